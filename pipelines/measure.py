"""What an accelerator costs and gains: exact and accelerated from the same noise, taken in turns, measured in this run.

The floor is what the exact run does when it is repeated: no accelerated run can be told from that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.compare import Difference, difference, difference_of_clips
from pipelines.likeness import Likeness, likeness
from pipelines.request import Request, RequestError
from pipelines.video_files import LOSSY

if TYPE_CHECKING:
    from pipelines.generate import OnStep
    from pipelines.result import Result

ROUNDS = 100
"""Most rounds of one comparison."""
KINDS = ("exact", "accelerated")
PHASES = ("encode", "denoise", "decode")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One comparison. `pictures` and `floor` hold a difference for each picture, `times` the seconds of every round.

    `latent_errors` are |accelerated - exact| / |exact| before decoding; None where the pipeline decodes nothing.
    `results` holds the first result of each kind, by "exact" and "accelerated".
    """

    request: Request
    rounds: int
    pictures: tuple[Difference, ...]
    floor: tuple[Difference, ...]
    latent_errors: tuple[float | None, ...]
    times: dict[str, dict[str, list[float]]]
    predicted_speedup: float | None
    report: dict[str, Any]
    failures: tuple[str, ...]
    results: dict[str, Result] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def psnr(self) -> float:
        """Mean PSNR of the pictures in dB; infinite if all are identical."""
        finite = [one.psnr for one in self.pictures if math.isfinite(one.psnr)]
        return statistics.fmean(finite) if finite else math.inf

    @property
    def ssim(self) -> float:
        """Mean SSIM of the pictures."""
        return statistics.fmean(one.ssim for one in self.pictures)

    def speedup(self, of: str = "end_to_end") -> float:
        """Return median exact time over median accelerated time, `of` the denoising loop (`denoise`) or `end_to_end`."""
        exact, fast = (statistics.median(self.times[kind][of]) for kind in KINDS)
        return exact / fast if fast > 0 else math.inf

    @property
    def settled(self) -> bool:
        """Whether every accelerated round was faster, or every one slower, than every exact one."""
        exact, fast = (self.times[kind]["end_to_end"] for kind in KINDS)
        return max(fast) < min(exact) or min(fast) > max(exact)

    @property
    def verdict(self) -> str:
        """The comparison in words."""
        if self.failures:
            return f"failed: {'; '.join(self.failures)}"
        speed = self.speedup()
        if not self.settled:
            gain = f"no difference in time that {self.rounds} rounds could show"
        elif speed >= 1:
            gain = f"{speed:.2f} times faster"
        else:
            gain = f"slower ({speed:.2f} times the speed)"
        return f"{gain}; {self._likeness()}"

    def _likeness(self) -> str:
        worst = max(self.pictures, key=lambda one: one.largest if one.largest <= 1 else 1000 - one.psnr)
        if worst.largest == 0:
            return "the same picture, bit for bit"
        noise = min(one.psnr for one in self.floor)
        if min(one.psnr for one in self.pictures) >= noise:
            return "no further from the exact picture than a second exact run"
        words = {
            "within rounding": "the same picture within rounding",
            "small": "a small difference",
            "visible": "a visible difference",
        }
        return words.get(worst.verdict, worst.verdict)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; an infinite PSNR is null."""
        return {
            "request": self.request.to_dict(),
            "rounds": self.rounds,
            "psnr_db": _number(self.psnr),
            "ssim": round(self.ssim, 5),
            "pictures": [one.to_dict() for one in self.pictures],
            "latent_errors": [None if one is None else _number(one, 6) for one in self.latent_errors],
            "floor": [one.to_dict() for one in self.floor],
            "times": self.times,
            "median": {
                kind: {name: statistics.median(seconds) for name, seconds in found.items()}
                for kind, found in self.times.items()
            },
            "speedup": {name: self.speedup(name) for name in ("denoise", "end_to_end")},
            "settled": self.settled,
            "predicted_speedup": self.predicted_speedup,
            "run": self.report.get("run", {}),
            "failures": list(self.failures),
            "verdict": self.verdict,
        }

    def __str__(self) -> str:
        lines = [self.verdict]
        for name, words in (("denoise", "denoising loop"), ("end_to_end", "end to end")):
            exact, fast = (statistics.median(self.times[kind][name]) for kind in KINDS)
            lines.append(f"{words}: exact {exact:.3f} s, accelerated {fast:.3f} s, {self.speedup(name):.2f}x")
        if self.predicted_speedup is not None:
            lines.append(
                f"predicted from the schedule: {self.predicted_speedup:.2f}x (an estimate, blocks alone)"
            )
        lines += [f"picture {place}: {one}" for place, one in enumerate(self.pictures)]
        errors = [one for one in self.latent_errors if one is not None]
        if errors:
            lines.append(f"latent error: {statistics.fmean(errors):.3%}")
        lines.append(f"exact against itself: {'; '.join(map(str, dict.fromkeys(map(str, self.floor))))}")
        lines.append(str(self.report.get("summary", "")))
        return "\n".join(lines)


def compare(
    request: Request, accelerators: Sequence[Any], rounds: int = 3, *, on_step: OnStep | None = None
) -> Measured:
    """Make the pictures of a request exactly and accelerated, in turns, and measure both.

    One run of each kind goes before, untimed. Loading is never counted.

    A request that names a profile is compared with what the profile stands for, and no accelerators are given.

    Raises:
        RequestError: no accelerator is given, or one that cannot work here; and all that `generate` raises.
    """
    from pipelines.generate import generate

    if not accelerators and request.profile is None:
        raise RequestError("accelerators", [], "at least one, such as delta-cache")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= ROUNDS:
        raise RequestError("rounds", rounds, f"a whole number from 1 to {ROUNDS}")
    requests = {
        "exact": request.replace(accelerators=(), profile=None),
        "accelerated": request.replace(accelerators=tuple(accelerators)),
    }
    times: dict[str, dict[str, list[float]]] = {kind: {"denoise": [], "end_to_end": []} for kind in KINDS}
    first: dict[str, Result] = {}
    latents: dict[str, list[Any]] = {}
    floor: list[Difference] = []
    for kind in KINDS:  # warm up, and keep the latents: nothing is captured while time counts
        with _latents(requests[kind]) as latents[kind]:
            first[kind] = generate(requests[kind], on_step=on_step, retry=False)
    for turn in range(rounds):
        for kind in KINDS if turn % 2 == 0 else reversed(KINDS):
            result = generate(requests[kind], on_step=on_step, retry=False)
            seconds = result.report["timings"]
            times[kind]["denoise"].append(seconds["denoise"])
            times[kind]["end_to_end"].append(sum(seconds[phase] for phase in PHASES))
            if kind == "exact":
                floor = _furthest(floor, _differences(result, first["exact"]))
    report = first["accelerated"].report
    return Measured(
        request=first["accelerated"].request,
        rounds=rounds,
        pictures=tuple(_differences(first["accelerated"], first["exact"])),
        floor=tuple(floor),
        latent_errors=tuple(_errors(latents, request.images)),
        times=times,
        predicted_speedup=_predicted(first["accelerated"].request, report),
        report=report,
        failures=tuple(f"{kind}: {one}" for kind in KINDS for one in first[kind].report.get("failures", [])),
        results=first,
    )


def files(a: str | Path, b: str | Path) -> Difference | Likeness:
    """Compare two files: pictures, clips or folders of frames. Raises: RequestError where one cannot be read or sizes differ."""
    from pipelines.inputs import read_image

    first, second = Path(a).expanduser(), Path(b).expanduser()
    if _moving(first) or _moving(second):
        return likeness(first, second, ("first file", "second file"))

    pictures = [read_image(str(one))[0] for one in (a, b)]
    assert pictures[0] is not None
    assert pictures[1] is not None
    try:
        return difference(pictures[0], pictures[1])
    except ValueError as error:
        raise RequestError("files", f"{a} and {b}", f"pictures that can be compared ({error})") from None


def _moving(path: Path) -> bool:
    """Whether a file holds more than one picture; one that cannot be read is told of when it is."""
    from PIL import Image

    if path.is_dir() or path.suffix.lower() in LOSSY:
        return True
    try:
        with Image.open(path) as opened:
            return int(getattr(opened, "n_frames", 1)) > 1
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return False


def _differences(result: Result, other: Result) -> list[Difference]:
    return [difference_of_clips(a, b) for a, b in zip(result.clips, other.clips, strict=True)]


def _furthest(known: list[Difference], new: list[Difference]) -> list[Difference]:
    if not known:
        return new
    return [min(pair, key=lambda one: one.psnr) for pair in zip(known, new, strict=True)]


@contextlib.contextmanager
def _latents(request: Request) -> Iterator[list[Any]]:
    """Note what goes into the decoder of the model's pipeline, the last time for each picture."""
    from dit.seams import patched
    from pipelines import catalog
    from pipelines.generate import check

    folder, card = catalog.prepare(catalog.find(request.model))
    check(request, card)
    pipeline = catalog.load_folder(folder, card, request.dtype, request.device).pipeline
    decoder = next(
        (found for name in ("codec", "vae") if (found := getattr(pipeline, name, None)) is not None), None
    )
    seen: list[Any] = []
    if decoder is None:
        yield seen
        return
    inner = decoder.decode

    def decode(latents: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(latents.detach().to("cpu"))
        return inner(latents, *args, **kwargs)

    with patched(decoder, "decode", decode):
        yield seen


def _errors(latents: dict[str, list[Any]], count: int) -> list[float | None]:
    exact, fast = (latents[kind] for kind in KINDS)
    if len(exact) != count or len(fast) != count:  # no decoder, or one that works in pieces
        return [None] * count
    found: list[float | None] = []
    for a, b in zip(fast, exact, strict=True):
        size = float(b.double().norm())
        found.append(float((a.double() - b.double()).norm()) / size if size else None)
    return found


def _predicted(request: Request, report: dict[str, Any]) -> float | None:
    """Return what the schedules alone promise; None where a method makes no prediction."""
    found = report["run"].get("predicted_speedup") if request.accelerators else None
    return None if found is None else float(found)


def _number(value: float, digits: int = 2) -> float | None:
    return round(value, digits) if math.isfinite(value) else None
