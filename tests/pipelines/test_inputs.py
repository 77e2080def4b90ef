"""A starting picture of any mode, and files that are none: what is wrong is told in words, before any weights load."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from control.conditions import read_picture
from pipelines import inputs
from pipelines.inputs import read_image
from pipelines.request import RequestError
from pipelines.video_files import encode

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK")


def drawn(folder: Path, mode: str) -> Path:
    """A picture of 12x8 px with four shades; where the mode has alpha, its left half is not to be seen."""
    shades = np.repeat(np.array([[0, 80, 160, 255]], dtype=np.uint8), 8, axis=0).repeat(3, axis=1)
    path = folder / f"{mode.replace(';', '')}.{'jpg' if mode == 'CMYK' else 'png'}"
    if mode == "I;16":
        Image.fromarray(shades.astype(np.uint16) * 257).save(path)
        return path
    image = Image.fromarray(shades).convert("RGB")
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        alpha = Image.new("L", image.size, 255)
        alpha.paste(0, (0, 0, 6, 8))
        image.putalpha(alpha)
    image.convert(mode).save(path)
    return path


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_read_as_conditions_are(tmp_path: Path, mode: str) -> None:
    path = drawn(tmp_path, mode)
    found, told = read_image(str(path))
    assert found is not None
    assert told is not None
    assert (found.mode, found.size, told["name"]) == ("RGB", (12, 8), path.name)
    made = np.asarray(found)
    assert np.abs(made - np.rint(read_picture(path) * 255)).max() <= 1
    if mode in ("RGBA", "LA"):
        assert (made[:, :6] == 255).all(), "what is transparent lies on white, not on black"
    elif mode in ("RGB", "L", "I;16"):
        assert [int(one) for one in made[0, ::3, 0]] == [0, 80, 160, 255]


@pytest.mark.parametrize(
    ("name", "words"),
    [("empty.png", "it is empty"), ("text.png", "no picture is recognised in it"), ("none.png", "there is no such file"),
     ("cut.png", "truncated"), ("folder.png", "it is a folder: give one")],
)  # fmt: skip
@pytest.mark.parametrize("field", ["image", "last_image"])
def test_what_is_no_picture_is_told_in_words(tmp_path: Path, name: str, words: str, field: str) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    noise.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with pytest.raises(RequestError) as caught:
        read_image(str(tmp_path / name), field)
    told = str(caught.value)
    assert caught.value.field == field
    assert f"picture ({words}" in told or (name == "cut.png" and words in told)
    assert "0x" not in told, "no object's address"
    assert "Errno" not in told


@pytest.mark.parametrize("ending", [".gif", ".png", ".webp"])
def test_of_an_animation_the_first_frame_is_taken_and_that_is_told(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "blue", "green")]
    path = tmp_path / f"moving{ending}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    notes: list[str] = []
    found, _ = read_image(str(path), "last_image", notes)
    assert found is not None
    assert np.asarray(found)[4, 6].tolist() == [255, 0, 0]
    assert notes == [f"last_image: of the 3 frames of {path.name} the first was taken"]
    frames[0].save(tmp_path / f"still{ending}")
    read_image(str(tmp_path / f"still{ending}"), "image", notes)
    assert len(notes) == 1


def test_a_film_is_no_picture_and_where_it_belongs_is_told(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(encode([Image.new("RGB", (16, 16), "red")] * 2, ".mp4", 8, "{}"))
    matroska = tmp_path / "film.mkv"
    matroska.write_bytes(b"\x1aE\xdf\xa3" + bytes(60))
    for one in (path, matroska):
        with pytest.raises(
            RequestError, match="it is a film: give one of its frames, or give it as the clip"
        ):
            read_image(str(one))


def test_what_is_too_large_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = drawn(tmp_path, "RGB")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "PIXEL_LIMIT", 95)
        with pytest.raises(RequestError, match="12x8"):
            read_image(str(path))
    monkeypatch.setattr(inputs, "BYTE_LIMIT", 20)
    with pytest.raises(RequestError, match="a file of at most"):
        read_image(str(path))
