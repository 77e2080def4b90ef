"""Any bytes at all in the place of weights: read or refused in words, and never kinder than the library that opens them later."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from pipelines.safe import Header, ModelError, check_weights

BOUNDED = settings(max_examples=150, deadline=None)
SIZES = {"F32": 4, "BF16": 2, "U8": 1, "BOOL": 1, "I64": 8}
ODD = st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**40, 1.5, True, None, "2", [], {}])
NAMES = st.text(max_size=6) | st.sampled_from(["w", "__metadata__", "a/../b", "\0"])


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A true file of a few tensors, of which then perhaps one thing is not true."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(NAMES.filter(lambda one: one != "__metadata__"), max_size=4, unique=True)):
        kind, shape = draw(st.sampled_from(sorted(SIZES))), draw(st.lists(st.integers(0, 3), max_size=3))
        size = SIZES[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if draw(st.booleans()):
        header["__metadata__"] = draw(
            st.dictionaries(st.text(max_size=5), st.text(max_size=5) | ODD, max_size=2)
        )
    changed = [name for name in header if name != "__metadata__"]
    if changed and draw(st.booleans()):
        one = header[draw(st.sampled_from(changed))]
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
        inside = field in ("shape", "data_offsets") and one[field] and draw(st.booleans())
        if inside:
            one[field][draw(st.integers(0, len(one[field]) - 1))] = draw(ODD)
        else:
            one[field] = draw(ODD | st.lists(ODD, max_size=3))
    raw = json.dumps(header).encode() + b" " * draw(st.integers(0, 8))
    length = draw(st.sampled_from([len(raw)] * 4 + [0, 1, len(raw) - 1, len(raw) + 1, 2**63, 2**64 - 1]))
    data = struct.pack("<Q", length) + raw + bytes(max(0, end + draw(st.sampled_from([0, 0, 0, 0, -1, 1]))))
    place = draw(st.integers(0, len(data) - 1))
    return (
        data[:place] + bytes([draw(st.integers(0, 255))]) + data[place + 1 :] if draw(st.booleans()) else data
    )


def checked(folder: pytest.TempPathFactory, data: bytes) -> tuple[Path, Header | None]:
    path = folder.getbasetemp() / "any.safetensors"
    path.write_bytes(data)
    try:
        return path, check_weights(path)
    except ModelError:
        return path, None


@BOUNDED
@given(data=files() | st.binary(max_size=300))
def test_any_weights_are_read_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path, header = checked(tmp_path_factory, data)
    if header is None:
        return
    with safe_open(
        path, framework="pt"
    ) as opened:  # what passes the check, the library opens and reads in the same way
        assert sorted(opened.keys()) == sorted(header.tensors)
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in header.tensors}
    assert shapes == {name: shape for name, (_, shape, _, _) in header.tensors.items()}
