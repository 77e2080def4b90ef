"""The figures of sparse attention on clips: the exact run beside, a control that differs in its choice alone, and the truth."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from acceleration import Accelerator
from benchmarks import sparse_clips
from benchmarks._motion_tasks import drawn
from benchmarks.sparse_clips import AdaSpa, RandomTiles, truth
from dit.backbones.vdt import VDT
from dit.spec import kinds
from pipelines import catalog
from training import ship_motion

TILES = "rows=16,block=16,measure=False,dense_layers=0,guard=0.0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip model with full attention, 256 tokens a clip, that has learnt nothing."""
    from dit.codec import ResampleCodec

    where = tmp_path_factory.mktemp("model")
    model: dict[str, Any] = {
        "in_channels": 3, "patch_size": 4, "sample_size": 16, "frames": 16, "width": 32, "depth": 2, "heads": 2,
        "context_dim": 384, "prediction_type": "sample", "clean_time": True, "mixer": {"name": "full"},
    }  # fmt: skip
    torch.manual_seed(0)
    network = VDT(**model)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    network.save_pretrained(where / "transformer")
    ResampleCodec(scale_factor=4, width=8, depth=1).save_pretrained(where / "codec")
    recipe = {
        "model": model, "codec": {"scale": 4}, "sampling": {"shift": 4.0},
        "data": {"frames": 16, "scenes": 3, "scene_frames": 8, "text_tokens": 40, "world": "small"},
    }  # fmt: skip
    ship_motion.ship(recipe, where / "transformer", where / "codec", where / "plain")
    return where / "plain"


def test_methods_stand_beside_the_exact_run_and_chance(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = [f"adaspa:density=0.3,{TILES}", f"random-tiles:density=0.3,{TILES}", f"adaspa:density=1.0,{TILES}"]
    words = [word for one in methods for word in ("--accelerate", one)]
    out = tmp_path / "figures.json"
    command = ["x", "--model", str(folder), "--count", "2", "--steps", "4", "--min-tokens", "64", "--out", str(out), *words]
    monkeypatch.setattr(sys, "argv", command)
    sparse_clips.main()
    catalog.unload()
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result["tasks"]
    assert result["settings"] == {"count": 2, "steps": 4, "guidance": 3.0, "given": 8}
    assert set(result["tasks"]) == {"text", "prediction"}
    for task, rows in result["tasks"].items():
        assert (tmp_path / f"figures-{task}.png").is_file()
        exact, chosen, lots, neutral = rows.values()
        assert set(exact) == {"clips", "denoise_seconds", "truth"}
        assert (neutral["psnr_db"], neutral["latent_relative_error"], neutral["ssim"]) == (None, 0.0, 1.0)
        assert neutral["truth"] == exact["truth"]
        assert (neutral["sparse_calls"], neutral["density"]) == (0.0, 1.0)
        assert chosen["density"] == lots["density"] < 0.6
        assert chosen["sparse_calls"] == lots["sparse_calls"] > 0.5
        assert chosen["recall"] > lots["recall"]
        for one in (chosen, lots):
            assert 10 < one["worst_psnr_db"] <= one["psnr_db"] < 80
            assert 0 < one["latent_relative_error"] < 1
            assert min(one["denoise_ratio"], one["end_to_end_ratio"]) > 0


def test_chance_keeps_as_many_tiles_of_every_row_and_what_must_be_kept() -> None:
    mass = torch.rand(1, 2, 6, 10, generator=torch.Generator().manual_seed(0)) ** 4
    queries, columns = torch.zeros(6, dtype=torch.bool), torch.zeros(10, dtype=torch.bool)
    queries[2], columns[7] = True, True
    settings = {"density": 0.4, "guard": 0.0, "guard_goal": 0.0}
    chosen = AdaSpa(**settings).chosen(mass, queries, columns)
    lots = RandomTiles(**settings).chosen(mass, queries, columns)
    assert torch.equal(chosen.kept.sum(-1), lots.kept.sum(-1))
    assert lots.kept[:, :, 2].all()
    assert lots.kept[..., 7].all()
    assert not torch.equal(chosen.kept, lots.kept)
    held = (mass * lots.kept).sum((-1, -2)) / mass.sum((-1, -2))
    torch.testing.assert_close(lots.recall, held)
    assert RandomTiles.name not in kinds(Accelerator), "nobody is offered it"
    assert (lots.recall < chosen.recall).all()


def test_the_truth_of_real_clips_is_all_right() -> None:
    clips, _ = drawn(3, 5, kind="single", world="small")
    for clip, other in zip(clips, [*clips[1:], clips[0]], strict=True):
        assert truth("text", clip, clip.frames) == 1.0
        assert truth("text", clip, other.frames) == 0.0
        assert truth("prediction", clip, clip.frames) < 1.0 < truth("prediction", clip, other.frames)
