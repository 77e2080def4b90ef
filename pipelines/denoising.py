"""The denoising loop that our pipelines share: noise for each picture, guidance in one call or two, steps, interruption.

Paper: Classifier-Free Diffusion Guidance, Ho and Salimans 2022, arXiv:2207.12598.
Differs: every picture draws all its noise from a generator of its own on the processor, in float32, so any picture of a
batch can be made again alone; latents stay float32 between the steps; an interrupted run returns no picture and never decodes.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from dit.model import Backbone
from dit.seams import announce
from pipelines import autoencoder
from pipelines.request import RequestError
from pipelines.schedulers import is_flow

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]
Inputs = dict[str, Tensor]
"""Keyword arguments of the transformer that differ between the guidance branches, [B, ...] each."""


def make_loadable(*modules: str) -> None:
    """Import modules whose models diffusers is to load from a folder.

    diffusers takes a component only from a module that was imported before, and knows it for a model by finding the
    name `ModelMixin` in that module.
    """
    for name in modules:
        vars(importlib.import_module(name)).setdefault("ModelMixin", ModelMixin)


class GuidedPipeline(DiffusionPipeline):
    """Base of the pipelines that guide: components are `transformer`, `scheduler` and perhaps `codec` or `vae`."""

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    _interrupt = False
    _guidance_scale = 1.0
    _num_timesteps = 0

    @property
    def interrupt(self) -> bool:
        """Whether the run is to stop before its next step."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        """The guidance of the run; 1 is none."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the run evaluates two branches."""
        return self._guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        """How many evaluations the run's scheduler makes."""
        return self._num_timesteps

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.transformer.config.in_channels)

    @property
    def scale_factor(self) -> int:
        """Picture pixels for one latent pixel."""
        codec = getattr(self, "codec", None)
        vae = getattr(self, "vae", None)
        if codec is not None:
            return int(codec.scale_factor)
        return 1 if vae is None else autoencoder.scale_of(vae)

    @property
    def multiple(self) -> int:
        """What width and height must divide by, in px."""
        patch = self.transformer.config.patch_size
        return self.scale_factor * int(patch[-1] if isinstance(patch, list | tuple) else patch)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        own = int(self.transformer.config.sample_size) * self.scale_factor
        size = {"height": own if height is None else height, "width": own if width is None else width}
        for name, side in size.items():
            if side < self.multiple or side % self.multiple:
                raise RequestError(name, side, f"a multiple of {self.multiple} px for this model")
        return size["height"], size["width"]

    def _generators(self, count: int, seeds: Sequence[int] | None, generator: Any) -> list[torch.Generator]:
        if seeds is not None and generator is not None:
            raise RequestError("generator", generator, "left out where seeds are given")
        if generator is None:
            chosen = torch.randint(2**31, (count,)).tolist() if seeds is None else list(seeds)
            generator = [torch.Generator("cpu").manual_seed(int(seed)) for seed in chosen]
        found = [generator] if isinstance(generator, torch.Generator) else list(generator)
        if len(found) != count:
            raise RequestError("seeds", len(found), f"one for each of the {count} pictures")
        return found

    def _timesteps(self, steps: int, strength: float, from_image: bool) -> int:
        """Set the scheduler to `steps`; return the index of the evaluation to begin with."""
        if not 1 <= steps <= 1000:
            raise RequestError("num_inference_steps", steps, "a whole number from 1 to 1000")
        self.scheduler.set_timesteps(steps, device=self._execution_device)
        begin = 0
        if from_image:
            if not 0 < strength <= 1:
                raise RequestError("strength", strength, "above 0 and at most 1")
            taken = min(steps, max(1, round(steps * strength)))
            begin = min((steps - taken) * self.scheduler.order, len(self.scheduler.timesteps) - 1)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        return begin

    def _start(
        self, shape: tuple[int, int, int], generators: list[torch.Generator], image: Any, begin: int
    ) -> Tensor:
        """Return the noise, or the noised starting picture, [B, C, H, W] in float32 on the device."""
        device = self._execution_device
        noise = torch.cat(
            [torch.randn(1, *shape, generator=one, dtype=torch.float32) for one in generators]
        ).to(device)
        flow, scheduler = is_flow(self.scheduler), self.scheduler
        if image is None:
            return noise if flow else noise * scheduler.init_noise_sigma
        clean = self._encoded(image, shape, len(generators))
        if flow:
            sigma = float(scheduler.sigmas[begin])
            return clean * (1 - sigma) + noise * sigma
        times = scheduler.timesteps[begin].to(device).expand(len(generators))
        noised: Tensor = scheduler.add_noise(clean, noise, times)
        return noised

    @torch.no_grad()
    def _encoded(self, image: Any, shape: tuple[int, int, int], count: int) -> Tensor:
        height, width = shape[1] * self.scale_factor, shape[2] * self.scale_factor
        pixels = VaeImageProcessor(vae_scale_factor=self.multiple).preprocess(
            image, height=height, width=width
        )
        pixels = pixels.to(self._execution_device, torch.float32)
        if pixels.shape[0] not in (1, count):
            raise RequestError(
                "image", pixels.shape[0], f"one picture, or one for each of the {count} prompts"
            )
        codec, vae = getattr(self, "codec", None), getattr(self, "vae", None)
        if codec is not None:
            latents = codec.encode(pixels.to(codec.dtype))
        elif vae is not None:
            latents = autoencoder.encode(vae, pixels)
        else:
            latents = pixels
        return latents.float().expand(count, -1, -1, -1)

    @torch.no_grad()
    def _denoise(
        self,
        latents: Tensor,
        begin: int,
        branches: dict[str, Inputs],
        generators: list[torch.Generator],
        callback: Callback | None,
        mode: str,
    ) -> Tensor | None:
        """Run the steps on `latents` [B, C, H, W]; None if the run was interrupted."""
        timesteps, order = self.scheduler.timesteps[begin:], self.scheduler.order
        self._interrupt, self._num_timesteps = False, len(timesteps)
        announce(self.transformer, steps=-(-len(timesteps) // order))
        extra = (
            {"generator": generators}
            if "generator" in inspect.signature(self.scheduler.step).parameters
            else {}
        )
        with self.progress_bar(total=len(timesteps)) as bar:
            for index, time in enumerate(timesteps):
                scaled = (
                    latents if is_flow(self.scheduler) else self.scheduler.scale_model_input(latents, time)
                )
                # A scheduler that evaluates twice asks for both evaluations in one step.
                predicted = self._guided(
                    scaled, self._time(begin + index, time), index // order, branches, mode
                )
                latents = self.scheduler.step(predicted, time, latents, **extra, return_dict=False)[0]
                if callback is not None:
                    latents = (callback(self, index, time, {"latents": latents}) or {}).get(
                        "latents", latents
                    )
                bar.update()
                if self._interrupt:
                    return None
        return latents

    def _time(self, index: int, time: Any) -> Tensor:
        # DPM++ and UniPC round the timesteps of a flow to whole numbers; the noise level itself is exact.
        if is_flow(self.scheduler):
            return torch.as_tensor(self.scheduler.sigmas[index] * self.scheduler.config.num_train_timesteps)
        return torch.as_tensor(time)

    def _guided(
        self, latents: Tensor, time: Tensor, step: int, branches: dict[str, Inputs], mode: str
    ) -> Tensor:
        if len(branches) == 1:
            ((name, inputs),) = branches.items()
            return self._shaped(self._predict(latents, time, step, name, inputs), None)
        if mode == "sequential":
            cond, uncond = (  # this order lets GuidanceSkip make the second from the first
                self._predict(latents, time, step, name, branches[name]) for name in ("cond", "uncond")
            )
        else:
            joined = {
                key: torch.cat([branches["uncond"][key], branches["cond"][key]]) for key in branches["cond"]
            }
            both = self._predict(torch.cat([latents, latents]), time, step, "uncond+cond", joined)
            uncond, cond = both.chunk(2)
        return self._shaped(cond, uncond)

    def _predict(self, latents: Tensor, time: Tensor, step: int, branch: str, inputs: Inputs) -> Tensor:
        """Call the transformer once: [B, C, H, W] -> [B, C or 2C, H, W] in float32."""
        announce(self.transformer, step=step, branch=branch)
        cached = getattr(self.transformer, "is_cache_enabled", False)
        with self.transformer.cache_context(branch) if cached else contextlib.nullcontext():
            # Our networks take float32 in any dtype: a velocity made of a rounded input would carry the rounding.
            own = isinstance(self.transformer, Backbone)
            output = self.transformer(
                hidden_states=latents if own else latents.to(self.transformer.dtype),
                timestep=self._times(time, latents),
                return_dict=False,
                **inputs,
            )[0]
        found: Tensor = output.float()
        return found

    def _times(self, time: Tensor, latents: Tensor) -> Tensor:
        """Return the time as the network takes it: one a sample [B]."""
        return time.to(latents.device).expand(latents.shape[0])

    def _shaped(self, cond: Tensor, uncond: Tensor | None) -> Tensor:
        """Guide the prediction; a learned variance is taken from the conditional branch, and only where it is used."""
        channels = self.latent_channels
        predicted, variance = cond[:, :channels], cond[:, channels:]
        if uncond is not None:
            free = uncond[:, :channels]
            predicted = free + self._guidance_scale * (predicted - free)
        learned = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        return torch.cat([predicted, variance], dim=1) if learned and variance.shape[1] else predicted

    @torch.no_grad()
    def _decoded(self, latents: Tensor, output_type: str) -> Any:
        """[B, C, H, W] -> pictures: "pil" a list, "np" [B, H, W, 3] in 0..1 (NaN kept), "pt" [B, 3, H, W], or "latent"."""
        if output_type == "latent":
            return latents
        codec, vae = getattr(self, "codec", None), getattr(self, "vae", None)
        if codec is not None:
            latents = codec.decode(latents.to(codec.dtype))
        elif vae is not None:
            latents = autoencoder.decode(vae, latents)
        pixels = (latents.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return pixels
        array = pixels.permute(0, 2, 3, 1).cpu().numpy()
        return array if output_type == "np" else pictures(array)


def pictures(array: np.ndarray) -> list[Image.Image]:
    """[B, H, W, 3] in 0..1 -> B pictures; NaN becomes black."""
    whole = np.rint(np.nan_to_num(array, nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1) * 255).astype(np.uint8)
    return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in whole]


def check_choice(field: str, given: str, allowed: Sequence[str]) -> None:
    """Raises: RequestError unless `given` is one of `allowed`."""
    if given not in allowed:
        raise RequestError(field, given, f"one of {', '.join(allowed)}")
