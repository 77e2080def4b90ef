"""Remake a picture from its file and say whether it came out the same, and if not, which ingredient differs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import _clipping, catalog
from pipelines.controls import confirmed
from pipelines.generate import OnStep, generate
from pipelines.metadata import read_metadata
from pipelines.request import Request, RequestError
from pipelines.result import Picture, pixel_hash
from pipelines.video_files import LOSSY, lossy_copy, read_clip

if TYPE_CHECKING:
    from PIL.Image import Image

NOISE = 1.0
"""Largest root mean square difference, in steps of 255, that is called noise (a PSNR of 48 dB)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What remaking a picture showed: "identical", "within noise" or "different", and every ingredient that is not as it was."""

    verdict: str
    rms: float | None
    largest: int | None
    differs: dict[str, dict[str, Any]]
    seconds: float

    @property
    def same(self) -> bool:
        """Whether the picture counts as reproduced."""
        return self.verdict != "different"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            self.verdict
            if self.rms is None
            else f"{self.verdict} (rms {self.rms:.3f}, largest {self.largest} of 255)"
        ]
        lines += [
            f"  {name}: was {_shown(pair['was'])}, is {_shown(pair['is'])}"
            for name, pair in self.differs.items()
        ]
        if not self.differs and not self.same:
            lines.append(
                "  every recorded ingredient is the same; the difference comes from one that is not recorded"
            )
        return "\n".join(lines)


def repro(
    path: str | Path,
    *,
    model: str | None = None,
    image: str | None = None,
    on_step: OnStep | None = None,
    **named: Any,
) -> Verdict:
    """Remake the picture of a file.

    Args:
        model, image: needed where the file names a model that is not shipped, or a starting picture: nothing that a file
            names is opened unless you name it too.
        named: so too its `last_image` and `clip`, its `mask`, `controls` and `loras`, all of them in the order of the file.

    Raises:
        RequestError: the file holds no request, or names what you have to confirm.
    """
    found = read_metadata(path)
    request, was = Request.from_dict(found["request"]), found["report"]
    changes = _confirmed(request, was, model, image) | _clipping.confirmed(request, was, named)
    request = request.replace(**changes, **confirmed(request, was, named))
    request = request.replace(**_as_it_ran(request, was))
    result = generate(request, on_step=on_step)
    place = _part(was, "panels").get("index")
    picture = result.pictures[place if isinstance(place, int) and 0 <= place < len(result.pictures) else 0]
    differs = compare(was, picture.report)
    timings = sum(result.report["timings"].values())
    if was.get("pixels") == picture.report["pixels"]:
        altered = _altered(Path(path), was, picture)
        return Verdict("different" if altered else "identical", None, None, differs | altered, timings)
    rms, largest, altered = _difference(Path(path), picture, was)
    verdict = "within noise" if rms is not None and rms <= NOISE else "different"
    return Verdict(verdict, rms, largest, differs | altered, timings)


def compare(was: dict[str, Any], now: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the ingredients that differ between two reports: weights, software, device, dtype, accelerators, settings."""
    found = {}
    before, after = _ingredients(was), _ingredients(now)
    for name in before | after:
        if before.get(name) != after.get(name):
            found[name] = {"was": before.get(name), "is": after.get(name)}
    return found


def _part(report: dict[str, Any], name: str) -> dict[str, Any]:
    found = report.get(name)
    return found if isinstance(found, dict) else {}


def _ingredients(report: dict[str, Any]) -> dict[str, Any]:
    effective, run = _part(report, "effective"), _part(report, "run")
    parts = {
        "weights": report.get("weights"),
        "device": effective.get("device_name"),
        "dtype": effective.get("dtype"),
        "starting picture": _part(report, "image").get("sha256"),
        "accelerators": [effective.get("accelerators"), run.get("effective"), run.get("computed")],
    }
    parts |= {
        name: read["sha256"]
        for name, read in report.items()
        if isinstance(read, dict) and set(read) == {"name", "sha256"} and name != "image"
    }
    told = ("field", "strength", "start", "end", "made_by", "condition_size", "calls", "acted")
    rows = [one for one in _part(report, "steering").get("parts") or () if isinstance(one, dict)]
    parts["control"] = [{name: row[name] for name in told if name in row} for row in rows]
    settings = ("pipeline", "scheduler", "steps", "guidance", "guidance_mode", "width", "height", "frames")
    parts |= {f"setting {name}": effective.get(name) for name in settings}
    return parts | {f"version of {name}": number for name, number in _part(report, "versions").items()}


def _confirmed(request: Request, was: dict[str, Any], model: str | None, image: str | None) -> dict[str, str]:
    changes = {}
    if model is not None:
        changes["model"] = model
    elif request.model not in catalog.shipped():
        raise RequestError(
            "model",
            request.model,
            "shipped, or confirmed by you with --model (a folder: --model FOLDER, with the path to it;"
            " a hub id: --model ID): a file cannot choose what is opened",
        )
    if request.profile is not None:  # ours hold what a profile stood for, not its name
        raise RequestError("profile", request.profile, "left out: a file cannot choose what is opened")
    if image is not None:
        changes["image"] = image
    elif request.image is not None:
        name = _part(was, "image").get("name")
        raise RequestError("image", name, "given again with --image: a file cannot choose what is opened")
    return changes


def _as_it_ran(request: Request, was: dict[str, Any]) -> dict[str, str]:
    """Return the dtype and device that took effect then, where they can be had now."""
    effective = _part(was, "effective")
    known = effective.get("dtype") in ("float32", "bfloat16", "float16")
    changes = {"dtype": effective["dtype"]} if known else {}
    device = effective.get("device")
    if isinstance(device, str):
        try:
            changes["device"] = catalog.device_for(Request(prompt="x", device=device).device)
        except (catalog.Unavailable, RequestError):
            changes["device"] = "auto"
    return changes


def _altered(path: Path, was: dict[str, Any], picture: Picture) -> dict[str, dict[str, Any]]:
    """Tell whether the file holds other pixels than its report says.

    An MP4 or a GIF lost something when it was written: it is held against the remade frames after the same loss.
    """
    try:
        frames = _frames(path)
    except RequestError as error:
        return {"the file's own pixels": {"was": was.get("pixels"), "is": f"not readable: {error.allowed}"}}
    if frames is None:
        return {}
    if path.suffix.lower() in LOSSY:
        lost = _gap(frames, lossy_copy(picture.frames, path.suffix.lower()))
        if picture.report["pixels"] != was.get("pixels") or (lost is not None and lost[0] <= NOISE):
            return {}
    elif pixel_hash(frames) == was.get("pixels"):
        return {}
    return {"the file's own pixels": {"was": was.get("pixels"), "is": pixel_hash(frames)}}


def _difference(
    path: Path, picture: Picture, was: dict[str, Any]
) -> tuple[float | None, int | None, dict[str, Any]]:
    try:
        frames = _frames(path)
    except RequestError:
        return None, None, _altered(path, was, picture)
    if frames is None:
        return None, None, {}
    ending = path.suffix.lower()
    made = lossy_copy(picture.frames, ending) if ending in LOSSY else list(picture.frames)
    rms, largest = _gap(frames, made) or (None, None)
    return rms, largest, _altered(path, was, picture)


def _gap(frames: list[Image], others: list[Image]) -> tuple[float, int] | None:
    """Return the root mean square and the largest difference of two clips, None where their sizes differ."""
    import numpy as np

    if len(frames) != len(others) or frames[0].size != others[0].size:
        return None
    old, new = (
        np.stack([np.asarray(one.convert("RGB"), dtype=np.float32) for one in group])
        for group in (frames, others)
    )
    gap = np.abs(old - new)
    return float(np.sqrt((gap**2).mean())), int(gap.max())


def _frames(path: Path) -> list[Image] | None:
    """Return the pictures of a file or a folder of frames, None of a sidecar. Raises: RequestError where they are damaged."""
    return None if path.suffix.lower() == ".json" else read_clip(path, field="file")[0]


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
