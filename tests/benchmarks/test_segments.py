"""The figures of small stories: their generator, eyes that must see what is there and nothing else, and runs that go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks import _segments_tasks as tasks
from benchmarks import segments
from benchmarks._segments_data import (
    COLOURS,
    NEVER,
    PALETTE,
    SIDES,
    TRIPLES,
    Stories,
    baselines,
    drawn,
    look,
    scored,
)
from benchmarks._segments_tasks import UNEQUAL, Maker
from dit.backbones.mask2dit import Mask2DiT


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaken(mixer: str) -> Mask2DiT:
    """Make a network whose gates are open: a new one returns zeros."""
    torch.manual_seed(0)
    network = Mask2DiT(mixer=mixer, **segments.NETWORK).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.1)
    return network


class Perfect:
    """Stands in for a network: leads from any noise straight to the clip that was asked for."""

    def __init__(self) -> None:
        self.lengths: list[Any] = []

    def make(self, stories: Stories, seed: int, *, frames: Any = None, **_: Any) -> Tensor:
        self.lengths.append(frames)
        return stories.film(frames)


def test_a_scene_is_what_its_numbers_say() -> None:
    one = Stories(
        torch.tensor([[0, 2]]), torch.tensor([[1, 0]]), torch.tensor([[1, 1]]), torch.zeros(1, 2, 2)
    )
    clip = one.film()
    assert clip.shape == (1, 3, 8, 8, 8)
    for frame in range(4):  # a square of three pixels goes down from the upper edge
        red, blue = clip[0, 0, frame] > 0, clip[0, 2, 4 + frame] > 0
        assert red.nonzero().min(0).values.tolist() == [frame, 4]
        assert red.nonzero().max(0).values.tolist() == [frame + 2, 6]
        assert blue.nonzero().min(0).values.tolist() == [frame, 0]
        assert (red.sum(), blue.sum()) == (9, 9)
    assert (clip[0, 1] == -1).all()
    assert (clip[0, 2, :4] == -1).all()


def test_squares_stay_in_their_half_and_turn_at_the_edge() -> None:
    stories = drawn(200, dice())
    clip = stories.film((12, 12, 12))
    ink = (clip > 0).any(1)  # [B, F, 8, 8]
    assert (ink.flatten(2).sum(-1) == torch.tensor(SIDES)[stories.sides[:, :1]] ** 2).all()
    rows = ink.any(-1).float().argmax(-1)
    assert ((rows.diff(dim=1).abs() == 1) | (torch.arange(35) % 12 == 11)).all()
    left = ink[..., :4].any(dim=(2, 3))
    assert (left == (stories.places.repeat_interleave(12, dim=1) == 0)).all()
    assert all(ink[stories.sides[:, 0] == side].any(dim=(0, 1)).all() for side in range(3)), (
        "everywhere in it"
    )


def test_test_stories_have_triples_that_are_never_trained() -> None:
    learnt, held = drawn(500, dice()).colours, drawn(500, dice(), held_out=True).colours
    assert {tuple(row) for row in learnt.tolist()}.isdisjoint({tuple(row) for row in held.tolist()})
    assert 0.15 < NEVER.float().mean() < 0.25
    for scene in range(3):
        assert set(TRIPLES[~NEVER][:, scene].tolist()) == set(range(len(COLOURS)))
    longer = drawn(50, dice(), held_out=True, scenes=6)
    assert longer.colours.shape == (50, 6)
    assert (longer.sides == longer.sides[:, :1]).all()
    with pytest.raises(ValueError, match=r"threes.*got 4"):
        drawn(1, dice(), scenes=4)


def test_words_are_orthogonal_and_name_the_scene_only_when_asked() -> None:
    stories = drawn(64, dice())
    plain, named = stories.words(), stories.words(ids=True)
    assert plain.shape == (64, 6, 11)
    rows = plain.flatten(0, 1).unique(dim=0)
    assert len(rows) == 8
    products = rows @ rows.T
    assert torch.allclose(products, 11 * torch.eye(8), atol=1e-4)
    assert (plain[..., 8:] == 0).all()
    assert ((named - plain)[:, ::2, 8:].argmax(-1) == torch.arange(3)).all()


@pytest.mark.parametrize("frames", [(4, 4, 4), UNEQUAL])
def test_real_stories_are_right_and_stay_so_under_little_noise(frames: tuple[int, ...]) -> None:
    stories = drawn(200, dice(), held_out=True)
    clips = stories.film(frames)
    noise = 0.2 * torch.randn(clips.shape, generator=dice(1))
    for one in (clips, clips + noise):
        assert set(scored(look(one, frames), stories).values()) == {1.0}


def test_the_wrong_story_is_seen_to_be_wrong() -> None:
    stories = drawn(100, dice())
    for scene in range(3):
        found = scored(look(stories.recaptioned(scene).film()), stories)
        assert found["colour"] == found["place"] == found["caption"] == pytest.approx(2 / 3)
        assert (found["story"], found["identity"]) == (0.0, 1.0)
    sides = stories.sides.clone()
    sides[:, 2] = (sides[:, 2] + 1) % 3
    grown = Stories(stories.colours, stories.places, sides, stories.starts)
    assert scored(look(grown.film()), stories)["identity"] == 0.5
    assert scored(look(grown.film()), stories, first=2)["identity"] == 0.0
    assert scored(look(grown.film()), stories)["caption"] == 1.0
    other = Stories(stories.colours, stories.places, (stories.sides + 1) % 3, stories.starts)
    assert scored(look(other.film()), stories)["identity"] == 1.0, (
        "no caption says how large: only cuts must keep it"
    )


def test_nothing_and_muddle_are_no_colour() -> None:
    black = PALETTE[-1].reshape(1, 3, 1, 1, 1).expand(2, 3, 12, 8, 8)
    noise = torch.randn(2, 3, 12, 8, 8, generator=dice())
    half = drawn(2, dice()).film()
    half[:, :, ::2] = drawn(2, dice()).recaptioned(0).recaptioned(1).recaptioned(2).film()[:, :, ::2]
    for clip in (black, noise, half):
        assert (look(clip).colours == -1).all()
    assert (look(black).sides == -1).all()
    assert set(scored(look(black), drawn(2, dice())).values()) == {0.0}


def test_a_drawing_that_is_no_square_is_seen_to_be_none() -> None:
    stories = drawn(50, dice())
    clip = stories.film()
    spoilt = clip.clone()
    ink = (
        (clip[:, :, 0] > 0).any(1).flatten(1).float().argmax(1)
    )  # the first coloured pixel of the first frame
    spoilt[:, :, 0] = (
        spoilt[:, :, 0].flatten(2).scatter(2, ink[:, None, None].expand(-1, 3, 1), -1.0).unflatten(2, (8, 8))
    )
    assert scored(look(clip), stories)["square"] == 1.0
    assert scored(look(spoilt), stories)["square"] == pytest.approx(11 / 12)
    assert scored(look(spoilt), stories)["caption"] == 1.0
    large = torch.full((1, 3, 12, 8, 8), 1.0)
    assert scored(look(large), drawn(1, dice()))["square"] == 0.0, "no identity is as large"
    assert scored(look(-large), drawn(1, dice()))["square"] == 0.0


def test_baselines_miss_what_they_are_made_to_miss() -> None:
    found = baselines(drawn(600, dice(), held_out=True), dice(1))
    assert set(found["real"].values()) == {1.0}
    for name in ("colour", "place", "caption"):
        assert found["another request"][name] == pytest.approx(found["chance"][name], abs=0.06)
        assert found["another request"][name] < found["scenes in any order"][name] < 0.75
        assert found["unrelated scenes"][name] == 1.0
    assert found["unrelated scenes"]["identity"] == pytest.approx(found["chance"]["identity"], abs=0.06)
    assert found["scenes in any order"]["identity"] == 1.0


def test_a_perfect_network_gets_every_figure() -> None:
    maker: Any = Perfect()
    maker.network, maker.ids = shaken("scenes"), False
    figures, clips = tasks.figures_of(maker, 8)
    assert UNEQUAL in maker.lengths
    for name in ("held_out", "learnt", "unequal"):
        assert set(figures[name].values()) == {1.0}, name
    assert figures["effect"]["own_share"] == 1.0
    assert figures["effect"]["mse"] == figures["effect"]["real_mse"]
    assert figures["effect"]["mse"][0][0] > 0.05 > figures["effect"]["mse"][0][1] == 0
    assert set(figures["extension"].values()) == {1.0}
    assert figures["told_on"]["colour"] == figures["told_on"]["identity"] == [1.0] * 6
    assert figures["told_on"]["drift_px"] == [0.0] * 6
    assert clips["told_on"].shape == (8, 3, 24, 8, 8)


def test_no_scene_hears_another_caption_in_the_first_block() -> None:
    stories = drawn(2, dice())
    masked = tasks.gradients(Maker(shaken("scenes")), stories)
    assert masked["own_only"] is True
    for i in range(3):
        for k in range(3):
            assert (masked["first_block"][i][k] > 0) == (i == k)
            assert masked["network"][i][k] > 0, "later blocks hear it through the other scene"
    open_to_all = tasks.gradients(Maker(shaken("full")), stories)
    assert open_to_all["own_only"] is False
    assert min(min(row) for row in open_to_all["first_block"]) > 0


def test_given_scenes_are_at_time_zero_and_come_out_bit_for_bit() -> None:
    maker, stories = Maker(shaken("scenes"), steps=3, batch=2), drawn(3, dice())
    clean = stories.film() + 0.3
    asked: list[Tensor] = []
    maker.network.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[1]))
    made = maker.make(stories, 5, clean=clean, given=2)
    assert torch.equal(made[:, :, :8], clean[:, :, :8])
    assert not torch.equal(made[:, :, 8:], clean[:, :, 8:])
    assert len(asked) == 6
    assert all((one[:, :2] == 0).all() and (one[:, 2] > 0).all() for one in asked)
    again = maker.make(stories, 5, clean=clean, given=2)
    assert torch.equal(made, again)
    assert not torch.equal(made, maker.make(stories, 6, clean=clean, given=2))


def test_a_story_is_told_on_by_a_window_of_what_was_made() -> None:
    maker, stories = Maker(shaken("scenes"), steps=2), drawn(2, dice(), scenes=6)
    figures, clips = tasks.told_on(maker, stories)
    assert {len(one) for one in figures.values()} == {6}
    px = look(clips).px
    assert figures["drift_px"] == (px - px[:, :1]).abs().mean(0).tolist()
    assert max(figures["drift_px"]) > 0
    window = torch.cat([clips[:, :, 8:16], torch.zeros(2, 3, 4, 8, 8)], dim=2)
    made = maker.make(stories.scenes(2, 5), tasks.TEST + 4 + 4, clean=window, given=2)
    assert torch.equal(made[:, :, -4:], clips[:, :, 16:20])


def test_variants_learn_from_the_same_stories_and_start_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {}
    for name, variant in segments.VARIANTS.items():
        learner = segments.Learner(variant, 3, 2)
        heard: list[Tensor] = []
        learner.network.register_forward_pre_hook(lambda _, inputs, kept=heard: kept.extend(inputs[:2]))
        weights = [one.clone() for one in learner.master.weights]
        losses = [learner.step(), learner.step()]
        assert all(torch.tensor(losses).isfinite())
        assert any(not torch.equal(a, b) for a, b in zip(weights, learner.master.weights, strict=True))
        seen[name] = weights + heard
    first = seen["mask"]
    assert len(seen) == 4
    for name, other in seen.items():
        assert len(first) == len(other), name
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def row(name: str, seed: int, *, steps: int = 2, caption: float = 1.0, **_: Any) -> Any:
    right = {"colour": caption, "place": caption, "caption": caption, "story": caption, "identity": caption}
    figures = {
        "held_out": right,
        "extension": right | {"given_unchanged": True},
        "gradient": {"first_block": [[1.0, 0.0]], "own_only": name == "mask"},
    }
    told = {
        "variant": name, "seed": seed, "parameters": 1, "curve": [{"step": steps, "caption": caption}],
        "figures": {"half": figures, "end": figures},
    }  # fmt: skip
    return told, {"held_out": torch.zeros(2, 3, 12, 8, 8), "told_on": torch.zeros(2, 3, 24, 8, 8)}


def called(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str, train: Callable[..., Any] = row) -> Any:
    arguments = ["segments", "--out", str(out), "--steps", "2", "--count", "2", "--batch", "2", *more]
    monkeypatch.setattr("sys.argv", arguments)
    threads = torch.get_num_threads()
    try:
        segments.main(train)
    finally:
        torch.set_num_threads(threads)
    return json.loads(out.read_text())


def test_a_killed_run_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out, asked = tmp_path / "one.json", []

    def killed(name: str, seed: int, **more: Any) -> Any:
        asked.append((name, seed))
        if len(asked) == 6:
            raise KeyboardInterrupt
        return row(name, seed, **more)

    with pytest.raises(KeyboardInterrupt):
        called(monkeypatch, out, "--seeds", "2", train=killed)
    assert len(json.loads(out.read_text())["runs"]) == 5
    found = called(monkeypatch, out, "--seeds", "2", train=killed)
    everything = [(name, seed) for seed in range(2) for name in segments.VARIANTS]
    assert asked == [*everything[:6], *everything[5:]]
    assert [(one["variant"], one["seed"]) for one in found["runs"]] == everything
    called(monkeypatch, out, "--seeds", "2", train=killed)
    assert len(asked) == 9, "nothing was left to do"
    more = called(monkeypatch, out, "--seeds", "3", train=killed)
    assert asked[9:] == [(name, 2) for name in segments.VARIANTS]
    assert more["over_seeds"]["mask"]["seeds"] == [0, 1, 2]


def test_runs_of_other_settings_are_not_mixed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "one.json"
    called(monkeypatch, out, "--seeds", "1", "--only", "mask")
    with pytest.raises(SystemExit):
        called(monkeypatch, out, "--steps", "4")
    assert "steps 2 and not 4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        called(monkeypatch, tmp_path / "other.json", "--seeds", "0")
    assert not (tmp_path / "other.json").exists()


def test_figures_are_gathered_over_seeds() -> None:
    trees = [
        {"a": 1.0, "b": [0.0, 2.0], "c": True, "d": None},
        {"a": 3.0, "b": [0.0, 4.0], "c": False, "d": 7},
    ]
    assert segments.gathered(trees) == {
        "a": {"mean": 2.0, "spread": pytest.approx(2**0.5)},
        "b": {"mean": [0.0, 3.0], "spread": [0.0, pytest.approx(2**0.5)]},
        "c": False,
        "d": {"each": [None, 7]},
    }
    assert segments.steps_to_learn([{"step": 5, "caption": 0.5}, {"step": 10, "caption": 0.95}]) == 10
    assert segments.steps_to_learn([{"step": 5, "caption": 0.5}]) is None


def test_claims_are_of_the_worst_seed_against_the_best_control() -> None:
    def runs(mask: list[float], control: list[float]) -> dict[str, list[dict[str, Any]]]:
        shares = dict(zip(segments.VARIANTS, (mask, [0.1, 0.1], [0.2, 0.2], control), strict=True))
        return {name: [row(name, 0, caption=one)[0] for one in each] for name, each in shares.items()}

    apart = segments.claims(runs([0.95, 0.99], [0.5, 0.9]))
    assert apart["scene i shows caption i in 90 % of held-out scenes"]
    assert apart["every seed above the control with a table of frames at the end"]
    assert apart["in the first block a scene hears its own caption alone"]
    close = segments.claims(runs([0.85, 0.99], [0.5, 0.9]))
    assert not close["scene i shows caption i in 90 % of held-out scenes"]
    assert not close["every seed above the control with a table of frames at the end"]
    assert not close["the control with scene ids is nearer at the end than at half"], "half is as good here"
    late = runs([0.95, 0.95], [0.5, 0.9])
    for one in late["no mask, scene ids"]:
        one["figures"] = one["figures"] | {"half": {"held_out": {"caption": 0.1}}}
    for one in late["no mask, scene ids, frame table"]:
        one["figures"] = one["figures"] | {"half": {"held_out": {"caption": 0.97}}}
    found = segments.claims(late)
    assert found["the control with scene ids is nearer at the end than at half"]
    assert found["every seed above both controls with its positions at half of the steps"]
    assert not found["every seed above the control with a table of frames at half of the steps"]
    assert found["every seed above the control with a table of frames at the end"]


def test_a_tiny_training_from_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tasks, "SAMPLING", 2)
    monkeypatch.setattr(segments, "Maker", lambda network, ids: Maker(network, ids, steps=2))
    monkeypatch.setattr(segments, "PARTS", 2)
    found = called(monkeypatch, tmp_path / "one.json", "--seeds", "1", train=segments.run)
    assert [one["variant"] for one in found["runs"]] == list(segments.VARIANTS)
    assert found["baselines"]["real"]["story"] == 1.0
    assert {"machine", "commit", "settings", "claims"} <= set(found)
    assert found["claims"]["given scenes come out bit for bit"]
    assert found["claims"]["in the first block a scene hears its own caption alone"]
    for one in found["runs"]:
        assert [point["step"] for point in one["curve"]] == [1, 2]
        assert one["seconds"] > 0
        assert one["parameters"] == found["runs"][0]["parameters"]
        assert set(one["figures"]) == {"half", "end"}
    for name in ("mask", "no-mask", "no-mask-scene-ids", "no-mask-scene-ids-frame-table"):
        assert Image.open(tmp_path / f"one-{name}-held_out.png").size == (580, 72)
        assert Image.open(tmp_path / f"one-{name}-told_on.png").height == 72
