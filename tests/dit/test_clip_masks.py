"""Masks of clips: every task gives and generates what its name says, and never nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit.clip_masks import TASKS, batch_mask, blend, draw_mask, given_tokens, masked_mean, task_mask

GIVEN: dict[str, tuple[dict[str, Any], set[int]]] = {
    "unconditional": ({}, set()),
    "predict": ({}, {0, 1, 2, 3}),
    "backward": ({"given": 2}, {7, 8}),
    "interpolate": ({}, {0, 4, 8}),
    "image": ({}, {0}),
    "first-last": ({}, {0, 8}),
    "keyframes": ({"keyframes": (1, -2)}, {1, 7}),
    "region": ({"box": (1, 0, 3, 2)}, set()),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_gives_the_frames_it_names(task: str) -> None:
    settings, given = GIVEN[task]
    mask = task_mask(task, 9, 4, 6, **settings)
    assert mask.shape == (9, 4, 6)
    if task == "region":
        assert mask.sum() == 9 * 2 * 2
        assert mask[:, 1:3, :2].all()
        return
    assert {frame for frame in range(9) if not mask[frame].any()} == given
    assert mask.sum() == (9 - len(given)) * 24


@pytest.mark.parametrize(
    ("task", "settings", "words"),
    [
        ("dream", {}, "one of unconditional, predict"),
        ("predict", {"given": 4}, "given is from 1 to 3"),
        ("backward", {"given": 0}, "given is from 1 to 3"),
        ("interpolate", {"every": 1}, "every is at least 2"),
        ("keyframes", {"keyframes": (4,)}, "frame 4 is not in a clip of 4 frames"),
        ("keyframes", {"keyframes": (0, 1, 2, 3)}, "nothing is left to generate"),
        ("keyframes", {}, "nothing is left to be given"),
        ("image", {"keyframes": (0, 1)}, "one frame is given"),
        ("region", {}, "box is \\(top, left, bottom, right\\) inside 4 x 6"),
        ("region", {"box": (0, 0, 5, 2)}, "inside 4 x 6"),
        ("region", {"box": (0, 0, 4, 6)}, "the task of a whole clip is unconditional"),
    ],
)
def test_settings_that_give_or_leave_nothing_are_refused(task: str, settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        task_mask(task, 4, 4, 6, **settings)


def test_a_clip_of_no_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 frame, row and column, got 0 frames of 4 x 4"):
        task_mask("unconditional", 0, 4, 4)


def test_drawn_masks_are_never_empty_and_repeat() -> None:
    draw, again = (torch.Generator().manual_seed(3) for _ in range(2))
    spatial, shares, kinds = 0, [], set()
    for _ in range(400):
        mask = draw_mask(12, 8, 8, draw)
        assert torch.equal(mask, draw_mask(12, 8, 8, again))
        assert mask.any()
        assert bool(((mask == 0) | (mask == 1)).all())
        whole = bool((mask.flatten(1) == mask[:, :1, 0]).all())
        if whole:
            kinds.add(tuple(mask[:, 0, 0].tolist()))
            continue
        spatial += 1
        busy = mask.flatten(1).any(1)
        places = busy.nonzero().flatten().tolist()
        assert places == list(range(places[0], places[-1] + 1))  # one run of frames
        assert (mask[busy] == mask[places[0]]).all()
        shares.append(float(mask[places[0]].mean()))
        blocks = mask.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        assert torch.equal(blocks.amax((2, 4)), blocks.amin((2, 4)))  # made of patches
    assert 50 < spatial < 110  # a fifth of 400
    assert 0.3 < sum(shares) / len(shares) < 0.6
    ends = [(0.0,) * 6 + (1.0,) * 6, (1.0,) * 6 + (0.0,) * 6, (0.0, 1.0, 1.0, 1.0) * 3, (1.0,) * 12]
    assert kinds.issuperset(ends)
    assert len({one for one in kinds if sum(one) == 11}) == 12  # each frame alone


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 2, 2), (3, 4, 10), (5, 1, 1)])
def test_small_clips_have_masks_too(size: tuple[int, int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(60):
        mask = draw_mask(*size, draw, given=9, patch=2)
        assert mask.shape == size
        assert mask.any()


def test_given_sites_stay_bit_for_bit() -> None:
    clean, noisy = torch.randn(2, 3, 4, 6, 6), torch.randn(2, 3, 4, 6, 6)
    noisy[0, 0, 0] = torch.nan  # what is not looked at may be anything
    mask = task_mask("predict", 4, 6, 6)
    both = blend(clean, noisy, mask)
    assert torch.equal(both[:, :, :2], clean[:, :, :2])
    assert torch.equal(both[:, :, 2:], noisy[:, :, 2:])


def test_masks_of_other_shapes_are_refused_with_both_shapes() -> None:
    clip = torch.zeros(2, 3, 4, 6, 6)
    for mask in (torch.ones(4, 6, 6), torch.ones(2, 4, 6, 6), torch.ones(2, 1, 4, 6, 6)):
        assert batch_mask(mask, clip).shape == (2, 1, 4, 6, 6)
    for shape in ((3, 6, 6), (3, 4, 6, 6), (6, 6), (2, 3, 4, 6, 6)):
        with pytest.raises(
            ValueError, match=r"takes \(4, 6, 6\) or \(2, 4, 6, 6\), got \(" + str(shape)[1:-1]
        ):
            batch_mask(torch.ones(shape), clip)
    with pytest.raises(ValueError, match="as large as the noisy one"):
        blend(clip[:, :, :2], clip, torch.ones(4, 6, 6))


def test_the_loss_is_of_generated_sites_and_not_of_their_count() -> None:
    error = torch.ones(3, 2, 4, 6, 6).requires_grad_()
    mask = torch.stack(
        [task_mask("predict", 4, 6, 6), task_mask("region", 4, 6, 6, box=(0, 0, 1, 1)), torch.zeros(4, 6, 6)]
    )
    loss = masked_mean(error, mask)
    assert loss.tolist() == [1, 1, 0]
    loss.sum().backward()
    assert error.grad is not None
    assert torch.equal(error.grad > 0, (mask > 0)[:, None].expand_as(error))


def test_a_patch_is_given_when_all_of_it_is() -> None:
    mask = torch.zeros(1, 1, 2, 4, 4)
    mask[0, 0, 1, 1, 2] = 1
    assert given_tokens(mask, 2).tolist() == [[True] * 5 + [False] + [True] * 2]
    assert given_tokens(mask[:, :, 1], 2).tolist() == [[True, False, True, True]]
