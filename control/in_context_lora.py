"""In-Context LoRA: a set of pictures as panels of one canvas with one joint caption, and a LoRA on a few such canvases.

Paper: In-Context LoRA for Diffusion Transformers, Huang, Wang, Wu, Shi, Feng, Hu, Liu, Wang, Chen, Zhou; 2024; arXiv:2410.23775.
Differs: the joint caption is a grammar that is written and read back, so a caption that does not fit the panels is refused;
    the file tells how many panels in which order it was trained with; panels that are given are the pipeline's matter
    (`pipelines.panels`). The published files are plain LoRAs and load as such (`lora`), whatever marks their captions use.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from control._layers import check_targets
from control.lora import LoRA
from dit.spec import knob, spec

MARKS = ("image", "scene", "place")
# The maps of attention of both streams; perceptrons, norms and ends of the network stay as they are.
ATTENTION_MAPS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_HEAD = re.compile(r"\s*\[(?:SET-OF-(?P<count>\d{1,3})|(?P<other>[A-Z][A-Z0-9-]*))\]\s*")
_MARK = re.compile(
    r"\[(?:(?P<kind>IMAGE|SCENE-)(?P<number>\d{1,3})|"
    r"(?P<place>(?:(?:TOP|MIDDLE|BOTTOM)-)?(?:LEFT|CENTER|RIGHT)|TOP|MIDDLE|BOTTOM))\]"
)
_ROWS = {1: ("",), 2: ("TOP", "BOTTOM"), 3: ("TOP", "MIDDLE", "BOTTOM")}
_COLUMNS = {1: ("",), 2: ("LEFT", "RIGHT"), 3: ("LEFT", "CENTER", "RIGHT")}


@spec("in-context-lora", paper="In-Context LoRA, arXiv:2410.23775")
class InContextLoRA(LoRA):
    """A LoRA that makes the panels of one canvas belong together."""

    about = "Panels of one canvas that belong together: one style, one subject, one story"

    targets: tuple[str, ...] = knob(
        default=ATTENTION_MAPS, label="Names of the layers in blocks that are added to"
    )
    panels: int = knob(default=4, label="Panels of a canvas in training", low=1, high=16)
    arrangement: str = knob(
        default="grid", label="Arrangement in training", choices=("grid", "row", "column")
    )
    marks: str = knob(default="image", label="Marks before the panels' captions", choices=MARKS)

    def check(self) -> None:
        """Raises: ValueError if targets are no names of layers."""
        check_targets(self.name, self.targets)


@dataclasses.dataclass(frozen=True, slots=True)
class Captions:
    """What a set is asked for with: a caption a panel, and what holds for all of them.

    Raises:
        ValueError: no caption, an empty one, or one that holds a mark.
    """

    panels: tuple[str, ...]
    about: str = ""
    head: str = ""  # another trigger than [SET-OF-n], such as MOVIE-SHOTS

    def __post_init__(self) -> None:
        if not self.panels:
            raise ValueError("captions: a set needs at least one panel, got none")
        for place, text in enumerate(self.panels, 1):
            if not text.strip():
                raise ValueError(f"captions: panel {place} of {len(self.panels)} has no caption")
        for text in (self.about, *self.panels):
            if _MARK.search(text) or _HEAD.match(text):
                raise ValueError(
                    f"captions: marks such as [IMAGE1] stand between captions, not inside: {text!r}"
                )

    def joint(self, *, marks: str = "image", columns: int | None = None) -> str:
        """Return the one caption of the canvas: `[SET-OF-n] about [IMAGE1] one [IMAGE2] two`.

        Args:
            marks: "image" [IMAGE1], "scene" [SCENE-1], "place" [TOP-LEFT] for a layout of `columns` columns.

        Raises:
            ValueError: marks that are not known, or places for more than 3 rows or columns.
        """
        names = _names(marks, len(self.panels), len(self.panels) if columns is None else columns)
        head = f"[{self.head or f'SET-OF-{len(self.panels)}'}]"
        pairs = [f"[{name}] {text.strip()}" for name, text in zip(names, self.panels, strict=True)]
        return " ".join(filter(None, (head, self.about.strip(), *pairs)))


def read_captions(text: str | Sequence[str], count: int | None = None) -> Captions:
    """Read the captions of a set: a list, "one | two | three", or a joint caption with its marks.

    Args:
        count: how many panels there must be.

    Raises:
        ValueError: missing or empty captions, marks out of their order, or another count.
    """
    if not isinstance(text, str):
        found = Captions(tuple(str(one) for one in text))
    elif _MARK.search(text):
        found = _marked(text)
    else:
        found = Captions(tuple(one.strip() for one in text.split("|")))
    if count is not None and len(found.panels) != count:
        raise ValueError(
            f"captions: {count} panels need {count} captions, got {len(found.panels)} "
            '(written "one | two", or "[IMAGE1] one [IMAGE2] two")'
        )
    return found


def _marked(text: str) -> Captions:
    head = _HEAD.match(text)
    if head is not None and _MARK.match(text.strip()):
        head = None  # a mark of a panel, such as [LEFT], and no trigger
    rest = text[head.end() :] if head else text
    marks = list(_MARK.finditer(rest))
    ends = [one.start() for one in marks[1:]] + [len(rest)]
    numbers = [int(one["number"]) for one in marks if one["number"]]
    places = [one["place"] for one in marks if one["place"]]
    if numbers and (places or numbers != list(range(1, len(marks) + 1))):
        raise ValueError(
            f"captions: marks count from 1 in their order, got {', '.join(one.group() for one in marks)}"
        )
    if len(set(places)) < len(places):
        raise ValueError(f"captions: a place is named twice in {', '.join(places)}")
    found = Captions(
        tuple(rest[one.end() : end].strip() for one, end in zip(marks, ends, strict=True)),
        rest[: marks[0].start()].strip(),
        (head["other"] or "") if head else "",
    )
    told = head["count"] if head else None
    if told is not None and int(told) != len(marks):
        raise ValueError(f"captions: [SET-OF-{told}] stands before {len(marks)} panels")
    return found


def _names(marks: str, count: int, columns: int) -> list[str]:
    if marks == "image":
        return [f"IMAGE{i + 1}" for i in range(count)]
    if marks == "scene":
        return [f"SCENE-{i + 1}" for i in range(count)]
    if marks != "place":
        raise ValueError(f"captions: marks must be one of {', '.join(MARKS)}, got {marks!r}")
    rows = count // columns if columns and count % columns == 0 else 0
    if rows not in _ROWS or columns not in _COLUMNS or count == 1:
        raise ValueError(
            f"captions: places have names for 2 to 9 panels in up to 3 rows and columns, not for {count} in {columns} columns"
        )
    return ["-".join(filter(None, (row, column))) for row in _ROWS[rows] for column in _COLUMNS[columns]]
