"""A small picture of what a running denoising step would end with: the estimate behind its noise, decoded at low resolution.

Paper: Denoising Diffusion Implicit Models, Song et al. 2020, arXiv:2010.02502 (equation 9, the clean estimate of a step).
Differs: the estimate is made beside the run, of copies, and draws no random number, so pixels are the same with and without it. It
may cost a fiftieth of the run's time at most; whatever fails or is not known of a model ends the previews, never the run.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SIDE = 32
"""Largest side of the latents that are decoded; larger ones are averaged down."""
WIDEST = 256
"""Largest side of a preview, in px."""
PAUSE = 0.4
"""Least time between two previews, in s."""
SHARE = 50
"""After a preview none follows before this many times what it took has gone by."""

OnPreview = Callable[["Image"], object]
"""Called with each preview, from the thread of the run."""


@contextlib.contextmanager
def previewing(pipeline: Any, given: dict[str, Any], on_preview: OnPreview | None) -> Iterator[None]:
    """Show the running estimate of a pipeline to `on_preview` while it denoises; None shows nothing and touches nothing.

    Args:
        given: the arguments that the pipeline is called with.
    """
    scheduler, decode = getattr(pipeline, "scheduler", None), None
    if on_preview is not None:
        decode = _decoder(pipeline, given)
    if on_preview is None or decode is None or scheduler is None:
        yield
        return
    from dit.seams import patched

    inner, painter = scheduler.step, _Painter(decode, on_preview)

    @functools.wraps(inner)  # pipelines look for arguments in the signature of a step
    def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        # with times of its own for every token a step goes up the output, not down (LTX-Video from frames)
        seen = -model_output if kwargs.get("per_token_timesteps") is not None else model_output
        painter.see(scheduler, seen, timestep, sample)
        return inner(model_output, timestep, sample, *args, **kwargs)

    with patched(scheduler, "step", step):
        yield


def estimated(scheduler: Any, output: Tensor, time_now: Any, sample: Tensor) -> Tensor | None:
    """Return the clean latents that a step of the network points to, in the shape of `sample`; None where that is not known."""
    from pipelines.schedulers import is_flow

    config = scheduler.config
    output = output[:, : sample.shape[1]].float()
    if output.shape != sample.shape:
        return None
    noisy, now = sample.float(), float(time_now)
    if is_flow(scheduler):
        return noisy - now / config.num_train_timesteps * output
    kind, alphas = config.get("prediction_type"), getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return None
    alpha = float(alphas[min(len(alphas) - 1, max(0, round(now)))])
    if float(scheduler.init_noise_sigma) > 1.001:  # this kind scales what the network sees, not what it keeps
        noisy = noisy * alpha**0.5
    if kind == "epsilon":
        return (noisy - (1 - alpha) ** 0.5 * output) / max(alpha, 1e-4) ** 0.5
    if kind == "v_prediction":
        return alpha**0.5 * noisy - (1 - alpha) ** 0.5 * output
    return output if kind == "sample" else None


def small(latents: Tensor) -> Tensor:
    """[B, C, H, W] or [B, C, F, H, W] -> [1, C, h, w] of the first picture or middle frame, h and w at most `SIDE`."""
    import torch

    one = latents[:1]
    one = one[:, :, one.shape[2] // 2] if one.dim() == 5 else one
    height, width = one.shape[-2:]
    share = min(1.0, SIDE / max(height, width))
    size = (max(1, round(height * share)), max(1, round(width * share)))
    return one if share == 1 else torch.nn.functional.adaptive_avg_pool2d(one, size)


class _Painter:
    """Paint when it is time to, and give up at the first failure."""

    def __init__(self, decode: Callable[[Tensor], Tensor], on_preview: OnPreview) -> None:
        self.decode, self.on_preview, self.due = decode, on_preview, time.monotonic() + PAUSE
        self.over = False

    def see(self, scheduler: Any, output: Any, time_now: Any, sample: Any) -> None:
        start = time.monotonic()
        if self.over or start < self.due:
            return
        import torch

        try:
            with torch.no_grad():
                found = estimated(scheduler, output, time_now, sample)
                picture = None if found is None else _picture(self.decode(found))
        except Exception:  # noqa: BLE001 - a preview is a courtesy: a run must not fail for it
            picture = None
        if picture is None:
            self.over = True
            return
        self.on_preview(picture)
        end = time.monotonic()
        self.due = end + max(PAUSE, SHARE * (end - start))


def _picture(pixels: Tensor) -> Image:
    """[1, 3, H, W] or [1, 3, 1, H, W] in about -1..1 -> a picture of at most `WIDEST` px."""
    from pipelines.denoising import pictures

    flat = pixels.float().reshape(1, pixels.shape[1], *pixels.shape[-2:])
    (made,) = pictures((flat / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy())
    made.thumbnail((WIDEST, WIDEST))
    return made


def _decoder(pipeline: Any, given: dict[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """Return what makes pixels of clean latents, by the decoder as it stands before anything takes hold of it; None without one."""
    codec, vae = getattr(pipeline, "codec", None), getattr(pipeline, "vae", None)
    if any(getattr(one, "_hf_hook", None) is not None for one in (codec, vae)):
        return (
            None  # it lies elsewhere until it is needed: to fetch it would cost more than a glance is worth
        )
    if codec is not None:
        return _plainly(codec, codec.decode)
    if vae is None:
        return small if type(pipeline).__module__.startswith("pipelines.") else None
    if not hasattr(vae, "decode") or not hasattr(vae, "config"):
        return None
    return _scaled(pipeline, given, vae, vae.decode)


def _plainly(codec: Any, decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda latents: decode(small(latents).to(codec.dtype))


def _scaled(
    pipeline: Any, given: dict[str, Any], vae: Any, decode: Callable[..., Any]
) -> Callable[[Tensor], Tensor]:
    import torch

    config = vae.config
    buffers = dict(vae.named_buffers(recurse=False)) if isinstance(vae, torch.nn.Module) else {}  # LTX-Video keeps them there
    mean, std = (config.get(name, buffers.get(name)) for name in ("latents_mean", "latents_std"))
    films = "3D" in type(vae).__name__ or any(
        word in type(vae).__name__ for word in ("Wan", "LTX", "Hunyuan", "Cog", "Mochi")
    )

    frames_first = type(pipeline).__name__.startswith("CogVideoX")

    def decoded(latents: Tensor) -> Tensor:
        if latents.dim() == 3:
            latents = _unpacked(pipeline, given, latents)
        elif frames_first:
            latents = latents.transpose(1, 2)
        one = small(latents).to(vae.dtype)
        if mean is not None and std is not None and len(mean) == one.shape[1]:
            shape = (1, -1, 1, 1)
            one = one * torch.as_tensor(std).to(one).view(shape) + torch.as_tensor(mean).to(one).view(shape)
        else:
            one = one / (config.get("scaling_factor") or 1.0) + (config.get("shift_factor") or 0.0)
        # LTX-Video's later decoders hear how much noise is left
        late = {"temb": torch.zeros(1).to(one)} if config.get("timestep_conditioning") else {}
        found: Tensor = decode(one.unsqueeze(2) if films else one, return_dict=False, **late)[0]
        return found[:, :, 0] if films else found

    return decoded


def _unpacked(pipeline: Any, given: dict[str, Any], latents: Tensor) -> Tensor:
    """[B, N, C] of FLUX and its kin -> [B, c, H, W], of LTX-Video -> [B, c, F, H, W], by the pipeline's own way."""
    if hasattr(pipeline, "transformer_temporal_patch_size"):
        from pipelines.calls import default_of

        frames, *sides = (given.get(name) or default_of(pipeline, name) for name in ("num_frames", "height", "width"))
        frames = (frames - 1) // pipeline.vae_temporal_compression_ratio + 1
        high, wide = (side // pipeline.vae_spatial_compression_ratio for side in sides)
        patch, patch_t = pipeline.transformer_spatial_patch_size, pipeline.transformer_temporal_patch_size
        made = latents[:, -(frames // patch_t) * (high // patch) * (wide // patch) :]  # behind frames that are given
        film: Tensor = pipeline._unpack_latents(made, frames, high, wide, patch, patch_t)
        return film
    square = {
        name: given.get(name) or pipeline.default_sample_size * pipeline.vae_scale_factor
        for name in ("height", "width")
    }
    found: Tensor = pipeline._unpack_latents(
        latents, square["height"], square["width"], pipeline.vae_scale_factor
    )
    return found
