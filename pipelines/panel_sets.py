"""A set as files: every panel a picture of its own that tells its set, place and layout; and the set read back from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.metadata import read_metadata
from pipelines.request import Request, RequestError
from pipelines.result import Picture, pixel_hash

if TYPE_CHECKING:
    from PIL.Image import Image

    from control.in_context_lora import Captions
    from pipelines.catalog import Card
    from pipelines.layout import Layout


@dataclasses.dataclass(frozen=True, slots=True)
class PanelSet:
    """A set read back: its panels in order, captions, layout, which panels were given, and the request that makes all of it.

    `known` and `captions` fit `pipelines.panels.PanelsPipeline`, which goes on from some of the panels.
    """

    name: str
    images: tuple[Image, ...]
    captions: Captions
    joint: str
    layout: Layout
    known: tuple[int, ...]
    request: Request

    def canvas(self) -> Image:
        """Return the panels in one picture, white between them."""
        from PIL import Image

        height, width = self.layout.canvas
        board = Image.new("RGB", (width, height), "white")
        for (rows, columns), one in zip(self.layout.boxes(), self.images, strict=True):
            board.paste(one, (columns.start, rows.start))
        return board


def check_panels(request: Request, card: Card) -> None:
    """Check what a request says of panels before weights load. Raises: RequestError."""
    if request.panels is None:
        for name, own in (("layout", "grid"), ("known", "re-inject")):
            if getattr(request, name) != own:
                raise RequestError(name, getattr(request, name), "left out where no panels are asked for")
        return
    if card.task != "text-to-image":
        raise RequestError("panels", request.panels, f"left out: {card.name} is no text-to-image model")
    if request.image is None and request.known != "re-inject":
        raise RequestError("known", request.known, "left out where no starting picture gives the first panel")
    if request.mask is not None:
        raise RequestError(
            "mask", request.mask, "left out where panels are asked for: a given panel is known as a whole"
        )
    from pipelines.panels import plan

    side = card.multiple
    found = plan(
        request.prompt,
        request.height or card.height or side,
        request.width or card.width or side,
        panels=request.panels,
        layout=request.layout,
        way=request.known,
    )
    found.layout.check(card.multiple)


def panel_arguments(request: Request) -> dict[str, Any]:
    """Return what the call of a pipeline of panels takes beside the rest; nothing where no panels are asked for."""
    if request.panels is None:
        return {}
    return {
        "panels": request.panels,
        "layout": request.layout,
        "way": request.known if request.image else None,
    }


def apart(made: Iterable[Picture]) -> tuple[Picture, ...]:
    """Return every panel of sets as a picture of its own, whose report tells of the set; other pictures as they are."""
    found: list[Picture] = []
    for picture in made:
        record = picture.report.get("panels")
        if record is None:
            found.append(picture)
            continue
        name = _name(picture)
        for index, frame in enumerate(picture.frames):
            told = {"set": name, "index": index, "panels": len(picture.frames)} | record
            effective = picture.report.get("effective", {}) | {"frames": 1}
            report = {"pixels": pixel_hash((frame,)), "effective": effective, "panels": told}
            found.append(Picture((frame,), picture.request, picture.report | report))
    return tuple(found)


def read_set(paths: Sequence[str | Path]) -> PanelSet:
    """Read one set from the files of its panels, in any order.

    Raises:
        RequestError: files of more than one set, a panel missing or twice, pixels that are not those that were saved.
    """
    sets = _grouped(Path(one) for one in paths)
    if len(sets) != 1:
        raise RequestError("files", f"{len(sets)} sets", "the panels of one set")
    ((name, panels),) = sets.items()
    return _read(name, panels)


def read_sets(folder: str | Path) -> list[PanelSet]:
    """Read every set whose panels lie in a folder; pictures that belong to no set are passed over.

    Raises:
        RequestError: no sets there, or one that is not whole.
    """
    found = _grouped(sorted(Path(folder).glob("*.png")), others=True)
    if not found:
        raise RequestError("folder", str(folder), "a folder with the panels of at least one set")
    return [_read(name, panels) for name, panels in found.items()]


def _grouped(paths: Iterable[Path], others: bool = False) -> dict[str, list[tuple[Path, dict[str, Any]]]]:
    found: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path in paths:
        try:
            metadata = read_metadata(path)
        except RequestError:
            if others:
                continue
            raise
        record = metadata["report"].get("panels")
        if isinstance(record, dict) and isinstance(record.get("set"), str):
            found.setdefault(record["set"], []).append((path, metadata))
        elif not others:
            raise RequestError("file", str(path), "a panel of a set; this picture stands alone")
    return found


def _read(name: str, panels: list[tuple[Path, dict[str, Any]]]) -> PanelSet:
    from control.in_context_lora import Captions
    from pipelines.layout import Layout

    records = [metadata["report"]["panels"] for _, metadata in panels]
    first = records[0]
    same = ("joint", "captions", "about", "layout", "known", "panels")
    places = [record.get("index") for record in records]
    layout = Layout.from_dict(first.get("layout"))
    if any(record.get(key) != first.get(key) for record in records for key in same):
        raise RequestError("files", name, "panels that tell the same of their set")
    if (
        sorted(map(str, places)) != sorted(map(str, range(layout.count)))
        or first.get("panels") != layout.count
    ):
        shown = ", ".join(str(one + 1 if isinstance(one, int) else one) for one in places)
        raise RequestError("files", f"panels {shown}", f"panels 1 to {layout.count} of set {name}, each once")
    try:
        captions = Captions(tuple(map(str, first["captions"])), str(first["about"]))
        known = tuple(int(one) for one in first["known"])
        joint = str(first["joint"])
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError("file", str(panels[0][0]), f"a panel whose record can be read ({error})") from None
    ordered = sorted(panels, key=lambda one: one[1]["report"]["panels"]["index"])
    images = tuple(_image(path, metadata["report"], layout) for path, metadata in ordered)
    return PanelSet(name, images, captions, joint, layout, known, Request.from_dict(panels[0][1]["request"]))


def _image(path: Path, report: dict[str, Any], layout: Layout) -> Image:
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as opened:
            found = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError("file", str(path), f"a readable PNG ({error})") from None
    if found.size != (layout.width, layout.height):
        raise RequestError(
            "file", f"{path.name}: {found.width}x{found.height}", f"{layout.width}x{layout.height} px"
        )
    if report.get("pixels") not in (None, pixel_hash((found,))):
        raise RequestError("file", str(path), "a panel with the pixels it was saved with")
    return found


def _name(picture: Picture) -> str:
    """Return a name of the set that the same request, weights and pixels always have."""
    parts = [picture.request.to_dict(), picture.report.get("weights"), picture.report.get("pixels")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
