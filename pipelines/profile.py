"""A profile: accelerator settings that were measured for one model, scheduler, step count and size, and act nowhere else.

A request that names a profile is resolved before the work begins: its settings take the place of the name, so what is saved
can be repeated without the profile.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.request import Request, RequestError, nearest

if TYPE_CHECKING:
    from pipelines.catalog import Card, Loaded

VERSION = 1
LIMIT = 1_000_000
"""Most bytes of a profile."""
FOLDER = Path("profiles")
"""Where `tune` writes and where names are looked for, in the current folder; a model's own lie in its `profiles`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Where a profile holds; None where it is not known yet. `guided` tells whether guidance is on (not 1).

    `own_size` tells that no size was given, so the pipeline chose it.
    """

    weights: str | None = None
    scheduler: str | None = None
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    guided: bool | None = None
    own_size: bool = False

    def difference(self, other: Range) -> str | None:
        """Say in words which item of `other`, as far as it is known, differs; None if all agree."""
        for name, words in _WORDS.items():
            mine, found = getattr(self, name), getattr(other, name)
            if found is not None and found != mine:
                return f"it was tuned for {words(mine)}, and this run has {words(found)}"
        if other.own_size and not self.own_size and other.width is None:
            return f"it was tuned for {self.width} px wide pictures, and this run leaves the size to the pipeline"
        return None


_WORDS: dict[str, Any] = {
    "steps": lambda value: f"{value} steps",
    "width": lambda value: f"a width of {value} px",
    "height": lambda value: f"a height of {value} px",
    "guided": lambda value: "guidance on" if value else "guidance off",
    "scheduler": lambda value: f"the scheduler {value}",
    "weights": lambda value: f"the weights {value[:23]}...",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Settings, where they hold, and what was measured with them on pictures that were not searched on.

    `expected` holds speed-ups (denoising loop and end to end), PSNR (mean and worst, in dB), SSIM, the number of pictures;
    `curve` every point on the way, `searched` by what it was found, `machine` and `made` where and when.
    """

    model: str
    budget: str
    range: Range
    accelerators: tuple[dict[str, Any], ...]
    expected: dict[str, Any]
    curve: tuple[dict[str, Any], ...] = ()
    searched: dict[str, Any] = dataclasses.field(default_factory=dict)
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    made: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {"leapfrog_profile": VERSION} | dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write the profile, whole or not at all; an older one of the same name is replaced. Raises: SaveError."""
        from pipelines.result import write_file

        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        write_file(path, text.encode() + b"\n", overwrite=True)

    @property
    def measured(self) -> str:
        """What was measured, in words."""
        found = self.expected
        return (
            f"{found['speedup_denoise']:.2f}x denoising, {found['speedup_end_to_end']:.2f}x end to end, "
            f"PSNR {found['psnr_db']:.1f} dB (worst {found['psnr_worst_db']:.1f} dB) on {found['pictures']} pictures "
            "that were not searched on"
        )

    def __str__(self) -> str:
        return f"{' and '.join(_text(one) for one in self.accelerators)}: {self.measured}"


def load(path: Path) -> Profile:
    """Read a profile. Raises: RequestError if there is none, or it is not whole."""
    try:
        if path.stat().st_size > LIMIT:
            raise RequestError("profile", str(path), f"a file of at most {LIMIT // 1_000_000} MB")
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict) or values.pop("leapfrog_profile", None) != VERSION:
            raise RequestError("profile", str(path), "a file written by leapfrog tune (this version)")
        values["range"] = Range(**values["range"])
        values |= {name: tuple(values[name]) for name in ("accelerators", "curve")}
        found = Profile(**values)
        Request.from_dict({"prompt": "-", "accelerators": found.accelerators})
        str(found)
    except OSError as error:
        raise RequestError(
            "profile", str(path), f"a readable file or a known name ({error.strerror})"
        ) from None
    except RequestError:
        raise
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise RequestError("profile", str(path), "a file written by leapfrog tune (it holds no JSON)") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RequestError(
            "profile", str(path), f"a whole profile ({type(error).__name__}: {error})"
        ) from None
    return found


def folders(model: str) -> list[Path]:
    """Return the folders in which a model's profiles are looked for: the current one's, and the shipped."""
    from pipelines.catalog import CHECKPOINTS

    shipped = CHECKPOINTS / model / "profiles"
    return [FOLDER, *([shipped] if "/" not in model and "\\" not in model else [])]


def known(model: str) -> dict[str, Profile]:
    """Return the profiles of a model by name, as far as they can be read; those of the current folder go first."""
    found: dict[str, Profile] = {}
    for folder in folders(model):
        for file in sorted(folder.glob("*.json")):
            try:
                one = load(file)
            except RequestError:
                continue
            if one.model == model:
                found.setdefault(file.stem, one)
    return found


def find(request: Request) -> Profile | None:
    """Return the profile that a request names, by its file or by its name among the known; None if it names none.

    Raises:
        RequestError: there is none.
    """
    name = request.profile
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.suffix.lower() == ".json" or path.is_file():
        return load(path)
    for folder in folders(request.model):
        if path.name == name and (folder / f"{name}.json").is_file():
            return load(folder / f"{name}.json")
    names = known(request.model)
    there = f" (there are: {', '.join(names)})" if names else ""
    raise RequestError(
        "profile", name, f"a file written by leapfrog tune, or a known name{there}{nearest(name, names)}"
    )


def check(profile: Profile, request: Request, card: Card) -> None:
    """Check what a model's card tells before its weights load. Raises: RequestError where the profile does not hold."""
    guidance = card.guidance if request.guidance is None else request.guidance
    _refuse(
        profile,
        request,
        Range(
            steps=request.steps or card.steps,
            width=request.width or card.width,
            height=request.height or card.height,
            guided=None if guidance is None else guidance != 1,
        ),
    )
    if request.image is not None:
        raise RequestError(
            "profile", request.profile, "left out with a starting picture: profiles are tuned without"
        )


def resolved(profile: Profile, request: Request, loaded: Loaded, given: dict[str, Any]) -> Request:
    """Return the request with the profile's settings in its place.

    Args:
        given: what the pipeline is called with.

    Raises:
        RequestError: the profile does not hold here; the sentence names the item and how to tune for it.
    """
    _refuse(profile, request, range_of(request, loaded, given))
    return request.replace(profile=None, accelerators=profile.accelerators)


def range_of(request: Request, loaded: Loaded, given: dict[str, Any]) -> Range:
    """Return what a profile is bound to, for a request that is about to run."""
    from pipelines.calls import default_of
    from pipelines.schedulers import scheduler_for

    pipeline = loaded.pipeline
    guidance = given.get("guidance_scale", default_of(pipeline, "guidance_scale"))
    guidance = given.get("true_cfg_scale", guidance)
    width, height = given.get("width"), given.get("height")
    return Range(
        weights=loaded.digest,
        scheduler=type(scheduler_for(request.scheduler, pipeline.scheduler)).__name__,
        steps=given.get("num_inference_steps", default_of(pipeline, "num_inference_steps")),
        width=width,
        height=height,
        guided=guidance is not None and guidance != 1,
        own_size=width is None or height is None,
    )


def noted(profile: Profile, name: str | None) -> dict[str, Any]:
    """Return what a report says about the profile that was used."""
    return {"name": Path(name or "").name, "budget": profile.budget, "expected": profile.expected}


def _refuse(profile: Profile, request: Request, here: Range) -> None:
    reason = profile.range.difference(here)
    if reason is not None:
        raise RequestError(
            "profile", request.profile, f"one for this run: {reason} (to tune for it: {command(request)})"
        )


def command(request: Request, budget: str = "--psnr 35") -> str:
    """Return the command that tunes for a request's settings."""
    words = ["leapfrog tune"]
    for name in ("model", "width", "height", "steps", "guidance", "scheduler"):
        value = getattr(request, name)
        if value not in (None, "default") or name == "model":
            words.append(f"--{name} {shlex.quote(str(value))}")
    return " ".join([*words, budget])


def _text(one: dict[str, Any]) -> str:
    (method,) = Request.from_dict({"prompt": "-", "accelerators": [one]}).accelerators
    return str(method)
