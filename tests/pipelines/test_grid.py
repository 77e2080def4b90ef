"""Grids: axes, cells, what they share, what they would take, and what is exported; no model is loaded, but for one whole run."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines import _grid_sheets, cli
from pipelines import bench as benches
from pipelines.grid import Grid, Shown, Table, estimate, read_axis, table
from pipelines.jobs import Item, Ledger
from pipelines.request import Request, RequestError
from pipelines.scatter import Dot, ordered, scatter


def grid(*texts: str, **more: Any) -> Grid:
    base = more.pop("request", Request(prompt="a dog", steps=4, seed=5))
    return Grid(request=base, axes=tuple(map(read_axis, texts)), **more)


def test_a_comma_in_an_accelerator_s_settings_does_not_divide_the_axis() -> None:
    axis = read_axis("accelerators=none,delta-cache:interval=3,warmup=1,delta-cache+guidance-skip")
    assert [one.label for one in axis.values] == [
        "none",
        "delta-cache:interval=3,warmup=1",
        "delta-cache+guidance-skip",
    ]
    assert [len(one.given) for one in axis.values] == [0, 1, 2]
    assert axis.values[1].given[0]["warmup"] == 1


@pytest.mark.parametrize(
    ("text", "field"),
    [("steps", "axis"), ("steps=", "axis"), ("stepz=1,2", "axis"), ("images=1,2", "axis"), ("steps=4,4", "axis steps"),
     ("steps=4,x", "axis steps"), ("delta-cashe:interval=2", "axis"), ("delta-cache:intervall=2", "axis"),
     ("delta-cache:interval=99", "axis delta-cache:interval"), ("accelerators=nothing", "axis accelerators"),
     ("steps=" + ",".join(map(str, range(1, 80))), "axis steps"), ("lora:a.safetensors=-1", "axis lora:a.safetensors")],
)  # fmt: skip
def test_an_axis_that_cannot_be_is_refused_with_its_name(text: str, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_axis(text)
    assert caught.value.field == field


def test_every_combination_is_a_cell_with_its_own_seed_and_prompts_keep_their_commas() -> None:
    found = grid("steps=4,6", "prompt=a dog, cartoon | a cat", "guidance=1,2,3", seeds=2)
    cells = found.cells()
    assert [cell.place for cell in cells] == list(itertools.product(range(2), range(2), range(3), range(2)))
    assert {cell.request.prompt for cell in cells} == {"a dog, cartoon", "a cat"}
    assert {cell.request.seed for cell in cells} == {5, 6}
    assert len({cell.key for cell in cells}) == len(found.work()) == 24
    assert not found.accelerates
    assert all(cell.exact == "" for cell in cells), (
        "nothing is accelerated, so there is nothing to hold it against"
    )


def test_a_setting_of_an_accelerator_joins_the_request_s_own_and_off_takes_it_out() -> None:
    base = Request(prompt="a dog", accelerators=("delta-cache:warmup=1",))
    cells = grid("delta-cache:interval=3,off", request=base).cells()
    assert [tuple(map(str, cell.request.accelerators)) for cell in cells] == [
        ("delta-cache:interval=3,warmup=1",),
        (),
    ]
    alone = grid("delta-cache:interval=3").cells()
    assert [str(one) for one in alone[0].request.accelerators] == ["delta-cache:interval=3"]
    both = grid("accelerators=none,delta-cache", "delta-cache:interval=3,4")
    assert [len(cell.request.accelerators) for cell in both.cells()] == [0, 0, 1, 1], (
        "a setting acts only where its method is on"
    )
    assert len(both.work()) == 3, "the two exact cells are one picture"


def test_exact_pictures_are_added_once_and_are_never_the_first_of_their_model() -> None:
    found = grid("delta-cache:interval=2,3", "steps=4,6")
    assert len(found.work()) == 4 + 2
    assert found.work()[0].request.accelerators
    assert len(grid("delta-cache:interval=2,3", "steps=4,6", references=False).work()) == 4
    named = grid("accelerators=none,delta-cache")
    assert len(named.work()) == 2
    assert named.work()[0].request.accelerators, "what warms up counts against the accelerators"


def test_cells_of_one_model_and_lora_stand_together(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"not opened here")
    found = grid("seed=1,2,3", f"lora:{tmp_path}/a.safetensors=0,0.5,1")
    weights = [tuple(one.strength for one in cell.request.loras) for cell in found.work()]
    assert [key for key, _ in itertools.groupby(weights)] == sorted(set(weights), key=weights.index)
    assert () in weights, "weight 0 is no LoRA at all"


def test_cells_that_cannot_be_are_told_together_before_anything_is_made() -> None:
    with pytest.raises(RequestError) as caught:
        grid("class_label=1,2", "steps=4").cells()
    assert "class_label=1, steps=4" in str(caught.value)
    assert "class_label=2, steps=4" in str(caught.value)
    for wrong in (("steps=4", "steps=6"), ()):
        with pytest.raises(RequestError, match="1 to 3"):
            grid(*wrong)
    with pytest.raises(RequestError, match="at most 2000"):
        grid(*(f"{name}=" + ",".join(map(str, range(1, 61))) for name in ("steps", "seed")))


def test_a_grid_comes_back_from_its_json() -> None:
    found = grid("steps=4,6", "accelerators=none,delta-cache:interval=3,warmup=1", seeds=3)
    again = Grid.from_dict(json.loads(json.dumps(found.to_dict())))
    assert [cell.key for cell in again.cells()] == [cell.key for cell in found.cells()]
    for wrong in (None, {}, {"leapfrog_grid": 1}, found.to_dict() | {"seeds": "2"}):
        with pytest.raises(RequestError):
            Grid.from_dict(wrong)


def finished(ledger: Ledger, found: Grid, folder: Path, times: dict[str, float]) -> None:
    """Do the work of a worker: a picture of one colour for each cell, redder the more it is accelerated."""
    ledger.add(found.items(batch="g", folder=folder))
    while (job := ledger.lease("w")) is not None:
        request = Request.from_dict(job.item.request)
        name = str(request.accelerators[0]) if request.accelerators else ""
        path = folder / job.item.output
        colour = (60 + 30 * list(times).index(name), 100, 100 + request.seed % 2)
        Image.new("RGB", (24, 16), colour).save(path)
        report = {
            "timings": {"denoise": times[name]},
            "effective": {"steps": request.steps},
            "peak_memory_mb": {"main": 500.0},
        }
        assert ledger.done(job, [path], report)


TIMES = {"": 4.0, "delta-cache:interval=4": 2.0, "delta-cache:interval=3": 1.0}


@pytest.fixture
def made(tmp_path: Path) -> Table:
    found = grid("accelerators=none,delta-cache:interval=4,delta-cache:interval=3", "steps=4,6", seeds=2)
    ledger = Ledger(tmp_path / "jobs.sqlite")
    finished(ledger, found, tmp_path, TIMES)
    return table(found, ledger.jobs(batch="g", limit=-1))


def test_speed_and_likeness_stand_against_the_exact_cell_of_the_same_settings(made: Table) -> None:
    assert made.cells[0, 0, 0, 0].words == "4.00 s · exact"
    near, far = made.cells[1, 0, 0, 0], made.cells[2, 1, 0, 1]
    assert (near.speedup, far.speedup) == (2.0, 4.0)
    assert near.psnr == pytest.approx(10 * math.log10(255**2 / (30**2 / 3)))
    assert far.psnr == pytest.approx(10 * math.log10(255**2 / (60**2 / 3)))
    dots = made.dots()
    assert [(dot.label, dot.speedup, dot.pictures) for dot in dots][:2] == [
        ("delta-cache:interval=4, 4", 2.0, 2), ("delta-cache:interval=4, 6", 2.0, 2),
    ]  # fmt: skip
    assert len(made.to_dict()["front"]) == 2
    assert [one["speedup_denoise"] for one in made.to_dict()["front"]] == [2.0, 4.0]


def test_a_second_start_makes_nothing_and_a_larger_grid_only_what_is_new(tmp_path: Path) -> None:
    ledger, small = Ledger(tmp_path / "jobs.sqlite"), grid("steps=4,6")
    finished(ledger, small, tmp_path, {"": 1.0})
    ledger.add(small.items(batch="g", folder=tmp_path))
    assert ledger.lease("w") is None
    ledger.add(grid("steps=4,6,8").items(batch="g", folder=tmp_path))
    job = ledger.lease("w")
    assert job is not None
    assert job.item.request["steps"] == 8
    assert ledger.lease("w") is None


def test_an_estimate_comes_from_earlier_runs_and_says_what_it_does_not_know(tmp_path: Path) -> None:
    now = [100.0]
    ledger = Ledger(tmp_path / "jobs.sqlite", clock=lambda: now[0])
    ledger.add([Item(request=Request(prompt="x", steps=4, seed=1).to_dict(), id="a", folder=str(tmp_path))])
    job = ledger.lease("w")
    assert job is not None
    now[0] += 8.0
    ledger.done(job, [], {"effective": {"steps": 4}, "peak_memory_mb": {"main": 700.0}})
    found = grid("steps=4,8").work()
    told = estimate(found, ledger.jobs())
    assert (told.seconds, told.unknown, told.scaled, told.memory) == (8.0 + 16.0, 0, 1, {"main": 700.0})
    assert "about 24 s" in str(told)
    other = estimate(grid("width=64,96").work(), ledger.jobs())
    assert (other.seconds, other.unknown) == (None, 2)
    assert "not known yet" in str(other)
    done = estimate(found, ledger.jobs(), made=[cell.key for cell in found])
    assert (done.made, done.seconds) == (2, 0.0)


def test_the_sheet_holds_every_picture_pixel_for_pixel_with_its_labels(made: Table, tmp_path: Path) -> None:
    layout = _grid_sheets._Layout(made)
    (rows, columns), *rest = layout.tiles()
    assert not rest
    sheet = layout.draw(rows, columns)
    zoom = layout.zoom
    assert zoom == 7, "24 px are enlarged by a whole number"
    y = next(y for y in range(sheet.height) if sheet.getpixel((layout._x(0) + 5, y)) == (60, 100, 101))
    for column, red in ((0, 60), (2, 90), (4, 120)):
        box = (layout._x(column), y, layout._x(column) + 24 * zoom, y + 16 * zoom)
        assert sheet.crop(box).getcolors() == [(24 * 16 * zoom**2, (red, 100, 101))]
    above = sheet.crop((layout._x(2), y - layout.above, layout._x(2) + layout.width, y))
    assert len(above.getcolors(256) or []) > 3, "a label stands above the column"


def test_a_grid_is_exported_as_one_sheet_as_several_or_as_a_page(
    made: Table, tmp_path: Path, monkeypatch: Any
) -> None:
    assert [one.name for one in _grid_sheets.export(made, tmp_path)] == ["grid.png", "grid-scatter.svg"]
    with Image.open(tmp_path / "grid.png") as opened:
        assert Grid.from_dict(json.loads(opened.info["leapfrog-grid"])).seeds == 2  # type: ignore[attr-defined]
    monkeypatch.setattr(_grid_sheets, "TILE_SIDE", 900)
    names = [one.name for one in _grid_sheets.export(made, tmp_path)]
    assert names[:2] == ["grid-1.png", "grid-2.png"]
    assert not (tmp_path / "grid.png").exists(), "what an earlier export left is gone"
    for name in names[:-1]:
        with Image.open(tmp_path / name) as opened:
            assert max(opened.size) <= 900
    monkeypatch.setattr(_grid_sheets, "TILES", 1)
    assert [one.name for one in _grid_sheets.export(made, tmp_path)] == ["grid.html", "grid-scatter.svg"]
    page = (tmp_path / "grid.html").read_text()
    sources = re.findall(r'<img src="([^"]+)"', page)
    assert len(sources) == 12
    assert all((tmp_path / one).is_file() for one in sources)
    assert 'scope="row"' in page


def test_what_failed_or_waits_is_told_in_its_cell_and_escaped() -> None:
    found = grid("steps=4,6")
    cells = {cell.place: Shown(cell=cell, state="failed", error="<b>no</b>") for cell in found.cells()}
    page = _grid_sheets.table_html(Table(grid=found, cells=cells), lambda _: "")
    assert page.count("&lt;b&gt;no") == 2
    assert "<b>" not in page


def test_the_scatter_joins_what_no_other_beats() -> None:
    dots = [Dot(label=name, speedup=speed, psnr=psnr) for name, speed, psnr in
            (("a", 1.0, math.inf), ("b", 2.0, 30.0), ("c", 1.5, 25.0), ("<d>", 3.0, 20.0))]  # fmt: skip
    text = scatter(dots, wish=28)
    assert 'data-dots="4"' in text
    assert 'data-front="3"' in text
    assert len(re.findall(r'class="dot best"', text)) == 3
    assert "identical" in text
    assert "wished: 28 dB" in text
    assert "<d>" not in text
    assert [dot.label for _, dot, best in ordered(dots) if best] == ["a", "b", "<d>"]
    assert scatter([]) == ""


def test_the_command_checks_everything_and_makes_nothing_in_a_dry_run(tmp_path: Path, capsys: Any) -> None:
    target = str(tmp_path / "g")
    words = [
        "grid",
        "a dog",
        "--x",
        "steps=4,6",
        "--y",
        "delta-cache:interval=2,3",
        "--output",
        target,
        "--dry-run",
        "--json",
    ]
    assert cli.main(words) == cli.DONE
    told = json.loads(capsys.readouterr().out)
    assert (told["cells"], told["made"], told["dry_run"]) == (6, 0, True)
    assert not (tmp_path / "g").exists()
    for wrong in (
        ["--x", "stepz=4"],
        ["--y", "steps=4"],
        ["--x", "steps=4", "--seeds", "0"],
        ["--x", "width=100"],
        [],
    ):
        assert cli.main(["grid", "a dog", *wrong, "--output", target, "--json"]) == cli.BAD_INPUT
        assert json.loads(capsys.readouterr().out)["error"]["message"]
    assert not (tmp_path / "g").exists()


def test_a_benchmark_counts_its_rounds_and_tells_what_was_refused(monkeypatch: Any) -> None:
    from types import SimpleNamespace

    asked: list[tuple[str, ...]] = []

    def make(request: Request, **_: Any) -> Any:
        names = tuple(map(str, request.accelerators))
        asked.append(names)
        if names == ("taylor-cache",):
            raise RequestError("accelerators", "taylor-cache", "one that this model can use")
        seconds = 1.0 if names else 4.0
        picture = Image.new("RGB", (16, 16), (10 * len(names), 0, 0))
        return SimpleNamespace(
            clips=[[picture]], report={"timings": {"encode": 0.0, "denoise": seconds, "decode": 1.0}}
        )

    monkeypatch.setattr("pipelines.generate.generate", make)
    request = Request(prompt="a dog")
    found = benches.bench(request, ["delta-cache", "taylor-cache"], rounds=3)
    exact, fast, refused = found.rows
    assert (exact.name, exact.speedup_denoise, exact.psnr) == ("exact", 1.0, math.inf)
    assert (fast.speedup_denoise, fast.speedup_whole, len(fast.denoise)) == (4.0, 2.5, 3)
    assert fast.psnr == pytest.approx(10 * math.log10(255**2 / (100 / 3)))
    assert "one that this model can use" in refused.refused
    assert asked[3:] == [(), ("delta-cache",), ("delta-cache",), (), (), ("delta-cache",)], (
        "in turns, the order turning round"
    )
    assert math.isinf(found.floor)
    json.dumps(found.to_dict(), allow_nan=False)
    with pytest.raises(RequestError, match="rounds"):
        benches.bench(request, rounds=0)
