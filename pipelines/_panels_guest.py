"""Sets of panels with pipelines of diffusers: FLUX and Stable Diffusion 3, by their own loops and what these let a caller do.

Noise is handed to them and known latents are put back by their callback; SDEdit is their own picture-to-picture pipeline. A
time for each token is none of their networks' arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines import autoencoder
from pipelines.denoising import Callback, check_choice
from pipelines.layout import Layout
from pipelines.panels import OUTPUTS, Held, PanelsOutput, Plan, check_caption, plan
from pipelines.request import RequestError

PACKED = ("FluxPipeline",)
PLAIN = ("StableDiffusion3Pipeline",)


def guest_refused(pipeline: Any) -> str | None:
    """Return in words why panels cannot be made with a pipeline, or None."""
    name = type(pipeline).__name__
    if name in (*PACKED, *PLAIN):
        return None
    known = ", ".join(("TextToImagePipeline", *PACKED, *PLAIN))
    return f"sets of panels are made with {known}; where the tokens of {name} lie is not known"


class GuestPanels:
    """A pipeline of diffusers that makes sets; everything but the call is that pipeline's."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def __getattr__(self, name: str) -> Any:
        if name == "pipeline":  # while it is being made or copied
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler, which can be set."""
        return self.pipeline.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.pipeline.scheduler = scheduler

    @property
    def packed(self) -> bool:
        """Whether latents are rows of tokens, 2 x 2 latent pixels each."""
        return type(self.pipeline).__name__ in PACKED

    @property
    def multiple(self) -> int:
        """What sides must divide by, in px."""
        patch = 2 if self.packed else int(self.pipeline.transformer.config.patch_size)
        return int(self.pipeline.vae_scale_factor) * patch

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        panels: int | None = None,
        layout: str | Layout = "grid",
        gutter: int = 0,
        about: str = "",
        marks: str = "image",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        known: Mapping[int, Any] | None = None,
        image: Any = None,
        way: str = "re-inject",
        strength: float = 0.9,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        return_dict: bool = True,
        **more: Any,
    ) -> PanelsOutput | tuple[Any]:
        """Make one set. Arguments are those of `pipelines.panels.PanelsPipeline`; `more` are the pipeline's own.

        Raises:
            RequestError: captions, sizes, panels or choices that do not fit each other or this model.
        """
        check_choice("output_type", output_type, OUTPUTS)
        if way == "clean-tokens" and (known or image is not None):
            name = type(self.pipeline.transformer).__name__
            raise RequestError("way", way, f"re-inject or sdedit: {name} takes one time for all its tokens")
        own = self._own_side()
        found = plan(
            prompt, own if height is None else height, own if width is None else width, panels=panels, layout=layout,
            gutter=gutter, about=about, marks=marks, known=known, image=image, way=way,
        )  # fmt: skip
        config = self.pipeline.transformer.config
        found.layout.check(self.multiple, side=config.get("pos_embed_max_size"))
        check_caption(
            self.pipeline, found.joint, more.get("max_sequence_length", 512 if self.packed else 256)
        )
        given: dict[str, Any] = {
            "prompt": found.joint, "negative_prompt": negative_prompt, "guidance_scale": guidance_scale,
            "height": found.layout.canvas[0], "width": found.layout.canvas[1], "num_inference_steps": num_inference_steps,
            "output_type": "latent",
        }  # fmt: skip
        given = {name: value for name, value in given.items() if value is not None} | more
        generator = torch.Generator("cpu") if generator is None else generator
        if found.known and way == "sdedit":
            latents = self._from_canvas(found, given, generator, strength, callback_on_step_end)
        else:
            latents = self._from_noise(found, given, generator, callback_on_step_end)
        images = [] if latents is None else self._apart(found, latents, output_type)
        self.pipeline.maybe_free_model_hooks()
        return PanelsOutput(images=images, record=found.record()) if return_dict else (images,)

    def _own_side(self) -> int:
        side = self.pipeline.default_sample_size
        return int(side) * int(self.pipeline.vae_scale_factor)

    def _from_noise(
        self, found: Plan, given: dict[str, Any], generator: torch.Generator, callback: Callback | None
    ) -> Tensor | None:
        pipe, device = self.pipeline, self.pipeline._execution_device
        canvas = found.layout.divided(int(pipe.vae_scale_factor)).canvas
        channels = int(pipe.transformer.config.in_channels) // (4 if self.packed else 1)
        noise = torch.randn(1, channels, *canvas, generator=generator).to(device)
        held = self._holding(found, noise) if found.known else None

        def restored(inner: Any, index: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if held is not None:
                latents = tensors["latents"]
                put = held.restored(self._plain(latents.float(), found.layout), inner.scheduler, index + 1)
                tensors = tensors | {"latents": self._rows(put).to(latents.dtype)}
            return tensors | ((callback(inner, index, time, tensors) if callback is not None else None) or {})

        start = self._rows(noise).to(pipe.transformer.dtype)
        latents = pipe(latents=start, generator=generator, callback_on_step_end=restored, **given).images
        return None if pipe.interrupt else self._plain(latents.float(), found.layout)

    def _from_canvas(
        self,
        found: Plan,
        given: dict[str, Any],
        generator: torch.Generator,
        strength: float,
        callback: Callback | None,
    ) -> Tensor | None:
        from diffusers import AutoPipelineForImage2Image

        if not 0 < strength <= 1:
            raise RequestError("strength", strength, "above 0 and at most 1")
        pipe = AutoPipelineForImage2Image.from_pipe(self.pipeline)
        pipe._progress_bar_config = getattr(self.pipeline, "_progress_bar_config", {})
        told = {} if callback is None else {"callback_on_step_end": callback}
        latents = pipe(image=found.canvas(), strength=strength, generator=generator, **told, **given).images
        return None if pipe.interrupt else self._plain(latents.float(), found.layout)

    @torch.no_grad()
    def _panel_latents(self, found: Plan) -> dict[int, Tensor]:
        device = self.pipeline._execution_device
        return {
            i: autoencoder.encode(self.pipeline.vae, one.unsqueeze(0).to(device) * 2 - 1).float()
            for i, one in found.known.items()
        }

    def _holding(self, found: Plan, noise: Tensor) -> Held:
        layout, clean = found.layout.divided(int(self.pipeline.vae_scale_factor)), torch.zeros_like(noise)
        for place, latents in self._panel_latents(found).items():
            clean[0][(slice(None), *layout.boxes()[place])] = latents[0]
        places = list(found.known)
        tokens = found.layout.divided(self.multiple).mask(places).flatten()
        return Held(clean, noise, layout.mask(places).to(noise.device), tokens.to(noise.device), "re-inject")

    @torch.no_grad()
    def _apart(self, found: Plan, latents: Tensor, output_type: str) -> Any:
        each = found.layout.divided(int(self.pipeline.vae_scale_factor)).cut(latents)[0].clone()
        for place, clean in self._panel_latents(found).items():
            each[place] = clean[0]
        if output_type == "latent":
            return each
        made = autoencoder.decode(
            self.pipeline.vae, each
        ).float()  # as pictures of one batch: no seam is seen
        return found.shown((made / 2 + 0.5).clamp(0, 1), output_type)

    def _rows(self, latents: Tensor) -> Tensor:
        """[1, C, H, W] -> the pipeline's own form."""
        if not self.packed:
            return latents
        b, c, h, w = latents.shape
        packed: Tensor = self.pipeline._pack_latents(latents, b, c, h, w)
        return packed

    def _plain(self, latents: Tensor, layout: Layout) -> Tensor:
        """The pipeline's own form -> [1, C, H, W]."""
        if not self.packed:
            return latents
        height, width = layout.canvas
        plain: Tensor = self.pipeline._unpack_latents(
            latents, height, width, int(self.pipeline.vae_scale_factor)
        )
        return plain
