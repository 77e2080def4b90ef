"""Inheritance: everything outside of the attention comes along, the report is exact, and what was inherited is worth having."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dit.backbones.dit import DiT
from dit.backbones.mmdit import MMDiT
from training import inherit as module
from training.inherit import inherit, load_backbone
from training.objectives import FlowMatching, hybrid


def mmdit(**changes: Any) -> MMDiT:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "in_channels": 3, "patch_size": 2, "sample_size": 8, "width": 32, "heads": 4, "dual_depth": 1, "single_depth": 1,
        "mlp_ratio": 2.0, "context_dim": 12, "pooled_dim": None, "qk_norm": True, "position": "both",
    }  # fmt: skip
    return filled(MMDiT(**(size | changes)))


def filled(model: Any) -> Any:
    """Zero maps filled, so that a copied weight differs from a new one."""
    for one in model.parameters():
        nn.init.normal_(one, std=0.1)
    return model


def test_everything_but_the_attention_comes_along() -> None:
    teacher = mmdit()
    student, report = inherit(teacher, mixer="linear:heads=2,kernel=3")
    given, own = teacher.state_dict(), student.state_dict()
    assert set(report.renewed) == {
        f"{path}.{kind}"
        for path, kind in [
            *(
                (f"transformer_blocks.0.attn.{n}", k)
                for n in ("to_q", "to_k", "to_v", "to_out.0")
                for k in ("weight", "bias")
            ),
            *((f"transformer_blocks.0.attn.add_{n}_proj", k) for n in "qkv" for k in ("weight", "bias")),
            *(("transformer_blocks.0.attn.to_add_out", k) for k in ("weight", "bias")),
            *((f"transformer_blocks.0.attn.norm_{n}", "weight") for n in ("q", "k", "added_q", "added_k")),
            *(
                (f"single_transformer_blocks.0.attn.{n}", k)
                for n in ("to_q", "to_k", "to_v")
                for k in ("weight", "bias")
            ),
            *((f"single_transformer_blocks.0.attn.norm_{n}", "weight") for n in "qk"),
            ("single_transformer_blocks.0.proj_out", "weight[:, :32]"),
        ]
    }
    assert sorted(report.new) == sorted(name for name in own if ".attn.conv." in name)
    assert len(report.new) == 4
    assert report.dropped == ()
    whole = [name for name in report.inherited if "[" not in name]
    assert sorted([*whole, *report.renewed, *report.new]) == sorted(
        name + "[:, :32]" * (name == "single_transformer_blocks.0.proj_out.weight") for name in own
    )
    assert all(torch.equal(own[name], given[name]) for name in whole)
    joined = "single_transformer_blocks.0.proj_out.weight"
    assert f"{joined}[:, 32:]" in report.inherited
    assert torch.equal(own[joined][:, 32:], given[joined][:, 32:])
    assert not torch.equal(own[joined][:, :32], given[joined][:, :32])
    for name in report.renewed:
        if "[" not in name and "norm" not in name:
            assert not torch.equal(own[name], given[name])


@pytest.mark.parametrize(
    ("load", "weights"), [("q", ("to_q",)), ("kv", ("to_k", "to_v")), ("o", ("to_out.0",))]
)
def test_parts_of_the_attention_can_come_along(load: str, weights: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    teacher = filled(DiT(width=16, depth=1, heads=2, num_classes=3, sample_size=8))
    student, report = inherit(teacher, load=load, mixer="linear")
    parts = {name.split("attn.")[1].rsplit(".", 1)[0] for name in report.renewed}
    assert parts == {"to_q", "to_k", "to_v", "to_out.0"} - set(weights)
    for name in weights:
        path = f"transformer_blocks.0.attn.{name}.weight"
        assert torch.equal(student.state_dict()[path], teacher.state_dict()[path])


def test_norms_of_heads_go_into_larger_heads() -> None:
    teacher = mmdit()
    student, report = inherit(teacher, load="qkvo", mixer="linear:heads=1")
    assert report.renewed == ()
    path = "single_transformer_blocks.0.attn.norm_q.weight"
    assert torch.equal(student.state_dict()[path], teacher.state_dict()[path].repeat(4))
    _, report = inherit(teacher, load="qkvo", mixer="gated")
    assert "single_transformer_blocks.0.attn.to_q.weight" in report.renewed  # half as many channels
    assert "single_transformer_blocks.0.attn.to_v.bias" in report.dropped
    assert "single_transformer_blocks.0.attn.to_v.weight" in report.inherited


def test_the_same_mixer_with_everything_is_the_teacher() -> None:
    teacher = mmdit().eval()
    student, report = inherit(teacher, load="qkvo")
    assert (report.renewed, report.new, report.dropped) == ((), (), ())
    given = {
        "hidden_states": torch.randn(1, 3, 8, 8), "timestep": torch.tensor([300.0]),
        "encoder_hidden_states": torch.randn(1, 4, 12),
    }  # fmt: skip
    assert torch.equal(student(**given).sample, teacher(**given).sample)
    assert not student.training


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"load": "qx"}, "made of the letters qkvo"),
        ({"mixr": "linear"}, "no setting 'mixr'"),
        ({"mlp_ratio": 3.0}, "in the student"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        inherit(mmdit(), **changes)


def test_fused_teachers_are_refused() -> None:
    teacher = mmdit()
    teacher.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        inherit(teacher, mixer="linear")


def test_the_command_writes_a_folder_to_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mmdit().save_pretrained(tmp_path / "teacher")
    where = [str(tmp_path / "teacher"), str(tmp_path / "student")]
    monkeypatch.setattr(sys, "argv", ["inherit", *where, "--mixer", "linear:heads=2", "--load", "v"])
    module.main()
    student = load_backbone(tmp_path / "student")
    assert student.config.mixer == "linear:heads=2" or student.config.mixer["heads"] == 2
    report = json.loads((tmp_path / "student" / "inherited.json").read_text())
    assert len(report["new"]) == 4
    with pytest.raises(ValueError, match="no folder of a network"):
        load_backbone(tmp_path)


def test_hybrid_weighs_noise_and_variance() -> None:
    student, teacher = torch.zeros(2, 6, 4, 4), torch.zeros(2, 6, 4, 4)
    teacher[0, :3], teacher[1, 3:] = 2.0, 3.0
    assert hybrid(student, teacher, 3).tolist() == pytest.approx([0.5 * 4, 0.05 * 9])
    assert hybrid(student[:, :3], teacher[:, :3], 3, noise=1.0).tolist() == pytest.approx([4.0, 0.0])


def test_an_heir_learns_faster_than_a_beginner() -> None:
    """A teacher learns four pictures; its heirs are nearer to it after a few steps than the same network from the start."""
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "in_channels": 1, "patch_size": 2, "sample_size": 8, "width": 32, "depth": 2, "heads": 4, "num_classes": 4,
        "learn_sigma": False, "convention": "flow", "mlp_ratio": 2.0,
    }  # fmt: skip
    labels = torch.arange(4).repeat(4)
    pictures = torch.randn(4, 1, 8, 8).repeat(4, 1, 1, 1)
    objective = FlowMatching()

    def train(model: Any, steps: int, teacher: Any = None) -> float:
        dice = torch.Generator().manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(steps):
            noise, times = torch.randn(pictures.shape, generator=dice), objective.times(len(pictures), dice)
            level = times.reshape(-1, 1, 1, 1)
            noisy = (1 - level) * pictures + level * noise
            out = model(noisy, times * 1000, labels, return_dict=False)[0]
            loss = (out - (noise - pictures)).square().mean()
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher(noisy, times * 1000, labels, return_dict=False)[0]
                loss = loss + hybrid(out, wanted, 1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float((out - (noise - pictures)).detach().square().mean()))
        return sum(losses[-5:]) / 5

    teacher = DiT(**size)
    train(teacher, 120)
    torch.manual_seed(1)
    heir, _ = inherit(teacher, mixer="linear:kernel=3")
    torch.manual_seed(1)
    beginner = DiT(**size, mixer="linear:kernel=3")
    assert train(heir, 25, teacher) < 0.9 * train(beginner, 25, teacher)


@pytest.mark.parametrize("experts", ["dynamic", "switch", "dtr:share=1.0"])
def test_experts_that_begin_as_the_dense_network_do_so_with_its_weights(experts: str) -> None:
    """The joint map of one-stream blocks is cut in two; nothing of the teacher is lost."""
    teacher = mmdit().eval()
    student, report = inherit(teacher, experts=experts, load="qkvo")
    assert report.renewed == report.dropped == ()
    assert all("router" in name or ".tokens." in name or "ff" in name for name in report.new)
    given = {
        "hidden_states": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([100.0, 800.0]),
        "encoder_hidden_states": torch.randn(2, 5, 12),
    }  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(**given).sample, teacher(**given).sample, atol=1e-5, rtol=1e-4)
