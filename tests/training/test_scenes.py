"""Scenes with exact truth: every map against a plain look at the shapes, pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training import scenes
from training.scenes import (
    COLOURS,
    KINDS,
    Scene,
    Shape,
    as_pictures,
    draw,
    exact_conditions,
    made_of,
    scene,
    truths,
    turned,
)

SIZE = 24


def plainly(what: Scene, size: int) -> list[list[int]]:
    """What each pixel's middle belongs to, one point at a time: 0 the ground, i + 1 shape i."""
    found = []
    for row in range(size):
        line = []
        for column in range(size):
            nearest = 0
            for number, one in enumerate(what.shapes):
                y, x = np.array([[(row + 0.5) / size]]), np.array([[(column + 0.5) / size]])
                if bool(one.inside(y, x)[0, 0]):
                    nearest = number + 1
            line.append(nearest)
        found.append(line)
    return found


@pytest.mark.parametrize("number", range(6))
def test_labels_masks_edges_and_depth_are_those_of_every_pixel(number: int) -> None:
    truth = draw(scene(7, number), SIZE)
    labels = plainly(truth.scene, SIZE)
    assert truth.labels.tolist() == labels
    count = len(truth.scene.shapes)
    for row in range(SIZE):
        for column in range(SIZE):
            beside = [
                labels[y][x]
                for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
                if 0 <= y < SIZE and 0 <= x < SIZE
            ]
            here = labels[row][column]
            assert truth.edges[row, column] == any(other < here for other in beside)
            assert truth.depth[row, column] == pytest.approx(here / count)
            assert [bool(mask[row, column]) for mask in truth.masks] == [here == i + 1 for i in range(count)]


@pytest.mark.parametrize(
    ("kind", "area"),
    [
        ("circle", math.pi * 0.8),
        ("oval", math.pi * 0.6),
        ("square", 1.5**2),
        ("bar", 1.9 * 0.7),
        ("triangle", 3 * math.sqrt(3) / 4),
        ("hexagon", 3 * math.sqrt(3) / 2),
        ("star", 10 * 0.5 * 0.42 * math.sin(math.pi / 5)),
        ("ring", math.pi * 0.6),
        ("cross", 2 * 1.9 * 0.6 - 0.36),
    ],
)
@pytest.mark.parametrize("angle", [0.0, 1.1])
def test_shapes_have_the_area_that_geometry_gives_them(kind: str, area: float, angle: float) -> None:
    shape = Shape(kind, "red", (0.5, 0.5), 0.4, angle)
    seen = float(draw(Scene((shape,), "grey", "plain"), 200).masks.sum()) / 200**2
    assert seen == pytest.approx(area * 0.4**2, rel=0.01)


def test_every_kind_and_colour_comes_up_and_a_scene_follows_from_its_number() -> None:
    many = [scene(0, i) for i in range(120)]
    assert {one.kind for what in many for one in what.shapes} == set(KINDS)
    assert {one.colour for what in many for one in what.shapes} == set(COLOURS)
    assert scene(0, 5) == many[5]
    assert scene(1, 5) != many[5]
    assert np.array_equal(truths(3, seed=0, first=4)[1].pixels, draw(many[5], 64).pixels)


def test_a_picture_is_smooth_where_its_labels_change_and_pure_inside() -> None:
    truth = draw(Scene((Shape("circle", "blue", (0.5, 0.5), 0.4, 0.0),), "white", "plain"), 32)
    assert tuple(truth.pixels[16, 16]) == COLOURS["blue"]
    assert tuple(truth.pixels[0, 0]) == (255, 255, 255)
    assert len({tuple(one) for one in truth.pixels.reshape(-1, 3).tolist()}) > 4, "edges are averaged"


def test_what_is_hidden_is_in_the_whole_and_not_in_the_mask() -> None:
    back, front = (
        Shape("square", "red", (0.5, 0.5), 0.4, 0.0),
        Shape("circle", "blue", (0.5, 0.5), 0.2, 0.0),
    )
    truth = draw(Scene((back, front), "grey", "plain"), 40)
    assert truth.whole[0].sum() == truth.masks[0].sum() + truth.masks[1].sum()
    assert truth.box(0) == (8, 8, 32, 32)
    assert truth.scene.caption == "a blue circle in front of a red square, on a plain grey ground"
    hidden = draw(Scene((front, back), "grey", "plain"), 40)
    assert hidden.box(0) is None


def test_a_subject_is_its_shape_alone_upright_on_white() -> None:
    what = Scene((Shape("star", "green", (0.3, 0.3), 0.2, 2.0),), "navy", "striped")
    crop = draw(what, 32).subject()
    assert np.array_equal(
        crop, draw(Scene((Shape("star", "green", (0.9, 0.1), 0.1, 0.4),), "teal", "fading"), 32).subject()
    )
    assert tuple(crop[0, 0]) == (255, 255, 255)
    assert tuple(crop[16, 16]) == COLOURS["green"]


def test_scenes_are_pictures_for_the_trainers() -> None:
    found = truths(4, seed=3, size=16)
    pictures = as_pictures(found, "val_pair")
    assert pictures.pixels.shape == (4, 3, 16, 16)
    assert pictures.rows[2]["caption"] == found[2].scene.caption
    edges = exact_conditions(found, "edges")
    assert edges.shape == (4, 3, 16, 16)
    assert torch.equal(edges[1, 0] > 0, torch.from_numpy(found[1].edges))
    depth = exact_conditions(found, "depth")[0, 0].float() / 255
    assert torch.allclose(depth, torch.from_numpy(found[0].depth), atol=0.003)
    with pytest.raises(ValueError, match="must be one of edges, masks, depth, subject, got 'pose'"):
        exact_conditions(found, "pose")
    with pytest.raises(ValueError, match="at least 8 px, got 4"):
        draw(found[0].scene, 4)


def on_white(count: int) -> list[scenes.Truth]:
    return [
        draw(Scene((Shape(kind, "blue", (0.5, 0.45), 0.35, 0.3),), "white", "plain"), 48)
        for kind in list(KINDS)[:count]
    ]


def test_conditions_made_of_pictures_are_near_the_truth() -> None:
    found = on_white(6)
    pixels = as_pictures(found).pixels
    masks = made_of(pixels, "masks")[:, 0] > 0
    edges = made_of(pixels, "edges")[:, 0] > 0
    for one, mask, edge in zip(found, masks.numpy(), edges.numpy(), strict=True):
        true = one.labels > 0
        assert (mask & true).sum() / (mask | true).sum() > 0.85
        rows, columns = np.nonzero(edge)
        near = [
            one.edges[max(0, r - 1) : r + 2, max(0, c - 1) : c + 2].any()
            for r, c in zip(rows, columns, strict=True)
        ]
        assert len(near) > 40
        assert np.mean(near) > 0.97, "edges lie on the truth, at most a pixel away"
    with pytest.raises(ValueError, match="must be one of edges, masks, subject, got 'depth'"):
        made_of(pixels, "depth")


def test_an_empty_picture_gives_black_and_no_error() -> None:
    assert not made_of(torch.full((2, 3, 16, 16), 255, dtype=torch.uint8), "edges").any()


def test_subjects_do_not_tell_where_they_stood() -> None:
    pair = [
        draw(Scene((Shape("star", "red", middle, 0.25, 0.0),), "white", "plain"), 48)
        for middle in ((0.3, 0.3), (0.6, 0.65))
    ]
    one, two = made_of(as_pictures(pair).pixels, "subject").float()
    assert float((one - two).abs().mean()) < 8
    both = made_of(as_pictures(pair).pixels, "subject")
    first = turned(both, seed=1)
    assert torch.equal(first, turned(both, seed=1))
    assert not torch.equal(first, turned(both, seed=2))
    assert torch.equal(turned(both, seed=1, turn=0.0, mirror=0.0), both)
    assert torch.equal(turned(both, seed=1, turn=0.0, mirror=1.0), both.flip(-1))
