"""Switch-DiT and task routing: the released recordings, and what the papers claim of the mechanism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fidelity
from dit.backbones.dit import DiT
from dit.backbones.mmdit import MMDiT
from dit.convert import LayoutError, convert, find
from dit.experts.dtr import TaskRouter, TaskRouting
from dit.experts.switch import LinearExperts, Switch, SwitchRouter, TimeGate, prior_loss, prior_table
from dit.ledger import analytic, parameters_of
from dit.presets import build

SIZE: dict[str, Any] = {"sample_size": 8, "width": 24, "depth": 3, "heads": 3, "num_classes": 5}
ARGS: dict[str, Any] = {
    "input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 3, "num_heads": 2, "num_classes": 7,
}  # fmt: skip


@pytest.fixture
def fixture() -> Path:
    folder = Path(__file__).resolve().parents[2] / ".." / "shared" / "fixtures" / "Switch-DiT"
    if not folder.is_dir():
        pytest.skip("the recordings of the released code are not here")
    return folder


def inputs(batch: int = 4) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=draw),
        "timestep": torch.tensor([5, 300, 300, 990])[:batch],
        "class_labels": torch.tensor([0, 1, 2, 5])[:batch],
    }


def filled(model: Any, std: float = 0.3) -> Any:
    torch.manual_seed(0)
    for one in model.parameters():
        if not one.any():
            torch.nn.init.normal_(one, std=std)
    return model


def test_recordings_are_reproduced(fixture: Path) -> None:
    assert fidelity.main([str(fixture), "--mid"]) == fidelity.HIT


def test_every_official_table_loads_strictly(fixture: Path) -> None:
    presets = json.loads((fixture / "config.json").read_text())["official_presets"]
    for name, table in json.loads((fixture / "keys.json").read_text()).items():
        preset = presets[name.split()[0]]
        keys = ("depth", "hidden_size", "patch_size", "num_heads", "mlp_ratio", "in_channels", "num_classes", "learn_sigma")
        args = {"model": {key: preset[key] for key in keys}, "routing": {"name": "DMoE"}}
        state = {key: torch.empty(shape, device="meta") for key, shape in table.items()}
        model = convert(state, "Switch-DiT", args)
        again = find("Switch-DiT").to_official(model)
        assert {key: list(value.shape) for key, value in again.items()} == table


@pytest.mark.parametrize(
    "routing",
    [
        {"name": "DMoE", "taskcount": 50, "w_JSD": 0.5, "param": {"num_experts": 5, "k": 3}},
        {"name": "DMoE", "param": {"num_experts": 2, "k": 2}},
        {"name": "DTR", "param": {"alpha": 2.0, "beta": 0.5, "taskcount": 100}},
    ],
    ids=str,
)
def test_other_configurations_go_out_and_come_back(routing: dict[str, Any]) -> None:
    found = find("Switch-DiT")
    args = {"model": ARGS, "routing": routing}
    model = filled(found.build(args, {})).eval()
    official = found.to_official(model)
    again = convert(official, "Switch-DiT", args)
    case = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([3, 40]), "y": torch.tensor([0, 7])}
    assert torch.equal(found.run(again, case)["model"], found.run(model, case)["model"])
    draws = {"rand_label": torch.tensor([0.9, 0.01])}
    if routing["name"] == "DMoE":
        count = 3 * routing["param"]["num_experts"]
        draws |= {"rand_gate": torch.rand(count), "rand_prior": torch.rand(count)}
        loss = found.run(again, case | draws)["aux_loss"].detach()
        assert 0 <= float(loss) <= 0.7 * routing.get("w_JSD", 1)  # a divergence is at most ln 2
    bad = next(key for key in official if "routers" in key)
    with pytest.raises(LayoutError, match=r"routers|missing|released"):
        convert({key: value for key, value in official.items() if key != bad} | {"routers.0.nothing": torch.ones(1)},
                "Switch-DiT", args)  # fmt: skip


def test_unknown_routing_is_refused() -> None:
    with pytest.raises(LayoutError, match="routing is one of DMoE, DTR"):
        find("Switch-DiT").build({"model": ARGS, "routing": {"name": "MoE"}}, {})
    with pytest.raises(LayoutError, match="no argument"):
        find("Switch-DiT").build({"model": ARGS, "routing": {"name": "DMoE", "param": {"experts": 3}}}, {})


def test_begins_as_the_plain_network() -> None:
    torch.manual_seed(3)
    routed = DiT(**SIZE, experts=Switch())
    plain = DiT(**SIZE)
    plain.load_state_dict({k: v for k, v in routed.state_dict().items() if ".router." not in k})
    for model in (routed, plain):
        for name, one in model.named_parameters():
            if not one.any() and ".router." not in name:
                torch.nn.init.constant_(one, 0.1)
    assert torch.equal(routed.eval()(**inputs()).sample, plain.eval()(**inputs()).sample)


def test_gate_reads_the_time_alone() -> None:
    model = filled(DiT(**SIZE, experts="switch:experts=4,active=2")).train()
    model(**inputs())
    routers = [one for one in model.modules() if isinstance(one, SwitchRouter)]
    before = torch.stack([one.seen[0] for one in routers if one.seen])
    model(**(inputs() | {"class_labels": torch.tensor([3, 3, 3, 3]), "hidden_states": torch.randn(4, 4, 8, 8)}))
    after = torch.stack([one.seen[0] for one in routers if one.seen])
    assert torch.equal(before, after)
    assert torch.equal(before[:, 1], before[:, 2])  # two samples of one time
    assert not torch.allclose(before[:, 0], before[:, 3])


@torch.no_grad()
def test_only_chosen_experts_are_computed_and_they_equal_the_reference() -> None:
    torch.manual_seed(0)
    gate, experts = TimeGate(16, 5, 2), LinearExperts(16, 5, 2)
    torch.nn.init.normal_(experts.weight)
    torch.nn.init.normal_(experts.bias)
    x, decision = torch.randn(6, 7, 16), gate(torch.randn(6, 16))
    assert decision.active.sum(dim=-1).eq(2).all()
    assert float((decision.gates * decision.active).sum(dim=-1).max()) < 1  # the kept ones are not made to add up to 1
    torch.testing.assert_close(experts(x, decision), experts.reference(x, decision), atol=1e-5, rtol=1e-4)
    one = gate(torch.randn(1, 16))
    torch.testing.assert_close(experts(x[:1], one), experts.reference(x[:1], one), atol=1e-5, rtol=1e-4)
    unused = set(range(5)) - set(one.active[0].nonzero().flatten().tolist())
    with torch.no_grad():
        experts.weight[list(unused)] = float("nan")
    assert experts(x[:1], one).isfinite().all()


def test_prior_is_a_band_that_moves_with_the_fourth_power() -> None:
    table = prior_table(12, 5, 2 / 3)
    assert table.sum(dim=1).eq(8).all()
    starts = table.argmax(dim=1).tolist()
    assert starts == [0, 0, 0, 1, 4]  # 4 x (0, 1/256, 1/16, 81/256, 1), rounded
    narrow = prior_table(100, 5, 0.2, alpha=1.0)
    assert narrow.argmax(dim=1).tolist() == [0, 20, 40, 60, 80]


def test_prior_loss_is_least_where_the_gates_follow_the_prior() -> None:
    torch.manual_seed(0)
    prior = prior_table(6, 40, 0.5)
    ideal = prior / prior.sum(dim=1, keepdim=True)
    shuffle = torch.tensor([4, 2, 0, 5, 1, 3])
    best, matching = prior_loss(2 * ideal[:, shuffle], prior[:, shuffle], prior, prior, depth=2)
    assert float(best) < 1e-5  # whatever the order of the columns
    assert sorted(matching.tolist()) == list(range(6))
    flat, _ = prior_loss(torch.full((40, 6), 1 / 3), prior[:, shuffle], prior, prior, depth=2)
    wrong, _ = prior_loss(2 * ideal.flip(0)[:, shuffle], prior[:, shuffle], prior, prior, depth=2)
    assert float(best) < float(flat) < float(wrong)


@pytest.mark.parametrize("convention", ["ddpm", "flow"])
def test_prior_loss_reaches_the_gates(convention: Any) -> None:
    model = filled(DiT(**SIZE, convention=convention, experts="switch:weight=2")).train()
    model(**inputs())
    losses = model.auxiliary_losses()
    assert list(losses) == ["diffusion_prior"]
    losses["diffusion_prior"].backward()
    assert all(one.gate.linear.weight.grad.any() for one in model.modules() if isinstance(one, SwitchRouter))
    model.eval()(**inputs())
    assert model.auxiliary_losses() == {}


def test_training_the_prior_alone_separates_the_noise_levels() -> None:
    torch.manual_seed(0)
    model = DiT(**SIZE, convention="flow", experts="switch:bins=50")
    model.train()
    gates = [one.gate for one in model.modules() if isinstance(one, SwitchRouter)]
    optimizer = torch.optim.Adam([p for one in gates for p in one.parameters()], lr=0.05)
    found = []
    for _ in range(25):
        times = torch.rand(16) * 1000
        model(torch.zeros(16, 4, 8, 8), times, torch.zeros(16, dtype=torch.long))
        loss = model.auxiliary_losses()["diffusion_prior"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert sum(found[-5:]) < 0.7 * sum(found[:5])


def test_one_time_a_token_and_dual_streams() -> None:
    model = filled(DiT(**SIZE, convention="flow", experts="switch")).eval()
    given = inputs(2)
    same = model(**(given | {"timestep": given["timestep"][:, None].expand(2, 16).float()})).sample
    torch.testing.assert_close(same, model(**(given | {"timestep": given["timestep"].float()})).sample, atol=1e-4, rtol=1e-4)
    joint = filled(MMDiT(width=16, heads=2, dual_depth=1, single_depth=1, context_dim=8, pooled_dim=None, experts="switch"))
    joint.eval()
    words = torch.randn(2, 3, 8)
    out = joint(torch.randn(2, 3, 16, 16), torch.tensor([10.0, 900.0]).repeat_interleave(16).reshape(2, 16), words).sample
    assert out.isfinite().all()


def test_sizes_of_the_paper() -> None:
    with torch.device("meta"):
        for name, added in (("s", 5.3), ("b", 21.3), ("l", 75.6), ("xl", 111.7)):
            routed, plain = build(f"switch-dit-{name}/2"), build(f"dit-{name}/2")
            assert abs(parameters_of(routed) - parameters_of(plain) - added * 1e6) < 0.06e6, name
        extra = analytic(routed, 32, 32).macs - analytic(plain, 32, 32).macs
    assert abs(extra / 19.0e9 - 1) < 0.01


def test_task_routing_lets_a_band_through() -> None:
    model = filled(DiT(**SIZE, experts=TaskRouting(share=0.5, counted=True))).eval()
    router = model.transformer_blocks[0].router
    assert isinstance(router, TaskRouter)
    seen: list[torch.Tensor] = []

    def body(streams: dict[str, torch.Tensor], context: Any) -> dict[str, torch.Tensor]:
        seen.append(streams["hidden_states"])
        return {"hidden_states": streams["hidden_states"] + 1}

    from dit.model import Context

    x = torch.ones(2, 3, 24)
    out = router(body, {"hidden_states": x}, Context(None, torch.ones(2, 24), timestep=torch.tensor([0, 999])))
    assert seen[0][0, 0].tolist() == [1.0] * 12 + [0.0] * 12
    assert seen[0][1, 0].tolist() == [0.0] * 12 + [1.0] * 12
    assert torch.equal(out["hidden_states"], x + 1)
    assert model(**inputs()).sample.isfinite().all()


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="active must be at most experts"):
        Switch(experts=2, active=3)
    router = Switch().router(16, 2, 32)
    from dit.model import Context

    with pytest.raises(ValueError, match="read the time"):
        router(lambda s, c: s, {"hidden_states": torch.ones(1, 2, 16)}, Context(None, torch.ones(1, 16)))
