"""Conditions: every one deterministic and of the picture's size, Canny against a plain reference, bad pictures, filling in."""

from __future__ import annotations

import importlib.util
import io
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from control.base import Refused
from control.conditions import (
    Array,
    Boxes,
    Canny,
    Condition,
    Holes,
    LowResolution,
    Mask,
    Palette,
    Segments,
    SoftEdge,
    Subject,
    condition_of,
    conditions,
    extended,
    feathered,
    fitted,
    image_of,
    pasted,
    preview,
    read_picture,
    resized,
)
from dit.spec import knobs, parse

_place = importlib.util.spec_from_file_location("pictures", Path(__file__).with_name("pictures.py"))
assert _place is not None
assert _place.loader is not None
pictures = importlib.util.module_from_spec(_place)
_place.loader.exec_module(pictures)
scene = pictures.scene

PLAIN = sorted(set(conditions()) - {"depth", "pose"})


def canny_by_loops(picture: Array, low: float, high: float, sigma: float) -> Array:
    """Canny as it is described, pixel by pixel."""
    height, width = picture.shape[:2]
    radius = int(2 * sigma + 0.5)
    taps = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(-radius, radius + 1)]
    taps = [one / sum(taps) for one in taps]

    def at(plane: Array, y: int, x: int) -> float:
        return float(plane[min(max(y, 0), height - 1), min(max(x, 0), width - 1)])

    def each(plane: Array, function: Any) -> Array:
        return np.array([[function(plane, y, x) for x in range(width)] for y in range(height)])

    best = np.zeros((height, width, 3))
    for channel in range(3):
        plane = each(
            picture[..., channel],
            lambda p, y, x: sum(t * at(p, y + i - radius, x) for i, t in enumerate(taps)),
        )
        plane = each(plane, lambda p, y, x: sum(t * at(p, y, x + i - radius) for i, t in enumerate(taps)))
        for y in range(height):
            for x in range(width):
                down = (
                    sum(
                        w * (at(plane, y + 1, x + i) - at(plane, y - 1, x + i))
                        for i, w in ((-1, 1), (0, 2), (1, 1))
                    )
                    / 8
                )
                right = (
                    sum(
                        w * (at(plane, y + i, x + 1) - at(plane, y + i, x - 1))
                        for i, w in ((-1, 1), (0, 2), (1, 1))
                    )
                    / 8
                )
                if math.hypot(down, right) > best[y, x, 0] + 1e-9:
                    best[y, x] = math.hypot(down, right), down, right
    thin = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            strength, down, right = best[y, x]
            sector = round(math.atan2(down, right) / (math.pi / 4)) % 4
            dy, dx = ((0, 1), (1, 1), (1, 0), (1, -1))[sector]

            def beside(row: int, column: int) -> float:
                return best[row, column, 0] if 0 <= row < height and 0 <= column < width else 0.0

            if strength > beside(y - dy, x - dx) and strength >= beside(y + dy, x + dx):
                thin[y, x] = strength
    found, todo = np.zeros((height, width)), [tuple(place) for place in np.argwhere(thin > high)]
    while todo:
        y, x = todo.pop()
        if found[y, x]:
            continue
        found[y, x] = 1
        todo += [
            (y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)
            if 0 <= y + i < height and 0 <= x + j < width and thin[y + i, x + j] > low
        ]  # fmt: skip
    return found


@pytest.mark.parametrize("sigma", [1.0, 1.6])
def test_canny_is_what_its_description_says(sigma: float) -> None:
    draw = np.random.default_rng(3)
    smooth = resized(draw.random((7, 9, 3)).astype(np.float32), 27, 21)
    found = Canny(low=0.02, high=0.05, sigma=sigma).made(smooth)
    wanted = canny_by_loops(smooth, 0.02, 0.05, sigma)
    assert 20 < wanted.sum() < wanted.size / 2
    assert (found != wanted).mean() < 0.006, "but for ties in the last bit"


def test_canny_knobs_move_what_they_say() -> None:
    picture = read_picture(scene())
    counts = [Canny(low=0.02, high=high).made(picture).sum() for high in (0.05, 0.2, 0.27, 0.31, 0.4)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]
    outline = Canny().made(picture)[:, 30:58]
    assert 50 < outline.sum() < 90, "the ellipse has one thin closed line"
    faint = np.full((20, 20, 3), 0.5, dtype=np.float32)
    faint[:, 10:, 0], faint[:, 10:, 2] = 0.8, 0.27  # another colour of the same brightness
    assert Canny(low=0.02, high=0.04).made(faint).any()


@pytest.mark.parametrize("name", PLAIN)
def test_every_condition_is_of_the_pictures_size_and_always_the_same(name: str) -> None:
    for size in ((60, 44), (33, 71), (200, 16)):
        picture = read_picture(scene().resize(size))
        found = condition_of(parse(Condition, name), picture)  # type: ignore[type-abstract,unused-ignore]
        assert found.shape == picture.shape
        assert found.dtype == np.float32
        assert 0 <= found.min() < found.max() <= 1
        again = condition_of(parse(Condition, name), picture.copy())  # type: ignore[type-abstract,unused-ignore]
        assert np.array_equal(found, again)
    cls = conditions()[name]
    assert cls.about
    assert cls.instruction
    assert all(one.label for one in knobs(cls))
    assert preview(name, scene()).size == (60, 44)
    assert preview(name, scene(), (32, 32)).size == (32, 32)


def test_text_forms_and_their_limits() -> None:
    one = parse(Condition, "canny:low=0.02,high=0.3")  # type: ignore[type-abstract,unused-ignore]
    assert parse(Condition, str(one)) == one == parse(Condition, one.to_dict())  # type: ignore[type-abstract,unused-ignore]
    for text, words in (
        ("cany", "did you mean 'canny'"), ("canny:low=2", "0 to 1"), ("canny:low=0.5,high=0.2", "at most high"),
        ("canny:lo=1", "did you mean 'low'"), ("palette:colours=1", "2 to 64"), ("low-resolution:factor=4.5", "whole number"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            parse(Condition, text)  # type: ignore[type-abstract,unused-ignore]


def test_things_masks_boxes_and_subjects() -> None:
    picture = read_picture(scene())
    mask = condition_of(Mask(), picture)[..., 0]
    assert mask[8:31, 6:26].all()
    assert mask.sum() < 23 * 20 + 22 * 22
    assert np.array_equal(condition_of(Mask(inverted=True), picture)[..., 0], 1 - mask)
    boxes = condition_of(Boxes(), picture)[..., 0]
    assert boxes[12:33, 34:55].all()
    assert boxes.sum() == pytest.approx(23 * 20 + 21 * 21, abs=3)
    one = condition_of(Boxes(most=1, line=2), picture)[..., 0]
    assert one[8:31, 6:26].sum() == one.sum() == 23 * 20 - 19 * 16
    cut = Subject().made(picture[:, :30])
    places = np.argwhere(np.abs(cut - 1).max(axis=2) > 0.3)
    assert (places.min(axis=0) + places.max(axis=0)) / 2 == pytest.approx((21.5, 14.5), abs=1), (
        "it stands in the middle"
    )
    ring = np.ones((20, 20, 3), dtype=np.float32)
    ring[5:15, 5:15] = 0
    ring[8:12, 8:12] = 1
    assert Mask().made(ring)[9, 9] == 1, "holes are part of the thing"


def test_colours_of_surfaces() -> None:
    picture = read_picture(scene())
    found = condition_of(Segments(segments=3, smoothing=0.0), picture)
    assert len(np.unique(found.reshape(-1, 3), axis=0)) == 3
    assert np.abs(found - picture).max() < 0.02, "three colours, three kinds of surface"
    listed = condition_of(Segments(segments=3, colours="list"), picture)
    assert len(np.unique(listed.reshape(-1, 3), axis=0)) == 3
    few = condition_of(Palette(colours=3, cells=6), picture)
    assert len(np.unique(few.reshape(-1, 3), axis=0)) == 3
    coarse = LowResolution(factor=4).made(picture)
    assert np.allclose(coarse[0, 0], picture[:4, :4].mean(axis=(0, 1)), atol=1e-6)
    assert np.array_equal(coarse[40:44, 56:60], np.broadcast_to(coarse[43, 59], (4, 4, 3)))
    assert Holes(share=0.4).made(picture).mean() >= 0.4
    assert not np.array_equal(Holes(seed=1).made(picture), Holes(seed=2).made(picture))


def modes() -> dict[str, tuple[Image.Image, float]]:
    """Pictures of every mode, half dark, with the error that their levels allow."""
    dark = np.full((8, 10), 10, dtype=np.uint8)
    dark[:, 5:] = 200
    grey = Image.fromarray(dark)
    deep = Image.fromarray(dark.astype(np.uint16) * 257)
    alpha = Image.merge("RGBA", (*grey.convert("RGB").split(), Image.new("L", grey.size, 255)))
    return {
        "L": (grey, 0), "RGB": (grey.convert("RGB"), 0), "RGBA": (alpha, 0), "P": (grey.convert("P"), 0),
        "LA": (alpha.convert("LA"), 0),
        "I;16": (deep, 1e-4), "I": (Image.fromarray(dark.astype(np.int32) * 257), 1e-4), "CMYK": (grey.convert("CMYK"), 0.01),
        "F": (Image.fromarray(dark.astype(np.float32) / 255), 1e-6), "YCbCr": (grey.convert("YCbCr"), 0.01),
    }  # fmt: skip


@pytest.mark.parametrize("mode", sorted(modes()))
def test_any_mode_is_read_as_what_it_shows(mode: str, tmp_path: Path) -> None:
    image, error = modes()[mode]
    assert image.mode == mode
    wanted = np.repeat(np.where(np.arange(10) < 5, 10, 200)[None, :, None] / 255, 8, axis=0)
    assert np.abs(read_picture(image) - wanted).max() <= error + 1e-6
    if mode in ("L", "RGB", "RGBA", "P", "LA", "I;16"):
        image.save(tmp_path / "x.png")
        assert np.abs(read_picture(tmp_path / "x.png") - wanted).max() <= error + 1e-6


def test_transparency_lies_on_white_and_depth_out_of_range_is_refused() -> None:
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (read_picture(clear) == 1).all()
    for wrong in (
        np.full((3, 3), 2.0, np.float32),
        np.full((3, 3), np.nan, np.float32),
        np.full((3, 3), -5, np.int32),
    ):
        with pytest.raises(Refused, match="convert it"):
            read_picture(Image.fromarray(wrong))


def bomb() -> bytes:
    """A small PNG that says it holds 400 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def test_bad_files_are_told_in_words(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    scene().save(buffer, "PNG")
    torn = buffer.getvalue()[:200]
    for data, words in (
        (bomb(), "million pixels"),
        (b"", "readable .*it is empty"),
        (b"GIF89a nonsense", "readable .*no picture is recognised in it"),
        (torn, "readable"),
    ):
        with pytest.raises(Refused, match=words):
            read_picture(data)
    for path, words in ((tmp_path / "none.png", "readable .*no such file"), (tmp_path, "readable")):
        with pytest.raises(Refused, match=words):
            read_picture(path)


@pytest.mark.parametrize("level", [0, 128, 255])
@pytest.mark.parametrize("name", PLAIN)
def test_a_picture_of_one_colour_is_refused(name: str, level: int) -> None:
    with pytest.raises(Refused, match="all over"):
        preview(name, Image.new("RGB", (20, 20), (level,) * 3))


def test_what_finds_nothing_says_so_and_arrays_are_checked() -> None:
    slow = np.repeat(np.linspace(0.3, 0.5, 200, dtype=np.float32)[None, :, None], 30, axis=0).repeat(
        3, axis=2
    )
    with pytest.raises(Refused, match="canny found nothing"):
        condition_of(Canny(), slow)
    assert condition_of(SoftEdge(), slow).any()
    for wrong in (
        np.zeros((0, 4, 3)),
        np.zeros((4, 4, 2)),
        np.full((4, 4, 3), 2.0),
        np.zeros((4, 4, 3), np.int64),
    ):
        with pytest.raises(Refused):
            condition_of(Canny(), wrong)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(PLAIN), st.integers(0, 10_000))
def test_any_size_is_answered_or_refused(width: int, height: int, name: str, seed: int) -> None:
    picture = np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)
    try:
        found = condition_of(conditions()[name](), picture)
    except Refused:
        return
    assert found.shape == picture.shape
    assert np.isfinite(found).all()


def test_sizes_keep_the_aspect() -> None:
    picture = read_picture(scene(80, 40))
    assert fitted(picture, 80, 40) is picture or np.array_equal(fitted(picture, 80, 40), picture)
    square = fitted(picture, 40, 40)
    assert np.array_equal(square, picture[:, 20:60])
    assert fitted(picture, 16, 32).shape == (32, 16, 3)


def test_a_known_part_comes_back_bit_for_bit() -> None:
    draw = np.random.default_rng(0)
    made, known = (draw.integers(0, 256, (30, 40, 3), dtype=np.uint8) for _ in range(2))
    mask = np.zeros((30, 40), dtype=np.float32)
    mask[5:20, 8:30] = 1
    soft = feathered(mask, 3)
    found = pasted(made, known, soft)
    assert np.array_equal(found[mask == 0], known[mask == 0])
    assert np.array_equal(found[soft == 1], made[soft == 1])
    assert np.array_equal(pasted(made, known, mask)[mask == 1], made[mask == 1])
    assert list(soft[12, 6:13]) == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1, 1])
    assert np.array_equal(feathered(mask, 0), mask)
    assert feathered(np.ones((4, 4)), 3).min() == 1, "nothing is known, so there is no border"
    for wrong in ({"mask": mask[:5]}, {"made": made.astype(np.float32)}, {"known": known[:, :3]}):
        with pytest.raises(Refused):
            pasted(**({"made": made, "known": known, "mask": mask} | wrong))
    with pytest.raises(Refused, match="width"):
        feathered(mask, -1)


def test_a_larger_canvas_goes_on_from_the_border() -> None:
    picture = read_picture(scene())
    canvas, mask = extended(picture, left=5, bottom=3, multiple=8)
    assert canvas.shape == (48, 72, 3)
    assert np.array_equal(canvas[:44, 5:65], picture)
    assert not mask[:44, 5:65].any()
    assert mask.sum() == 48 * 72 - 44 * 60
    assert np.array_equal(canvas[20, :5], np.repeat(picture[20, :1], 5, axis=0))
    for wrong, words in (
        ({"left": -1}, "left"),
        ({}, "above 0"),
        ({"top": 1.5}, "top"),
        ({"top": 10**7}, "million"),
    ):
        with pytest.raises(Refused, match=words):
            extended(picture, **wrong)  # type: ignore[arg-type]


def test_a_preview_is_what_an_adapter_is_given() -> None:
    picture = read_picture(scene())
    shown = np.asarray(preview("canny", scene()), dtype=np.float32) / 255
    assert np.array_equal(shown, condition_of(Canny(), picture))
    assert image_of(picture).tobytes() == scene().tobytes()
