"""Every mixer with every kind of experts: builds, learns a step, is saved and loaded, and is accelerated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dit.experts
import dit.mixers
from acceleration import Accelerator, DeltaCache, accelerated
from acceleration.base import Refused, Untouched
from dit.backbones.dit import DiT
from dit.backbones.mmdit import MMDiT
from dit.experts.dense import Experts
from dit.ledger import activated_of, analytic, parameters_of
from dit.mixers.full import Mixer
from dit.spec import kinds

assert dit.experts
assert dit.mixers

SLOTS = [(mixer, "dense") for mixer in kinds(Mixer)] + [("full", experts) for experts in kinds(Experts)]
EAGER: dict[str, dict[str, Any]] = {  # so that few steps and short sequences are not left alone
    "delta-cache": {"interval": 2, "warmup": 1, "final_full": 1},
    "taylor-cache": {"interval": 2, "warmup": 1, "final_full": 1},
    "step-forecast": {"interval": 2, "warmup": 1, "final_full": 1},
    "adaspa": {"min_tokens": 16, "density": 0.4, "rows": 4, "block": 4, "dense_layers": 0, "warmup": 0.2},
    "xattention": {"min_tokens": 16, "threshold": 0.05, "stride": 2, "rows": 16, "block": 16, "dense_layers": 0, "warmup": 0.2},
    "token-merge": {"min_tokens": 16, "window": 4},
    "guidance-skip": {"warmup": 1},
}
PAIRS = [(mixer, experts) for mixer in kinds(Mixer) for experts in kinds(Experts)]


def one_stream(mixer: str, experts: str) -> DiT:
    torch.manual_seed(0)
    return DiT(
        sample_size=16, width=32, depth=3, heads=2, mlp_ratio=2.0, num_classes=5, convention="flow", mixer=mixer, experts=experts
    )


def two_streams(mixer: str, experts: str) -> MMDiT:
    torch.manual_seed(0)
    return MMDiT(
        in_channels=4, patch_size=2, sample_size=16, width=32, heads=2, dual_depth=2, single_depth=2, mlp_ratio=2.0, context_dim=12,
        pooled_dim=None, position="both", mixer=mixer, experts=experts,
    )  # fmt: skip


def inputs(network: nn.Module) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    found: dict[str, Any] = {
        "hidden_states": torch.randn(2, 4, 16, 16, generator=draw),
        "timestep": torch.tensor([400.0, 400.0]),
    }
    if isinstance(network, MMDiT):
        return found | {"encoder_hidden_states": torch.randn(2, 8, 12, generator=draw)}
    return found | {"class_labels": torch.tensor([1, 5])}


def answer(network: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out: Tensor = network(**given).sample
    return out


@pytest.mark.parametrize(("mixer", "experts"), PAIRS)
@pytest.mark.parametrize("build", [one_stream, two_streams])
def test_every_pair_works(build: Any, mixer: str, experts: str, tmp_path: Path) -> None:
    try:
        network = build(mixer, experts)
    except ValueError as error:  # a mixer that cannot join two streams says so
        assert build is two_streams
        assert mixer in str(error)  # noqa: PT017 - building either works or says why
        return
    given = inputs(network)
    learnt = learn(network, given)
    assert learnt
    network.eval()
    plain = answer(network, given)
    assert plain.isfinite().all()
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path)
    assert torch.equal(answer(again, given), plain)
    rows = analytic(network, 16, 16, text=8 if build is two_streams else 0)
    assert rows.parameters == parameters_of(network) >= activated_of(network) == rows.activated
    accelerates(network, given)


@pytest.mark.parametrize("mixer", list(kinds(Mixer)))
@pytest.mark.parametrize("build", [one_stream, two_streams])
def test_no_mixer_passes_routed_heads_by(build: Any, mixer: str) -> None:
    try:
        network = build(mixer, "dynamic:start_width=0,start_tokens=0,weight=0")
    except ValueError:
        return
    for one in network.parameters():
        if not one.any():
            nn.init.normal_(one, std=0.1)
    network.train()
    network(**inputs(network)).sample.square().mean().backward()
    gates = [name for name, one in network.named_parameters() if name.endswith("router.heads.weight") and not one.grad.any()]
    assert gates == []


@pytest.mark.parametrize(("mixer", "experts"), SLOTS)
@pytest.mark.parametrize("build", [one_stream, two_streams])
def test_every_accelerator_runs_or_is_refused(build: Any, mixer: str, experts: str) -> None:
    try:
        network = build(mixer, experts)
    except ValueError:
        return
    for one in network.parameters():
        if not one.any():
            nn.init.normal_(one, std=0.1)
    network.eval()
    given = inputs(network)
    plain, ran, refused = steps(network, given), [], {}
    for name, method in kinds(Accelerator).items():
        try:
            with accelerated(network, method(**EAGER.get(name, {})), steps=4):
                made = steps(network, given)
        except (Refused, Untouched) as error:
            refused[name] = str(error)
        else:
            assert all(one.isfinite().all() for one in made), name
            ran.append(name)
        assert all(torch.equal(a, b) for a, b in zip(plain, steps(network, given), strict=True)), name
    assert {"delta-cache", "step-forecast"} <= set(ran)
    assert all(len(words.split()) > 3 for words in refused.values()), refused


@pytest.mark.parametrize(("mixer", "experts"), SLOTS)
@pytest.mark.parametrize("build", [one_stream, two_streams])
def test_every_slot_works_in_half_precision(build: Any, mixer: str, experts: str) -> None:
    try:
        network = build(mixer, experts).eval()
    except ValueError:
        return
    given = inputs(network)
    for one in network.parameters():
        if not one.any():
            nn.init.normal_(one, std=0.02)
    whole = answer(network, given)
    half = answer(network.to(torch.bfloat16), given)
    assert half.dtype == torch.float32
    assert float((half - whole).abs().max()) < 0.1 * float(whole.abs().max())


def steps(network: Any, given: dict[str, Any]) -> list[Tensor]:
    """Four calls from noise to picture."""
    return [answer(network, given | {"timestep": torch.full((2,), t)}) for t in (800.0, 600.0, 400.0, 200.0)]


def learn(network: Any, given: dict[str, Any]) -> bool:
    """Take two steps; whether the loss fell and every part of the second gradient is finite."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        torch.manual_seed(2)
        error = (network(**given).sample - 1).square().mean()
        (error + sum(network.auxiliary_losses().values())).backward()
        assert all(one.grad is None or one.grad.isfinite().all() for one in network.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(error.detach()))
    return losses[-1] < losses[0]


def accelerates(network: Any, given: dict[str, Any]) -> None:
    """Neutral settings are bit-equal, eager ones leave blocks out, and nothing stays."""

    def run() -> list[Tensor]:
        return steps(network, given)

    plain = run()
    with accelerated(network, DeltaCache(interval=1), steps=4):
        assert all(torch.equal(a, b) for a, b in zip(plain, run(), strict=True))
    with accelerated(network, DeltaCache(interval=2, mode="whole", warmup=1, final_full=1), steps=4) as tally:
        run()
    assert tally.report().reused > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, run(), strict=True))
