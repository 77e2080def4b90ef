"""In-Context LoRA: the grammar of joint captions both ways, what it refuses, and settings that a file keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from control import load
from control._files import save
from control.base import Use, controlled
from control.in_context_lora import MARKS, Captions, InContextLoRA, read_captions
from control.lora import LoRA


@pytest.mark.parametrize("count", [2, 3, 4, 6, 9])
@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("about", ["", "four stickers, one style"])
def test_a_joint_caption_reads_back(count: int, marks: str, about: str) -> None:
    captions = Captions(tuple(f"a thing, number {i}" for i in range(count)), about)
    columns = {4: 2, 6: 3, 9: 3}.get(count, count)
    text = captions.joint(marks=marks, columns=columns)
    assert text.startswith(f"[SET-OF-{count}] ")
    assert read_captions(text) == captions
    assert read_captions(text, count) == captions


def test_the_forms_a_person_types() -> None:
    joint = Captions(("a dog", "a cat"), "one style").joint()
    assert joint == "[SET-OF-2] one style [IMAGE1] a dog [IMAGE2] a cat"
    assert Captions(("a", "b", "c", "d")).joint(marks="place", columns=2) == (
        "[SET-OF-4] [TOP-LEFT] a [TOP-RIGHT] b [BOTTOM-LEFT] c [BOTTOM-RIGHT] d"
    )
    assert read_captions(" a dog|a cat ") == read_captions(["a dog", "a cat"])
    shots = read_captions("[MOVIE-SHOTS] a story [SCENE-1] he comes [SCENE-2] he goes")
    assert shots == Captions(("he comes", "he goes"), "a story", "MOVIE-SHOTS")
    assert read_captions(shots.joint(marks="scene")) == shots
    assert read_captions("[LEFT] a dog [RIGHT] a cat") == Captions(("a dog", "a cat"))
    assert read_captions("one alone", 1).panels == ("one alone",)


@pytest.mark.parametrize(
    ("text", "count", "words"),
    [
        ("a | b", 3, "3 panels need 3 captions, got 2"),
        ("a |  | b", None, "panel 2 of 3 has no caption"),
        ("", None, "panel 1 of 1 has no caption"),
        ([], None, "at least one panel"),
        ("[IMAGE1] a [IMAGE3] b", None, "count from 1 in their order, got .IMAGE1., .IMAGE3."),
        ("[IMAGE1] a [IMAGE2]", None, "panel 2 of 2 has no caption"),
        ("[IMAGE1] a [RIGHT] b", None, "count from 1 in their order"),
        ("[LEFT] a [LEFT] b", None, "named twice"),
        ("[SET-OF-3] [IMAGE1] a [IMAGE2] b", None, "stands before 2 panels"),
        (["a", "b [IMAGE2] c"], None, "between captions, not inside"),
    ],
)
def test_captions_that_fit_no_set_are_refused(text: Any, count: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_captions(text, count)


def test_places_and_marks_have_names_only_where_they_are() -> None:
    with pytest.raises(ValueError, match="marks must be one of"):
        Captions(("a", "b")).joint(marks="letters")
    with pytest.raises(ValueError, match="not for 5 in 5 columns"):
        Captions(tuple("abcde")).joint(marks="place", columns=5)


def test_a_file_keeps_its_settings_and_plain_loras_stay_plain(make: Any, tmp_path: Path) -> None:
    tiny = make("mmdit")
    settings = InContextLoRA(rank=2, panels=6, arrangement="row", marks="scene")
    adapter = settings.build(tiny.model)
    text = [path for path in adapter.layers if path.rpartition(".")[2] == "add_k_proj"]
    assert text, "the words' own maps of attention are learnt too"
    for one in adapter.parameters():
        torch.nn.init.normal_(one, std=0.3)
    again = load(save(adapter, tmp_path / "set.safetensors", tiny.model), tiny.model)
    assert again.control == settings
    assert str(again.coverage) == f"{2 * len(adapter.layers)}/{2 * len(adapter.layers)} keys"
    given = tiny.given()
    with torch.no_grad():
        plain = tiny.call(given)
        with controlled(tiny.model, Use(adapter)):
            ours = tiny.call(given)
        with controlled(tiny.model, Use(again)):
            assert tiny.call(given).equal(ours)
        assert not torch.allclose(ours, plain, atol=1e-3)
    foreign = (
        tmp_path / "published.safetensors"
    )  # keys of diffusers, without our metadata, as the published ones have
    from safetensors.torch import save_file

    save_file({f"transformer.{key}": x.contiguous() for key, x in adapter.state_dict().items()}, foreign)
    published = load(foreign, tiny.model)
    assert type(published.control) is LoRA
    with torch.no_grad(), controlled(tiny.model, Use(published)):
        assert tiny.call(given).equal(ours)


def test_settings_out_of_their_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="panels must be a whole number from 1 to 16"):
        InContextLoRA(panels=0)
    with pytest.raises(ValueError, match="arrangement must be one of grid, row, column"):
        InContextLoRA(arrangement="spiral")
    with pytest.raises(ValueError, match="targets must be names"):
        InContextLoRA(targets=())
