"""How a request is said to a pipeline: the arguments its `__call__` takes, ours or one of diffusers', and what comes back."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from pipelines.catalog import Card
from pipelines.clip_calls import clip_arguments
from pipelines.inputs import NOTHING, Inputs
from pipelines.panel_sets import panel_arguments
from pipelines.request import Request, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image


def takes(pipeline: Any, *names: str) -> bool:
    """Whether the pipeline's call takes all these arguments."""
    return all(name in _parameters(pipeline) for name in names)


def default_of(pipeline: Any, name: str) -> Any:
    """Return the pipeline's own default of an argument, or None."""
    parameter = _parameters(pipeline).get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def arguments(
    pipeline: Any, request: Request, card: Card, image: Image | None, inputs: Inputs = NOTHING
) -> dict[str, Any]:
    """Return the keyword arguments that make the one picture of `request`, for `perform`.

    Raises:
        RequestError: a field that this pipeline has no use for.
    """
    import torch

    wanted = _plain(request, card) | _guidance(pipeline, request, card)
    if image is not None:
        wanted |= {"image": image}
        if card.task != "text-to-video" or takes(pipeline, "strength"):  # a clip's first frame is kept as it is
            wanted |= {"strength": request.strength}
        if request.width is None and request.height is None and not takes(pipeline, "guidance_mode"):
            wanted |= _fitted(image, card.multiple)
    wanted |= panel_arguments(request)
    if card.task == "text-to-video":
        wanted |= clip_arguments(pipeline, request, card, inputs)
    windows = ("window", "overlap") if "overlap" in wanted else ()  # of a long clip; no pipeline's own
    for name, value in wanted.items():
        if value is not None and name not in windows and not takes(pipeline, name):
            field = {
                "num_inference_steps": "steps",
                "guidance_scale": "guidance",
                "num_frames": "frames",
                "video": "clip",
                "given": "clip",
                "frame_rate": "fps",
            }.get(name, name)
            raise RequestError(field, value, f"left out: {type(pipeline).__name__} does not take it")
    given = {name: value for name, value in wanted.items() if value is not None}
    if takes(pipeline, "seeds"):
        given = {"seeds": [request.seed], "guidance_mode": request.guidance_mode} | given
    else:
        given["generator"] = torch.Generator("cpu").manual_seed(request.seed)
    if takes(pipeline, "use_resolution_binning"):
        given["use_resolution_binning"] = request.width is None and request.height is None
    if takes(pipeline, "clean_caption"):
        given["clean_caption"] = False
    return given | {"output_type": "np"}


def perform(pipeline: Any, given: dict[str, Any]) -> Any:
    """Call a pipeline with what `arguments` returned; of a long clip once for each window."""
    if "overlap" in given:
        from pipelines.long_clips import long_clip

        return long_clip(pipeline, **given)
    return pipeline(**given)


def runs_of(pipeline: Any, given: dict[str, Any]) -> int:
    """Return how often the denoising loop runs: once, or for each window of a clip or further scene of a story."""
    if "overlap" in given:
        from pipelines.long_clips import layout

        return len(layout(pipeline, **given))
    if takes(pipeline, "scene_frames"):
        from pipelines.story_to_video import runs_of as runs_of_story

        return runs_of_story(pipeline, given)
    return 1


def finished(output: Any) -> tuple[list[Image], list[str]]:
    """Return the frames of the one picture or clip in a pipeline's output, and what is wrong with them."""
    import numpy as np

    from pipelines.denoising import pictures

    found = getattr(output, "images", None)
    if found is None:
        found = getattr(output, "frames", None)
    if found is None:
        raise RequestError("model", type(output).__name__, "a pipeline whose output has images or frames")
    array = np.asarray(found, dtype=np.float32)
    array = array[0] if array.ndim == 5 else array
    failures = []
    if not np.isfinite(array).all():
        failures.append("the picture contains NaN: it is not what the model would draw")
    elif float(array.max() - array.min()) < 1 / 255:
        failures.append("the picture is one colour all over")
    return pictures(array), failures


def _plain(request: Request, card: Card) -> dict[str, Any]:
    return {
        "prompt": None if card.takes_class or request.prompts is not None else request.prompt,
        "class_labels": [request.class_label] if card.takes_class else None,
        "width": request.width or card.width,
        "height": request.height or card.height,
        "num_frames": request.frames if card.task == "text-to-video" else None,
        "num_inference_steps": request.steps or card.steps,
    }


def _guidance(pipeline: Any, request: Request, card: Card) -> dict[str, Any]:
    guidance = card.guidance if request.guidance is None else request.guidance
    found: dict[str, Any] = {"guidance_scale": guidance, "negative_prompt": request.negative_prompt or None}
    if request.negative_prompt and takes(pipeline, "true_cfg_scale"):
        # FLUX and its kin: guidance_scale is an input of the distilled network, a negative prompt acts by true_cfg_scale.
        found |= {"guidance_scale": None, "true_cfg_scale": 4.0 if guidance is None else guidance}
    return found


def _fitted(image: Image, multiple: int) -> dict[str, int]:
    """Return the size of a starting picture, cut down to what the model can make."""
    return {
        name: max(multiple, side // multiple * multiple)
        for name, side in (("width", image.width), ("height", image.height))
    }


def _parameters(pipeline: Any) -> Any:
    return inspect.signature(type(pipeline).__call__).parameters
