"""Groups of blocks with a router: all on is the plain network, and what is not chosen does not run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit.backbones.dit import DiT
from dit.backbones.mmdit import MMDiT
from dit.block_mixture import BlockMixture, BlockRouter, executed, group_blocks, groups_of
from dit.dense2moe import convert, load_converted, random_scores, save_converted
from dit.ledger import activated_of, counted, parameters_of
from dit.seams import blocks_of

_place = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("test_dense2moe.py"))
assert _place is not None
assert _place.loader is not None
cases = importlib.util.module_from_spec(_place)
_place.loader.exec_module(cases)

STACKS = {
    "dit": {"transformer_blocks": (2, 1)},
    "mmdit": {"transformer_blocks": (2, 1), "single_transformer_blocks": (2, 1)},
    "flux": {"transformer_blocks": (2, 1), "single_transformer_blocks": (3, 2)},
    "sd3": {"transformer_blocks": (2, 1)},
}


def grouped(name: str, *, every: bool = False) -> Any:
    model = cases.network(name)
    stacks = {
        stack: BlockMixture(size, size if every else active) for stack, (size, active) in STACKS[name].items()
    }
    made = group_blocks(model, stacks)
    assert made == list(groups_of(model))
    return model


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("training", [False, True])
def test_all_blocks_of_every_group_are_the_plain_network(name: str, training: bool) -> None:
    plain = cases.run(cases.network(name), name)
    model = grouped(name, every=True).train(training)
    assert torch.equal(cases.run(model, name), plain)


@pytest.mark.parametrize("name", STACKS)
def test_what_is_not_chosen_does_not_run_and_the_masked_path_agrees(name: str) -> None:
    model = grouped(name)
    for group in groups_of(model).values():
        torch.nn.init.normal_(group.router.condition.weight, std=3.0)
    with executed(model) as counts:
        compact = cases.run(model, name)
    for path, group in groups_of(model).items():
        assert sum(n for block, n in counts.items() if block.startswith(path)) == 2 * group.settings.active
    torch.testing.assert_close(cases.run(model.train(), name), compact, atol=1e-5, rtol=1e-5)


def test_samples_of_one_batch_go_their_own_ways() -> None:
    model = grouped("flux")
    for group in groups_of(model).values():
        with torch.no_grad():
            group.router.tokens.weight.normal_(std=5.0)
            group.router.condition.weight.normal_(std=5.0)
    inputs = cases.CASES["flux"][1]()
    with executed(model) as counts, torch.no_grad():
        both = model(**inputs, return_dict=False)[0]
    assert 1 in counts.values(), "somewhere the two samples chose differently"
    for i in range(2):
        alone = {k: v[i : i + 1] if k not in ("img_ids", "txt_ids") else v for k, v in inputs.items()}
        with torch.no_grad():
            one = model(**alone, return_dict=False)[0]
        torch.testing.assert_close(one, both[i : i + 1], atol=1e-5, rtol=1e-5)


def test_the_chosen_blocks_are_adjacent_and_the_best() -> None:
    router = BlockRouter(8, 1, BlockMixture(size=5, active=2, alpha=0.0))
    with torch.no_grad():
        router.condition.weight.zero_()
        router.condition.bias.copy_(torch.tensor([5.0, 0.0, 3.0, 4.0, 0.0]))
    decision = router([torch.randn(3, 4, 8)], torch.randn(3, 8))
    assert decision.active is not None
    assert decision.active.tolist() == [[0, 0, 1, 1, 0]] * 3
    assert torch.equal(decision.gates, decision.active)
    assert decision.share.tolist() == pytest.approx([0.4] * 3)


def test_alpha_weighs_tokens_against_conditioning() -> None:
    def choice(alpha: float, tokens: Tensor, temb: Tensor) -> list[float]:
        torch.manual_seed(4)
        router = BlockRouter(8, 1, BlockMixture(size=4, active=1, alpha=alpha))
        active = router([tokens], temb).active
        assert active is not None
        return active.argmax(dim=1).tolist()

    tokens, temb = torch.randn(32, 4, 8), torch.randn(32, 8)
    other, later = torch.randn(32, 4, 8), torch.randn(32, 8)
    assert choice(0.0, tokens, temb) == choice(0.0, other, temb) != choice(0.0, tokens, later)
    assert choice(1.0, tokens, temb) == choice(1.0, tokens, later) != choice(1.0, other, temb)


def test_the_router_learns_which_blocks_matter() -> None:
    """The target is the network without its first block: the router must learn to drop that one."""
    torch.manual_seed(0)
    model = grouped("flux").train()
    for one in model.parameters():
        one.requires_grad_(False)
    group = groups_of(model)["transformer_blocks.0"]
    inputs = cases.CASES["flux"][1]()
    with torch.no_grad():
        group.router.condition.bias.copy_(torch.tensor([0.0, 9.0]))
        wanted = model(**inputs, return_dict=False)[0]
        group.router.condition.bias.copy_(torch.tensor([0.5, 0.0]))
    group.router.requires_grad_(True)
    optimizer = torch.optim.Adam(group.router.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = (model(**inputs, return_dict=False)[0] - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 1e-4
    assert losses[-1] == pytest.approx(0.0, abs=1e-9)


def test_the_books_count_the_blocks_that_run() -> None:
    model = grouped("flux")
    dense = cases.network("flux")
    routers = sum(parameters_of(group.router) for group in groups_of(model).values())
    saved = parameters_of(dense.transformer_blocks[0]) + parameters_of(dense.single_transformer_blocks[0])
    assert activated_of(model) == parameters_of(dense) - saved + routers
    inputs = {k: v.to("meta") for k, v in cases.CASES["flux"][1]().items()}
    assert counted(model.to("meta"), inputs).activated == activated_of(model)
    assert counted(model, inputs).macs < counted(dense.to("meta"), inputs).macs


@pytest.mark.parametrize("name", ["flux", "mmdit"])
def test_blocks_and_experts_together_survive_saving(name: str, tmp_path: Path) -> None:
    model = cases.network(name)
    convert(model, "mixture", random_scores(model, 0))
    group_blocks(model, {k: BlockMixture(*v) for k, v in STACKS[name].items()})
    plain = cases.run(model, name)
    save_converted(model, tmp_path)
    assert torch.equal(cases.run(load_converted(tmp_path), name), plain)
    if name == "mmdit":
        again = type(model).from_pretrained(tmp_path)
        assert groups_of(again).keys() == groups_of(model).keys()
        assert torch.equal(cases.run(again.eval(), name), plain)


def test_leftover_and_pre_only_blocks_stay_as_they_are() -> None:
    model = cases.network("sd3")
    assert group_blocks(model, {"transformer_blocks": BlockMixture(2, 1)}) == ["transformer_blocks.0"]
    assert [type(one).__name__ for one in model.transformer_blocks] == ["BlockGroup", "JointTransformerBlock"]
    assert len(blocks_of(model)) == 2


def test_checkpointing_sees_the_same_choice() -> None:
    inputs = cases.CASES["mmdit"][1]()
    model = grouped("mmdit").train()
    model(**inputs).sample.square().mean().backward()
    plain = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    model(**inputs).sample.square().mean().backward()
    for name, grad in plain.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, msg=name)


@pytest.mark.parametrize(("size", "active", "alpha"), [(1, 1, 0.5), (3, 4, 0.5), (3, 0, 0.5), (3, 2, 1.5)])
def test_settings_that_cannot_work_are_refused(size: int, active: int, alpha: float) -> None:
    with pytest.raises(ValueError, match=f"size={size}, active={active}, alpha={alpha}"):
        BlockMixture(size, active, alpha)


def test_networks_that_cannot_be_grouped_are_refused() -> None:
    with pytest.raises(ValueError, match="no stack of blocks 'blocks'"):
        group_blocks(cases.network("mmdit"), {"blocks": BlockMixture(2, 1)})
    with pytest.raises(ValueError, match="a group needs 9"):
        group_blocks(cases.network("mmdit"), {"transformer_blocks": BlockMixture(9, 1)})
    with pytest.raises(ValueError, match="BasicTransformerBlock takes hidden_states, attention_mask"):
        group_blocks(cases.network("pixart"), {"transformer_blocks": BlockMixture(2, 1)})
    assert not groups_of(MMDiT(width=32, heads=2, dual_depth=1, single_depth=1))
    assert not groups_of(DiT(width=32, heads=2, depth=1))
