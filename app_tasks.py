"""What a model can do, told by its card and its folder before any weights load; and what each task asks for."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from pipelines import catalog
from pipelines.catalog import Card
from pipelines.families import FROM_PICTURE, Face, turned
from pipelines.request import Request, RequestError

OWN_PICTURES = "TextToImagePipeline"
OWN_CLIPS = "TextToVideoPipeline"
NO_MODEL = "no model yet"
"""Name of the card that stands where there is no model."""


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One thing to ask for: the inputs that are shown for it, and those that must be given."""

    label: str
    shown: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    clip: bool = False


TASKS: Mapping[str, Task] = {
    "text": Task("Text → image"),
    "image": Task("Image → image", ("image", "strength"), ("image",)),
    "inpaint": Task("Inpaint", ("editor", "outpaint", "strength"), ("editor",)),
    "control": Task("Control", ("controls",), ("controls",)),
    "panels": Task("Panels", ("image", "panels", "layout", "known")),
    "clip": Task("Text → video", ("frames", "fps", "file_type"), (), True),
    "animate": Task("Image → video", ("image", "frames", "fps", "file_type"), ("image",), True),
    "between": Task(
        "First + last frame",
        ("image", "last_image", "frames", "fps", "file_type"),
        ("image", "last_image"),
        True,
    ),
    "story": Task("Story, scene | scene | scene", ("frames", "fps", "file_type"), (), True),
}
FIRST_TASK, FIRST_CLIP = "text", "clip"


def label_of(task: str, card: Card) -> str:
    """Return how a task is called; a model that takes a class number starts from that."""
    label = TASKS[task].label
    return label.replace("Text", "Class") if card.takes_class else label


def possible(card: Card) -> dict[str, str]:
    """Return for every task "" if the model can do it, or in words why not."""
    return {name: _reason(name, card) for name in TASKS}


def choices(card: Card) -> list[tuple[str, str]]:
    """Return the tasks that a model can do, as (label, name)."""
    return [(label_of(name, card), name) for name, reason in possible(card).items() if not reason]


def refused(card: Card) -> list[tuple[str, str]]:
    """Return the tasks that it cannot do, as (label, reason)."""
    return [(label_of(name, card), reason) for name, reason in possible(card).items() if reason]


def task_of(request: Request, card: Card) -> str:
    """Return the task that a request is."""
    if card.task == "text-to-video":
        if request.prompts and not _reason("story", card):
            return "story"
        return "between" if request.last_image else "animate" if request.image else FIRST_CLIP
    if request.panels is not None:
        return "panels"
    if request.mask is not None:
        return "inpaint"
    if request.controls:
        return "control"
    return "image" if request.image is not None else FIRST_TASK


def check(task: str, card: Card, given: Mapping[str, Any]) -> None:
    """Check that a task can be done and has what it needs. Raises: RequestError in words."""
    if task not in TASKS:
        raise RequestError("task", task, f"one of {', '.join(TASKS)}")
    reason = _reason(task, card)
    if reason:
        raise RequestError(
            "task", label_of(task, card), f"one that {card.title or card.name} can do: {reason}"
        )
    words = {
        "image": "a picture to start from", "last_image": "a picture to end with",
        "editor": "a picture with a part painted over, which is made anew, or with pixels added at its sides",
        "controls": "at least one control with an adapter and a picture",
    }  # fmt: skip
    for name in TASKS[task].needed:
        if not given.get(name):
            field = {"editor": "mask", "image": "starting_picture"}.get(name, name)
            raise RequestError(field, None, words[name])


def _reason(task: str, card: Card) -> str:
    name = card.title or card.name
    if card.name == NO_MODEL and task not in (FIRST_TASK, FIRST_CLIP):
        return "there is no model yet"
    if TASKS[task].clip != (card.task == "text-to-video"):
        return f"{name} makes {'clips' if card.task == 'text-to-video' else 'still pictures'}"
    if task in (FIRST_TASK, FIRST_CLIP):
        started = {"ImageToVideo": "a first picture", "VideoToVideo": "a clip"}
        return next(
            (f"{name} starts from {words}" for part, words in started.items() if part in card.pipeline), ""
        )
    if TASKS[task].clip:
        return _clip_reason(task, card, name)
    if card.takes_class:
        return f"{name} takes a class number alone"
    if _pipeline(card) == OWN_PICTURES or task == "control":
        return ""
    return _foreign(task, _pipeline(card), name)


def _clip_reason(task: str, card: Card, name: str) -> str:
    pipeline = _pipeline(card)
    if task == "story":
        return "" if pipeline in (OWN_CLIPS, "StoryToVideoPipeline") else f"{name} is told one caption a clip"
    if pipeline == OWN_CLIPS:
        return ""
    if pipeline == "StoryToVideoPipeline":
        return f"{name} tells a story by captions, without pictures"
    given = "a first picture" if task == "animate" else "a first and a last picture"
    asked = Request(prompt="-", image="-", last_image=None if task == "animate" else "-")
    try:
        face = _face(card.name)
        if face is not None and turned(face, asked) != FROM_PICTURE:
            return ""
    except RequestError as error:
        return f"{name}: {error.allowed.removeprefix('left out: ')}"
    return f"{pipeline or name} is not known to start from {given}"


@functools.cache
def _face(model: str) -> Face | None:
    """Return what is known of a family's model on this computer."""
    try:
        folder = catalog.find(model).folder
    except RequestError:
        return None
    return None if folder is None else Face.in_folder(folder)


@functools.cache
def _foreign(task: str, pipeline: str, name: str) -> str:
    """Ask diffusers whether it has a pipeline for this task with the same parts."""
    if task == "panels":
        return ""
    from diffusers.pipelines import auto_pipeline

    tables = {"image": "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING", "inpaint": "AUTO_INPAINT_PIPELINES_MAPPING"}
    texts = auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING
    family = next((key for key, one in texts.items() if one.__name__ == pipeline), None)
    there = family is not None and family in getattr(auto_pipeline, tables[task])
    words = "start from a picture" if task == "image" else "fill in a part"
    return "" if there else f"diffusers has no way to let {pipeline or name} {words}"


@functools.cache
def _index(model: str) -> dict[str, Any]:
    try:
        folder = catalog.find(model).folder
        found = json.loads((folder / "model_index.json").read_bytes()) if folder is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def index_of(card: Card) -> dict[str, Any]:
    """Return what stands in a model's model_index.json; nothing for one that is not on this computer."""
    return _index(card.name)


def _pipeline(card: Card) -> str:
    return card.pipeline or str(_index(card.name).get("_class_name", ""))
