"""A clip of several scenes from a list of captions with a Mask2DiT: scenes at once, then one after another past what was trained.

Paper: Mask^2DiT, Qi et al. 2025, arXiv:2503.19881.
Differs: any flow-matching or diffusion scheduler; scenes of different lengths; every scene draws its noise from a seed of its
own, so a story that is told on keeps the scenes it had; what came longest ago falls out of the network's view.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from torch import Tensor

from dit import text as prompts
from pipelines import autoencoder
from pipelines.clips import whole
from pipelines.denoising import Callback, Inputs, check_choice, make_loadable, pictures
from pipelines.request import GUIDANCE_MODES, RequestError
from pipelines.schedulers import is_flow
from pipelines.text_to_image import TextToImagePipeline

make_loadable("dit.backbones.mask2dit", "dit.codec")


@dataclass
class StoryOutput(BaseOutput):
    """A clip.

    Attributes:
        frames: "pil" [[picture, ...]], "np" [1, F, H, W, 3] and "pt" [1, F, 3, H, W] in 0..1, "latent" [1, C, F, H, W]; of an
            interrupted run an empty list.
        scene_frames: frames of each scene.
        latents: of all scenes [1, C, F, H, W]; None of an interrupted run.
    """

    frames: Any
    scene_frames: list[int]
    latents: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Window:
    """What the network sees in one run: given scenes [1, C, F, H, W] first, and frames and caption tokens of all scenes."""

    given: Tensor | None
    clean: int
    frames: list[int]
    texts: list[int]


class StoryToVideoPipeline(TextToImagePipeline):
    """Make clips of several scenes; components are those of `TextToImagePipeline`, the transformer is a Mask2DiT.

    The first scenes, as many as the network was trained with, are made together. Every further scene is made by itself behind
    the last ones, which are given to the network at time 0.
    """

    _view: _Window | None = None

    @property
    def frame_ratio(self) -> int:
        """Frames of the clip for one latent frame, save the first of a scene."""
        config = getattr(getattr(self, "vae", None), "config", None)
        return int(config.get("temporal_compression_ratio", 1)) if config is not None else 1

    def __call__(  # type: ignore[override]
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        scene_frames: int | Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        seeds: int | Sequence[int] | None = None,
        given: Sequence[Any] = (),
        window: int | None = None,
        guidance_mode: str = "batched",
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        return_dict: bool = True,
    ) -> StoryOutput | tuple[Any]:
        """Tell one story.

        Args:
            prompt: a caption a scene, as a list or as "one | two | three".
            scene_frames: frames of every scene, or of each; by default what the network was trained with.
            seeds: one a scene; or one for the first, from which the others count on; or none, for one drawn from torch.
            given: clips of the first scenes, each a list of pictures, [F, H, W, 3] or [F, 3, H, W] in 0..1; they come out as
                they are, their captions are the first ones, and `scene_frames` does not concern them.
            window: how many scenes the network sees at once; by default as many as it was trained with.
            guidance_scale, guidance_mode, output_type, callback_on_step_end: those of `TextToImagePipeline`. The callback sees
                the latents of the scenes in view, given ones too, and counts its steps through all runs.

        Raises:
            RequestError: captions, scenes, sizes, seeds or choices that do not fit each other or this model.
        """
        captions = split_story(prompt)
        if "scenes" not in self.transformer.config:
            raise RequestError(
                "transformer", type(self.transformer).__name__, "a network of scenes, Mask2DiT"
            )
        check_choice("guidance_mode", guidance_mode, GUIDANCE_MODES)
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        height, width = self._size(height, width)
        trained = int(self.transformer.config.scenes)
        window = trained if window is None else window
        if window < 1:
            raise RequestError("window", window, "at least 1 scene")
        if len(given) > len(captions):
            raise RequestError(
                "given", len(given), f"at most one clip for each of the {len(captions)} captions"
            )
        chosen = _seeds(seeds, len(captions))
        pixels = [self._pixels(one, height, width) for one in given]
        frames = self._frames(scene_frames, len(captions), [len(one) for one in pixels])
        self._guidance_scale = float(guidance_scale)
        scenes = [self._latents(one) for one in pixels]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in chosen]
        steps, done = num_inference_steps, 0
        plane = (height // self.scale_factor, width // self.scale_factor)
        while len(scenes) < len(captions):
            known = scenes[len(scenes) - min(len(scenes), window - 1) :]
            count = 1 if scenes else min(window, len(captions))
            first, last = len(scenes) - len(known), len(scenes) + count
            noise = [
                torch.randn(
                    1,
                    self.latent_channels,
                    (frames[i] - 1) // self.frame_ratio + 1,
                    *plane,
                    generator=generators[i],
                )
                for i in range(len(scenes), last)
            ]
            made = self._made(
                known, noise, captions[first:last], negative_prompt or "", steps,
                generators[len(scenes)], _counted(callback_on_step_end, done), guidance_mode,
            )  # fmt: skip
            if made is None:
                scenes = []
                break
            scenes += made
            done += self._num_timesteps
        latents = torch.cat([one.to(self._execution_device) for one in scenes], dim=2) if scenes else None
        shown = [] if latents is None else self.decode_latents(latents, output_type, frames, pixels)
        self.maybe_free_model_hooks()
        found = StoryOutput(frames=shown, scene_frames=frames, latents=latents)
        return found if return_dict else (shown,)

    def _made(
        self,
        known: list[Tensor],
        noise: list[Tensor],
        captions: Sequence[str],
        negative: str,
        steps: int,
        generator: torch.Generator,
        callback: Callback | None,
        mode: str,
    ) -> list[Tensor] | None:
        """Make scenes from their noise behind the known ones, [1, C, F, H, W] each; None if the run was interrupted."""
        begin, device = self._timesteps(steps, 1.0, False), self._execution_device
        scale = 1.0 if is_flow(self.scheduler) else float(self.scheduler.init_noise_sigma)
        branches, length = self._captions(captions, negative)
        given = torch.cat(known, dim=2).to(device) if known else None
        sizes = [one.shape[2] for one in (*known, *noise)]
        self._view = _Window(given, len(known), sizes, [length] * len(sizes))
        latents = torch.cat([one.to(device) * scale for one in noise], dim=2)
        latents = latents if given is None else torch.cat([given, latents], dim=2)

        def restored(pipe: Any, index: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            """Put the given scenes back after every step."""
            tensors = {"latents": self._restored(tensors["latents"])}
            changed = tensors | (
                (callback(pipe, index, time, tensors) if callback is not None else None) or {}
            )
            return changed | {"latents": self._restored(changed["latents"])}

        try:
            done = self._denoise(latents, begin, branches, [generator], restored, mode)
        finally:
            self._view = None
        return None if done is None else list(done.split(sizes, dim=2)[len(known) :])

    def _captions(self, captions: Sequence[str], negative: str) -> tuple[dict[str, Inputs], int]:
        """Encode the captions in view, padded to one length: inputs of each guidance branch, and that length."""
        free = [negative] * len(captions) if self.do_classifier_free_guidance else []
        found: prompts.Prompt = self.encode_prompt([*free, *captions])
        names = {"encoder_hidden_states": found.tokens}
        if self.config.text_padding == "masked":
            names["encoder_attention_mask"] = found.mask
        device, count = self._execution_device, len(captions)
        rows = {
            "uncond": {name: value[:count] for name, value in names.items()} if free else None,
            "cond": {name: value[len(free) :] for name, value in names.items()},
        }
        branches = {
            branch: {name: value.flatten(0, 1).unsqueeze(0).to(device) for name, value in inputs.items()}
            for branch, inputs in rows.items()
            if inputs is not None
        }
        return branches, int(found.tokens.shape[1])

    def _predict(self, latents: Tensor, time: Tensor, step: int, branch: str, inputs: Inputs) -> Tensor:
        view = self._view
        assert view is not None
        lengths: dict[str, Any] = {"scene_frames": view.frames, "scene_texts": view.texts}
        # a scheduler may have scaled what the network is to see, the given scenes too
        return super()._predict(self._restored(latents), time, step, branch, inputs | lengths)

    def _times(self, time: Tensor, latents: Tensor) -> Tensor:
        """Return one time a scene [B, S], 0 for the given ones."""
        view, times = self._view, super()._times(time, latents)
        if view is None or not view.clean:
            return times
        found = times.unsqueeze(1).repeat(1, len(view.frames))
        found[:, : view.clean] = 0
        return found

    def _restored(self, latents: Tensor) -> Tensor:
        if self._view is None or self._view.given is None:
            return latents
        given = self._view.given.to(latents.dtype)
        rest = latents[:, :, given.shape[2] :]
        return torch.cat([given.expand(len(latents), -1, -1, -1, -1), rest], dim=2)

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        config = self.transformer.config
        size = {
            "height": config.sample_height * self.scale_factor if height is None else height,
            "width": config.sample_width * self.scale_factor if width is None else width,
        }
        for name, side in size.items():
            if side < self.multiple or side % self.multiple:
                raise RequestError(name, side, f"a multiple of {self.multiple} px for this model")
        return size["height"], size["width"]

    def _frames(self, wanted: int | Sequence[int] | None, scenes: int, given: list[int]) -> list[int]:
        """Return the frames of every scene, those that were given as they are; a count that no codec makes is rounded."""
        ratio, cut = self.frame_ratio, int(self.transformer.config.patch_frames)
        if wanted is None:
            wanted = (int(self.transformer.config.frames) - 1) * ratio + 1
        found = list(wanted) if isinstance(wanted, Sequence) else [whole("scene_frames", wanted, "frames")] * scenes
        if len(found) != scenes:
            raise RequestError("scene_frames", len(found), f"one count for each of the {scenes} captions")
        found = [*given, *found[len(given) :]]
        for place, count in enumerate(found):
            whole("scene_frames", count, "frames")
            legal = round((count - 1) / ratio) * ratio + 1
            if legal != count and place < len(given):
                raise RequestError("given", count, f"{ratio} n + 1 frames for this model, such as {legal}")
            if legal != count:
                warnings.warn(
                    f"scene_frames: {count} is no multiple of {ratio} and 1 more; made {legal}", stacklevel=3
                )
                found[place] = legal
            if ((legal - 1) // ratio + 1) % cut:
                raise RequestError("scene_frames", count, f"a count of latent frames that divides by {cut}")
        return found

    def _pixels(self, clip: Any, height: int, width: int) -> Tensor:
        """A given clip -> [F, 3, H, W] in 0..1, on the processor."""
        if not len(clip):
            raise RequestError("given", "no frames", "clips of at least one frame")
        processor = VaeImageProcessor(vae_scale_factor=self.multiple, do_normalize=False)
        frames: Tensor = processor.preprocess(clip, height=height, width=width).float()
        return frames

    @torch.no_grad()
    def _latents(self, pixels: Tensor) -> Tensor:
        """[F, 3, H, W] in 0..1 -> [1, C, F', H', W'] in float32; every scene by itself, so none leaks into another."""
        pixels = pixels.to(self._execution_device) * 2 - 1
        if self.vae is not None and self.vae.config.get("temporal_compression_ratio"):
            return autoencoder.encode(self.vae, pixels.transpose(0, 1).unsqueeze(0)).float()
        if self.codec is not None:
            pixels = self.codec.encode(pixels.to(self.codec.dtype))
        elif self.vae is not None:
            pixels = autoencoder.encode(self.vae, pixels)
        return pixels.float().transpose(0, 1).unsqueeze(0)

    @torch.no_grad()
    def _decoded_scene(self, latents: Tensor) -> Tensor:
        """[1, C, F', H', W'] -> [F, 3, H, W] in 0..1: every scene by itself."""
        count = (latents.shape[2] - 1) * self.frame_ratio + 1
        if self.vae is not None and self.vae.config.get("temporal_compression_ratio"):
            # of an even count of latents CogVideoX's decoder repeats the first frame too
            frames = autoencoder.decode(self.vae, latents)[0].transpose(0, 1)[-count:]
        else:
            frames = latents[0].transpose(0, 1)
            if self.codec is not None:
                frames = self.codec.decode(frames.to(self.codec.dtype))
            elif self.vae is not None:
                frames = autoencoder.decode(self.vae, frames)
        return (frames.float() / 2 + 0.5).clamp(0, 1)

    def decode_latents(
        self,
        latents: Tensor,
        output_type: str = "pil",
        scene_frames: Sequence[int] | None = None,
        given: Sequence[Tensor] = (),
    ) -> Any:
        """Decode latents [1, C, F, H, W], one scene at a time.

        Args:
            scene_frames: frames of each scene; None for one scene.
            given: the first scenes as they were given, [F, 3, H, W] in 0..1; they stay so.
        """
        if output_type == "latent":
            return latents
        ratio, count = self.frame_ratio, latents.shape[2]
        sizes = [count] if scene_frames is None else [(one - 1) // ratio + 1 for one in scene_frames]
        made = [self._decoded_scene(one).cpu() for one in latents.split(sizes, dim=2)[len(given) :]]
        pixels = torch.cat([*given, *made])  # [F, 3, H, W]
        if output_type == "pt":
            return pixels.unsqueeze(0)
        array = pixels.permute(0, 2, 3, 1).numpy()
        return array[None] if output_type == "np" else [pictures(array)]


def split_story(prompt: str | Sequence[str]) -> list[str]:
    """Return the captions of a story, given as a list or as "one | two | three". Raises: RequestError for an empty one."""
    captions = [one.strip() for one in (prompt.split("|") if isinstance(prompt, str) else prompt)]
    if not captions or not all(captions):
        raise RequestError("prompt", prompt, "at least one caption, and none of them empty")
    return captions


def _seeds(given: int | Sequence[int] | None, scenes: int) -> list[int]:
    if given is None:
        given = int(torch.randint(2**31, (1,)))
    if isinstance(given, int):
        return [given + scene for scene in range(scenes)]
    if len(given) != scenes:
        raise RequestError("seeds", len(given), f"one, or one for each of the {scenes} scenes")
    return [int(one) for one in given]


def _counted(callback: Callback | None, before: int) -> Callback | None:
    """Let a callback count its steps through all runs of a story."""
    if callback is None:
        return None
    told = callback
    return lambda pipe, index, time, tensors: told(pipe, before + index, time, tensors)


def runs_of(pipeline: Any, given: dict[str, Any]) -> int:
    """Return how often the denoising loop runs for the arguments of a story: for the first scenes at once, then for each."""
    captions, known = len(split_story(given["prompt"])), len(given.get("given") or ())
    if known:
        return captions - known
    return max(1, captions - int(given.get("window") or pipeline.transformer.config.scenes) + 1)
