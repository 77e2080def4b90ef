"""Pictures from prompts with an MMDiT or E-MMDiT: a diffusers pipeline with a seed for each picture.

Paper: Scaling Rectified Flow Transformers, Esser et al. 2024, arXiv:2403.03206; SDEdit (image to image by strength), Meng et
al. 2021, arXiv:2108.01073.
Differs: see `pipelines.denoising`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from dit import text as prompts
from pipelines.denoising import Callback, GuidedPipeline, Inputs, check_choice, make_loadable
from pipelines.request import GUIDANCE_MODES, RequestError
from pipelines.safe import check_weights

MINILM = "all-MiniLM-L6-v2"
TEXT_PADDINGS = ("masked", "heard")

make_loadable("dit.backbones.mmdit", "dit.backbones.ptdit", "dit.backbones.emmdit", "dit.codec")


# Sana's mixin is diffusers' plainest set of LoRA methods for a pipeline with a transformer alone.
class TextToImagePipeline(GuidedPipeline, SanaLoraLoaderMixin):
    """Make pictures from prompts.

    Args:
        transformer, scheduler: the network and a flow-matching scheduler.
        text_encoder, tokenizer: the prompt encoder, saved with the pipeline; or
        text_model: "all-MiniLM-L6-v2", found where it is installed (`dit.text.find_minilm`) and never saved along.
        codec, vae: between pictures and latents, one of ours or one of diffusers' autoencoders; neither for pixels.
        text_length: most tokens of a prompt; what is longer is cut, and `prompt_lengths` tells it.
        text_padding: "masked" pads prompts to the longest and masks the padding; "heard" pads all to `text_length` with the end
            mark and masks nothing, as networks behind a language model (any decoder-only one) were trained.
    """

    model_cpu_offload_seq = "text_encoder->transformer->codec->vae"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "tokenizer", "codec", "vae"]

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        text_encoder: Any = None,
        tokenizer: Any = None,
        codec: Any = None,
        vae: Any = None,
        text_model: str | None = None,
        text_length: int = 64,
        text_padding: str = "masked",
    ) -> None:
        super().__init__()
        check_choice("text_padding", text_padding, TEXT_PADDINGS)
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            codec=codec,
            vae=vae,
        )
        self.register_to_config(text_model=text_model, text_length=text_length, text_padding=text_padding)
        self.prompt_lengths: tuple[int, ...] = ()
        if text_encoder is None and text_model is not None:
            if text_model != MINILM:
                raise ValueError(f"text_model must be {MINILM!r}, got {text_model!r}")
            # Set past the config, where both stay None: so they move with the pipeline and are not saved with it.
            self.__dict__["tokenizer"], self.__dict__["text_encoder"] = prompts.load_minilm(transformer.dtype)

    @torch.no_grad()
    def encode_prompt(self, texts: Sequence[str]) -> prompts.Prompt:
        """Encode prompts: tokens [B, L, Dt], mask [B, L], pooled [B, Dp]."""
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "this pipeline has no text encoder; load it with text_encoder and tokenizer, or text_model"
            )
        length = self.config.text_length
        if self.config.text_padding == "heard":
            found = prompts.encode_padded(self.tokenizer, self.text_encoder, texts, length=length)
        else:
            found = prompts.encode(self.tokenizer, self.text_encoder, texts, limit=length)
        self.prompt_lengths = found.counts
        return found

    def _branches(self, texts: list[str], negatives: list[str]) -> dict[str, Inputs]:
        count = len(texts)
        found = self.encode_prompt([*negatives, *texts] if self.do_classifier_free_guidance else texts)
        inputs = {"encoder_hidden_states": found.tokens}
        if self.config.text_padding == "masked":
            inputs["encoder_attention_mask"] = found.mask
        if self.transformer.config.get("pooled_dim"):
            inputs["pooled_projections"] = found.pooled
        device = self._execution_device  # asks every component, each time
        inputs = {name: value.to(device) for name, value in inputs.items()}
        if not self.do_classifier_free_guidance:
            return {"cond": inputs}
        return {
            "uncond": {name: value[:count] for name, value in inputs.items()},
            "cond": {name: value[count:] for name, value in inputs.items()},
        }

    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
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
        """Make one picture for each prompt.

        Args:
            seeds: one for each prompt; or `generator`, on the processor; or neither, for seeds drawn from torch.
            image: a picture (or one for each prompt) to start from; `strength`, a fraction, says how far to go from it.
            guidance_scale: 1 evaluates the prompt alone; guidance_mode: both branches in one call, or one after the other.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called as callback(pipeline, index, timestep, {"latents"}) after every evaluation; it may set
                `pipeline._interrupt`, and then the output holds no pictures.

        Raises:
            RequestError: sizes, seeds or choices that do not fit this model.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = _negatives(negative_prompt, len(texts))
        check_choice("guidance_mode", guidance_mode, GUIDANCE_MODES)
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        height, width = self._size(height, width)
        generators = self._generators(len(texts), seeds, generator)
        self._guidance_scale = float(guidance_scale)
        begin = self._timesteps(num_inference_steps, strength, image is not None)
        branches = self._branches(texts, negatives)
        shape = (self.latent_channels, height // self.scale_factor, width // self.scale_factor)
        latents = self._start(shape, generators, image, begin)
        done = self._denoise(latents, begin, branches, generators, callback_on_step_end, guidance_mode)
        images = [] if done is None else self._decoded(done, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def load_lora_weights(self, weights: Any, adapter_name: str | None = None, **kwargs: Any) -> None:
        """Load a LoRA for the transformer: a state dict, a safetensors file, or a folder or hub id of one; never a pickle."""
        from pathlib import Path

        if not isinstance(weights, dict) and Path(weights).is_file():
            check_weights(Path(weights))
        super().load_lora_weights(weights, adapter_name=adapter_name, **(kwargs | {"use_safetensors": True}))


def _negatives(negative: str | list[str] | None, count: int) -> list[str]:
    found = [negative or ""] * count if negative is None or isinstance(negative, str) else list(negative)
    if len(found) != count:
        raise RequestError("negative_prompt", len(found), f"one text, or one for each of the {count} prompts")
    return found
