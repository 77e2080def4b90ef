"""The plot of `benchmarks.peers`: PSNR over speed-up, a line and a mark for each method, readable in black and white."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from benchmarks._peers_front import Point
from benchmarks._peers_methods import own
from pipelines.pareto import front

WIDTH, HEIGHT, LEFT, TOP, GAP = 470, 380, 56, 44, 70
LOW, HIGH = 18.0, 50.0
MARKS = ("circle", "square", "triangle", "diamond", "cross", "bar")
DASHES = ("", "6 3", "2 2", "8 2 2 2")
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#7a7a00",
    "#56b4e9",
    "#333333",
    "#e69f00",
    "#8b4513",
    "#5b3fa0",
)


def svg(points: Mapping[int, Mapping[str, Sequence[Point]]], levels: Sequence[float], across: str) -> str:
    """Return the plot: one field for each step count, for each method its points and the front; `across` says what runs right."""
    names = sorted({name for field in points.values() for name in field}, key=lambda one: (not own(one), one))
    wide = LEFT + len(points) * (WIDTH + GAP)
    high = TOP + HEIGHT + 60 + 18 * -(-len(names) // 3)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
    ]
    for place, (steps, field) in enumerate(points.items()):
        parts += _field(LEFT + place * (WIDTH + GAP), steps, field, names, levels, across)
    for place, name in enumerate(names):
        x, y = LEFT + place % 3 * 300, TOP + HEIGHT + 62 + place // 3 * 18
        parts += [
            *_style(place, name, [(x, y), (x + 26, y)]),
            f'<text x="{x + 34}" y="{y + 4}">{html.escape(name)}</text>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _field(
    left: float,
    steps: int,
    field: Mapping[str, Sequence[Point]],
    names: Sequence[str],
    levels: Sequence[float],
    words: str,
) -> list[str]:
    fastest = max((one.speedup for points in field.values() for one in points if one.psnr >= LOW), default=2.0)
    last = max(2, math.ceil(fastest))

    def at(one: Point) -> tuple[float, float]:
        across = math.log(max(one.speedup, 1.0)) / math.log(last)
        return left + WIDTH * across, TOP + HEIGHT * (HIGH - min(one.psnr, HIGH)) / (HIGH - LOW)

    parts = [
        f'<text x="{left}" y="{TOP - 16}" font-size="14">{steps} steps: mean PSNR (dB) over {words}</text>'
    ]
    for level in range(int(LOW), int(HIGH) + 1, 4):
        y = at(Point(1, level))[1]
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{level}</text>')
    for wanted in levels:
        y = at(Point(1, wanted))[1]
        parts.append(f'<path d="M{left} {y:.1f}h{WIDTH}" stroke="#bbb" stroke-dasharray="1 3"/>')
    for speed in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16):
        if speed <= last:
            x = at(Point(speed, LOW))[0]
            parts.append(f'<path d="M{x:.1f} {TOP}v{HEIGHT}" stroke="#eee"/>')
            parts.append(f'<text x="{x:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{speed}x</text>')
    parts.append(f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>')
    for name, points in field.items():
        seen = [at(one) for one in front(points) if one.psnr >= LOW]
        parts += _style(names.index(name), name, seen)
    return parts


def _style(place: int, name: str, seen: Sequence[tuple[float, float]]) -> list[str]:
    colour, dash, mark = (
        COLOURS[place % len(COLOURS)],
        DASHES[place // 3 % len(DASHES)],
        MARKS[place % len(MARKS)],
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in seen)
    width = 2.6 if own(name) else 1.2
    drawn = [
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash}"/>'
    ]
    return drawn + [_mark(mark, x, y, colour, filled=own(name)) for x, y in seen]


def _mark(kind: str, x: float, y: float, colour: str, filled: bool) -> str:
    paths = {
        "circle": "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "square": "m-3.5-3.5h7v7h-7z", "triangle": "m0-4.5l4.5 8h-9z",
        "diamond": "m0-5l4.5 5l-4.5 5l-4.5-5z", "cross": "m-4-4l8 8m0-8l-8 8", "bar": "m0-5v10",
    }  # fmt: skip
    inside = colour if filled else "white"
    return f'<path d="M{x:.1f} {y:.1f}{paths[kind]}" fill="{inside}" stroke="{colour}" stroke-width="1.4"/>'
