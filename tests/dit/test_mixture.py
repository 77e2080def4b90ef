"""The mixture of a shared and routed experts: fast path equals the plain one, and what it says of itself is so."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dit.experts import _dispatch
from dit.experts._dispatch import ACTIVATIONS, GATED, dispatch, dispatch_reference, grouped_linear
from dit.experts.dense import Experts
from dit.experts.mixture import (
    BLIND,
    Mixture,
    MixtureLayer,
    layers_of,
    load_balance,
    set_active,
    watched,
)
from dit.ledger import activated_of, macs_of, parameters_of
from dit.spec import parse

WIDTH, HIDDEN = 16, 64


def layer(seed: int = 0, **settings: object) -> MixtureLayer:
    torch.manual_seed(seed)
    made = MixtureLayer(WIDTH, HIDDEN, Mixture(**settings))  # type: ignore[arg-type]
    for one in made.parameters():
        nn.init.normal_(one, std=0.5)
    return made


def tokens(rows: int = 37) -> Tensor:
    return torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(1))


def routed(kind: str, rows: int = 29, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | str | None]:
    """Random experts, one of them chosen by nobody, and a choice for every token."""
    draw = torch.Generator().manual_seed(2)
    experts, size = 5, 3
    inner = size * (2 if kind in GATED else 1)
    choice = torch.rand(rows, experts - 1, generator=draw).argsort(dim=1)[:, :2]
    return {
        "x": torch.randn(rows, WIDTH, generator=draw, dtype=dtype, requires_grad=True),
        "indices": choice,
        "gates": torch.rand(rows, 2, generator=draw, dtype=dtype, requires_grad=True),
        "up": torch.randn(experts, inner, WIDTH, generator=draw, dtype=dtype, requires_grad=True),
        "bias": torch.randn(experts, inner, generator=draw, dtype=dtype, requires_grad=True),
        "down": torch.randn(experts, WIDTH, size, generator=draw, dtype=dtype, requires_grad=True),
        "kind": kind,
    }


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_fast_path_equals_the_plain_one_and_so_do_its_gradients(kind: str) -> None:
    fast, plain = routed(kind), routed(kind)
    ours, theirs = dispatch(**fast), dispatch_reference(**plain)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().max() > 0.1
    for out in (ours, theirs):
        out.square().sum().backward()
    for name in ("x", "gates", "up", "bias", "down"):
        torch.testing.assert_close(fast[name].grad, plain[name].grad, msg=name)  # type: ignore[union-attr]


def test_the_operator_tells_torch_the_truth_about_itself() -> None:
    given = routed("gelu")
    counts = torch.tensor([10, 0, 12, 5, 2])
    torch.library.opcheck(_dispatch._segments, (given["x"], counts, given["up"]))


def test_torchs_own_grouped_product_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes that path; torch runs it on a processor too, so it can be compared here."""
    x, weight = torch.randn(24, 16), torch.randn(3, 8, 16)
    counts = torch.tensor([5, 0, 19])
    loop = grouped_linear(x, counts, weight)
    monkeypatch.setattr(_dispatch, "_grouped_kernel_fits", lambda *_: True)
    torch.testing.assert_close(grouped_linear(x, counts, weight), loop)


def test_the_sizes_are_those_of_the_paper() -> None:
    """1S12E2A: shared one part, twelve experts of a quarter, two of them at work: 1.5 parts of 4."""
    assert Mixture().sizes(4 * 3072) == (3072, 768)
    assert Mixture().activated_share == pytest.approx(0.375)
    assert Mixture(active=0).activated_share == pytest.approx(0.25)


def test_activated_parameters_and_macs_are_counted() -> None:
    made = layer()
    dense = 2 * WIDTH * HIDDEN
    gate = 12 * WIDTH
    biases = HIDDEN * 3 // 8 + WIDTH
    assert activated_of(made) == dense * 3 // 8 + biases + gate
    assert parameters_of(made) == dense + HIDDEN + WIDTH + gate
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made(tokens())
    assert counter.get_total_flops() == 2 * macs_of(made, 74) == 2 * 74 * (dense * 3 // 8 + gate)


def test_the_count_of_experts_changes_at_any_time() -> None:
    made, x = layer(), tokens()
    two = made(x)
    set_active(made, 0)
    assert torch.equal(made(x), made.shared(x))
    assert activated_of(made) == parameters_of(made.shared)
    set_active(made, 12)
    every = made(x)
    set_active(made, 2)
    assert torch.equal(made(x), two)
    assert not torch.allclose(two, every)
    with pytest.raises(ValueError, match=r"active experts: from 0 to 12, got 13"):
        set_active(made, 13)
    with pytest.raises(ValueError, match="Linear has no mixture"):
        layers_of(nn.Linear(2, 2))


def test_the_masked_path_is_the_compact_one() -> None:
    made, x = layer(active=3), tokens()
    compact = made(x)
    made.masked = True
    torch.testing.assert_close(made(x), compact)


def test_the_best_experts_are_used_and_weighted_by_their_gate() -> None:
    made, x = layer(active=1), tokens(5)
    gates = torch.softmax(made.gate(x), dim=-1) * 12
    best = gates.argmax(dim=-1)
    up, bias, down = made.stacked(torch.float32)
    assert bias is not None
    for place in ((0, 0), (1, 3)):
        e = int(best[place])
        inner = torch.nn.functional.gelu(up[e] @ x[place] + bias[e], approximate="tanh")
        expected = made.shared(x)[place] + gates[place][e] * (down[e] @ inner)
        torch.testing.assert_close(made(x)[place], expected)


def test_a_router_that_knows_nothing_weighs_all_experts_alike() -> None:
    torch.manual_seed(0)
    made = MixtureLayer(WIDTH, HIDDEN, Mixture(active=12))
    nn.init.normal_(made.gate.weight, std=BLIND)
    plain = made(tokens())
    made.unit_gates = True
    torch.testing.assert_close(made(tokens()), plain, rtol=1e-5, atol=1e-5)


def test_the_load_balance_loss_is_one_when_even_and_more_when_not() -> None:
    even = torch.ones(12, 4)
    turns = torch.arange(12).view(12, 1) % 4
    assert float(load_balance(even, turns)) == pytest.approx(1.0)
    lopsided = torch.tensor([4.0, 0.0, 0.0, 0.0]).expand(12, 4)
    assert float(load_balance(lopsided, torch.zeros(12, 1, dtype=torch.long))) == pytest.approx(4.0)


def test_the_loss_is_left_behind_in_training_alone_and_balances() -> None:
    made = layer(balance=1.0)
    x = tokens(64) + 1  # what all tokens have in common sends them to the same experts at first
    made.eval()(x)
    assert made.auxiliary == {}
    made.train()
    optimizer = torch.optim.SGD([made.gate.weight], lr=0.3)
    losses = []
    for _ in range(60):
        made(x)
        loss = made.auxiliary["load_balance"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 1.2
    assert losses[-1] < 1.05


def test_decisions_are_kept_while_watched() -> None:
    made, x = layer(), tokens()
    made(x)
    assert made.decision is None
    with watched(made) as found:
        made(x)
        decision = found[""].decision
        assert decision is not None
        assert decision.active is not None
        assert decision.active.shape == (2, 37, 12)
        assert torch.equal(decision.active.sum(dim=-1), torch.full((2, 37), 2.0))
    assert made.decision is None


def test_gradients_reach_everything_the_gate_included() -> None:
    made = layer()
    made(tokens(200)).square().mean().backward()
    assert [name for name, one in made.named_parameters() if one.grad is None or not one.grad.any()] == []


def test_bfloat16_is_close() -> None:
    """The choice itself may differ where two experts are as good; with all of them on it cannot."""
    made, x = layer(active=12), tokens()
    plain = made(x).detach()
    half = made.to(torch.bfloat16)(x.to(torch.bfloat16)).detach().float()
    assert float((half - plain).abs().max()) < 0.05 * float(plain.abs().max())


def test_it_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    made, x = layer(), tokens()
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixture:active=13", "active must be at most experts, got active=13, experts=12"),
        ("mixture:experts=0", "experts must be a whole number from 1 to 512"),
        ("mixture:activation=relu", "activation must be one of"),
    ],
)
def test_settings_that_cannot_work_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(Experts, text)


def test_too_few_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="8 hidden channels are too few"):
        MixtureLayer(WIDTH, 8, Mixture(experts=40))
