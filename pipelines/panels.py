"""Sets of pictures that belong together: panels of one canvas with one joint caption, some of them perhaps given.

Paper: In-Context LoRA for Diffusion Transformers, Huang et al. 2024, arXiv:2410.23775 (canvas, joint caption); SDEdit, Meng et
al. 2021, arXiv:2108.01073; RePaint, Lugmayr et al. 2022, arXiv:2201.09865 (putting what is known back at every step).
Differs: a given panel is held in one of three ways, of which SDEdit is the paper's; every panel is encoded and decoded by itself,
so nothing crosses a seam, and a given panel comes out with the pixels it came in with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from control.in_context_lora import Captions, read_captions
from pipelines.denoising import Callback, Inputs, check_choice, pictures
from pipelines.layout import Layout
from pipelines.request import GUIDANCE_MODES, KNOWN, RequestError
from pipelines.schedulers import is_flow
from pipelines.text_to_image import TextToImagePipeline

OUTPUTS = ("pil", "np", "pt", "latent")
_TIMES_A_TOKEN = ("MMDiT", "PTDiT")


@dataclasses.dataclass
class PanelsOutput(BaseOutput):
    """One set.

    Attributes:
        images: the panels: "pil" a list, "np" [n, H, W, 3] and "pt" [n, 3, H, W] in 0..1, "latent" [n, C, H, W]; of an
            interrupted run an empty list.
        record: joint caption, captions, layout, numbers of the given panels (from 0) and how they were held.
    """

    images: Any
    record: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What a run is to make, checked: captions and their joint form, layout in px, given panels [3, H, W] in 0..1, and the way."""

    captions: Captions
    joint: str
    layout: Layout
    known: dict[int, Tensor]
    way: str

    @property
    def starts(self) -> bool:
        """Whether the run starts from the given panels (SDEdit) and does not hold them."""
        return bool(self.known) and self.way == "sdedit"

    def record(self) -> dict[str, Any]:
        """Return what a file is to tell of the set."""
        return {
            "joint": self.joint,
            "captions": list(self.captions.panels),
            "about": self.captions.about,
            "layout": self.layout.to_dict(),
            "known": sorted(self.known),
            "way": self.way if self.known else None,
        }

    def canvas(self) -> Tensor:
        """Return what SDEdit starts from, [1, 3, H, W] in 0..1: the other panels in the mean colour of the given ones."""
        given = torch.stack(list(self.known.values()))
        mean = given.mean(dim=(0, 2, 3)).reshape(3, 1, 1).expand(3, self.layout.height, self.layout.width)
        every = [self.known.get(place, mean) for place in range(self.layout.count)]
        return self.layout.joined([one.unsqueeze(0) for one in every])

    def shown(self, panels: Tensor, output_type: str) -> Any:
        """Put the given pixels into panels [n, 3, H, W] in 0..1 and return them in the form asked for."""
        panels = panels.float().cpu()
        for place, one in self.known.items():
            panels[place] = one
        if output_type == "pt":
            return panels
        array = panels.permute(0, 2, 3, 1).numpy()
        return array if output_type == "np" else pictures(array)


def plan(
    prompt: str | Sequence[str],
    height: int,
    width: int,
    *,
    panels: int | None = None,
    layout: str | Layout = "grid",
    gutter: int = 0,
    about: str = "",
    marks: str = "image",
    known: Mapping[int, Any] | None = None,
    image: Any = None,
    way: str = "re-inject",
) -> Plan:
    """Check what is asked for. Arguments are those of `PanelsPipeline`. Raises: RequestError."""
    check_choice("way", way, KNOWN)
    try:
        captions = read_captions(prompt, panels)
        if about and captions.about:
            raise RequestError("about", about, "left out where the prompt tells it before its first mark")
        captions = Captions(captions.panels, captions.about or about, captions.head)
        if not isinstance(layout, Layout):
            layout = Layout.of(len(captions.panels), height, width, arrangement=layout, gutter=gutter)
        joint = captions.joint(marks=marks, columns=layout.columns)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError("prompt", prompt, f"a caption for each panel ({error})") from None
    if layout.count != len(captions.panels):
        raise RequestError("layout", layout.count, f"made for {len(captions.panels)} panels")
    if image is not None and known:
        raise RequestError("image", "a picture", "left out where known panels are given: it is the first one")
    given = dict(known or {}) if image is None else {0: image}
    for place in given:
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < layout.count:
            raise RequestError("known", place, f"panel numbers from 0 to {layout.count - 1}")
    return Plan(captions, joint, layout, {i: _pixels(i, given[i], layout) for i in sorted(given)}, way)


def _pixels(place: int, given: Any, layout: Layout) -> Tensor:
    """A given panel -> [3, H, W] in 0..1. Raises: RequestError for another size or kind."""
    if isinstance(given, Image.Image):
        given = np.asarray(given.convert("RGB"))
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(np.array(given))  # a copy: the caller's may be read-only
        given = given.permute(2, 0, 1) if given.dim() == 3 else given
    where = f"panel {place + 1}"
    if not isinstance(given, Tensor) or given.dim() != 3 or given.shape[0] != 3:
        got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise RequestError(where, got, "a picture, [H, W, 3] or a tensor [3, H, W]")
    if tuple(given.shape[1:]) != (layout.height, layout.width):
        got = f"{given.shape[2]}x{given.shape[1]}"
        raise RequestError(where, got, f"{layout.width}x{layout.height} px as every panel of the set")
    pixels = given.float() / 255 if given.dtype == torch.uint8 else given.float()
    if not bool(torch.isfinite(pixels).all()) or pixels.min() < 0 or pixels.max() > 1:
        raise RequestError(where, "values out of range", "made of values from 0 to 1")
    return pixels.cpu()


def check_caption(pipeline: Any, joint: str, limit: int | None) -> None:
    """Refuse a joint caption of which no text encoder of the pipeline reads the end. Raises: RequestError."""
    counts = []
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is None:
            continue
        own = getattr(tokenizer, "model_max_length", None)
        limits = [one for one in (limit, own) if isinstance(one, int) and 0 < one < 100_000]
        count = len(tokenizer(joint, truncation=False, verbose=False)["input_ids"])
        counts.append((count, min(limits, default=count)))
    if counts and all(count > most for count, most in counts):
        count, most = max(counts, key=lambda one: one[1])
        raise RequestError(
            "prompt", f"{count} tokens", f"a joint caption of at most {most} tokens: shorten the captions"
        )


def noised(scheduler: Any, clean: Tensor, noise: Tensor, index: int) -> Tensor:
    """Return known latents at the noise level that a run has reached before its evaluation `index`; clean after the last."""
    if index >= len(scheduler.timesteps):
        return clean
    if is_flow(scheduler):
        sigma = float(scheduler.sigmas[index])
        return clean * (1 - sigma) + noise * sigma
    found: Tensor = scheduler.add_noise(clean, noise, scheduler.timesteps[index].expand(len(clean)))
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Held:
    """The given panels of one run: clean latents and noise [1, C, H, W], where they lie [H, W], and the way they are held."""

    clean: Tensor
    noise: Tensor
    mask: Tensor
    tokens: Tensor  # where they lie counted in tokens, [N]
    way: str

    def restored(self, latents: Tensor, scheduler: Any, index: int) -> Tensor:
        """Put the given panels back as they are to be before evaluation `index`: clean, or with their noise."""
        if self.way == "re-inject":
            return torch.where(self.mask, noised(scheduler, self.clean, self.noise, index), latents)
        return torch.where(self.mask, self.clean, latents)


class PanelsPipeline(TextToImagePipeline):
    """Make sets of pictures; components are those of `TextToImagePipeline`. `panels_of` puts it around a loaded pipeline."""

    _held: Held | None = None

    def __call__(  # type: ignore[override]
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
        guidance_scale: float = 4.0,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        known: Mapping[int, Any] | None = None,
        image: Any = None,
        way: str = "re-inject",
        strength: float = 0.9,
        guidance_mode: str = "batched",
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        return_dict: bool = True,
    ) -> PanelsOutput | tuple[Any]:
        """Make one set.

        Args:
            prompt: a caption a panel, as a list, as "one | two" or as a joint caption with its marks; `panels` says how many.
            about: what holds for all panels, before the first mark. marks: "image", "scene" or "place".
            layout: "grid", "row", "column" or a `Layout`; gutter: px between panels.
            height, width: of a panel. seeds, generator: one for the set.
            known: given panels by number from 0, of a panel's size; image: the first panel alone.
            way: "re-inject": their noised latents are put back after every step; "clean-tokens": the network sees them clean and
                at time 0 (only where it takes a time a token); "sdedit": the run starts from them and the mean colour of them in
                the other panels, `strength` says from how far.
            callback_on_step_end: that of `TextToImagePipeline`; it sees the latents of the canvas.

        Raises:
            RequestError: captions, sizes, panels or choices that do not fit each other or this model.
        """
        check_choice("guidance_mode", guidance_mode, GUIDANCE_MODES)
        check_choice("output_type", output_type, OUTPUTS)
        height, width = self._size(height, width)
        found = plan(
            prompt, height, width, panels=panels, layout=layout, gutter=gutter, about=about, marks=marks,
            known=known, image=image, way=way,
        )  # fmt: skip
        self._check(found)
        generators = self._generators(1, seeds, generator)
        self._guidance_scale = float(guidance_scale)
        begin = self._timesteps(num_inference_steps, strength, found.starts)
        branches = self._branches([found.joint], [negative_prompt or ""])
        done = self._filled(found, begin, branches, generators, guidance_mode, callback_on_step_end)
        images = [] if done is None else self._apart(found, done, output_type)
        self.maybe_free_model_hooks()
        return PanelsOutput(images=images, record=found.record()) if return_dict else (images,)

    def _check(self, found: Plan) -> None:
        """Hold a plan against the model. Raises: RequestError."""
        found.layout.check(self.multiple)
        check_caption(self, found.joint, int(self.config.text_length))
        name = type(self.transformer).__name__
        if found.known and found.way == "clean-tokens" and name not in _TIMES_A_TOKEN:
            raise RequestError("way", found.way, f"re-inject or sdedit: {name} takes one time for all its tokens")

    def _filled(
        self, found: Plan, begin: int, branches: dict[str, Inputs], generators: list[torch.Generator], mode: str,
        told: Callback | None,
    ) -> Tensor | None:
        """Denoise the canvas from its evaluation `begin` while given panels are held; None if interrupted."""
        shape = (self.latent_channels, *found.layout.divided(self.scale_factor).canvas)
        start = self._start(shape, generators, found.canvas() if found.starts else None, begin)
        held = self._holding(found, start) if found.known and not found.starts else None

        def restored(pipe: Any, index: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if held is not None:
                put = held.restored(tensors["latents"], self.scheduler, begin + index + 1)
                tensors = tensors | {"latents": put}
            return tensors | ((told(pipe, index, time, tensors) if told is not None else None) or {})

        self._held = held
        try:
            if held is not None:
                start = held.restored(start, self.scheduler, begin)
            return self._denoise(start, begin, branches, generators, restored, mode)
        finally:
            self._held = None

    def _holding(self, found: Plan, start: Tensor) -> Held:
        scale = 1.0 if is_flow(self.scheduler) else float(self.scheduler.init_noise_sigma)
        clean = torch.zeros_like(start)
        boxes = found.layout.divided(self.scale_factor).boxes()
        for place, latents in self._panel_latents(found).items():
            clean[0][(slice(None), *boxes[place])] = latents[0]
        places = list(found.known)
        return Held(
            clean,
            start / scale,
            found.layout.divided(self.scale_factor).mask(places).to(start.device),
            found.layout.divided(self.multiple).mask(places).flatten().to(start.device),
            found.way,
        )

    def _panel_latents(self, found: Plan) -> dict[int, Tensor]:
        """Encode every given panel by itself: [1, C, H, W] each."""
        plane = (found.layout.height // self.scale_factor, found.layout.width // self.scale_factor)
        shape = (self.latent_channels, *plane)
        return {i: self._encoded(one.unsqueeze(0), shape, 1) for i, one in found.known.items()}

    def _apart(self, found: Plan, latents: Tensor, output_type: str) -> Any:
        """Cut latents [1, C, H, W], then decode the panels side by side, as pictures of one batch."""
        layout = found.layout.divided(self.scale_factor)
        each = layout.cut(latents)[0].clone()
        for place, clean in self._panel_latents(found).items():
            each[place] = clean[0]
        if output_type == "latent":
            return each
        return found.shown(self._decoded(each, "pt"), output_type)

    def _predict(self, latents: Tensor, time: Tensor, step: int, branch: str, inputs: Inputs) -> Tensor:
        held = self._held
        if held is not None and held.way == "clean-tokens":
            latents = torch.where(held.mask, held.clean, latents)  # a scheduler may have scaled the known too
        return super()._predict(latents, time, step, branch, inputs)

    def _times(self, time: Tensor, latents: Tensor) -> Tensor:
        """Return one time a token [B, N] where known tokens are clean, 0 for these."""
        times, held = super()._times(time, latents), self._held
        if held is None or held.way != "clean-tokens":
            return times
        return times.unsqueeze(1) * (~held.tokens).to(times.dtype)


def panels_of(pipeline: Any) -> Any:
    """Return a pipeline for sets around a loaded text-to-image pipeline, which it shares everything with.

    Raises:
        RequestError: a pipeline whose latents are not known here.
    """
    from pipelines._panels_guest import GuestPanels, guest_refused

    if isinstance(pipeline, PanelsPipeline | GuestPanels):
        return pipeline
    if type(pipeline) is TextToImagePipeline:
        names = ("text_model", "text_length", "text_padding")
        made = PanelsPipeline(**pipeline.components, **{name: pipeline.config[name] for name in names})
        made._progress_bar_config = getattr(pipeline, "_progress_bar_config", {})
        return made
    reason = guest_refused(pipeline)
    if reason is not None:
        raise RequestError("panels", type(pipeline).__name__, f"left out: {reason}")
    return GuestPanels(pipeline)
