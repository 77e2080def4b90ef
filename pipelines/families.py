"""diffusers' families of video models behind our door: which frame counts they make, and which pipeline takes a picture or clip.

Paper: Wan (arXiv:2503.20314), HunyuanVideo (arXiv:2412.03603), CogVideoX (arXiv:2408.06072), LTX-Video (arXiv:2501.00103).
Differs: a frame count that a model's autoencoder cannot make is rounded to the nearest that it can, and the report says so.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from pipelines.catalog import Card, read_config
from pipelines.inputs import Inputs
from pipelines.request import Request, RequestError

FPS = {
    "Wan": 16.0,
    "HunyuanVideo": 15.0,
    "CogVideoX": 8.0,
    "LTX": 25.0,
    "Mochi": 30.0,
    "Allegro": 15.0,
    "Latte": 8.0,
}
"""Frames a second that the families were made for, by the start of a pipeline's name."""
_RATIOS = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
OWN = ("TextToVideoPipeline", "StoryToVideoPipeline")
"""Our own pipelines of clips."""
FROM_PICTURE = "AutoPipelineForImage2Image"
"""Stands for whichever pipeline diffusers has that starts from a picture; it has none for clips."""
_RATIO_KEYS = ("scale_factor_temporal", "temporal_compression_ratio")


def frame_ratio(pipeline: Any) -> int:
    """Return how many frames one latent frame stands for; a pipeline makes `ratio` n + 1 frames."""
    for name in _RATIOS:
        if isinstance(getattr(pipeline, name, None), int):
            return int(getattr(pipeline, name))
    return ratio_in(getattr(getattr(pipeline, "vae", None), "config", None) or {})


def ratio_in(vae: Mapping[str, Any]) -> int:
    """Return how many frames one latent frame stands for, by an autoencoder's config."""
    if isinstance(vae.get("spatio_temporal_scaling"), list | tuple):  # LTX-Video
        return int(vae.get("patch_size_t") or 1) * 2 ** sum(map(bool, vae["spatio_temporal_scaling"]))
    return next((int(vae[key]) for key in _RATIO_KEYS if isinstance(vae.get(key), int)), 1)


def legal_frames(pipeline: Any, frames: int) -> int:
    """Return the count nearest to `frames` that the pipeline can make: `ratio` n + 1, of whole patches in time."""
    ratio = frame_ratio(pipeline)
    transformer = getattr(pipeline, "transformer", None)
    config = getattr(transformer, "config", None) or {}
    patch = config.get("patch_size_t") or 1
    if not isinstance(patch, int) or patch == 1:
        return max(0, round((frames - 1) / ratio)) * ratio + 1
    # CogVideoX 1.5 cuts latent frames in pairs and pads by itself; whole patches leave nothing to pad
    count = max(1, round(((frames - 1) / ratio + 1) / patch))
    return (count * patch - 1) * ratio + 1


@dataclasses.dataclass(frozen=True, slots=True)
class Face:
    """What decides which other pipeline a family turns into, known of a folder and of a loaded pipeline alike.

    Attributes:
        name: of the pipeline's class. defaults: of its call's arguments, None where they have none.
        hears_pictures: a network made for a first frame: more channels in than out, or frames with times of their own.
        shifts: a scheduler with `use_dynamic_shifting`, by which LTX-Video before 0.9.5 is known.
    """

    name: str
    defaults: Mapping[str, Any]
    hears_pictures: bool
    shifts: bool

    @classmethod
    def of(cls, pipeline: Any) -> Face:
        """Return that of a loaded pipeline."""
        parts = (getattr(getattr(pipeline, name, None), "config", {}) for name in ("transformer", "scheduler"))
        return cls._read(type(pipeline), getattr(pipeline, "config", {}), *parts)

    @classmethod
    def in_folder(cls, folder: Path) -> Face | None:
        """Return that of a folder, by its configs alone; None where its pipeline is not one of diffusers'."""
        import diffusers

        index = read_config(folder / "model_index.json")
        kind = getattr(diffusers, str(index.get("_class_name")), None)
        if kind is None:
            return None
        files = ("transformer/config.json", "scheduler/scheduler_config.json")
        return cls._read(kind, index, *(read_config(folder / name) for name in files))

    @classmethod
    def _read(cls, kind: type, index: Mapping[str, Any], network: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Face:
        comes, goes = (network.get(name) for name in ("in_channels", "out_channels"))
        wider = isinstance(comes, int) and isinstance(goes, int) and comes > goes
        told = inspect.signature(kind.__call__).parameters
        defaults = {name: None if one.default is one.empty else one.default for name, one in told.items()}
        frames = bool(index.get("expand_timesteps"))
        return cls(kind.__name__, defaults, frames or wider, bool(scheduler.get("use_dynamic_shifting")))

    @property
    def takes(self) -> Set[str]:
        """The names of its call's arguments."""
        return self.defaults.keys()


def check_family(request: Request, card: Card, folder: Path) -> None:
    """Check that a family of clips can start from what is given, before its weights load. Raises: RequestError."""
    face = Face.in_folder(folder) if card.task == "text-to-video" and card.pipeline not in OWN else None
    if face is not None and turned(face, request) == FROM_PICTURE:
        raise _no_picture(request)


def turned(face: Face, request: Request) -> str:
    """Return the name of the pipeline for what is given: the same one where it takes that, or `FROM_PICTURE`.

    Raises:
        RequestError: a family that has no pipeline for it, or needs other weights.
    """
    name = face.name
    if request.clip is not None:
        if face.takes & {"given_latents", "scene_frames", "video"}:
            return name
        other = {
            "LTXPipeline": "LTXConditionPipeline", "WanPipeline": "WanVideoToVideoPipeline",
            "CogVideoXPipeline": "CogVideoXVideoToVideoPipeline",
        }.get(name)  # fmt: skip
        if other is None:
            raise RequestError("clip", request.clip, f"left out: {name} cannot start from a clip")
        _check_ltx(face, "clip", request.clip)
        return other
    if request.last_image is not None and "last_image" not in face.takes:
        if name in ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"):
            _check_ltx(face, "last_image", request.last_image)
            return "LTXConditionPipeline"
        if name != "WanPipeline" or not face.hears_pictures:
            raise RequestError("last_image", request.last_image, f"left out: {name} takes no last picture")
        if request.image is None:
            raise RequestError("image", None, "given with a last picture")
    if request.image is None or face.takes >= {"image", "strength"} or face.takes >= {"image", "num_frames"}:
        return name
    if name == "LTXPipeline":
        return "LTXImageToVideoPipeline"
    if name == "WanPipeline" and face.hears_pictures:
        return "WanImageToVideoPipeline"
    return FROM_PICTURE


def variant(pipeline: Any, request: Request, inputs: Inputs) -> Any:
    """Return the pipeline for what is given, with the same parts; `pipeline` itself where it takes that.

    Raises:
        RequestError: a family that has no pipeline for it, or needs other weights.
    """
    from pipelines._inpainting import variant as filling

    if request.panels is not None:
        from pipelines.panels import panels_of

        return panels_of(pipeline)
    if inputs.inpainting is not None:
        return filling(pipeline, request)
    name = turned(Face.of(pipeline), request)
    if name == FROM_PICTURE:
        return _from_image(pipeline, request)
    return pipeline if name == type(pipeline).__name__ else _turned(pipeline, name)


def _check_ltx(face: Face, field: str, given: str | None) -> None:
    if face.name.startswith("LTX") and face.shifts:
        raise RequestError(
            field,
            given,
            "left out: only LTX-Video 0.9.5 and later goes on from frames, and this one is older",
        )


def _turned(pipeline: Any, name: str) -> Any:
    import diffusers

    return _quiet(getattr(diffusers, name).from_pipe(pipeline))


def _from_image(pipeline: Any, request: Request) -> Any:
    from diffusers import AutoPipelineForImage2Image

    try:
        return _quiet(AutoPipelineForImage2Image.from_pipe(pipeline))
    except (ValueError, AttributeError):
        raise _no_picture(request) from None


def _no_picture(request: Request) -> RequestError:
    return RequestError("image", request.image, f"left out: {request.model} cannot start from a picture")


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)  # progress goes out by `on_step` alone
    return pipeline


def fps_of(pipeline: Any, request: Request, card: Card, inputs: Inputs) -> float:
    """Return the frames a second of a clip: those asked for, else of the given clip, the card, the family; else 16."""
    from pipelines.video_files import FPS as PLAIN

    own = card.more.get("fps")
    family = next((fps for start, fps in FPS.items() if type(pipeline).__name__.startswith(start)), PLAIN)
    return float(request.fps or inputs.fps or (own if isinstance(own, int | float) else family))
