"""Layouts: cut is the exact inverse of joined for every count and size, and what does not fit is refused in words."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.layout import MOST_PANELS, Layout
from pipelines.request import LAYOUTS, RequestError


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, MOST_PANELS), height=st.integers(1, 9), width=st.integers(1, 9), gutter=st.integers(0, 4),
    arrangement=st.sampled_from(LAYOUTS), batch=st.integers(1, 2),
)  # fmt: skip
def test_cutting_is_the_inverse_of_joining(
    count: int, height: int, width: int, gutter: int, arrangement: str, batch: int
) -> None:
    layout = Layout.of(count, height, width, arrangement=arrangement, gutter=gutter)
    assert layout.count == count
    assert Layout.from_dict(layout.to_dict()) == layout
    panels = torch.randn(batch, count, 3, height, width)
    canvas = layout.joined(panels, fill=7.0)
    assert tuple(canvas.shape) == (batch, 3, *layout.canvas)
    assert layout.cut(canvas).equal(panels)
    assert layout.joined(panels.unbind(1), fill=7.0).equal(canvas)
    # what is no panel is gutter, all of it
    between = ~layout.mask(range(count))
    assert bool((canvas[..., between] == 7).all())
    assert int(between.sum()) == layout.canvas[0] * layout.canvas[1] - count * height * width
    # in units of 2 px everything lies at the same places
    double = Layout.of(count, 2 * height, 2 * width, arrangement=arrangement, gutter=2 * gutter)
    assert double.divided(2) == layout
    assert double.mask([count - 1])[::2, ::2].equal(layout.mask([count - 1]))


def test_arrangements_read_like_a_page() -> None:
    assert [(Layout.of(n, 8, 8).rows, Layout.of(n, 8, 8).columns) for n in (1, 2, 4, 5, 6, 9, 12)] == [
        (1, 1), (1, 2), (2, 2), (1, 5), (2, 3), (3, 3), (3, 4),
    ]  # fmt: skip
    assert Layout.of(4, 8, 8, arrangement="row").canvas == (8, 32)
    assert Layout.of(4, 8, 6, arrangement="column", gutter=2).canvas == (38, 6)
    canvas = Layout.of(4, 1, 1).joined(torch.arange(4.0).reshape(4, 1, 1, 1))
    assert canvas.tolist() == [[[0, 1], [2, 3]]]


def refused(field: str, words: str, call: object) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        call()  # type: ignore[operator]
    assert caught.value.field == field


def test_what_does_not_fit_is_refused() -> None:
    refused("panels", "from 1 to 16", lambda: Layout.of(0, 8, 8))
    refused("panels", "from 1 to 16", lambda: Layout.of(17, 8, 8))
    refused("panels", "from 1 to 16", lambda: Layout(rows=5, columns=5, height=8, width=8))
    refused("layout", "one of grid", lambda: Layout.of(2, 8, 8, arrangement="spiral"))
    refused("layout height", "from 1", lambda: Layout.of(2, 0, 8))
    refused("layout", "dictionary", lambda: Layout.from_dict({"rows": 1}))
    layout = Layout.of(4, 24, 16, gutter=4)
    layout.check(4)
    refused("layout gutter", "multiple of 8", lambda: layout.check(8))
    refused("height", "multiple of 16", lambda: Layout.of(2, 24, 16).check(16))
    refused("panels", "at most 50 tokens", lambda: layout.check(4, tokens=50))
    refused("panels", "at most 44 px a side", lambda: layout.check(4, side=11))
    refused("panels", "as many as the layout has, 4", lambda: layout.joined(torch.zeros(3, 3, 24, 16)))
    odd = [torch.zeros(3, 24, 16)] * 3 + [torch.zeros(3, 16, 16)]
    refused("panel 4", "16x24 px as every panel", lambda: layout.joined(odd))
    refused("canvas", "36x52 px", lambda: layout.cut(torch.zeros(3, 48, 32)))
