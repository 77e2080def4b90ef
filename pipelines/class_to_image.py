"""Pictures of a class with a DiT: a diffusers pipeline with a seed for each picture.

Paper: Scalable Diffusion Models with Transformers, Peebles and Xie 2023, arXiv:2212.09748; SiT, Ma et al. 2024,
arXiv:2401.08740.
Differs: guidance acts on every latent channel (the paper's sampler guides three of four); see also `pipelines.denoising`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from pipelines.denoising import Callback, GuidedPipeline, Inputs, check_choice, make_loadable
from pipelines.request import GUIDANCE_MODES, RequestError

make_loadable("dit.backbones.dit", "dit.backbones.dig", "dit.codec")


class ClassToImagePipeline(GuidedPipeline):
    """Make pictures of a class; `vae` is one of diffusers' autoencoders, `codec` one of ours, neither means pixels."""

    model_cpu_offload_seq = "transformer->codec->vae"
    _optional_components: ClassVar[list[str]] = ["codec", "vae"]

    def __init__(self, transformer: Any, scheduler: Any, codec: Any = None, vae: Any = None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, codec=codec, vae=vae)

    @property
    def classes(self) -> int:
        """How many classes there are; this number itself stands for "no class"."""
        config = self.transformer.config
        return int(config.get("num_classes") or config.get("num_embeds_ada_norm"))

    def _branches(self, labels: Sequence[int]) -> dict[str, Inputs]:
        cond = torch.as_tensor(labels, dtype=torch.long, device=self._execution_device)
        if self.do_classifier_free_guidance:
            return {
                "uncond": {"class_labels": torch.full_like(cond, self.classes)},
                "cond": {"class_labels": cond},
            }
        return {"cond": {"class_labels": cond}}

    def __call__(
        self,
        class_labels: int | Sequence[int],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        image: Any = None,
        strength: float = 0.7,
        guidance_mode: str = "batched",
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make one picture for each class number; the other arguments are those of `TextToImagePipeline`.

        Raises:
            RequestError: a class there is not, or sizes, seeds or choices that do not fit this model.
        """
        labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
        for label in labels:
            if not 0 <= label < self.classes:
                raise RequestError("class_label", label, f"a class number from 0 to {self.classes - 1}")
        check_choice("guidance_mode", guidance_mode, GUIDANCE_MODES)
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        height, width = self._size(height, width)
        generators = self._generators(len(labels), seeds, generator)
        if guidance_scale != 1 and self.transformer.config.get("null_class") is False:
            raise RequestError(
                "guidance", guidance_scale, '1: this model was trained without a class for "none"'
            )
        self._guidance_scale = float(guidance_scale)
        begin = self._timesteps(num_inference_steps, strength, image is not None)
        shape = (self.latent_channels, height // self.scale_factor, width // self.scale_factor)
        latents = self._start(shape, generators, image, begin)
        branches = self._branches(labels)
        done = self._denoise(latents, begin, branches, generators, callback_on_step_end, guidance_mode)
        images = [] if done is None else self._decoded(done, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
