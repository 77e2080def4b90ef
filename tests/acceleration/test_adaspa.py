from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from acceleration import AdaSpa, Refused, Untouched, XAttention, accelerated
from acceleration._sparse import block_mass
from dit.backbones.dit import DiT
from dit.backbones.mmdit import MMDiT

SMALL: dict[str, Any] = {"rows": 8, "block": 4, "min_tokens": 16, "measure": False}
STEPS = 10


def mmdit() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = MMDiT(
        sample_size=8,
        in_channels=4,
        patch_size=1,
        width=16,
        heads=4,
        dual_depth=2,
        single_depth=1,
        context_dim=12,
        pooled_dim=0,
    ).eval()
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.2)
    return net, {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 12)}


@torch.no_grad()
def sample(net: Any, given: dict[str, Tensor], steps: int = STEPS) -> list[Tensor]:
    outputs = []
    for step in range(steps):
        moved = given | {"hidden_states": given["hidden_states"] * (1 - step / 30)}
        outputs.append(
            net(**moved, timestep=torch.full((2,), 1000.0 * (1 - step / steps)), return_dict=False)[0]
        )
    return outputs


def states(run: Any) -> list[str]:
    return [cell["states"] for cell in run.report().cells]


def test_density_one_is_bit_equal() -> None:
    net, given = mmdit()
    plain = sample(net, given)
    with accelerated(net, AdaSpa(density=1.0), steps=STEPS) as run:
        same = sample(net, given)
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    assert run.report().sparse == 0
    assert run.report().effective == ["adaspa: every attention call was dense"]


def test_warm_up_and_first_layer_stay_dense_and_the_report_says_it_all() -> None:
    net, given = mmdit()
    with accelerated(net, AdaSpa(density=0.4, guard=0.0, **SMALL), steps=STEPS) as run:
        sample(net, given)
    report = run.report()
    assert states(run) == ["CCC"] * 2 + ["CSS"] * 8
    assert (report.computed, report.sparse) == (30, 16)
    first, second, _ = report.attention
    assert (first["layer"], first["sparse"], first["density"]) == ("transformer_blocks.0.attn", 0, 1.0)
    assert (second["calls"], second["sparse"], second["tokens"], second["kind"]) == (10, 8, 71, "joint")
    assert 0.4 < second["density"] < 0.8  # text tiles come on top
    assert 0.3 < second["recall"] < 1
    assert second["ms"]["sparse"] > 0 < second["ms"]["search"]
    assert report.effective[0].startswith("adaspa: 16 of 30 attention calls sparse, density 0.")
    assert report.bytes > 0


def test_no_warm_up_searches_at_once_and_once_more() -> None:
    net, given = mmdit()
    with accelerated(net, AdaSpa(warmup=0.0, dense_layers=0, guard=0.0, **SMALL), steps=STEPS) as run:
        sample(net, given)
        assert [row.weighed for row in run.attention.values()] == [2, 2, 2]
    assert states(run) == ["SSS"] * STEPS
    with accelerated(net, AdaSpa(search_again=None, guard=0.0, **SMALL), steps=STEPS) as run:
        sample(net, given)
        assert [row.weighed for row in run.attention.values()] == [0, 1, 1]


def brute(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_choice_is_uniform_keeps_text_and_its_recall_is_true(adaptive: bool) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 64, 16), torch.randn(2, 4, 64, 16)
    q[:, 0], k[:, 1] = q[:, 0] * 4, k[:, 1] * 0.1  # one sharp head, one flat one
    mass, _ = block_mass(q, k, 8, 4)
    queries, columns = torch.zeros(8, dtype=torch.bool), torch.zeros(16, dtype=torch.bool)
    queries[0], columns[:2] = True, True
    method = AdaSpa(density=0.5, adaptive=adaptive, guard=0.0, head_recall=0.6, rows=8, block=4)
    found = method.chosen(mass, queries, columns)
    assert found.kept[:, :, 0].all()
    assert found.kept[..., :2].all()
    counts = found.kept[:, :, 1:].sum(-1)
    assert (counts == counts[..., :1]).all()  # equally many in every row of a head
    heads = counts[..., 0]
    assert (heads.float().mean(1) == 8).all()  # the mean stays
    assert bool((heads[:, 0] < heads[:, 1]).all()) is adaptive
    heard = found.kept.repeat_interleave(8, 2).repeat_interleave(4, 3)
    weights = brute(q, k)
    assert torch.allclose(found.recall, (weights * heard).sum((-1, -2)) / weights.sum((-1, -2)), atol=1e-5)
    assert found.density == pytest.approx(float(found.kept.float().mean()))
    row = mass[0, 2, 3].masked_fill(columns, torch.inf)  # and they are the heaviest
    assert row[found.kept[0, 2, 3]].min() >= row[~found.kept[0, 2, 3]].max()


def test_the_guard_gives_more_tiles_or_goes_dense() -> None:
    torch.manual_seed(0)
    none = torch.zeros(8, dtype=torch.bool), torch.zeros(16, dtype=torch.bool)
    mass, _ = block_mass(torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16), 8, 4)
    method = AdaSpa(density=0.2, guard=0.7, guard_goal=0.9, rows=8, block=4)
    loose, guarded = method.replace(guard=0.0).chosen(mass, *none), method.chosen(mass, *none)
    assert float(loose.recall.mean()) < 0.7
    assert float(guarded.recall.mean()) >= 0.9
    assert guarded.density > loose.density
    net, given = mmdit()
    with accelerated(net, AdaSpa(guard=1.0, guard_goal=1.0, **SMALL), steps=STEPS) as run:
        sample(net, given)  # nothing below all tiles is enough
    assert run.report().sparse == 0
    assert "recall is too low" in run.report().attention[1]["reason"]


def test_what_has_no_effect_raises_in_words() -> None:
    net, given = mmdit()
    with (
        pytest.raises(Untouched, match="it has 71 tokens, and min_tokens is 8192"),
        accelerated(net, AdaSpa(), steps=STEPS),
    ):
        sample(net, given)
    with pytest.raises(Refused, match="both decide about which keys a query hears"):
        with accelerated(net, AdaSpa(), XAttention()):
            pass
    net.transformer_blocks[0].compile(backend="eager")
    with pytest.raises(Refused, match=r"transformer_blocks.0 is compiled"), accelerated(net, AdaSpa()):
        pass
    with pytest.raises(ValueError, match="guard_goal must be at least guard"):
        AdaSpa(guard=0.9, guard_goal=0.5)


def test_measuring_falls_back_to_dense_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    net, given = mmdit()
    plain = sample(net, given)
    times = iter([2.0, 1.0] * 9)
    monkeypatch.setattr("acceleration._attending._fastest", lambda *_: next(times))
    with accelerated(net, AdaSpa(guard=0.0, **SMALL | {"measure": True}), steps=STEPS) as run:
        same = sample(net, given)
    assert run.report().sparse == 0
    assert "dense attention is faster at 71 tokens, 4 heads of 4" in run.report().notes[0]
    assert run.report().attention[1]["reason"] == "dense is faster here"
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))
    times = iter([1.0, 2.0] * 9)
    with accelerated(net, AdaSpa(guard=0.0, **SMALL | {"measure": True}), steps=STEPS) as run:
        sample(net, given)
    assert run.report().sparse > 0


def test_unknown_steps_are_said() -> None:
    net, given = mmdit()
    with accelerated(net, AdaSpa(warmup=0.1, guard=0.0, **SMALL)) as run:
        sample(net, given)
    assert "adaspa: the number of steps is unknown, so 50 are assumed; give steps=" in run.report().notes
    assert states(run) == ["CCC"] * 5 + ["CSS"] * 5


def test_gradients_stay_exact() -> None:
    net, given = mmdit()
    with pytest.raises(Untouched, match="gradients are wanted"):
        with accelerated(net, AdaSpa(warmup=0.0, **SMALL), steps=1):
            net(**given, timestep=torch.full((2,), 500.0)).sample.sum().backward()
    assert all(one.grad is not None for one in net.transformer_blocks[0].attn.to_q.parameters())


def test_padding_is_respected() -> None:
    """HunyuanVideo masks its padded text in every call: what stands there must not change the picture."""
    torch.manual_seed(0)
    net: Any = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, num_single_layers=1, num_refiner_layers=1, text_embed_dim=16,
        pooled_projection_dim=16, guidance_embeds=False, rope_axes_dim=(2, 2, 4), attention_head_dim=8, num_attention_heads=2,
    ).eval()  # fmt: skip
    text, mask = torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.long)
    mask[:, 3:] = 0
    other = text.clone()
    other[:, 3:] = 9.0
    outputs = []
    for prompt in (text, other):
        given = {"hidden_states": torch.ones(2, 4, 2, 8, 8).cumsum(-1) / 8, "encoder_hidden_states": prompt}
        given |= {"encoder_attention_mask": mask, "pooled_projections": torch.ones(2, 16)}
        with accelerated(net, AdaSpa(warmup=0.0, guard=0.0, dense_layers=0, **SMALL), steps=3) as run:
            outputs.append(sample(net, given, 3))
        assert run.report().sparse == 9
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*outputs, strict=True))


def test_a_class_conditional_model_runs() -> None:
    torch.manual_seed(0)
    net = DiT(sample_size=8, in_channels=4, patch_size=1, width=16, heads=2, depth=3).eval()
    given = {"hidden_states": torch.randn(2, 4, 8, 8), "class_labels": torch.tensor([1, 2])}
    with accelerated(net, AdaSpa(guard=0.0, **SMALL), steps=STEPS) as run:
        sample(net, given)
    assert states(run) == ["CCC"] * 2 + ["CSS"] * 8
