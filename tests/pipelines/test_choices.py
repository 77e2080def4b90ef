"""Controls and LoRAs as text, dictionary and object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import controls
from pipelines.request import Request, RequestError

# Text forms


def test_text_dictionary_and_object_are_one(tmp_path: Path) -> None:
    texts = (
        "edges=pic.png:0.8",
        "edges@canny:low=0.02,high=0.5=a b,c.png:1,start=0.25,end=0.5,region=m.png",
        "./x.safetensors=C:\\pictures\\1.png,raw=true,curve=1/0.5/0",
    )
    request = Request(
        prompt="a", controls=texts, loras=("style.safetensors:0.7", "x.safetensors,start=0.5,task=cats")
    )
    first, second, third = (one.to_dict() for one in request.controls)
    assert (first["adapter"], first["file"], first["strength"]) == ("edges", "pic.png", 0.8)
    assert (second["condition"], second["file"], second["end"]) == (
        "canny:low=0.02,high=0.5",
        "a b,c.png",
        0.5,
    )
    assert (third["file"], third["raw"], third["curve"]) == ("C:\\pictures\\1.png", True, [1.0, 0.5, 0.0])
    again = Request.from_dict(json.loads(json.dumps(request.to_dict())))
    assert again == request
    texts_again = [one.text for one in request.controls]  # type: ignore[attr-defined]
    assert Request(prompt="a", controls=texts_again).controls == request.controls
    assert Request.from_dict({"prompt": "a"}).controls == (), "a file from before has none"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("edges", "no adapter in front of ="), ("=pic.png", "no adapter"), ("edges=", "no file"), ("edges=p.png:-1", "0 to 10"),
        ("edges=p.png:nan", "finite"), ("edges=p.png:99", "0 to 10"), ("edges=p.png:1,strat=2", "no setting strat"),
        ("edges@cany=p.png", "did you mean 'canny'"), ("edges@canny:low=7=p.png", "0 to 1"),
        ("edges=p.png:1,start=0.5,end=0.5", "below"),
        ("edges=p.png:1,curve=1", "2 to 1000"), ("edges=p.png:1,curve=a/b", "with / between"),
        ("edges@canny=p.png:1,raw=true", "raw"),
        ("edges=p\x00.png", "printable"), ("edges=" + "x" * 5000, "4096"),
    ],
)  # fmt: skip
def test_bad_texts_name_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(RequestError, match="controls must be") as caught:
        Request(prompt="a", controls=(text,))
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_same_twice_and_too_many_are_refused() -> None:
    for field, values in (
        ("loras", ("x.safetensors:1", "x.safetensors:0.5")), ("controls", ("edges=a.png", "edges=a.png:1.0")),
        ("loras", [f"{i}.safetensors" for i in range(9)]), ("controls", 5), ("loras", (5,)),
        ("controls", ({"name": "control", "adapter": "a", "file": "b", "more": 1},)),
        ("loras", ({"name": "control", "file": "x"},)),
    ):  # fmt: skip
        with pytest.raises(RequestError) as caught:
            Request(prompt="a", **{field: values})  # type: ignore[arg-type]
        assert caught.value.field == field
    assert len(Request(prompt="a", controls=("edges=a.png", "edges=b.png")).controls) == 2, (
        "two pictures, one adapter"
    )


@settings(max_examples=60, deadline=None)
@given(
    st.from_regex(r"[a-z]{1,8}(\.safetensors)?", fullmatch=True), st.from_regex(r"[\w ,.()/-]{0,20}\w\.png", fullmatch=True),
    st.floats(0, 10), st.floats(0, 0.4), st.floats(0.5, 1),
)  # fmt: skip
def test_any_choice_survives_its_text(
    adapter: str, file: str, strength: float, start: float, end: float
) -> None:
    one = controls.ControlChoice(adapter=adapter, file=file.strip(), strength=strength, start=start, end=end)
    assert controls.read_all(controls.ControlChoice, one.text) == (one,)
