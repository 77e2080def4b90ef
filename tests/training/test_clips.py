"""Drawn scenes: a seed gives the same scene, the truth is what is drawn, held-out pairs stay out; a tiny run on them, shipped."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from benchmarks._motion_eyes import colours_in
from dit.backbones.vdt import VDT
from dit.text import Prompt
from pipelines import catalog
from pipelines.generate import generate
from pipelines.request import Request
from training import enlarge_clips, motion, ship_motion, train
from training.clips import (
    BACKGROUNDS,
    CAMERAS,
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    OTHERS,
    SHAPES,
    SIDE,
    Mover,
    Script,
    coverage,
    example,
    film,
    film_story,
    write_caption,
    write_script,
)
from training.motion import Clips, MotionTrainer, Scripts, story_prompts


def dice(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Scenes


def test_a_seed_gives_a_scene_and_another_seed_another() -> None:
    (first, words), (again, same) = example(5), example(5)
    assert words == same
    assert np.array_equal(first.frames, again.frames)
    assert first.frames.shape == (16, 3, SIDE, SIDE)
    assert first.frames.dtype == np.uint8
    assert not np.array_equal(first.frames, example(6)[0].frames)
    assert example(5, frames=24)[0].frames.shape[0] == 24


def test_held_out_pairs_are_never_learnt_and_cover_every_colour() -> None:
    learnt = {(one.colour, one.shape) for seed in range(400) for one in write_script(dice(seed)).movers}
    assert not learnt & set(HELD_OUT)
    assert learnt == {(a, b) for a in COLOURS for b in SHAPES} - set(HELD_OUT)
    held = {write_script(dice(seed), held_out=True).movers[0] for seed in range(200)}
    assert {(one.colour, one.shape) for one in held} == set(HELD_OUT)
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)


def test_other_colours_come_with_every_shape_and_captions_name_them_or_not_as_asked() -> None:
    drawn = [(write_script(dice(seed), others=0.3, unnamed=0.2), dice(seed)) for seed in range(1200)]
    things = [one for script, _ in drawn for one in script.movers]
    others = [one for one in things if one.colour in OTHERS]
    nameless = [one for one in things if not one.named]
    assert abs(len(others) / len(things) - 0.5) < 0.05
    assert abs(len(nameless) / len(things) - 0.2) < 0.04
    for some in (nameless, [one for one in others if one.named]):
        assert {(one.colour, one.shape) for one in some} == {(a, b) for a in OTHERS for b in SHAPES}
    assert not {(one.colour, one.shape) for one in things} & set(HELD_OUT)
    for script, chance in drawn[:100]:
        said = write_caption(script, chance)
        named = {one.colour for one in script.movers if one.named}
        assert {colour for colour in COLOURS | OTHERS if re.search(rf"\b{colour}\b", said)} == named
        assert "  " not in said
    plain = write_script(dice(3))
    assert plain == write_script(dice(3), others=0.0, unnamed=0.0), "scenes of a seed stay what they are"
    for name, ink in OTHERS.items():
        film_of = film(Script(movers=(Mover(colour=name, shape="square", size="large"),)), dice(0), frames=2)
        assert (film_of.frames[0] == np.asarray(ink, np.uint8)[:, None, None]).all(0).sum() > 100
        assert colours_in(film_of.frames) == set(), "near to no colour that is judged"


def test_the_recipe_says_how_many_things_have_other_colours_and_which_are_named(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    found = []
    for others, unnamed in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        recipe["data"] |= {"others": others, "unnamed": unnamed}
        trainer = begun(recipe, tmp_path / f"{others}-{unnamed}")
        for clips in (trainer.clips, trainer.held_clips):
            things = [one for script in clips.scripts.scripts for one in script.movers]
            found.append((len({one.colour for one in things} & set(OTHERS)), {one.named for one in things}))
    held = (0, {True})
    assert found == [held, held, (len(OTHERS), {True}), held, (len(OTHERS), {False}), held]


def test_a_caption_names_what_is_shown_and_only_that() -> None:
    wordings = set()
    for seed in range(200):
        script = write_script(dice(seed))
        caption = write_caption(script, dice(seed + 1))
        for mover in script.movers:
            assert f" {mover.colour} " in caption
            assert any(word in caption for word in SHAPES[mover.shape])
        assert {c for c in COLOURS if f" {c} " in caption} == {mover.colour for mover in script.movers}
        assert ("camera" in caption) == (script.camera != "fixed")
        assert ("wall" in caption) == script.wall
        wordings.add(caption)
    assert len(wordings) > 190
    one = Script(movers=(Mover(colour="orange", shape="circle", motion="left", size="large"),))
    assert len({write_caption(one, dice(seed)) for seed in range(60)}) > 15, "words vary"


@pytest.mark.parametrize("shape", list(SHAPES))
def test_a_shape_lies_about_its_centre_and_is_as_large_as_it_is_said(shape: str) -> None:
    drawn = coverage(shape, np.asarray([30.0, 20.0], np.float32), np.asarray(10.0, np.float32))
    y, x = np.nonzero(drawn > 0.5)
    half = 9.0 if shape == "square" else 10.0
    assert (x.min() + x.max() + 1) / 2 == pytest.approx(30, abs=0.51)
    assert (y.min() + y.max() + 1) / 2 == pytest.approx(20, abs=1.01)
    assert (x.max() - x.min() + 1) / 2 == pytest.approx(half, abs=1)
    whole = {"circle": np.pi, "square": 3.24, "triangle": 2.0, "cross": 20 / 9}[shape] * 100
    assert drawn.sum() == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("motion", list(DIRECTIONS))
@pytest.mark.parametrize("speed", ["slow", "fast"])
def test_things_move_as_they_are_said_to_and_stay_in_view(motion: str, speed: str) -> None:
    for bounces in (False, True):
        script = Script(
            movers=(Mover(colour="red", shape="circle", motion=motion, speed=speed, bounces=bounces),)
        )
        clip = film(script, dice(3))
        steps = np.diff(clip.centres[:, 0], axis=0) @ np.asarray(DIRECTIONS[motion])
        assert steps[0] == pytest.approx({"slow": 1.0, "fast": 2.75}[speed], abs=1e-3)
        assert (steps < -0.5).any() == bounces
        assert (clip.centres >= clip.radii[..., None] - 1e-3).all()
        assert (clip.centres <= SIDE - clip.radii[..., None] + 1e-3).all()
        assert clip.visible == pytest.approx(np.ones_like(clip.visible), abs=0.05)


def test_a_fall_gains_speed_and_comes_back_up() -> None:
    for seed in range(5):
        clip = film(
            Script(movers=(Mover(colour="blue", shape="square", motion="fall"),)), dice(seed), frames=32
        )
        speeds = np.diff(clip.centres[:, 0, 1])
        assert 0 < speeds[0] < speeds[1] < speeds[2]
        assert (speeds < -1).any()
        assert clip.centres[:, 0, 1].max() <= SIDE - clip.radii[0, 0] + 1e-3


def test_a_wall_hides_a_thing_for_a_while_and_it_goes_on_behind() -> None:
    for seed in range(8):
        mover = Mover(
            colour="red", shape="circle", size="small", motion="right", speed=("medium", "fast")[seed % 2]
        )
        clip = film(Script(movers=(mover,), wall=True), dice(seed))
        assert clip.visible[0, 0] > 0.9
        assert clip.visible[-1, 0] > 0.9
        assert clip.visible[:, 0].min() < 0.05
        assert np.allclose(np.diff(clip.centres[:, 0, 0]), np.diff(clip.centres[:, 0, 0])[0], atol=1e-3)


def test_a_camera_moves_everything_the_other_way() -> None:
    pan = film(Script(movers=(Mover(colour="red", shape="circle"),), camera="pan right"), dice(1))
    assert np.allclose(np.diff(pan.centres[:, 0, 0]), -1.5, atol=1e-3)
    ground = pan.frames[:, :, :3].astype(int)  # three rows that the thing may only touch at the very edge
    assert not np.array_equal(ground[0], ground[1]), "the ground moves too"
    zoom = film(Script(movers=(Mover(colour="red", shape="circle"),), camera="zoom in"), dice(1))
    assert zoom.radii[-1, 0] / zoom.radii[0, 0] == pytest.approx(1.45)
    assert zoom.visible.min() > 0.95


def test_the_small_world_has_larger_things_a_plain_ground_and_walls_that_hide() -> None:
    scripts = [write_script(dice(seed), world="small") for seed in range(300)]
    assert {script.world for script in scripts} == {"small"}
    assert {script.camera for script in scripts} == {"fixed"}
    assert {len(script.movers) for script in scripts} == {1, 2}
    walls = [film(script, dice(seed)) for seed, script in enumerate(scripts) if script.wall]
    assert len(walls) > 20
    assert max(clip.visible[:, 0].min() for clip in walls) < 0.05
    assert min(clip.visible[[0, -1], 0].min() for clip in walls) > 0.9
    still = Script(movers=(Mover(colour="red", shape="circle", size="small"),), world="small")
    shown = film(still, dice(3))
    bare = np.asarray(BACKGROUNDS[shown.background], np.uint8)[:, None, None]
    assert (shown.frames == bare).all(1).mean() > 0.85, "one ground, no lines"
    assert shown.radii.min() > film(Script(movers=still.movers), dice(3)).radii.max()
    assert shown.visible[0, 0] == pytest.approx(1.0, abs=0.05)


def test_later_things_stand_before_earlier_ones() -> None:
    movers = tuple(Mover(colour=colour, shape="square", size="large") for colour in ("red", "blue"))
    hidden = [film(Script(movers=movers), dice(seed)).visible for seed in range(60)]
    assert min(one[:, 0].min() for one in hidden) < 0.5
    assert min(one[:, 1].min() for one in hidden) > 0.95


def test_scenes_of_a_story_share_a_ground() -> None:
    scripts = [write_script(dice(seed), single=True) for seed in range(3)]
    for seed in range(4):
        scenes = film_story(scripts, dice(seed))
        assert len({scene.background for scene in scenes}) == 1
        assert all(scene.frames.shape == (8, 3, SIDE, SIDE) for scene in scenes)


# A run


class _Encoder:
    def __init__(self) -> None:
        self.config = type("Config", (), {"hidden_size": 16})


def _encode(_: Any, __: Any, texts: Sequence[str], *, limit: int) -> Prompt:
    """Three words of a text, by their letters."""
    tokens = torch.zeros(len(texts), 3, 16)
    for row, text in enumerate(texts):
        for place, letter in enumerate(text[:48].ljust(48)):
            tokens[row, place // 16, place % 16] = ord(letter) / 128
    mask = torch.ones(len(texts), 3, dtype=torch.bool)
    return Prompt(tokens, mask, tokens.mean(1), (limit,) * len(texts))


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(motion, "load_minilm", lambda: (None, _Encoder()))
    monkeypatch.setattr(motion, "encode", _encode)
    return {
        "data": {
            "frames": 4, "scripts": 40, "text_tokens": 3, "drop": 0.2, "stories": 0.3, "scenes": 2, "scene_frames": 2,
            "tasks": dict.fromkeys(motion.TASKS, 1.0),
        },
        "model": {
            "backbone": "vdt", "in_channels": 3, "patch_size": 4, "sample_size": 16, "frames": 4, "width": 32, "depth": 1,
            "heads": 2, "context_dim": 16, "prediction_type": "sample", "clean_time": True,
        },
        "codec": {"scale": 4},
        "objective": {"mean": 0.5, "std": 1.2, "floor": 0.05},
        "sampling": {"shift": 5.0},
        "optimizer": {
            "name": "muon", "rate": 3e-3, "matrix_rate": 5e-3, "decay": 0.01, "clip": 1.0, "ema": 0.9, "warmup": 3,
            "cooldown": 0.5,
        },
        "run": {
            "samples": 96, "batch": 8, "precision": "float32", "compile": False, "save_every": 60.0, "check_every": 6, "seed": 1,
        },
    }  # fmt: skip


def begun(recipe: dict[str, Any], out: Path) -> MotionTrainer:
    trainer = MotionTrainer(copy.deepcopy(recipe), out, None, None)
    trainer.load_data()
    return trainer


def test_a_run_learns_goes_on_after_a_stop_and_leaves_a_network(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    @contextlib.contextmanager
    def quick(*given: Any) -> Iterator[None]:
        asked.append(given)
        yield

    monkeypatch.setattr(train, "quick_backward", quick)
    longer = copy.deepcopy(recipe)
    longer["run"] |= {"samples": 240, "check_every": 6}
    whole = MotionTrainer(longer, tmp_path / "whole", None, None)
    whole.run()
    assert asked == [(whole.device, torch.float32)]
    assert whole.seen >= 240
    assert whole.log[-1]["learnt_unconditional"] < whole.log[0]["learnt_unconditional"]
    assert {path.name for path in (tmp_path / "whole").iterdir()} >= {
        "state.safetensors",
        "sheet.png",
        "transformer",
    }

    straight = begun(recipe, tmp_path / "straight")
    losses = [straight.step() for _ in range(4)]
    first = begun(recipe, tmp_path / "parts")
    parts = [first.step() for _ in range(2)]
    first.save()
    second = begun(recipe, tmp_path / "parts")
    assert parts + [second.step() for _ in range(2)] == losses


def test_stills_are_frames_of_clips_and_come_first(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = write_script(dice(4), world="small")
    whole, still = film(script, dice(7)), film(script, dice(7), still=5)
    assert np.array_equal(still.frames, whole.frames[5:6])
    assert np.array_equal(still.centres, whole.centres[5:6])
    for camera in CAMERAS:
        seen = Script(movers=script.movers, camera=camera)
        assert np.array_equal(film(seen, dice(7), still=5).frames, film(seen, dice(7)).frames[5:6]), camera

    stills: list[int | None] = []

    def filmed(*given: Any, **more: Any) -> Any:
        stills.append(more.get("still"))
        return film(*given, **more)

    monkeypatch.setattr(motion, "film", filmed)
    recipe["data"] |= {
        "world": "small",
        "stills": 0.5,
        "stills_first": 0.5,
        "stills_batch": 30,
        "stories": 0.0,
    }
    trainer = begun(recipe, tmp_path)
    for clips in (trainer.clips, trainer.held_clips):
        assert {one.world for one in clips.scripts.scripts} == {"small"}
    first = [trainer.draw() for _ in range(4)]
    assert stills == [at for batch in first if batch.index is not None for at in batch.index[:, 0].tolist()]
    assert {batch.latents.shape[:3] for batch in first} == {(30, 3, 1)}
    assert all(batch.index is not None and batch.index.unique().tolist() == [0, 1, 2, 3] for batch in first)
    places: list[Any] = []
    trainer.model.register_forward_pre_hook(
        lambda _, __, given: places.append(given["frame_index"][:, 0].tolist()), with_kwargs=True
    )
    stills.clear()
    loss = trainer.step()
    assert places == [stills], "the network is told where in time a frame stands"
    assert np.isfinite(loss)
    assert trainer.seen == 8, "frames count as the clips that they cost"
    trainer.seen = 60
    kinds = {trainer.draw().latents.shape[2] for _ in range(20)}
    assert kinds == {1, 4}
    trainer.recipe["data"]["stories"] = 0.5
    drawn = [trainer.draw() for _ in range(20)]
    told = {(one.latents.shape[2], one.prompts["encoder_hidden_states"].shape[1]) for one in drawn}
    assert told == {(1, 3), (4, 6)}, "half of them stills, the others stories of two captions"


def test_what_is_given_has_no_part_in_the_loss(recipe: dict[str, Any], tmp_path: Path) -> None:
    trainer = begun(recipe, tmp_path)
    batch = trainer.clips.draw(4, torch.Generator().manual_seed(0), tasks={"predict": 1.0})
    given = batch.mask == 0
    assert given.any()
    noise, times = torch.randn(batch.latents.shape), torch.full((4,), 0.5)
    plain = trainer._error(batch, noise, times)
    moved = torch.where(given.unsqueeze(1).expand_as(noise), noise + 5.0, noise)
    assert torch.equal(trainer._error(batch, moved, times), plain)


def test_every_task_is_drawn_and_leaves_something_to_make(recipe: dict[str, Any]) -> None:
    clips = Clips(Scripts.drawn(20, 0, 3), recipe["data"], 4, 4)
    dice = torch.Generator().manual_seed(0)
    for task in motion.TASKS:
        batch = clips.draw(6, dice, tasks={task: 1.0})
        assert batch.latents.shape == (6, 3, 4, 16, 16)
        shares = batch.mask.mean((1, 2, 3))
        assert (shares > 0).all()
        assert (shares == 1).all() == (task == "unconditional")


def test_under_much_noise_a_clip_is_learnt_as_the_mean_of_scenes_of_its_caption(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["stable_target"] = {"above": 0.9, "scenes": 5}
    recipe["data"]["drop"] = 0.0
    trainer = begun(recipe, tmp_path)
    dice = torch.Generator().manual_seed(0)
    batch = trainer.clips.draw(3, dice, tasks={"unconditional": 1.0})
    drawn: list[list[np.ndarray]] = [[] for _ in batch.again]

    def kept(row: int, draw: motion.Again) -> motion.Again:
        return lambda: drawn[row].append(draw()) or drawn[row][-1]  # type: ignore[func-returns-value]

    batch.again = [kept(row, draw) for row, draw in enumerate(batch.again) if draw is not None]
    assert len(batch.again) == 3
    noise, times = torch.randn(batch.latents.shape, generator=dice), torch.tensor([0.5, 1.0, 0.95])
    target = trainer._target(batch, noise, times)
    assert target is not None
    assert [len(one) for one in drawn] == [0, 4, 4]
    assert torch.equal(target[0], batch.latents[0])
    everything = torch.cat([batch.latents[1:2], trainer.clips.latents(np.stack(drawn[1]))])
    torch.testing.assert_close(target[1], everything.mean(0))
    assert not torch.equal(target[2], batch.latents[2])
    moved = trainer._error(batch, noise, times, target) - trainer._error(batch, noise, times)
    assert moved[0] == 0
    assert moved[1] != 0
    recipe["data"] |= {"stories": 1.0}
    recipe["objective"]["mean"] = 6.0  # nearly all noise
    named = begun(recipe, tmp_path / "named")
    losses = named.step(), begun(recipe | {"stable_target": None}, tmp_path / "plain").step()
    assert losses[0] != losses[1], "the recipe's table is heard"


def test_scenes_are_drawn_anew_only_where_the_network_is_told_the_caption_and_nothing_else(
    recipe: dict[str, Any],
) -> None:
    recipe["data"] |= {"drop": 0.5, "stills_batch": 20}
    clips = Clips(Scripts.drawn(40, 0, 3), recipe["data"], 4, 4)
    dice = torch.Generator().manual_seed(0)
    empty = clips.scripts.tokens[0].float()

    def told(batch: motion.Batch) -> list[bool]:
        heard = batch.prompts["encoder_hidden_states"].unflatten(1, (-1, 3))  # [B, captions, L, D]
        empties = [[torch.equal(one, empty) for one in row] for row in heard]
        assert all(len(set(row)) == 1 for row in empties), "a story loses all its captions or none"
        return [not row[0] and bool(mask.all()) for row, mask in zip(empties, batch.mask, strict=True)]

    shapes = set()
    batches = [clips.draw(20, dice), clips.draw(20, dice, tasks={"unconditional": 1.0})]
    for batch in [*batches, clips.draw(20, dice, story=True), clips.stills(20, dice)]:
        assert [draw is not None for draw in batch.again] == told(batch)
        for row, draw in enumerate(batch.again):
            if draw is not None:
                shapes.add(draw().shape)
                again, clip = clips.latents(draw()[None])[0], batch.latents[row]
                assert again.shape == clip.shape
                assert not torch.equal(again, clip), "another place"
    assert shapes == {(4, 3, 64, 64), (1, 3, 64, 64)}
    for _ in range(10):  # a story's scenes come in their order
        batch = clips.draw(4, dice, story=True)
        for row, draw in enumerate(batch.again):
            if draw is not None:
                seen = [colours_in(frames) for frames in (draw()[:2], draw()[2:])]
                coded = batch.prompts["encoder_hidden_states"][row].unflatten(0, (-1, 3))
                for colour, caption in zip(seen, coded, strict=True):
                    place = next(
                        i for i, one in enumerate(clips.scripts.tokens) if torch.equal(one.float(), caption)
                    )
                    assert colour == {clips.scripts.scripts[place].movers[0].colour}


def test_each_frame_of_a_story_hears_the_caption_of_its_scene(recipe: dict[str, Any]) -> None:
    clips = Clips(Scripts.drawn(40, 0, 3), recipe["data"], 4, 4)
    batch = clips.draw(8, torch.Generator().manual_seed(0), story=True)
    assert batch.latents.shape == (8, 3, 4, 16, 16)
    heard = batch.prompts["encoder_attention_mask"]
    assert heard.shape == (8, 4, 6)
    assert torch.equal(heard[0].int(), torch.tensor([[1] * 3 + [0] * 3] * 2 + [[0] * 3 + [1] * 3] * 2))
    network = VDT(**{k: v for k, v in recipe["model"].items() if k != "backbone"})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.randn(1, 2, 3, 16, requires_grad=True)
    inputs = story_prompts(tokens, torch.ones(1, 2, 3, dtype=torch.bool), [2, 2])
    made = network(torch.randn(1, 3, 4, 16, 16), torch.tensor([500.0]), **inputs, return_dict=False)[0]
    (gradient,) = torch.autograd.grad(made[:, :, 2:].square().sum(), tokens)
    assert gradient[:, 0].abs().max() == 0, "of one block, scene 1 hears nothing of caption 0"
    assert gradient[:, 1].abs().max() > 0
    with pytest.raises(ValueError, match=r"\[B, F, L\]"):
        network(torch.randn(1, 3, 3, 16, 16), torch.tensor([500.0]), **inputs)


def test_the_enlarger_beats_bilinear_enlargement(tmp_path: Path) -> None:
    recipe = {
        "codec": {"width": 8, "depth": 1, "scale_factor": 2},
        "objective": {"noise": 0.05, "edges": 1.0},
        "run": {"scenes": 8, "samples": 480, "batch": 8, "rate": 5e-3, "seed": 1},
    }
    figures = enlarge_clips.train(recipe, tmp_path / "codec")
    assert figures["held_out_psnr_db"] > figures["bilinear_psnr_db"]
    assert (tmp_path / "codec" / "config.json").is_file()


def test_an_enlarger_sees_shapes_in_many_colours_and_no_pair_that_is_held_out() -> None:
    pairs = [(colour, shape) for colour in COLOURS | OTHERS for shape in SHAPES if (colour, shape) not in HELD_OUT]
    counts = {}
    for colour, shape in pairs:
        found = enlarge_clips.orders(Script(movers=(Mover(colour=colour, shape=shape),)))
        counts[colour, shape] = len(found)
        assert found[0] == (0, 1, 2), "as it is"
        seen = [[(COLOURS | OTHERS)[colour][channel] for channel in order] for order in found]
        for held, other in HELD_OUT:
            if other == shape:
                assert min(np.linalg.norm(np.asarray(one) - COLOURS[held]) for one in seen) >= enlarge_clips.APART
    assert set(counts.values()) >= {4, 5, 6}, "some orders are left out"
    assert min(counts.values()) >= 2, "nothing keeps to one colour"

    plain = enlarge_clips.frames_of(range(6), "small")
    want = [torch.from_numpy(example(seed, world="small")[0].frames[::4]) for seed in range(6)]
    assert torch.equal(plain, torch.cat(want))
    turned = enlarge_clips.frames_of(range(6), "small", turned=True)
    assert torch.equal(turned, enlarge_clips.frames_of(range(6), "small", turned=True)), "by the seed"
    assert torch.equal(plain.sort(1).values, turned.sort(1).values)
    same = (plain == turned).flatten(1).all(1)
    assert 0 < same.sum() < len(same) / 2
    others = [example(seed, world="small", others=1.0)[0].script.movers[0].colour for seed in range(6)]
    assert set(others) <= set(OTHERS)
    assert not torch.equal(enlarge_clips.frames_of(range(6), "small", others=1.0), plain)


def test_a_shipped_clip_model_goes_through_the_door(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit.codec import ResampleCodec

    recipe["model"] |= {"context_dim": 384, "sample_size": 32, "patch_size": 8}
    recipe["codec"], recipe["data"]["text_tokens"] = {"scale": 2}, 40
    network = VDT(**{k: v for k, v in recipe["model"].items() if k != "backbone"})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    network.save_pretrained(tmp_path / "transformer")
    ResampleCodec(width=8, depth=1).save_pretrained(tmp_path / "codec")
    ship_motion.ship(recipe, tmp_path / "transformer", tmp_path / "codec", tmp_path / "motion")
    told = json.loads((tmp_path / "motion" / "scheduler" / "scheduler_config.json").read_text())
    assert told["shift"] == 5.0, "clips are sampled where they were trained"
    files = list((tmp_path / "motion").rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"transformer", "codec"}
    with safe_open(files[0], "pt") as opened:
        assert str(opened.get_slice(next(iter(opened.keys()))).get_dtype()) == "BF16"
    card = catalog.find(str(tmp_path / "motion"))
    assert card is not None
    request = Request(
        model=str(tmp_path / "motion"), prompt="a red ball moves left", steps=2, seed=3, device="cpu"
    )
    made = generate(request).pictures[0]
    assert len(made.frames) == 4
    assert made.frames[0].size == (SIDE, SIDE)
    story = generate(request.replace(prompt="", prompts="a red ball | a blue box", frames=4)).pictures[0]
    assert len(story.frames) == 4
    assert story.report["pixels"] != made.report["pixels"]
    catalog.unload()


def test_sigterm_ends_a_run_on_clips_with_its_state_saved(recipe: dict[str, Any], tmp_path: Path) -> None:
    class Signalled(MotionTrainer):
        def step(self) -> float:
            if self.steps() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step()

    straight = begun(recipe, tmp_path / "straight")
    for _ in range(3):
        straight.step()
    stopped = Signalled(copy.deepcopy(recipe), tmp_path / "run", None, None)
    with pytest.raises(SystemExit) as ended:
        stopped.run()
    assert ended.value.code == 143
    again = begun(recipe, tmp_path / "run")
    assert again.master.steps == 2
    again.step()
    assert all(torch.equal(a, b) for a, b in zip(straight.master.weights, again.master.weights, strict=True))
