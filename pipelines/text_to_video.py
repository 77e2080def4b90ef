"""Clips from prompts, classes or nothing, and from any part of a clip, with a VDT: a diffusers pipeline with a seed for each clip.

Paper: VDT: General-purpose Video Diffusion Transformers via Mask Modeling, Lu et al. 2023, arXiv:2305.13311.
Differs: one mask stands for every task; what is given leaves bit for bit as it came; guidance may also drop the given frames; see
`pipelines.denoising`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from dit.segments import joined_captions
from pipelines import autoencoder
from pipelines.clips import Task, frames_of, placed, tensor_of, whole
from pipelines.denoising import Callback, Inputs, check_choice, make_loadable, pictures
from pipelines.request import GUIDANCE_MODES, RequestError
from pipelines.schedulers import is_flow
from pipelines.text_to_image import TextToImagePipeline

make_loadable("dit.backbones.vdt")

CHUNK = 16
"""Frames that a codec encodes or decodes at once."""


@dataclass
class ClipOutput(BaseOutput):
    """Clips, the latents [B, C, F, h, w] that they were decoded from (None for an interrupted run), and what was given of them.

    Clips are: "pil" a list of lists of pictures, "np" [B, F, H, W, C], "pt" [B, F, C, H, W] in 0..1, "latent" the latents.
    """

    frames: Any
    latents: Tensor | None = None
    shown: Shown | None = None


@dataclass(frozen=True, slots=True)
class Shown:
    """What is given: clips [1 or B, F, C, H, W] in 0..1 or None, their latents [B, C, F, h, w], and the mask [F, h, w]."""

    pixels: Tensor | None
    latents: Tensor
    mask: Tensor

    def paste(self, clips: Tensor) -> Tensor:
        """Put what was given back into clips [B, F, C, H, W] in 0..1."""
        if self.pixels is None:
            return clips
        scale = clips.shape[-1] // self.mask.shape[-1]
        sites = self.mask.repeat_interleave(scale, 1).repeat_interleave(scale, 2)[:, None].to(clips.device)
        return torch.where(sites > 0, clips, self.pixels.to(clips.device))


class TextToVideoPipeline(TextToImagePipeline):
    """Make clips. Its parts are those of `TextToImagePipeline`; the codec or autoencoder is one of pictures."""

    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        class_labels: int | Sequence[int] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        video: Any = None,
        image: Any = None,
        last_image: Any = None,
        given_latents: Tensor | None = None,
        task: str | Task | None = None,
        mask: Any = None,
        frame_index: Sequence[float] | Tensor | None = None,
        caption_frames: Sequence[int] | None = None,
        guide_frames: bool = False,
        guidance_mode: str = "batched",
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        return_dict: bool = True,
    ) -> ClipOutput | tuple[Any]:
        """Make one clip for each prompt or class, or for each seed where the network hears neither.

        Args:
            num_frames: how many; by default as many as the network was made for.
            guidance_scale: 1 evaluates one branch alone; None for 4 with a prompt or class, else 1.
            video: frames that are given (see `pipelines.clips.tensor_of`): all of the clip, of which the task shows some, or just
                those that are given, in order.
            image, last_image: a first, and a last frame, in place of a video.
            given_latents: in place of a video, its latents [1 or B, C, F, h, w]; then codecs have no part in what is given.
            task: a name of `dit.clip_masks.TASKS`, or a `Task` with its settings; by default frames are predicted.
            mask: in place of a task: 1 at what is to be generated, for each frame [F] or at latent size [F, h, w].
            frame_index: where the frames stand in time, in frames of training; by default 0, 1, 2, ...
            caption_frames: for one clip of several scenes, the frames of each; the prompts are their captions, each heard by its
                own frames (where `tells_scenes`).
            guide_frames: the branch that guidance leads away from is shown no frames either.
            seeds, generator, guidance_mode, output_type, callback_on_step_end: as in `TextToImagePipeline`.

        Raises:
            RequestError: inputs, sizes, seeds or choices that do not fit this model or each other.
        """
        check_choice("guidance_mode", guidance_mode, GUIDANCE_MODES)
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        height, width = self._size(height, width)
        texts, labels = self._told(prompt, class_labels)
        frames = int(self.transformer.config.frames) if num_frames is None else num_frames
        if caption_frames is not None:
            frames = self._scenes_fit(caption_frames, texts, labels, num_frames)
        frames = whole("num_frames", frames, "frames")
        count = 1 if caption_frames is not None else _count(texts, labels, seeds, generator)
        generators = self._generators(count, seeds, generator)
        size = (frames, height, width)
        shown = self.shown(video, image, last_image, given_latents, task, mask, count, size)
        guided = texts is not None or labels is not None
        self._guidance_scale = float((4.0 if guided else 1.0) if guidance_scale is None else guidance_scale)
        self._check_guidance(guided, guide_frames and shown is not None)
        begin = self._timesteps(num_inference_steps, 1.0, False)
        branches = self._heard(texts, negative_prompt, labels, count if texts is None else len(texts))
        if caption_frames is not None:
            branches = {name: _joined_scenes(inputs, caption_frames) for name, inputs in branches.items()}
        kept = self._with_frames(branches, shown, frame_index, frames, count, guide_frames)
        shape = (self.latent_channels, frames, height // self.scale_factor, width // self.scale_factor)
        latents = self._noise(shape, generators)[:, :, kept]
        done = self._denoise(latents, begin, branches, generators, callback_on_step_end, guidance_mode)
        clips: Any = []
        if done is not None:
            done = _joined(done, kept, shown)
            clips = done if output_type == "latent" else self.decode_latents(done, output_type, shown)
        self.maybe_free_model_hooks()
        return ClipOutput(frames=clips, latents=done, shown=shown) if return_dict else (clips,)

    @property
    def tells_scenes(self) -> bool:
        """Whether each frame can hear a caption of its own: by cross-attention alone, with no frames beside the clip."""
        config = self.transformer.config
        return bool(config.get("context_dim")) and not config.get("pooled_dim") and config.conditioning == "replace"

    def _told(
        self, prompt: str | list[str] | None, classes: int | Sequence[int] | None
    ) -> tuple[list[str] | None, list[int] | None]:
        """Return prompts and class numbers as lists. Raises: RequestError where the network hears the other, or neither."""
        config = self.transformer.config
        hears = bool(config.get("context_dim") or config.get("pooled_dim"))
        if not hears and prompt == "":
            prompt = None
        if (prompt is None) == hears:
            allowed = "given: this model hears one" if hears else "left out: this model hears none"
            raise RequestError("prompt", prompt, allowed)
        if classes is not None and not config.num_classes:
            raise RequestError("class_labels", classes, "left out: this model knows no classes")
        texts = [prompt] if isinstance(prompt, str) else None if prompt is None else list(prompt)
        labels = [classes] if isinstance(classes, int) else None if classes is None else list(classes)
        for label in labels or ():
            if not 0 <= label < config.num_classes:
                raise RequestError(
                    "class_labels", label, f"a class number from 0 to {config.num_classes - 1}"
                )
        if texts is not None and labels is not None and len(texts) != len(labels):
            raise RequestError("class_labels", len(labels), f"one for each of the {len(texts)} prompts")
        return texts, labels

    def _scenes_fit(
        self, scenes: Sequence[int], texts: list[str] | None, labels: list[int] | None, frames: int | None
    ) -> int:
        """Return the frames of all scenes. Raises: RequestError where captions, scenes and network do not fit each other."""
        if texts is None or labels is not None or not self.tells_scenes:
            raise RequestError(
                "caption_frames", list(scenes), "left out: this model cannot give each scene a caption of its own"
            )
        if len(scenes) != len(texts) or min(scenes) < 1:
            raise RequestError(
                "caption_frames", list(scenes), f"at least 1 frame for each of the {len(texts)} captions"
            )
        if frames not in (None, sum(scenes)):
            raise RequestError("num_frames", frames, f"{sum(scenes)}, the frames of all scenes")
        return sum(scenes)

    def _check_guidance(self, guided: bool, frames: bool) -> None:
        if not self.do_classifier_free_guidance:
            return
        if not guided and not frames:
            raise RequestError(
                "guidance_scale",
                self._guidance_scale,
                "1: there is no prompt, class or given frame to lead towards",
            )

    def _heard(
        self, texts: list[str] | None, negative: str | list[str] | None, labels: list[int] | None, count: int
    ) -> dict[str, Inputs]:
        """Return what the branches of guidance hear of prompts and classes."""
        if texts is not None:
            negatives = (
                [negative or ""] * count if negative is None or isinstance(negative, str) else list(negative)
            )
            if len(negatives) != count:
                raise RequestError(
                    "negative_prompt", len(negatives), f"one text, or one for each of the {count} prompts"
                )
            branches = self._branches(texts, negatives)
        else:
            names = ("uncond", "cond") if self.do_classifier_free_guidance else ("cond",)
            branches = {name: {} for name in names}
        if labels is not None:
            config = self.transformer.config
            cond = torch.tensor(labels, device=self._execution_device)
            branches["cond"]["class_labels"] = cond
            if "uncond" in branches:
                if not config.null_class:
                    raise RequestError(
                        "guidance_scale",
                        self._guidance_scale,
                        '1: this model was trained without a class for "none"',
                    )
                branches["uncond"]["class_labels"] = torch.full_like(cond, config.num_classes)
        return branches

    def _with_frames(
        self,
        branches: dict[str, Inputs],
        shown: Shown | None,
        index: Sequence[float] | Tensor | None,
        frames: int,
        count: int,
        guide: bool,
    ) -> Tensor:
        """Add to the branches what is given of the clips; return which frames are denoised, [F']."""
        device = self._execution_device
        places = torch.arange(frames) if index is None else torch.as_tensor(index)
        if places.shape != (frames,):
            raise RequestError(
                "frame_index", tuple(places.shape), f"a place in time for each of the {frames} frames"
            )
        kept = torch.arange(frames)
        both: Inputs = {}
        if shown is not None:
            mask, clean = shown.mask.to(device), shown.latents
            if self.transformer.config.conditioning == "concatenate":
                whole = ~shown.mask.flatten(1).any(1)  # frames with nothing to generate stand beside the clip
                kept = (~whole).nonzero().flatten()
                if whole.any():
                    both["condition_frames"] = clean[:, :, whole.to(device)]
                    both["condition_index"] = places[whole].expand(count, -1).to(device)
                    both["condition_mask"] = torch.ones(count, int(whole.sum()), device=device)
                mask, clean = mask[kept.to(device)], clean[:, :, kept.to(device)]
            if not mask.all():
                both |= {"mask": mask.expand(count, *mask.shape), "clean": clean}
        if index is not None or len(kept) < frames:
            both["frame_index"] = places[kept].expand(count, -1).to(device)
        for name, inputs in branches.items():
            inputs |= both
            if guide and name == "uncond":
                nothing = {"mask": torch.ones_like, "condition_mask": torch.zeros_like}
                inputs |= {key: like(both[key]) for key, like in nothing.items() if key in both}
        return kept

    def about(
        self, video: Any, image: Any, last_image: Any, latents: Tensor | None, task: str | Task | None, mask: Any
    ) -> tuple[Task, int | None]:
        """Return what the call's arguments mean, and how many frames they give (None: nothing is). Raises: RequestError."""
        video, about = _frames_first(video, image, last_image, _task_of(task, mask))
        came = None if latents is None else int(latents.shape[2])
        return about, came if video is None else frames_of(video)

    def shown(
        self, video: Any, image: Any, last_image: Any, latents: Tensor | None, task: str | Task | None, mask: Any, count: int,
        size: tuple[int, int, int],
    ) -> Shown | None:  # fmt: skip
        """Return what the call's arguments give of `count` clips of a size (frames, height, width); None where nothing is given.

        Raises: RequestError for frames that do not fit task or sizes.
        """
        video, task = _frames_first(video, image, last_image, _task_of(task, mask))
        frames, height, width = size
        scale = self.scale_factor
        pixels = None if video is None else tensor_of(video, height, width, self._picture_channels())
        came = pixels
        if latents is not None:
            sides = (self.latent_channels, height // scale, width // scale)
            fits = latents.dim() == 5 and (latents.shape[1], *latents.shape[3:]) == sides
            if video is not None or not fits:
                allowed = (
                    f"of {sides[0]} channels and {sides[1]} x {sides[2]} latent pixels, with no video beside"
                )
                raise RequestError("given_latents", tuple(latents.shape), allowed)
            came = latents.detach().float().transpose(1, 2)
        mask = task.of(frames, height // scale, width // scale, None if came is None else came.shape[1])
        if came is None or mask.all():
            return None
        if len(came) not in (1, count):
            raise RequestError("video", len(came), f"one clip, or one for each of the {count}")
        came = placed(came, mask)
        pixels = None if pixels is None else came
        found = (
            came.transpose(1, 2).to(self._execution_device) if pixels is None else self._clip_latents(pixels)
        )
        return Shown(pixels, found.expand(count, *[-1] * 4), mask)

    def _picture_channels(self) -> int:
        coded = self.codec is not None or self.vae is not None
        return 3 if coded else self.latent_channels

    @torch.no_grad()
    def _clip_latents(self, pixels: Tensor) -> Tensor:
        """[B, F, C, H, W] in 0..1 -> latents [B, C, F, h, w] in float32 on the device."""
        found = []
        for part in (pixels.flatten(0, 1) * 2 - 1).split(CHUNK):
            part = part.to(self._execution_device)
            if self.codec is not None:
                part = self.codec.encode(part.to(self.codec.dtype))
            elif self.vae is not None:
                part = autoencoder.encode(self.vae, part)
            found.append(part.float())
        return torch.cat(found).unflatten(0, pixels.shape[:2]).transpose(1, 2)

    def _noise(self, shape: tuple[int, int, int, int], generators: list[torch.Generator]) -> Tensor:
        """Return noise [B, C, F, h, w], each clip's from its own generator; given frames draw theirs too."""
        noise = torch.cat([torch.randn(1, *shape, generator=one, dtype=torch.float32) for one in generators])
        noise = noise.to(self._execution_device)
        return noise if is_flow(self.scheduler) else noise * self.scheduler.init_noise_sigma

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, output_type: str = "pil", shown: Shown | None = None) -> Any:
        """Decode latents [B, C, F, h, w], a few frames at a time, and put back what was given as it came; see `ClipOutput`."""
        if output_type == "latent":
            return latents
        latents = latents.to(self._execution_device)
        parts = latents.transpose(1, 2).flatten(0, 1).split(CHUNK)
        # decoded frames wait on the processor: of a long clip they take far more room than its latents
        done = torch.cat([self._decoded(part, "pt").cpu() for part in parts])
        clips = done.unflatten(0, (-1, latents.shape[2]))
        clips = clips if shown is None else shown.paste(clips)
        if output_type == "pt":
            return clips
        array = clips.permute(0, 1, 3, 4, 2).cpu().numpy()
        return array if output_type == "np" else [pictures(one) for one in array]


def _joined_scenes(inputs: Inputs, frames: Sequence[int]) -> Inputs:
    """Make one clip's inputs of those of its captions, one a row."""
    tokens = inputs["encoder_hidden_states"].unsqueeze(0)
    mask = inputs.get("encoder_attention_mask", tokens.new_ones(tokens.shape[:3]))
    joined, heard = joined_captions(tokens, mask.reshape(tokens.shape[:3]), frames)
    return inputs | {"encoder_hidden_states": joined, "encoder_attention_mask": heard}


def _joined(latents: Tensor, kept: Tensor, shown: Shown | None) -> Tensor:
    """Put the frames that were denoised, [B, C, F', h, w], and what was given together: [B, C, F, h, w]."""
    if shown is None:
        return latents
    whole = shown.latents.to(latents.device).clone()
    sites, where = shown.mask[kept][None, None].to(latents.device), kept.to(latents.device)
    whole[:, :, where] = torch.where(sites > 0, latents, whole[:, :, where])
    return whole


def _count(
    texts: list[str] | None, labels: list[int] | None, seeds: Sequence[int] | None, generator: Any
) -> int:
    for one in (texts, labels, seeds, generator):
        if isinstance(one, list | tuple | range):
            return len(one)
    return 1


def _task_of(task: str | Task | None, mask: Any) -> Task:
    if not isinstance(task, Task):
        return Task(name=task, mask=mask)
    if mask is not None:
        raise RequestError("mask", "a mask", "inside the Task that is given")
    return task


def _frames_first(video: Any, image: Any, last_image: Any, task: Task) -> tuple[Any, Task]:
    """Return the frames that came, as a video, and the task that they mean."""
    if image is None and last_image is None:
        return video, task
    if video is not None or image is None:
        raise RequestError(
            "image", "an image", "a first frame, maybe with a last one, and no video beside them"
        )
    frames = [image] if last_image is None else [image, last_image]
    if task.name is None and task.mask is None:
        task = Task(name="image" if last_image is None else "first-last", keyframes=task.keyframes)
    return frames, task
