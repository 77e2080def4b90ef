"""Making a part of a picture anew, or more around it: the known part is put into every step at its noise level, and back into
the pixels bit for bit.

    mask.png                      white is made anew, black is known
    outpaint:left=16,right=16     the picture lies on a larger canvas, and what was added is made

Paper: Blended Latent Diffusion; Avrahami, Fried, Lischinski; 2023; arXiv:2206.02779.
Differs: the noise of the known part is that of the start, so that both parts belong to one run; a latent pixel is made anew where
any of its pixels is, and the pixels decide at the end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit.spec import Spec, knob, knobs, parse, spec
from pipelines.catalog import Card
from pipelines.request import Request, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image


_WRITTEN = "written outpaint:left=..,top=..,right=..,bottom=.. in px"


class Canvas(Spec):
    """The family of masks that are written and not drawn."""

    __slots__ = ()


@spec("outpaint")
class Outpaint(Canvas):
    """A larger canvas: how many pixels of the starting picture's own are added at each side."""

    left: int = knob(default=0, label="Pixels to the left", low=0, high=8192)
    top: int = knob(default=0, label="Pixels above", low=0, high=8192)
    right: int = knob(default=0, label="Pixels to the right", low=0, high=8192)
    bottom: int = knob(default=0, label="Pixels below", low=0, high=8192)

    @property
    def sides(self) -> dict[str, int]:
        """Pixels by side."""
        return {one.name: getattr(self, one.name) for one in knobs(Outpaint)}


def written(mask: object) -> bool:
    """Whether a mask is told in words, so that no file is opened for it."""
    return isinstance(mask, str) and mask.startswith(f"{Outpaint.name}:")


def sides(text: str) -> dict[str, int]:
    """Return the pixels that a written mask adds, by side. Raises: RequestError."""
    try:
        found: dict[str, int] = parse(Canvas, text).sides  # type: ignore[type-abstract,attr-defined,unused-ignore]
        if not any(found.values()):
            raise ValueError("one of them must be above 0")
    except ValueError as error:
        raise RequestError("mask", text, f"{_WRITTEN} ({error})") from None
    return found


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Inpainting:
    """The starting picture and what of it is made anew: the mask is [H, W] from 0 (known) to 1, of any size."""

    image: Image
    mask: Any
    digest: dict[str, str]

    @contextlib.contextmanager
    def attached(self, pipeline: Any, given: dict[str, Any], request: Request) -> Iterator[None]:
        """Keep the known part in every step of a run. Raises: RequestError for a pipeline that cannot."""
        from control.conditions import image_of, resized
        from pipelines.calls import takes
        from pipelines.denoising import GuidedPipeline

        if takes(pipeline, "mask_image"):
            wide, high = given.get("width", self.image.width), given.get("height", self.image.height)
            given["mask_image"] = image_of(resized(self.mask, wide, high)).convert("L")
            yield
            return
        if not isinstance(pipeline, GuidedPipeline):
            raise RequestError(
                "mask", request.mask, f"left out: {type(pipeline).__name__} cannot fill in a part"
            )
        high, wide = pipeline._size(given.get("height"), given.get("width"))
        given["image"] = self.known(wide, high)
        given["callback_on_step_end"] = self._keeping(pipeline, given, (wide, high), request.seed)
        yield

    def known(self, wide: int, high: int) -> Image:
        """Return the starting picture at a size in px; at its own it is unchanged."""
        from PIL import Image

        same = self.image.size == (wide, high)
        return self.image if same else self.image.resize((wide, high), Image.Resampling.LANCZOS)

    def finished(self, frames: list[Image]) -> list[Image]:
        """Put the known part back into the pictures that were made."""
        import numpy as np
        from PIL import Image

        from control.conditions import pasted, resized

        wide, high = frames[0].size
        known, mask = np.asarray(self.known(wide, high)), resized(self.mask, wide, high)
        return [Image.fromarray(pasted(np.asarray(one.convert("RGB")), known, mask)) for one in frames]

    def _keeping(self, pipeline: Any, given: dict[str, Any], size: tuple[int, int], seed: int) -> Any:
        """Return a callback that puts the known part at its noise level into the latents after every evaluation."""
        import torch

        from control.conditions import resized
        from pipelines.schedulers import is_flow

        wide, high = size
        scale = pipeline.scale_factor
        shape = (pipeline.latent_channels, high // scale, wide // scale)
        device = pipeline._execution_device
        clean = pipeline._encoded(given["image"], shape, 1)
        noise = torch.randn(1, *shape, generator=torch.Generator("cpu").manual_seed(seed)).to(device)
        free = torch.from_numpy(resized(self.mask, wide, high) > 0)[None, None].float()
        free = torch.nn.functional.max_pool2d(free, scale).to(device) > 0
        inner = given.get("callback_on_step_end")

        def after(pipe: Any, index: int, time: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            inputs = (inner(pipe, index, time, inputs) or inputs) if inner is not None else inputs
            scheduler, latents = pipe.scheduler, inputs["latents"]
            if is_flow(scheduler):
                sigma = float(scheduler.sigmas[min(scheduler.step_index, len(scheduler.sigmas) - 1)])
                known = clean * (1 - sigma) + noise * sigma
            else:
                begin = len(scheduler.timesteps) - pipe.num_timesteps
                later = scheduler.timesteps[begin + index + 1 : begin + index + 2]
                known = scheduler.add_noise(clean, noise, later) if len(later) else clean
            return inputs | {"latents": torch.where(free, latents, known.to(latents))}

        return after


def prepare(request: Request, card: Card, image: Image | None) -> Inpainting | None:
    """Read the mask of a still picture; None where the request has none. Raises: RequestError, before weights load."""
    if request.mask is None or request.clip is not None:
        return None
    if image is None:
        raise RequestError("mask", request.mask, "left out where there is no starting picture")
    if card.task != "text-to-image":
        raise RequestError("mask", request.mask, f"left out: {card.name} is for {card.task}")
    if written(request.mask):
        return _larger(request, request.mask, card, image)
    from control.base import Refused
    from control.conditions import mask_of, read_picture
    from pipelines._adapter_files import digest_of_file

    try:
        picture = read_picture(request.mask, "the mask")
    except Refused as error:
        raise RequestError("mask", request.mask, f"usable: {error}") from None
    mask = mask_of(picture)
    aspect, own = mask.shape[1] / mask.shape[0], image.width / image.height
    if abs(aspect / own - 1) > 0.02:
        raise RequestError(
            "mask",
            f"{mask.shape[1]}x{mask.shape[0]}",
            f"of the shape of the starting picture, {image.width}x{image.height} px (any size of that aspect)",
        )
    if not mask.any():
        raise RequestError(
            "mask", request.mask, "white somewhere: it is black all over, so nothing would be made"
        )
    file = Path(request.mask).expanduser()
    return Inpainting(image, mask, {"name": file.name, "sha256": digest_of_file(file)})


def _larger(request: Request, text: str, card: Card, image: Image) -> Inpainting:
    """Put the starting picture on a larger canvas, of the shape of what is to be made."""
    import numpy as np

    from control.base import Refused
    from control.conditions import extended, image_of

    wide, high = request.width or card.width, request.height or card.height
    free = wide is None or high is None
    try:
        canvas, mask = extended(
            np.asarray(image.convert("RGB")), **sides(text), multiple=card.multiple if free else 1
        )
    except Refused as error:
        raise RequestError("mask", text, f"{_WRITTEN} ({error})") from None
    rows, columns = mask.shape
    if not free and abs(columns / rows * high / wide - 1) > 0.02:
        raise RequestError(
            "mask",
            text,
            f"such that the canvas has the shape of what is made, {wide}x{high} px: the starting picture and what is "
            f"added to it have {columns}x{rows} px",
        )
    digest = hashlib.sha256(f"{text} on {image.width}x{image.height}".encode()).hexdigest()
    return Inpainting(image_of(canvas), mask, {"name": text, "sha256": digest})


def variant(pipeline: Any, request: Request) -> Any:
    """Return the pipeline that fills in a part, with the same parts. Raises: RequestError where there is none."""
    from pipelines.calls import takes
    from pipelines.denoising import GuidedPipeline

    if isinstance(pipeline, GuidedPipeline) or takes(pipeline, "mask_image"):
        return pipeline
    from diffusers import AutoPipelineForInpainting

    try:
        return AutoPipelineForInpainting.from_pipe(pipeline)
    except (ValueError, AttributeError):
        raise RequestError("mask", request.mask, f"left out: {request.model} cannot fill in a part") from None
