"""diffusers' families of video models behind our door: which frame counts they make, and which pipeline takes a picture or clip.

Paper: Wan (arXiv:2503.20314), HunyuanVideo (arXiv:2412.03603), CogVideoX (arXiv:2408.06072), LTX-Video (arXiv:2501.00103).
Differs: a frame count that a model's autoencoder cannot make is rounded to the nearest that it can, and the report says so.
"""

from __future__ import annotations

from typing import Any

from pipelines.catalog import Card
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
_RATIO_KEYS = ("scale_factor_temporal", "temporal_compression_ratio")


def frame_ratio(pipeline: Any) -> int:
    """Return how many frames one latent frame stands for; a pipeline makes `ratio` n + 1 frames."""
    for name in _RATIOS:
        if isinstance(getattr(pipeline, name, None), int):
            return int(getattr(pipeline, name))
    config = getattr(getattr(pipeline, "vae", None), "config", None) or {}
    return next((int(config[key]) for key in _RATIO_KEYS if isinstance(config.get(key), int)), 1)


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


def variant(pipeline: Any, request: Request, inputs: Inputs) -> Any:
    """Return the pipeline for what is given, with the same parts; `pipeline` itself where it takes that.

    Raises:
        RequestError: a family that has no pipeline for it, or needs other weights.
    """
    from pipelines._inpainting import variant as filling
    from pipelines.calls import takes

    if request.panels is not None:
        from pipelines.panels import panels_of

        return panels_of(pipeline)
    name = type(pipeline).__name__
    if inputs.inpainting is not None:
        return filling(pipeline, request)
    if inputs.clip:
        if takes(pipeline, "given_latents") or takes(pipeline, "scene_frames") or takes(pipeline, "video"):
            return pipeline
        other = {
            "LTXPipeline": "LTXConditionPipeline", "WanPipeline": "WanVideoToVideoPipeline",
            "CogVideoXPipeline": "CogVideoXVideoToVideoPipeline",
        }.get(name)  # fmt: skip
        if other is None:
            raise RequestError("clip", request.clip, f"left out: {name} cannot start from a clip")
        _check_ltx(pipeline, "clip", request.clip)
        return _turned(pipeline, other)
    if inputs.last_image is not None and not takes(pipeline, "last_image"):
        if name in ("LTXPipeline", "LTXImageToVideoPipeline"):
            _check_ltx(pipeline, "last_image", request.last_image)
            return _turned(pipeline, "LTXConditionPipeline")
        if name != "WanPipeline" or not _hears_pictures(pipeline):
            raise RequestError("last_image", request.last_image, f"left out: {name} takes no last picture")
    if inputs.image is None or takes(pipeline, "image", "strength") or takes(pipeline, "image", "num_frames"):
        return pipeline
    if name == "LTXPipeline":
        return _turned(pipeline, "LTXImageToVideoPipeline")
    if name == "WanPipeline" and _hears_pictures(pipeline):
        return _turned(pipeline, "WanImageToVideoPipeline")
    return _from_image(pipeline, request)


def _hears_pictures(pipeline: Any) -> bool:
    """Whether a Wan transformer was made for a first frame: more channels in than out, or frames with times of their own."""
    config = pipeline.transformer.config
    return bool(pipeline.config.get("expand_timesteps")) or config.in_channels > config.out_channels


def _check_ltx(pipeline: Any, field: str, given: str | None) -> None:
    if type(pipeline).__name__.startswith("LTX") and pipeline.scheduler.config.get("use_dynamic_shifting"):
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
        raise RequestError(
            "image", request.image, f"left out: {request.model} cannot start from a picture"
        ) from None


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)  # progress goes out by `on_step` alone
    return pipeline


def fps_of(pipeline: Any, request: Request, card: Card, inputs: Inputs) -> float:
    """Return the frames a second of a clip: those asked for, else of the given clip, the card, the family; else 16."""
    from pipelines.video_files import FPS as PLAIN

    own = card.more.get("fps")
    family = next((fps for start, fps in FPS.items() if type(pipeline).__name__.startswith(start)), PLAIN)
    return float(request.fps or inputs.fps or (own if isinstance(own, int | float) else family))
