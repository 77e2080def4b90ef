"""DyDiT: the released recordings; what is off is not computed and changes nothing; the budget steers the gates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import fidelity
from dit.backbones.dit import DiT
from dit.backbones.mmdit import MMDiT
from dit.convert import LayoutError, convert, find
from dit.experts.dynamic import Dynamic, DynamicPerceptron, WidthRouter, complete, share_of, spent_share
from dit.layers import cut
from dit.ledger import extra_flops
from dit.model import Context
from dit.routing import RouteDecision

SIZE: dict[str, Any] = {"sample_size": 8, "width": 32, "depth": 2, "heads": 4, "num_classes": 5, "convention": "flow"}
HALF = "dynamic:start_width=0,start_tokens=0"
ARGS: dict[str, Any] = {
    "input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 24, "depth": 2, "num_heads": 3, "num_classes": 7,
}  # fmt: skip


@pytest.fixture
def fixture() -> Path:
    folder = Path(__file__).resolve().parents[2] / ".." / "shared" / "fixtures" / "DyDiT"
    if not folder.is_dir():
        pytest.skip("the recordings of the released code are not here")
    return folder


def inputs(times: tuple[float, ...] = (30.0, 30.0)) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    count = len(times)
    return {
        "hidden_states": torch.randn(count, 4, 8, 8, generator=draw),
        "timestep": torch.tensor(times),
        "class_labels": torch.arange(count) % 5,
    }


def network(experts: str = HALF, **changes: Any) -> DiT:
    """A network whose gates are about half on and differ from one noise level to another."""
    torch.manual_seed(0)
    model = DiT(**(SIZE | changes), experts=experts)
    for name, one in model.named_parameters():
        if "router" in name or "tokens" in name:
            nn.init.normal_(one, std=0.5)
        elif not one.any():
            nn.init.normal_(one, std=0.2)
    return model.eval()


def flops(model: nn.Module, given: dict[str, torch.Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=extra_flops()) as counter:
        model(**given)
    return int(counter.get_total_flops())


def test_recordings_are_reproduced(fixture: Path) -> None:
    assert fidelity.main([str(fixture), "--mid"]) == fidelity.HIT


def test_every_official_table_loads_strictly(fixture: Path) -> None:
    presets = json.loads((fixture / "config.json").read_text())["official_presets"]
    keys = ("depth", "hidden_size", "patch_size", "num_heads", "mlp_ratio", "in_channels", "num_classes", "learn_sigma")
    for name, table in json.loads((fixture / "keys.json").read_text()).items():
        args = {key: presets[name.split()[0]][key] for key in keys}
        model = convert({key: torch.empty(shape, device="meta") for key, shape in table.items()}, "DyDiT", args)
        again = find("DyDiT").to_official(model)
        assert {key: list(value.shape) for key, value in again.items()} == table


def test_other_configurations_go_out_and_come_back() -> None:
    found = find("DyDiT")
    model: Any = found.build(ARGS | {"num_heads": 6, "mlp_ratio": 2.0}, {"tau": 2}).eval()
    for one in model.parameters():
        nn.init.normal_(one, std=0.2)
    again = convert(found.to_official(model), "DyDiT", ARGS | {"num_heads": 6, "mlp_ratio": 2.0}, {"tau": 2})
    case = {"x": torch.randn(2, 3, 8, 8), "t": torch.tensor([3, 940]), "y": torch.tensor([0, 7])}
    assert torch.equal(found.run(again, case)["model"], found.run(model, case)["model"])
    assert again.transformer_blocks[0].ff.choose.temperature == 2
    with pytest.raises(LayoutError, match="a case has x, t, y"):
        found.run(again, case | {"z": torch.zeros(1)})


def test_what_is_off_is_left_out_and_changes_nothing() -> None:
    """The compact pass equals the masked one, for one noise level and for several, with LoRA-like wrapped maps too."""
    model = network()
    for times in ((30.0, 30.0), (30.0, 990.0, 500.0)):
        given = inputs(times)
        with torch.no_grad():
            compact = model(**given).sample
            masked = _masked(model, given)
        torch.testing.assert_close(compact, masked, atol=2e-5, rtol=1e-4)
    handle = model.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        torch.testing.assert_close(model(**given).sample, masked, atol=2e-5, rtol=1e-4)
    handle.remove()


def _masked(model: DiT, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same network with everything computed and multiplied by its mask."""
    model.train()
    for one in model.modules():
        if isinstance(one, WidthRouter):
            one.choose_heads.eval()
            one.choose_groups.eval()
        if isinstance(one, DynamicPerceptron):
            one.choose.eval()
    out: torch.Tensor = model(**given).sample
    model.eval()
    return out


def test_compact_pass_computes_less_by_what_the_routes_leave() -> None:
    model, given = network(), inputs()
    with complete(model):
        whole = flops(model, given)
    some = flops(model, given)
    with torch.no_grad():
        _masked(model, given)
        share = float(share_of_training(model, given))
    assert 0.3 < share < 0.95
    fixed = whole - 2 * 2 * model_cost(model)  # what no route touches: modulation, patches, time; two samples, FLOPs
    assert some - fixed == pytest.approx(share * 2 * 2 * model_cost(model), rel=0.03)


def share_of_training(model: DiT, given: dict[str, torch.Tensor]) -> torch.Tensor:
    _masked(model, given)
    share = share_of(model)
    assert share is not None
    return share


def model_cost(model: DiT) -> int:
    """MACs of attention and perceptron of all blocks for one sample of 16 tokens."""
    width, tokens = 32, 16
    return 2 * (tokens * 4 * width**2 + 2 * tokens**2 * width + 2 * tokens * width * 4 * width)


def test_begins_as_the_dense_network() -> None:
    torch.manual_seed(0)
    model = DiT(**SIZE, experts="dynamic").eval()
    plain = DiT(**SIZE).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "router" not in k and ".tokens." not in k})
    for one in (model, plain):
        for name, value in one.named_parameters():
            if not value.any() and "router" not in name and ".tokens." not in name:
                nn.init.constant_(value, 0.05)
    given = inputs((3.0, 900.0))
    with torch.no_grad():
        assert torch.equal(model(**given).sample, plain(**given).sample)
        with complete(model):
            assert torch.equal(model(**given).sample, plain(**given).sample)
    model.train()
    model(**given)
    assert float(share_of(model).detach()) == pytest.approx(1.0)


def test_width_reads_the_noise_level_alone() -> None:
    model = network()
    seen: list[torch.Tensor] = []
    model.transformer_blocks[1].router.choose_heads.register_forward_hook(lambda _m, _a, out: seen.append(out))
    for labels in ([0, 1], [2, 5]):
        with torch.no_grad():
            model(**(inputs((30.0, 800.0)) | {"class_labels": torch.tensor(labels)}))
    assert torch.equal(seen[0], seen[1])
    rows = torch.cat([seen[0][:, :1] * 0 + 1, seen[0]], dim=1)
    assert rows[:, 0].eq(1).all()


def test_budget_loss_narrows_the_network_and_its_target_falls_in_time() -> None:
    model = network("dynamic:target=0.5,start_width=1,start_tokens=1,temperature=2")
    model.train()
    gates = [p for name, p in model.named_parameters() if "router" in name or "tokens" in name]
    optimizer = torch.optim.Adam(gates, lr=0.05)
    torch.manual_seed(1)
    shares = []
    for _ in range(60):
        model(**inputs((100.0, 600.0)))
        share = share_of(model)
        loss = model.auxiliary_losses()["budget"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shares.append(float(share.detach()))
    assert sum(shares[-15:]) / 15 == pytest.approx(0.5, abs=0.08)
    model.training_step = 50  # still held at the whole budget
    model(**inputs())
    assert model.auxiliary_losses()["budget"].item() > 0.1
    model.eval()(**inputs())
    assert model.auxiliary_losses() == {}


def test_gates_of_training_are_noisy_by_the_logistic_distribution() -> None:
    torch.manual_seed(0)
    router = WidthRouter(8, 2, 16, Dynamic())
    logits = torch.full((20000, 1), 1.5)
    router.train()
    share = float(router.choose_heads(logits).detach().mean())
    assert share == pytest.approx(1 / (1 + 2.718281828**-1.5), abs=0.015)
    assert float(router.eval().choose_heads(logits).mean()) == 1


def test_tokens_without_need_keep_their_stream() -> None:
    torch.manual_seed(0)
    layer = DynamicPerceptron(16, 64, Dynamic(start_tokens=0)).eval()
    nn.init.normal_(layer.tokens[0].weight)
    x = torch.randn(3, 9, 16)
    residual = torch.randn(3, 9, 16)
    keep = layer.tokens(residual) > 0
    out = layer(x, Context(None, torch.zeros(3, 16), residual=residual))
    assert 0 < keep.sum() < keep.numel()
    assert not out[~keep.squeeze(-1)].any()
    with torch.no_grad():
        layer.complete = True
        torch.testing.assert_close(out[keep.squeeze(-1)], layer(x)[keep.squeeze(-1)])


def test_groups_need_not_divide_the_channels() -> None:
    layer = DynamicPerceptron(8, 30, Dynamic(tokens=False)).eval()
    route = RouteDecision("time", groups=torch.tensor([[1.0, 0.0, 1.0, 0.0]]), compact=True)
    x = torch.randn(1, 5, 8)
    out = layer(x, Context(None, torch.zeros(1, 8), route=route))
    torch.testing.assert_close(out, layer.masked(x, route.groups, None))


def test_joint_blocks_leave_out_heads_too() -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {"width": 32, "heads": 4, "dual_depth": 2, "single_depth": 1, "context_dim": 8, "pooled_dim": None}
    model = MMDiT(**size, experts=HALF).eval()
    for name, one in model.named_parameters():
        nn.init.normal_(one, std=0.4 if "router" in name or "tokens" in name else 0.15)
    given = {"hidden_states": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([300.0, 300.0])}
    given["encoder_hidden_states"] = torch.randn(2, 5, 8)
    with torch.no_grad():
        compact = model(**given).sample
        with complete(model):
            whole = flops(model, given)
        assert flops(model, given) < 0.9 * whole
        masked = _masked(model, given)  # type: ignore[arg-type]
    torch.testing.assert_close(compact, masked, atol=5e-5, rtol=1e-3)


def test_a_cut_is_made_anew_when_weights_change() -> None:
    layer, places, x = nn.Linear(12, 10), torch.tensor([0, 2, 3, 7]), torch.randn(3, 12)

    def answer() -> torch.Tensor:
        return nn.functional.linear(x, *cut(layer, places, 0))

    with torch.no_grad():
        assert torch.equal(cut(layer, places, 0)[0], cut(layer, places, 0)[0])
        assert cut(layer, places, 0)[0] is cut(layer, places, 0)[0]
        for change in (lambda: layer.weight.add_(1), lambda: layer.weight.data.mul_(2)):  # the second as adapters are merged
            change()
            torch.testing.assert_close(answer(), layer(x)[:, places])
        row = cut(layer, torch.tensor([3, 4, 5]), 0)[0]
        assert row.data_ptr() == layer.weight[3].data_ptr()  # side by side: no copy
    assert answer().requires_grad


def test_share_is_that_of_the_paper() -> None:
    ones = torch.ones(2, 3)
    assert float(spent_share(ones, ones, ones, 1.51, 2.72)) == pytest.approx(1.0)
    assert float(spent_share(ones * 0.5, ones * 0.5, ones * 0.5, 1.0, 3.0)) == pytest.approx((0.5 + 0.75) / 4)


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="hold must be at most fall"):
        Dynamic(hold=10, fall=5)
    router = WidthRouter(8, 2, 16, Dynamic())
    with pytest.raises(ValueError, match="reads the time"):
        router(lambda s, c: s, {"hidden_states": torch.ones(1, 2, 8)}, Context(None, torch.ones(1, 8)))
