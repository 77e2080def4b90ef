"""A request: everything that decides a picture, checked once, to and from JSON. Every limit and unit stands here."""

from __future__ import annotations

import dataclasses
import difflib
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

from dit.spec import Knob, Spec, knob, knobs

PROMPT_LENGTH = 2000
"""Longest prompt, in characters."""
LARGEST_SEED = 2**53 - 1
"""The largest seed, the largest whole number that JSON and a browser keep exactly."""

SCHEDULERS = ("default", "euler", "heun", "dpm++2m", "unipc", "ddim", "ddpm")
DTYPES = ("auto", "float32", "bfloat16", "float16")
GUIDANCE_MODES = ("batched", "sequential")
TASKS = (
    "unconditional", "predict", "backward", "interpolate", "image", "first-last", "keyframes", "region",
)  # fmt: skip
"""What of a clip may be given; the names of `dit.clip_masks.TASKS`, which imports torch."""
INPUTS = ("image", "last_image", "clip", "mask")
"""Fields that name a file to be read."""
_FILES = (*INPUTS, "model", "profile")
_NUMBERS = {
    "keyframes": (-999, 999),
    "region": (0, 4096),
    "scene_frames": (1, 1000),
    "window_seeds": (0, LARGEST_SEED),
}

LAYOUTS = ("grid", "row", "column")
KNOWN = ("re-inject", "clean-tokens", "sdedit")
METADATA = ("full", "prompt-free", "none")
WITHHELD = "(left out of the file)"
"""What stands in a saved file for words that it does not tell."""

_DEVICE = re.compile(r"(auto|cpu|mps|(cuda|xpu)(:\d{1,2})?)\Z")


class RequestError(ValueError):
    """A request that cannot be served: the field, what was given and what is allowed."""

    def __init__(self, field: str, given: object, allowed: str) -> None:
        super().__init__(field, given, allowed)
        self.field, self.given, self.allowed = field, given, allowed

    def __str__(self) -> str:
        return f"{self.field} must be {self.allowed}; got {shorten(self.given)}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to make. None stands for the model's own value; picture i of `images` has the seed `seed + i`.

    Raises:
        RequestError: a value out of its limits, with the field, what was given and what is allowed.
    """

    prompt: str = knob("", "Prompt")
    negative_prompt: str = knob("", "Negative prompt")
    model: str = knob("emoji", "Model: a shipped name, a folder or a hub id")
    class_label: int | None = knob(None, "Class number, for class-conditional models", low=0, high=999_999)
    width: int | None = knob(None, "Width", low=16, high=4096, step=8, unit="px")
    height: int | None = knob(None, "Height", low=16, high=4096, step=8, unit="px")
    frames: int | None = knob(None, "Frames, for video models", low=1, high=1000, step=1, unit="frames")
    steps: int | None = knob(None, "Denoising steps", low=1, high=1000, step=1, unit="steps")
    guidance: float | None = knob(
        None, "How strictly to follow the prompt; 1 turns guidance off", low=0.0, high=50.0, step=0.5
    )
    seed: int = knob(0, "Seed of the first picture", low=0, high=LARGEST_SEED, step=1)
    images: int = knob(1, "How many pictures", low=1, high=256, step=1, unit="pictures")
    scheduler: str = knob("default", "Scheduler", choices=SCHEDULERS)
    image: str | None = knob(None, "Picture to start from")
    strength: float = knob(
        0.7, "How far to move away from the starting picture", low=0.01, high=1.0, step=0.05
    )
    guidance_mode: str = knob("batched", "Guidance in one call or in two", choices=GUIDANCE_MODES)
    dtype: str = knob("auto", "Number format of the weights", choices=DTYPES)
    device: str = knob("auto", "Device: auto, cpu, cuda, cuda:1, mps")
    controls: tuple[Spec, ...] = knob((), "Controls, for example edges=pic.png:0.8")
    loras: tuple[Spec, ...] = knob((), "LoRAs, for example style.safetensors:0.7")
    accelerators: tuple[Spec, ...] = knob((), "Accelerators, for example delta-cache:interval=3")
    profile: str | None = knob(None, "Accelerators by a profile of leapfrog tune: its file or name")
    fps: float | None = knob(None, "Frames a second of a clip", low=1.0, high=120.0, step=1, unit="frames")
    prompts: str | None = knob(None, "Prompts over time: 'a | b', '0: a | 12: b' or '0-8: a | 8-16: b'")
    last_image: str | None = knob(None, "Picture that a clip ends with")
    clip: str | None = knob(None, "Clip of which frames are given: MP4, GIF, PNG or a folder of pictures")
    task: str | None = knob(None, "What of the clip is given", choices=TASKS)
    given: int | None = knob(None, "Frames given to predict or backward", low=1, high=999, unit="frames")
    every: int | None = knob(None, "To interpolate, every so many frames one is given", low=2, high=999)
    keyframes: str | None = knob(None, "Frames that are given, for example 0,7,15")
    region: str | None = knob(None, "Box that is made anew in every frame, in px: left,top,right,bottom")
    mask: str | None = knob(None, "Picture or clip, white where something is made anew")
    window: int | None = knob(
        None, "Frames of a window of a long clip; scenes of one of a story", low=1, high=1000
    )
    overlap: int | None = knob(None, "Frames that a window goes on from", low=1, high=999, unit="frames")
    window_seeds: str | None = knob(None, "A seed for each window or scene, for example 3,5,9")
    scene_frames: str | None = knob(None, "Frames of the scenes of a story: one number, or one each")
    tiling: bool = knob(False, "Decode in tiles, which takes less memory")
    panels: int | None = knob(
        None, "Pictures of a set made together; the prompt has a caption for each: a | b", low=1, high=16
    )
    layout: str = knob("grid", "How the pictures of a set lie together", choices=LAYOUTS)
    known: str = knob(
        "re-inject",
        "How the first picture of a set is held, where a starting picture gives it",
        choices=KNOWN,
    )

    metadata: str = knob("full", "What a saved file tells of how it was made", choices=METADATA)

    def __post_init__(self) -> None:
        for name in _FILES:
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        object.__setattr__(self, "accelerators", _read_accelerators(self.accelerators))
        self._read_schedule()
        self._read_steering()
        for one in settings():
            object.__setattr__(self, one.name, _checked(one, getattr(self, one.name)))
        self._check_texts()
        if self.seed + self.images - 1 > LARGEST_SEED:
            raise RequestError(
                "seed", self.seed, f"at most {LARGEST_SEED} for the last of {self.images} pictures"
            )
        if not _DEVICE.match(self.device):
            raise RequestError("device", self.device, "auto, cpu, mps, cuda or cuda:<number>")

    def _read_steering(self) -> None:
        if self.controls == () == self.loras:
            return
        from pipelines.controls import KINDS, read_all

        for kind in KINDS:
            object.__setattr__(self, kind.field, read_all(kind, getattr(self, kind.field)))

    def _read_schedule(self) -> None:
        """Put prompts and lists of numbers, in whatever form they came, into their one text form."""
        from pipelines.schedule import read_numbers, read_prompts, text_of

        if self.prompts is not None:
            parts = read_prompts(self.prompts)
            for part in parts:
                _check_text("prompts", part.text, PROMPT_LENGTH, empty=False)
            object.__setattr__(self, "prompts", text_of(parts))
        for name, (low, high) in _NUMBERS.items():
            if getattr(self, name) is not None:
                numbers = read_numbers(name, getattr(self, name), low=low, high=high)
                object.__setattr__(self, name, ",".join(map(str, numbers)))

    def _check_clip(self) -> None:
        """Check what says which part of a clip is given. Raises: RequestError for settings that exclude each other."""
        if self.prompts is not None and (self.prompt or self.class_label is not None):
            raise RequestError("prompts", self.prompts, "left out where a prompt or class number is given")
        if self.mask is not None and self.clip is None and self.image is None:
            raise RequestError("mask", self.mask, "given with a clip or a starting picture")
        if self.mask is not None and self.mask.startswith("outpaint:"):
            from pipelines._inpainting import sides

            if self.clip is not None:
                raise RequestError("mask", self.mask, "a picture or a clip, where a clip is given")
            sides(self.mask)
        if self.mask is not None and self.task is not None:
            raise RequestError("mask", self.mask, f"left out where a task is named ({self.task})")
        if self.window_seeds is not None and self.images > 1:
            raise RequestError(
                "window_seeds", self.window_seeds, "left out where several clips are asked for"
            )
        if self.clip is not None and (self.image is not None or self.last_image is not None):
            raise RequestError("clip", self.clip, "left out where a first or last picture is given")
        if self.clip is None and self.task not in (None, "unconditional"):
            raise RequestError("clip", None, f"a file for the task {self.task}")
        for name, tasks in {"given": ("predict", "backward"), "every": ("interpolate",), "region": ("region",),
                            "keyframes": ("keyframes", "image")}.items():  # fmt: skip
            if getattr(self, name) is not None and self.task not in tasks:
                raise RequestError(name, getattr(self, name), f"left out without the task {tasks[0]}")
        if self.task in ("region", "keyframes") and getattr(self, self.task) is None:
            raise RequestError(self.task, None, f"given for the task {self.task}")
        box = [int(one) for one in (self.region or "0,0,1,1").split(",")]
        if len(box) != 4 or box[0] >= box[2] or box[1] >= box[3]:
            raise RequestError(
                "region", self.region, "left,top,right,bottom in px, with left < right and top < bottom"
            )

    def _check_texts(self) -> None:
        _check_text(
            "prompt",
            self.prompt,
            PROMPT_LENGTH,
            empty=self.class_label is not None or self.prompts is not None or self.task == "unconditional",
        )
        self._check_clip()
        for name in ("last_image", "clip", "mask"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name), 4096, empty=False)
        _check_text("negative_prompt", self.negative_prompt, PROMPT_LENGTH, empty=True)
        _check_text("model", self.model, 1024, empty=False)
        if self.image is not None:
            _check_text("image", self.image, 4096, empty=False)
        if self.profile is not None:
            _check_text("profile", self.profile, 4096, empty=False)
            if self.accelerators:
                raise RequestError(
                    "profile", self.profile, "left out where accelerators are given: it stands for some"
                )
        if self.class_label is not None and self.prompt:
            raise RequestError("prompt", self.prompt, "empty where a class number is given")

    @property
    def words(self) -> str:
        """What is asked for, as people would say it."""
        if self.class_label is not None:
            return f"class {self.class_label}"
        return self.prompt or self.prompts or "no prompt"

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def one(self, index: int) -> Self:
        """Return the request that remakes picture `index` of this one alone."""
        if not 0 <= index < self.images:
            raise RequestError("index", index, f"a picture number from 0 to {self.images - 1}")
        return self.replace(seed=self.seed + index, images=1)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: every field, accelerators, controls and LoRAs as dictionaries."""
        values = {one.name: getattr(self, one.name) for one in settings()}
        named = ("accelerators", "controls", "loras")
        return values | {name: [one.to_dict() for one in getattr(self, name)] for name in named}

    def told(self) -> dict[str, Any]:
        """Return the JSON form that a saved file holds: files by their names, for a path tells of the computer, not the picture.

        The report beside it has their digests, and by these `repro` finds out whether it was given the same files.
        """
        given = {name: getattr(self, name) for name in INPUTS}
        named: dict[str, Any] = {name: bare(path) for name, path in given.items() if path is not None}
        named |= {
            "model": model_name(self.model),
            "profile": None if self.profile is None else bare(self.profile),
        }
        if self.controls or self.loras:
            from pipelines._choices import bare_all

            named |= {name: bare_all(cast(Any, getattr(self, name))) for name in ("controls", "loras")}
        if self.metadata != "full":
            words = ("prompt", "negative_prompt", "prompts")
            named |= {name: WITHHELD for name in words if getattr(self, name)}
        return self.replace(**named).to_dict()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the JSON form. Raises: RequestError, also for an unknown field (the nearest valid one is named)."""
        if not isinstance(values, Mapping):
            raise RequestError("request", values, "a dictionary of fields")
        names = [one.name for one in settings()]
        for key in values:
            if key not in names:
                raise RequestError(
                    "request", key, f"made of the fields {', '.join(names)}{nearest(str(key), names)}"
                )
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read the request inside a saved PNG, MP4 or GIF, a folder of frames or a JSON sidecar. Nothing it names is opened.

        Raises:
            RequestError: no such file, no request inside, more than 1 MB of it, or a request that is not valid.
        """
        from pipelines.metadata import read_metadata

        return cls.from_dict(read_metadata(path)["request"])


def settings() -> tuple[Knob, ...]:
    """Return the fields of a request with their limits; the page and the command line are built from them."""
    return knobs(cast(Any, Request))


def accelerator_kinds() -> dict[str, type[Spec]]:
    """Return every accelerator by name. Importing them imports torch, so this is done only when asked."""
    import importlib
    import pkgutil

    import acceleration
    from acceleration.base import Accelerator
    from dit.spec import kinds

    for module in pkgutil.iter_modules(acceleration.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"acceleration.{module.name}")
    return dict(kinds(Accelerator))


def nearest(word: str, words: Any) -> str:
    """Return " (did you mean ...?)" for the word most like `word`, or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def bare(path: str) -> str:
    """Return the name of a file without its folder."""
    return Path(path).name or path


def model_name(model: str) -> str:
    """Return what to call a model to others: a folder of this computer by its name, a shipped model and a hub id as they are."""
    place = model.startswith(("/", "\\", "~", ".")) or model[1:2] == ":"
    try:
        if place or Path(model).is_dir():
            return bare(str(Path(model.replace("\\", "/")).expanduser().resolve()))
    except (OSError, ValueError, RuntimeError):  # no path that this system knows, or the home of nobody
        return bare(model.replace("\\", "/")) if place else model
    return model


def shorten(value: object, length: int = 80) -> str:
    """Return how a value looks, cut for an error message."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


def _read_accelerators(values: Any) -> tuple[Spec, ...]:
    if isinstance(values, (str, Mapping, Spec)):
        values = (values,)
    if not isinstance(values, (tuple, list)):
        raise RequestError("accelerators", values, "a list of accelerators")
    if any(not isinstance(one, Spec) for one in values):
        kinds = accelerator_kinds()
        from acceleration.base import Accelerator
        from dit.spec import parse

        assert kinds is not None
        try:
            values = [parse(Accelerator, one) for one in values]  # type: ignore[type-abstract,unused-ignore]
        except ValueError as error:
            raise RequestError(
                "accelerators", list(values), f"known and within their limits: {error}"
            ) from None
    names = [one.name for one in values]
    if len(set(names)) < len(names):
        raise RequestError("accelerators", names, "named at most once each")
    return tuple(values)


def _checked(one: Knob, value: Any) -> Any:
    try:
        return one.check("request", value)
    except ValueError:
        raise RequestError(one.name, value, one.allowed()) from None


def _check_text(field: str, value: str, length: int, *, empty: bool) -> None:
    if not value.strip():
        if value or not empty:
            raise RequestError(field, value, f"text of 1 to {length} characters")
        return
    if len(value) > length:
        raise RequestError(field, value, f"text of at most {length} characters, not {len(value)}")
    for letter in value:
        if letter not in "\n\r\t" and unicodedata.category(letter) in ("Cc", "Cs"):
            raise RequestError(field, value, f"readable text, without the character U+{ord(letter):04X}")
    if not any(unicodedata.category(letter)[0] in "LNSP" for letter in value):
        raise RequestError(field, value, "text with at least one letter, number or sign")
