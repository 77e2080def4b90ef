"""Every transformer class of diffusers, and ours: each accelerator runs with an effect that is proven, or is refused in words."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from typing import Any

import pytest
import torch

from acceleration import Accelerator, accelerated
from acceleration._guidance import COND_FIRST
from acceleration.base import Refused, Untouched
from dit.seams import announce, observed
from dit.spec import kinds

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),  # towers left out at this size
    pytest.mark.filterwarnings("ignore:In CPU autocast"),  # Mochi asks for float32
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

REUSE, GUIDANCE = "which blocks are computed", "which guidance branches are computed"
# For guidance: classes without a batch, or with latents under a name of their own, are called twice a step; and classes
# whose inputs here hold no condition that could be left out.
ONE_BY_ONE = ("Cosmos3OmniTransformer", "T5FilmDecoder")
UNCONDITIONED = (
    "Kandinsky6SRTransformer3DModel", "MiniMaxMusic3RVQDepthDecoder", "OmniGenTransformer2DModel",
    "TransformerTemporalModel",
)  # fmt: skip
FEW: dict[str, Any] = {"interval": 3, "warmup": 1, "final_full": 1}
SMALL: dict[str, Any] = {"min_tokens": 16, "dense_layers": 0, "measure": False, "warmup": 0.2}
# Of each method: the settings that change nothing, and some that save much in few steps. The others run as they come.
SETTINGS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "delta-cache": (
        {"interval": 1},
        [FEW | {"mode": "rear"}, FEW | {"mode": "front", "cached_fraction": 0.5}],
    ),
    "taylor-cache": ({"interval": 1}, [FEW | {"fresh": 0, "order": 0}, FEW | {"level": "modules"}]),
    "adaspa": ({"density": 1.0}, [SMALL | {"density": 0.4, "rows": 4, "block": 4, "guard": 0.0}]),
    "xattention": (
        {"threshold": 1.0},
        [SMALL | {"threshold": 0.05, "stride": 2, "rows": 16, "block": 16, "min_tokens": 30}],
    ),
    "guidance-skip": ({"interval": 1}, [{"warmup": 1}, {"warmup": 2, "mode": "forecast", "interval": 3}]),
    "step-forecast": ({"interval": 1}, [FEW | {"order": 0}, FEW]),
    "token-merge": (
        {"ratio": 0.0},
        [{"min_tokens": 16, "window": 4}],
    ),
}


def settings() -> list[tuple[Accelerator | None, list[Accelerator]]]:
    """Return the neutral form, if known, and the eager ones of every registered method."""
    found: list[tuple[Accelerator | None, list[Accelerator]]] = []
    for name, cls in kinds(Accelerator).items():
        if name in SETTINGS:
            neutral, eager = SETTINGS[name]
            found.append((cls(**neutral), [cls(**one) for one in eager]))
        else:
            found.append((None, [cls()]))
    return found


def classes() -> list[str]:
    """Return the names of all model classes in diffusers' folder of transformers, by looking at every module there."""
    import diffusers
    from diffusers.models import transformers

    found = []
    for one in pkgutil.iter_modules(transformers.__path__):
        module = importlib.import_module(f"{transformers.__name__}.{one.name}")
        found += [
            name
            for name, cls in vars(module).items()
            if inspect.isclass(cls)
            and issubclass(cls, diffusers.ModelMixin)
            and cls.__module__ == module.__name__
        ]
    return found


def sample(tiny: Any, given: dict[str, Any], steps: int) -> list[torch.Tensor]:
    first = next(iter(given))
    latents, outputs = given[first], []
    for step in range(steps):
        scale = 1 - step / (2 * steps)
        moved = [x * scale for x in latents] if isinstance(latents, list) else latents * scale
        announce(tiny.model, step=step)
        outputs.append(tiny.call(given | {first: moved}, 1 - step / steps))
    return outputs


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check(tiny: Any, method: Accelerator) -> None:
    """Run a method twice, and once with inputs that stay equal. Raises: Refused or Untouched where it says that it cannot."""
    if method.seam == GUIDANCE:
        guided(tiny, method)
        return
    steps, before = 5, len(list(tiny.model.modules()))
    given = tiny.inputs(rows=4 if method.seam == REUSE else 8)
    plain = sample(tiny, given, steps)
    assert all(torch.isfinite(one).all() for one in plain)
    with accelerated(tiny.model, method, steps=steps) as run:
        first, second = sample(tiny, given, steps), sample(tiny, given, steps)
    report = run.report()
    assert equal(first, second), f"{method}: the second run differs"
    assert not equal(plain, first), f"{method}: nothing changed"
    assert equal(plain, sample(tiny, given, steps)), f"{method}: not restored"
    assert len(list(tiny.model.modules())) == before
    if method.seam != REUSE:
        assert report.sparse + report.merged > 0
    else:
        assert report.computed < report.calls * report.blocks
        assert report.reused + report.forecast > 0
        still(tiny, method, steps)


def guided(tiny: Any, method: Accelerator) -> None:
    """Spare unconditional forwards, with both branches in one batch and one after the other; what is computed stays exact."""
    name, steps = type(tiny.model).__name__, 5
    both = {} if name in ONE_BY_ONE else doubled(tiny)
    pair = [tiny.inputs(), tiny.inputs()] if name in ONE_BY_ONE else []

    def play() -> list[torch.Tensor]:
        return alternated(tiny, pair, steps) if pair else sample(tiny, both, steps)

    plain = play()
    assert all(torch.equal(*one.chunk(2)) for one in plain) is (name in UNCONDITIONED)
    if name in UNCONDITIONED:
        return
    with accelerated(tiny.model, method, steps=steps) as run:
        first, second = play(), play()
    assert equal(first, second), f"{method}: the second run differs"
    made = [cell["unconditional"] for cell in run.report().cells if cell["branch"] == "uncond"]
    assert {"computed"} < set(made)
    assert set(made) <= {"computed", "reused", "forecast"}
    assert {cell["states"].strip("C") for cell in run.report().cells if cell["branch"] == "cond"} == {""}
    half = 1 if pair or name in COND_FIRST else 0
    for step, how in enumerate(made[:steps]):
        for place in (0, 1):
            a, b = plain[step].chunk(2)[place], first[step].chunk(2)[place]
            near = float((a - b).norm() / a.norm()) < 1e-4
            assert near or (place == half and how != "computed"), f"{method}: step {step}, half {place}"
    assert equal(plain, play()), f"{method}: not restored"


def alternated(tiny: Any, pair: list[dict[str, Any]], steps: int) -> list[torch.Tensor]:
    """Return what a conditional and an unconditional call answer in each step, in one tensor."""
    outputs = []
    for step in range(steps):
        answers = []
        for given, branch in zip(pair, ("cond", "uncond"), strict=True):
            announce(tiny.model, step=step, branch=branch)
            answers.append(tiny.call(given, 1 - step / steps))
        outputs.append(torch.cat(answers))
    return outputs


def doubled(tiny: Any) -> dict[str, Any]:
    """Return the inputs of two samples with equal latents and different prompts."""
    given = tiny.inputs(images=2)
    first = next(iter(given))
    latents = given[first]
    same = [latents[0]] * 2 if isinstance(latents, list) else torch.cat([latents[:1]] * 2)
    return given | {first: same}


def still(tiny: Any, method: Accelerator, steps: int) -> None:
    """With equal inputs at every step what is reused is exact, with a ControlNet's residuals too."""
    for injected in ({}, tiny.residuals() if tiny.family.residuals else None):
        if injected is None:
            continue
        given = tiny.inputs() | injected
        exact = tiny.call(given, 1.0)
        with accelerated(tiny.model, method, steps=steps) as run:
            for step in range(steps):
                announce(tiny.model, step=step)
                error = (tiny.call(given, 1.0) - exact).norm() / exact.norm()
                assert error < 1e-5, f"{method}: error {error:.2g} at step {step} with equal inputs"
        assert run.tally["R"] + run.tally["F"] > 0


def words_of(tiny: Any, method: Accelerator) -> str | None:
    """Return in words why a method was refused; None if it ran and passed all checks."""
    try:
        check(tiny, method)
    except (Refused, Untouched) as error:
        return str(error)
    return None


def test_every_class_has_a_row_or_a_reason(tables: Any) -> None:
    theirs = {name for name, row in tables.rows().items() if row.home.startswith("diffusers")}
    reasons = set(tables.load("table_sound").UNBUILT)
    assert theirs | reasons == set(classes())
    assert not theirs & reasons


@pytest.mark.parametrize("name", [*sorted(classes()), "DiT", "MMDiT", "EMMDiT"])
def test_each_accelerator_runs_or_is_refused(name: str, tables: Any) -> None:
    if name not in tables.rows():
        pytest.skip(tables.load("table_sound").UNBUILT[name])
    refused = tables.load("table_sound").REFUSED.get(name)
    tiny = tables.build(name)
    given = tiny.inputs()
    with observed(tiny.model) as visits:
        tiny.call(given, 1.0)
    assert [visit.path for visit in visits if isinstance(visit.streams, str)] == []
    plain, told = sample(tiny, given, 2), []
    for neutral, eager in settings():
        if neutral is not None:
            with accelerated(tiny.model, neutral, steps=2):
                assert equal(plain, sample(tiny, given, 2)), neutral
        for method in eager:
            words = words_of(tiny, method)
            if words is not None:
                told.append(words)
                assert len(words.split()) > 4
                tiles = (
                    method.name == "xattention" and "min_tokens" in words
                )  # its smallest tiles are large here
                assert tiles or (refused and re.search(refused, words)), words
    assert refused is None or told, f"{name} now runs with everything: take it out of REFUSED"
    assert equal(plain, sample(tiny, given, 2))
