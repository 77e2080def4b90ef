"""RelaCtrl against a ControlNet: counts agree with counting by hand, recipes match, and a short run goes to its JSON."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import relactrl
from benchmarks.control import Bench
from benchmarks.relactrl import (
    RECIPES,
    accuracy,
    costs,
    goals,
    model_costs,
    released_costs,
    table,
    times,
    trained,
)
from control import Refused, Use, controlled
from control._files import save
from control.controlnet import ControlNet
from control.relactrl import RelaCtrl
from control.relevance import Relevance
from dit.backbones.mmdit import MMDiT
from dit.codec import ResampleCodec
from dit.ledger import analytic, parameters_of
from training.adapters import AdapterTrainer
from training.bases import Base, weights_digest
from training.data import Pictures
from training.scenes import KINDS, Scene, Shape, as_pictures, draw

WIDTH, SIDE = 32, 16
SHORT: dict[str, Any] = {  # a training that is over in a moment
    "base": {"model": "tiny"},
    "condition": {"kind": "edges", "drop": 0.1},
    "data": {"scenes": 24, "size": 32, "wordings": 1, "text_tokens": 6, "drop": 0.1},
    "objective": {"mean": 0.5, "std": 1.0},
    "optimizer": {
        "name": "adamw", "rate": 1e-2, "matrix_rate": 1e-2, "decay": 0.0, "clip": 1.0, "ema": 0.5, "warmup": 2, "cooldown": 0.3,
    },
    "run": {"samples": 32, "batch": 4, "precision": "float32", "save_every": 60.0, "check_every": 8, "checked": 4, "seed": 1},
}  # fmt: skip


class Pipeline:
    """Stand-in for a pipeline: words are made of their letters, pictures of what the transformer says of the noise of each seed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.transformer = MMDiT(
            in_channels=3, patch_size=4, sample_size=SIDE, width=WIDTH, heads=2, dual_depth=2, single_depth=2, context_dim=16,
            pooled_dim=16,
        )  # fmt: skip
        for one in self.transformer.parameters():
            if not bool(
                one.detach().any()
            ):  # an untrained network's last map is 0, and nothing would be learnt through it
                nn.init.normal_(one, std=0.2)
        self.codec, self.config = ResampleCodec(width=8, depth=1), {}

    def __call__(self, prompts: list[str], *, seeds: Any, num_inference_steps: int, **_: object) -> Any:
        noise = torch.stack(
            [torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        )
        words = torch.zeros(len(prompts), 4, 16)
        said = self.transformer(
            noise, torch.full((len(prompts),), 500.0), encoder_hidden_states=words, pooled_projections=words[:, 0],
            return_dict=False,
        )[0]  # fmt: skip
        return SimpleNamespace(images=(self.codec.decode(said) + 1) / 2)


class Words(Base):
    """A base whose prompts need no text encoder."""

    def _texts(self, texts: list[str], length: int) -> dict[str, torch.Tensor]:
        found = torch.tensor([[len(text) / 20.0] for text in texts])
        return {
            "encoder_hidden_states": found[:, None].expand(-1, length, 16),
            "pooled_projections": found.expand(-1, 16),
        }


@pytest.fixture
def base() -> Base:
    return Words(Pipeline(), "tiny")


@pytest.fixture
def adapters(base: Base) -> dict[str, Any]:
    made = {"relactrl": RelaCtrl(heads=1, places=(0, 2)), "controlnet": ControlNet()}
    return {name: one.build(base.transformer).requires_grad_(False).eval() for name, one in made.items()}


def shapes(count: int) -> Pictures:
    kinds = list(KINDS)
    found = as_pictures([
        draw(Scene((Shape(kinds[i], "blue", (0.5, 0.5), 0.3, 0.4 * i),), "white", "plain"), 32) for i in range(count)
    ])  # fmt: skip
    for row in found.rows:
        row["style"] = "noto"
    return found


# Counts


def test_the_counts_are_those_of_the_networks_own_reckoning(base: Base, adapters: dict[str, Any]) -> None:
    """The ControlNet's by the parts of the blocks it copies; RelaCtrl's by its own formula; both embed the condition."""
    found = model_costs(base, adapters, 32)
    tokens = (SIDE // 4) ** 2
    assert found["tokens"] == tokens
    own = analytic(base.transformer, SIDE, SIDE, text=relactrl.TEXT)
    assert found["model"] == {"parameters": own.parameters, "macs": own.macs}
    halves = [
        part for part in own.parts if part.path.startswith(("transformer_blocks.0.", "transformer_blocks.1."))
    ]
    maps, embedded = 3 * WIDTH * WIDTH, tokens * WIDTH * 3 * 4 * 4
    assert found["controlnet"]["parameters"] == sum(one.parameters for one in halves) + maps + 3 * WIDTH
    assert found["controlnet"]["macs"] == sum(one.macs for one in halves) + tokens * maps + embedded
    assert found["controlnet"]["acts_behind"] == [0, 1]
    assert found["relactrl"]["parameters"] == parameters_of(adapters["relactrl"])
    assert found["relactrl"]["macs"] == adapters["relactrl"].macs(tokens) + embedded
    for what in ("parameters", "macs"):
        assert found[f"{what}_share"] == found["relactrl"][what] / found["controlnet"][what]


def test_macs_are_half_the_flops_that_torch_counts(base: Base, adapters: dict[str, Any]) -> None:
    transformer, latent = base.transformer, torch.zeros(1, 3, SIDE, SIDE)
    inputs = {
        "hidden_states": latent, "timestep": torch.full((1,), 500.0), "encoder_hidden_states": torch.zeros(1, 5, 16),
        "pooled_projections": torch.zeros(1, 16), "return_dict": False,
    }  # fmt: skip
    found = costs(transformer, adapters, inputs, latent, 16)

    def maps(*uses: Use) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), controlled(transformer, *uses):
            transformer(**inputs)
        every = counter.get_flop_counts()["Global"]
        return sum(n for op, n in every.items() if "attention" not in str(op))

    added = maps(Use(adapters["controlnet"], latent)) - maps()
    heard = 2 * (2 * (16 + 5) ** 2 * WIDTH)  # of the joint attention of two blocks: scores and sums
    assert found["controlnet"]["macs"] == added // 2 + heard


def test_at_the_papers_size_they_are_the_papers() -> None:
    found = released_costs(512)
    assert found["controlnet"]["parameters"] == pytest.approx(294e6, rel=0.02)
    assert found["relactrl"]["parameters"] == pytest.approx(45.6e6, rel=0.005)
    assert found["parameters_share"] == pytest.approx(0.155, abs=0.005)
    assert found["macs_share"] == pytest.approx(0.175, abs=0.005)
    assert found["model"]["parameters"] == pytest.approx(611e6, rel=0.01)
    assert len(found["controlnet"]["acts_behind"]) == 13


def test_counting_needs_no_trained_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert relactrl.main(["--count", "--out", str(tmp_path / "relactrl.json")]) == 0
    said = capsys.readouterr().out
    assert "| RelaCtrl | +" in said
    assert "| ControlNet | +10.85 M | +0.34" in said
    assert "costs: macs_share" in said
    assert not (tmp_path / "relactrl.json").exists(), "what was not measured is not written"
    with pytest.raises(SystemExit):
        relactrl.main(["--relactrl", "one.safetensors"])
    assert "give both --relactrl and --controlnet" in capsys.readouterr().err


# The recipes


def recipes() -> dict[str, dict[str, Any]]:
    return {
        name: tomllib.loads((RECIPES / f"control-{name}.toml").read_text(encoding="utf-8"))
        for name in ("relactrl", "controlnet")
    }


def test_both_learn_from_the_same() -> None:
    one, other = recipes().values()
    assert one.pop("control")["name"] == "relactrl"
    assert other.pop("control")["name"] == "controlnet"
    assert one == other


def test_relactrl_stands_where_relevance_was_measured_to_be_highest() -> None:
    found = Relevance.read(relactrl.RESULTS / "relevance.json")
    settings = recipes()["relactrl"]["control"]
    assert RelaCtrl(
        **{key: tuple(x) if isinstance(x, list) else x for key, x in settings.items() if key != "name"}
    ) == (found.relactrl(len(settings["places"]), heads=settings["heads"]))


# Figures


def test_goals_and_table_say_what_was_reached() -> None:
    costs = {
        "relactrl": {"parameters": 15e5, "macs": 15e7}, "controlnet": {"parameters": 10e6, "macs": 5e8},
        "parameters_share": 0.15, "macs_share": 0.3,
    }  # fmt: skip
    scored = {
        "without": 0.7, "ceiling": 0.99, "accuracy_share": 0.96, "relactrl": {"edge_f1": 0.864, "shuffled": 0.5},
        "controlnet": {"edge_f1": 0.9, "shuffled": 0.55},
    }  # fmt: skip
    taken = {"none": {"of_none": 1.0}, "relactrl": {"of_none": 1.1}, "controlnet": {"of_none": 1.5}}
    figures = {"costs": costs, "accuracy": scored, "times": taken}
    assert {one["what"]: one["met"] for one in goals(figures)} == {
        "costs: parameters_share": True, "costs: macs_share": False, "accuracy: accuracy_share": True,
    }  # fmt: skip
    assert not goals({"accuracy": scored | {"accuracy_share": 0.94}})[0]["met"]
    assert table(figures).splitlines()[2:] == [
        "| RelaCtrl | +1.50 M | +0.150 G | x 1.10 | 0.864 | 0.500 |",
        "| ControlNet | +10.00 M | +0.500 G | x 1.50 | 0.900 | 0.550 |",
        "| no control |  |  | x 1.00 | 0.700 |  |",
        "| real pictures |  |  |  | 0.990 |  |",
        "| RelaCtrl of ControlNet | 15.0% | 30.0% | | 96.0% | |",
    ]


@torch.no_grad()
def test_what_is_scored_is_what_each_adapter_makes_of_its_own_edges(
    base: Base, adapters: dict[str, Any]
) -> None:
    for adapter in adapters.values():
        draw = torch.Generator().manual_seed(1)
        for one in adapter.parameters():
            one.data = one.data + torch.randn(one.shape, generator=draw) * 0.3
    bench = Bench(base, shapes(3), steps=2, guidance=2.0, batch=2)
    found = accuracy(bench, adapters)
    assert found["pictures"] == 3
    assert bench.made == 5 * 3, "no control, and two of each adapter"
    assert found["accuracy_share"] == pytest.approx(
        found["relactrl"]["edge_f1"] / found["controlnet"]["edge_f1"]
    )
    assert found["ceiling"] > found["without"]
    for row in (found["relactrl"], found["controlnet"]):
        assert row["share_of_ceiling"] == row["edge_f1"] / found["ceiling"]
        assert row["edge_f1"] != found["without"]
    taken = times(base, adapters, bench.pictures.pixels, rounds=1)
    assert list(taken) == ["none", "relactrl", "controlnet"]
    assert taken["none"]["of_none"] == 1.0


def test_a_file_of_the_other_kind_is_refused(base: Base, adapters: dict[str, Any], tmp_path: Path) -> None:
    file = save(
        adapters["controlnet"], tmp_path / "one.safetensors", base.transformer, {"condition": "edges"}
    )
    with pytest.raises(Refused, match=r"one\.safetensors holds controlnet, and it is given as --relactrl"):
        trained("relactrl", file, base)
    assert trained("controlnet", file, base).control == ControlNet(copies=2)


def test_from_training_to_figures(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are trained for a moment by the same recipe, saved, loaded, measured, and written down."""
    before, files = weights_digest(base.transformer), {}
    for name, settings in (("relactrl", {"heads": 1}), ("controlnet", {})):
        recipe = copy.deepcopy(SHORT) | {"control": {"name": name, **settings}}
        trainer = AdapterTrainer(recipe, tmp_path / name, None, base=base)
        started = {key: x.detach().clone() for key, x in trainer.model.named_parameters()}
        trainer.run()
        assert trainer.seen == 32
        moved = [key for key, x in trainer.model.named_parameters() if not torch.equal(x, started[key])]
        assert {"controlnet": "before_proj.weight", "relactrl": "blocks.0.before_proj.weight"}[name] in moved
        files[name] = tmp_path / name / "adapter.safetensors"
    assert weights_digest(base.transformer) == before
    monkeypatch.setattr(relactrl, "load_base", lambda _: base)
    monkeypatch.setattr(relactrl, "load_judge", lambda _: None)
    monkeypatch.setattr(relactrl, "held_out", lambda *_: shapes(2))
    out = tmp_path / "relactrl.json"
    words = [f"--{name}={file}" for name, file in files.items()]
    assert relactrl.main([*words, "--rounds=1", "--steps=2", "--size=32", "--batch=2", f"--out={out}"]) == 0
    found = json.loads(out.read_text())
    assert {one["what"] for one in found["goals"]} >= {
        "costs: macs_share",
        "costs: parameters_share",
        "accuracy: accuracy_share",
    }
    assert found["adapters"]["controlnet"] == {
        "control": {"name": "controlnet", "copies": 2},
        "file": "adapter.safetensors",
    }
    assert set(found["accuracy"]) >= {"without", "ceiling", "relactrl", "controlnet"}
    assert found["times"]["controlnet"]["of_none"] > 0
    assert found["machine"]
    assert found["commit"]
