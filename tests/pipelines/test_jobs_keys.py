"""Who a job is: its key names bytes, not places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.jobs import content_key, digests_of


def test_keys_name_bytes_and_not_places(tmp_path: Path) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    first.write_bytes(b"same")
    second.write_bytes(b"same")

    def key(**more: Any) -> str:
        request = {"prompt": "x"} | more
        return content_key(request, digests_of(request))

    assert key(image=str(first)) == key(image=str(second))
    assert key(image=str(first)) != key()
    before = key(image=str(first))
    first.write_bytes(b"other bytes")
    assert key(image=str(first)) != before
    assert key() == key(seed=0, negative_prompt="", model="emoji"), "what is left out is its default"
    assert (
        len(
            {
                key(),
                key(seed=1),
                key(steps=3),
                key(prompt="y"),
                key(prompt=str(second)),
                key(model="org/name"),
            }
        )
        == 6
    )
    assert digests_of({"prompt": str(second)}).keys() == {"emoji"}, "words are never opened"
    assert content_key({"prompt": "x"}, {"emoji": "1"}) != content_key({"prompt": "x"}, {"emoji": "2"})


def test_a_model_is_known_by_its_weights(tiny: str, copy_of: Any) -> None:
    other = str(copy_of())
    one, two = ({"prompt": "x", "model": model} for model in (tiny, other))
    assert content_key(one, digests_of(one)) == content_key(two, digests_of(two))
    config = Path(other) / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"extra": 1}))
    assert content_key(one, digests_of(one)) != content_key(two, digests_of(two))
