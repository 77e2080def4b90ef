"""From the inputs of a task to the fields of a request and back: pictures that were dropped, masks, controls, LoRAs, frames.

Uploads lie in a folder that is emptied when the page ends, and a job outlives the page: so they are copied beside the ledger, under
a folder of their owner, and are removed when nobody has used them for a month.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import app_tasks as tasks
from pipelines import controls
from pipelines._inpainting import Outpaint, prepare, sides, written
from pipelines.catalog import Card
from pipelines.clip_calls import captions_of, frames_of
from pipelines.request import WITHHELD, Request, RequestError
from pipelines.schedule import length_of, read_prompts

if TYPE_CHECKING:
    from PIL.Image import Image

CONTROLS, LORAS = 3, 4
"""How many of each can be given on the page; a request takes 8."""
AS_TRAINED, AS_IT_IS = "as the adapter was trained", "as it is: a condition already"
FRAMES = 16
"""Where a card says nothing."""
ENDINGS = (".png", ".mp4", ".gif")
KEPT = 30 * 86_400
"""How long an upload stays that nobody uses, in s."""
SIDES = tuple(Outpaint().sides)
"""Where pixels can be added around a picture."""
CANVAS = (800, 800)
"""Size of the editor's own empty canvas, in px."""
WINDOW = {"strength": 1.0, "start": 0.0, "end": 1.0}

RARE = {
    "task": "task", "given": "count of given frames", "every": "distance of given frames", "keyframes": "keyframes",
    "region": "region", "window": "window", "overlap": "overlap", "window_seeds": "seeds of windows",
}  # fmt: skip
"""Settings of clips that the form has no field for, and what they are called."""

Store = Callable[[str], str]


class Uploads:
    """Copies of what browsers sent, by owner and content.

    Args:
        folder: where they lie, beside the ledger.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, owner: str) -> Store:
        """Return what keeps files of one session: the same bytes under the same name are kept once."""
        place = self.folder / hashlib.sha256(owner.encode()).hexdigest()[:32]

        def keep(path: str) -> str:
            source = Path(path)
            with source.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
            target = place / digest / source.name
            if target.is_file():
                os.utime(target)
                return str(target)
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            draft = target.with_name(f".{secrets.token_hex(8)}")
            shutil.copyfile(source, draft)
            os.replace(draft, target)
            return str(target)

        return keep

    def sweep(self, now: float | None = None) -> int:
        """Remove what nobody has used for a month; return how many files."""
        removed, now = 0, time.time() if now is None else now
        for file in self.folder.glob("*/*/*"):
            with contextlib.suppress(OSError):
                if now - file.stat().st_mtime > KEPT:
                    file.unlink()
                    removed += 1
                    file.parent.rmdir()
        return removed


def fields_of(values: Mapping[str, Any], card: Card, keep: Store) -> dict[str, Any]:
    """Return the fields of a request that a task and its inputs stand for.

    Raises:
        RequestError: a task that the model cannot do, or an input that is missing or cannot be used; nothing was loaded.
    """
    task = values["task"] or (tasks.FIRST_CLIP if card.task == "text-to-video" else tasks.FIRST_TASK)
    steered = _controls(values, card, keep) if task == "control" else []
    painted = _edited(values) if task == "inpaint" else None
    tasks.check(task, card, {**values, "controls": steered, "editor": painted})
    shown = tasks.TASKS[task].shown
    found: dict[str, Any] = {"controls": steered, "loras": _loras(values, card, keep)}
    for name in ("image", "last_image"):
        if name in shown and values[name]:
            found[name] = keep(_checked(values[name], name))
    if painted is not None:
        found |= {name: value if written(value) else keep(value) for name, value in painted.items()}
    if task in ("image", "inpaint"):
        found["strength"] = values["strength"]
    if task == "panels":
        found |= {"panels": whole(values["panels"]), "layout": values["layout"]}
        found |= {"known": values["known"]} if values["image"] else {}
    if tasks.TASKS[task].clip:
        found |= {"frames": whole(values["frames"]) or None}
        found["fps"] = None if values["fps"] in (None, 0, card.more.get("fps")) else values["fps"]
    if task == "story":
        found["prompts"] = values["prompt"] or ""
    return found


def values_of(request: Request, card: Card) -> dict[str, Any]:
    """Return the values of a task's inputs; files are left out: nothing that a picture names is opened."""
    frames = _frames(request, card)
    found: dict[str, Any] = {
        "task": tasks.task_of(request, card), "image": None, "editor": None, "last_image": None, "strength": request.strength,
        "panels": request.panels or 4, "layout": request.layout, "known": request.known, "frames": frames,
        "fps": request.fps or card.more.get("fps"),
        "file_type": ".png",
    }  # fmt: skip
    added = sides(str(request.mask)) if written(request.mask) else {}
    found |= {f"outpaint.{side}": added.get(side, 0) for side in SIDES}
    own = _own(card)
    for place in range(CONTROLS):
        one: Any = request.controls[place] if place < len(request.controls) else None
        made_by = AS_TRAINED if one is None else AS_IT_IS if one.raw else one.condition or AS_TRAINED
        told = {
            "adapter": one.adapter if one is not None and one.adapter in own else "", "file": None, "picture": None,
            "made_by": made_by if made_by in made_by_choices() else AS_TRAINED,
        } | {name: WINDOW[name] if one is None else getattr(one, name) for name in WINDOW}  # fmt: skip
        found |= {f"control{place + 1}.{name}": value for name, value in told.items()}
    for place in range(LORAS):
        one = request.loras[place] if place < len(request.loras) else None
        name = one.file if one is not None and one.file in own else ""
        found |= {f"lora{place + 1}.adapter": name, f"lora{place + 1}.file": None}
        found[f"lora{place + 1}.strength"] = 1.0 if one is None else one.strength
    return found


def prompt_of(request: Request) -> str:
    """Return what a prompt field says; scenes of lengths of their own are told with their frames, which has no field."""
    if request.scene_frames is None or request.prompts in (None, WITHHELD):
        return request.prompts or request.prompt
    return captions_of(request)


def check(request: Request, card: Card) -> None:
    """Check what needs the picture itself, before a job is made of it. Raises: RequestError for a canvas of another shape."""
    if written(request.mask) and request.image is not None:
        from pipelines.inputs import read_image

        prepare(request, card, read_image(request.image)[0])


def left_out(request: Request, card: Card) -> list[str]:
    """Return what of a request a form cannot be filled with: files, which only a person can give again, and rare settings."""
    own = _own(card)
    found = [
        words
        for name, words in (
            ("image", "its starting picture"), ("last_image", "its last picture"), ("mask", "its mask"), ("clip", "its clip"),
        )
        if getattr(request, name) and not written(getattr(request, name))
    ]  # fmt: skip
    found += [f"its {words}" for name, words in RARE.items() if getattr(request, name) is not None]
    found += ["its prompt, which its file does not tell"] if request.prompt == WITHHELD else []
    found += ["the pictures of its controls"] if request.controls else []
    strange = [one.file for one in request.loras if one.file not in own]  # type: ignore[attr-defined]
    found += [f"the LoRA {Path(name).name}" for name in strange]
    return found


def adapters(card: Card, *, pictures: bool) -> list[tuple[str, str]]:
    """Return a model's own adapters, those that steer by a picture or the others, as choices; "" is none."""
    found = [
        (name, name)
        for name, one in _own(card).items()
        if one.takes_picture is None or one.takes_picture == pictures
    ]
    return [("none, or a file of mine", ""), *found]


def made_by_choices() -> list[str]:
    """Return how a picture can become a condition. Imports torch."""
    from control.conditions import conditions

    return [AS_TRAINED, AS_IT_IS, *sorted(conditions())]


def preview(
    card: Card, name: str, file: str | None, picture: str | None, made_by: str, size: tuple[int, int] | None
) -> Image | None:
    """Return the condition that an adapter would be given of a picture; None where nothing tells how it is made.

    Raises:
        RequestError: a picture that cannot be read, or holds nothing of the condition.
    """
    if not picture or made_by == AS_IT_IS:
        return None
    condition: str | None = made_by
    if made_by == AS_TRAINED:
        own = _own(card)
        found = own.get(name) or (_read(file) if file else None)
        condition = None if found is None else found.condition
    return None if condition is None else controls.preview(condition, _checked(picture, "picture"), size)


def coverage(card: Card, name: str, file: str | None) -> tuple[str, bool]:
    """Return how many keys of an adapter find a place in a model, in words, and whether it fits. Raises: RequestError."""
    from pipelines import catalog
    from pipelines._steering_files import fit_among

    folder = catalog.find(card.name).folder
    if folder is None or not (name or file):
        return "", True
    own = _own(card)
    found = fit_among(own[name].path if name in own else Path(file or ""), [folder])
    if "coverage" in found:
        return f"fits {card.title or card.name}: {found['coverage']}", True
    return next(iter(found.values())), False


def _frames(request: Request, card: Card) -> int:
    with contextlib.suppress(RequestError):  # of a file whose scenes do not fit its captions
        told = request.scene_frames is not None and request.prompts != WITHHELD
        return (length_of(read_prompts(captions_of(request))) if told else frames_of(request, card)) or FRAMES
    return int(card.more.get("frames") or FRAMES)


def _own(card: Card) -> dict[str, Any]:
    try:
        return {one.name: one for one in controls.adapters(card.name)}
    except (RequestError, ValueError):
        return {}


def _read(file: str) -> Any:
    from pipelines._adapter_files import read_adapter

    return read_adapter(Path(file))


def _checked(path: str, field: str) -> str:
    """Check a picture before it is kept. Raises: RequestError."""
    from pipelines.inputs import read_image

    try:
        read_image(path, field)
    except RequestError as error:
        given = (
            Path(path).name if str(error.given) == path else error.given
        )  # not where it lies on this computer
        raise RequestError("starting picture" if field == "image" else field, given, error.allowed) from None
    return path


def _controls(values: Mapping[str, Any], card: Card, keep: Store) -> list[dict[str, Any]]:
    found = []
    for place in range(1, CONTROLS + 1):
        one = {
            name: values[f"control{place}.{name}"]
            for name in ("adapter", "file", "picture", "made_by", *WINDOW)
        }
        adapter = _adapter(one["adapter"], one["file"], card, keep, "controls")
        if adapter is None and not one["picture"]:
            continue
        if adapter is None or not one["picture"]:
            missing = "an adapter" if adapter is None else "a picture"
            raise RequestError(
                "controls", f"number {place} without {missing}", "an adapter and a picture each"
            )
        told = {
            "adapter": adapter,
            "file": keep(_checked(one["picture"], "picture")),
            "raw": one["made_by"] == AS_IT_IS,
        }
        told |= {} if one["made_by"] in (AS_TRAINED, AS_IT_IS) else {"condition": one["made_by"]}
        found.append(told | {name: one[name] for name in WINDOW})
    return found


def _loras(values: Mapping[str, Any], card: Card, keep: Store) -> list[dict[str, Any]]:
    found = []
    for place in range(1, LORAS + 1):
        file = _adapter(values[f"lora{place}.adapter"], values[f"lora{place}.file"], card, keep, "loras")
        if file is not None:
            found.append({"file": file, "strength": values[f"lora{place}.strength"]})
    return found


def _adapter(name: str | None, file: str | None, card: Card, keep: Store, field: str) -> str | None:
    """Return an adapter by the model's own name, or a copy of the file that was given. Raises: RequestError."""
    if name:
        if name not in _own(card):  # a browser chooses among the model's own, and opens no file by name
            raise RequestError(field, name, f"one of the adapters of {card.title or card.name}, or a file")
        return name
    if not file:
        return None
    _read(file)
    return keep(file)


def _edited(values: Mapping[str, Any]) -> dict[str, str] | None:
    """Return a picture, and the file or the words of its mask; None where there is none, or no mask.

    Raises:
        RequestError: a picture or a mask that cannot be used, or two kinds of masks.
    """
    editor = values["editor"]
    if not isinstance(editor, Mapping) or not editor.get("background"):
        return None
    painted, added = _painted(editor), {side: whole(values[f"outpaint.{side}"]) for side in SIDES}
    if not any(added.values()):
        return painted
    if painted is not None:
        raise RequestError("mask", "both", "a painted part, or pixels added at the sides")
    words = f"{Outpaint.name}:" + ",".join(f"{side}={pixels}" for side, pixels in added.items() if pixels)
    sides(words)
    return {"image": str(editor["background"]), "mask": words}


def _painted(editor: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the files of a picture and of its mask, white where something was painted; None where nothing was.

    Raises:
        RequestError: a picture or a mask that cannot be used: blank, or of two sizes.
    """
    from PIL import Image, ImageChops

    background = Path(editor["background"])
    _checked(str(background), "image")
    with Image.open(background) as opened:
        size = opened.size
        extrema: Any = opened.convert("RGBA").getextrema()
        plain = all(low == high for low, high in extrema)
        empty = plain and (extrema[3][1] == 0 or all(low == 255 for low, _ in extrema))
        if empty and size == CANVAS:
            # the editor's own empty canvas looks like this: a picture dropped before it was ready never came in
            raise RequestError(
                "starting picture",
                "a blank canvas",
                "a picture; drop it once more, and wait until it is seen",
            )
    mask = Image.new("L", size, 0)
    for layer in editor.get("layers") or ():
        _checked(str(layer), "mask")
        with Image.open(layer) as opened:
            alpha = opened.convert("RGBA").getchannel("A")
        if alpha.size != size:
            raise RequestError(
                "mask",
                _sides(alpha.size),
                f"one of the picture's size, {_sides(size)}; drop the picture once more",
            )
        mask = ImageChops.lighter(mask, alpha.point(lambda value: 255 if value > 127 else 0))
    if mask.getextrema()[1] == 0:
        return None
    target = background.parent / f"mask-{secrets.token_hex(4)}.png"
    mask.save(target)
    return {"image": str(background), "mask": str(target)}


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} px"


def whole(value: Any) -> Any:
    """Return a number that a browser sent as 28.0 as 28; everything else unchanged, to be refused in words."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
