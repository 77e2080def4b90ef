"""Manifests: three kinds of tables, every problem told with its line, choices drawn the same everywhere, nothing read outside."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import _tables, manifest
from pipelines.manifest import Manifest, ManifestError, read_manifest
from pipelines.request import Request, RequestError
from pipelines.request import settings as request_fields
from pipelines.wildcards import Wildcards


def lines(folder: Path, *rows: Any, name: str = "m.jsonl") -> Path:
    path = folder / name
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8"
    )
    return path


def problems(path: Path, **more: Any) -> list[tuple[int, str]]:
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, **more)
    return [(one.line, one.field) for one in caught.value.problems]


def prompts(read: Manifest) -> list[str]:
    return [entry.request["prompt"] for entry in read.entries]


def test_a_row_becomes_requests_of_one_picture_each(tmp_path: Path) -> None:
    read = read_manifest(
        lines(
            tmp_path,
            {"id": "cat", "prompt": "a cat", "seed": 5, "n": 3, "steps": 4, "tags": {"set": "a"}},
            "",
            {
                "prompt": "a dog",
                "seeds": [9, 1],
                "output": "dogs/dog.png",
                "accelerators": ["delta-cache:interval=3"],
            },
        )
    )
    assert [entry.id for entry in read.entries[:3]] == ["cat-1", "cat-2", "cat-3"]
    assert [entry.request["seed"] for entry in read.entries] == [5, 6, 7, 9, 1]
    assert [entry.output for entry in read.entries[3:]] == ["dogs/dog-1.png", "dogs/dog-2.png"]
    assert read.entries[0].tags == {"set": "a"}
    assert [entry.line for entry in read.entries] == [1, 1, 1, 3, 3]
    for entry in read.entries:
        assert Request.from_dict(entry.request).images == 1
    assert read.entries[4].request["accelerators"][0]["name"] == "delta-cache"


def test_csv_and_parquet_say_the_same_as_json_lines(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "a", "prompt": "a cat, sitting", "seed": 7, "steps": 3, "guidance": 2.5, "tags": ["x", "y"]},
        {"id": "b", "prompt": 'a "dog"\nin two lines', "seed": 1, "steps": 5, "guidance": 1.0, "tags": ["z"]},
    ]
    plain = read_manifest(lines(tmp_path, *rows))
    table = tmp_path / "m.csv"
    with table.open("w", encoding="utf-8-sig", newline="") as file:  # the mark is what spreadsheets write
        writer = csv.writer(file)
        writer.writerow(rows[0])
        writer.writerows([*list(row.values())[:-1], "; ".join(row["tags"])] for row in rows)
    from_csv = read_manifest(table)
    same = [(one.id, one.key, one.request, one.tags) for one in plain.entries]
    assert [(one.id, one.key, one.request, one.tags) for one in from_csv.entries] == same
    assert [one.line for one in from_csv.entries] == [2, 3]
    pa = pytest.importorskip("pyarrow", reason="Parquet manifests need pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    from_parquet = read_manifest(tmp_path / "m.parquet")
    assert [(one.id, one.key, one.request, one.tags) for one in from_parquet.entries] == same


def test_every_problem_is_told_with_its_line(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        {"id": "a", "prompt": "a cat"},
        {"id": "a", "prompt": "a dog"},
        {"prompt": "a cat", "stpes": 3},
        {"prompt": "a cat", "steps": 4000, "width": 8, "scheduler": "eular"},
        "{not json",
        [1, 2],
        {"prompt": ""},
        {"prompt": "a cat", "image": "../secret.png"},
        '{"prompt": "a", "prompt": "b"}',
        '{"prompt": "a", "guidance": NaN}',
        {"prompt": "a cat", "seed": -1},
        {"prompt": "a cat", "n": 2, "seeds": [1, 2]},
        {"prompt": "a cat", "output": "../cat.png"},
        {"prompt": "a cat", "id": "../cat"},
        {"prompt": "a {red cat"},
        {"prompt": "a __colours__ cat"},
        {"prompt": "a cat", "accelerators": ["delta-cash"]},
        {"prompt": "a cat", "tags": 3},
    )
    assert problems(path) == [
        (2, "id"), (3, "column"), (4, "steps"), (4, "width"), (4, "scheduler"), (5, "line"), (6, "line"), (7, "prompt"),
        (8, "image"), (9, "line"), (10, "line"), (11, "seed"), (12, "n"), (13, "output"), (14, "id"), (15, "prompt"),
        (16, "prompt"), (17, "accelerators"), (18, "tags"),
    ]  # fmt: skip
    with pytest.raises(ManifestError, match=r"did you mean 'steps'") as caught:
        read_manifest(path)
    assert "line 4: steps must be a whole number from 1 to 1000 steps or none; got 4000" in str(caught.value)
    assert caught.value.problems[0].to_dict()["line"] == 2


def test_columns_are_the_fields_of_a_request_and_no_others(tmp_path: Path) -> None:
    fields = {one.name for one in request_fields()}
    assert fields <= set(manifest.columns())
    assert set(manifest.columns()) - fields == {
        "id", "tags", "output", "seeds", "matrix", "n",
        *(short for short, name in (("control", "controls"), ("lora", "loras")) if name in fields),
    }  # fmt: skip
    assert problems(lines(tmp_path, "prompt;seed", "a cat;1", name="m.csv"))[0] == (1, "column")


def test_equal_items_are_made_once(tmp_path: Path) -> None:
    read = read_manifest(
        lines(
            tmp_path,
            {"id": "one", "prompt": "a cat", "seed": 1},
            {"id": "two", "prompt": "a cat", "seeds": [1]},
            {"prompt": "a dog"},
            {"prompt": "a dog"},
        )
    )
    assert read.entries[0].id == "one"
    assert len(read.entries) == 2
    assert read.duplicates == {"two": "one"}
    assert read.repeated == 2


def test_a_picture_counts_by_its_bytes_not_by_its_name(tmp_path: Path) -> None:
    for name, data in (("a.png", b"1"), ("b.png", b"1"), ("c.png", b"2")):
        (tmp_path / name).write_bytes(data)
    path = lines(tmp_path, *({"id": name, "prompt": "a cat", "image": f"{name}.png"} for name in "abc"))
    read = read_manifest(path)
    assert [entry.id for entry in read.entries] == ["a", "c"]
    assert read.entries[0].request["image"] == str(tmp_path.resolve() / "a.png")


@pytest.mark.parametrize(
    "name", ["../out.png", "/etc/hostname", "link.png", "folder/../../out.png", "C:/x.png", "~/x.png", "..\\out.png",
             "x\0.png", "none.png", "․․/out.png", "a" * 3000],
)  # fmt: skip
def test_files_outside_the_folder_are_never_named(name: str, tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "out.png").write_bytes(b"")
    (inside / "folder").mkdir()
    (inside / "link.png").symlink_to(tmp_path / "out.png")
    assert problems(lines(inside, {"prompt": "a cat", "image": name})) == [(1, "image")]


def test_another_folder_may_be_allowed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.png").write_bytes(b"p")
    path = lines(tmp_path / "in", {"prompt": "a cat", "image": "../out.png"})
    assert read_manifest(path, roots=[tmp_path]).entries[0].request["image"] == str(
        tmp_path.resolve() / "out.png"
    )


@pytest.mark.skipif(
    "controls" not in {one.name for one in request_fields()}, reason="requests have no controls"
)
def test_controls_and_loras_are_objects_or_text_and_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "pose.png").write_bytes(b"p")
    (tmp_path / "style.safetensors").write_bytes(b"s")
    row = {
        "prompt": "a cat",
        "control": [{"adapter": "edges", "image": "pose.png", "weight": 0.5}],
        "lora": "style.safetensors:0.7",
    }
    request = Request.from_dict(read_manifest(lines(tmp_path, row)).entries[0].request)
    (control,), (lora,) = request.controls, request.loras
    assert (control.adapter, control.file, control.strength) == (
        "edges",
        str(tmp_path.resolve() / "pose.png"),
        0.5,
    )
    assert (lora.file, lora.strength) == (str(tmp_path.resolve() / "style.safetensors"), 0.7)
    assert problems(lines(tmp_path, row | {"control": "edges=/etc/passwd:1"})) == [(1, "controls.file")]
    assert problems(lines(tmp_path, row | {"control": {"adapter": "edges", "picture": "pose.png"}})) == [
        (1, "controls")
    ]


def test_choices_are_drawn_by_the_seed_and_the_same_everywhere(tmp_path: Path) -> None:
    (tmp_path / "animals.txt").write_text("# friends\ncat\ndog\n{red|blue} fish\n", encoding="utf-8")
    path = lines(tmp_path, {"prompt": "a {big|small} __animals__", "n": 200})
    drawn = prompts(read_manifest(path))
    assert drawn == prompts(read_manifest(path))
    assert set(drawn) == {
        f"a {size} {animal}"
        for size in ("big", "small")
        for animal in ("cat", "dog", "red fish", "blue fish")
    }
    # written down once: another machine or version of Python must draw the same
    assert drawn[:4] == ["a big red fish", "a small cat", "a small red fish", "a small cat"]
    alone = read_manifest(
        lines(tmp_path, {"prompt": "a {big|small} __animals__", "seed": 3}, name="one.jsonl")
    )
    assert prompts(alone) == [drawn[3]]


def test_a_matrix_makes_every_combination(tmp_path: Path) -> None:
    (tmp_path / "animals.txt").write_text("cat\ndog\n", encoding="utf-8")
    row = {"prompt": "{red|blue} __animals__", "negative_prompt": "{|dull}", "matrix": True, "seeds": [1, 2]}
    read = read_manifest(lines(tmp_path, row))
    assert len(read.entries) == 2 * 2 * 2 * 2 == len({entry.key for entry in read.entries})
    assert prompts(read)[::4] == ["red cat", "red dog", "blue cat", "blue dog"]
    huge = {"prompt": "{a|b|c|d}" * 30, "matrix": True}
    assert problems(lines(tmp_path, huge)) == [(1, "matrix")]


def test_words_that_choose_nothing(tmp_path: Path) -> None:
    read = Wildcards(tmp_path).parse
    assert read(r"a {plain} \{x\|y\} cat | dog \\ \__n__").drawn(0) == r"a {plain} {x|y} cat | dog \ __n__"
    (tmp_path / "a.txt").write_text("__b__\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("__a__\n", encoding="utf-8")
    for text in ("__a__", "{a|b", "a}", "{" * 20 + "a|b" + "}" * 20, "x" * 20_000, "__none__"):
        with pytest.raises(ValueError, match=r"word list|closed|closes|deep|characters"):
            read(text)


def test_limits_and_files_that_are_no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"prompt": "a cat"}
    for name, data in {
        "a.txt": b"{}", "b.jsonl": b"\xff\xfe\xff", "c.jsonl": '{"prompt":"é"}'.encode("latin-1"), "d.parquet": b"PAR1 no PAR1",
        "e.csv": b"prompt\nx\0y\n",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
        with pytest.raises(RequestError, match="manifest must be"):
            read_manifest(tmp_path / name)
    with pytest.raises(RequestError, match="No such file"):
        read_manifest(tmp_path / "none.jsonl")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(RequestError, match="a file"):
        read_manifest(tmp_path / "folder.csv")
    assert problems(lines(tmp_path, name="empty.jsonl")) == [(1, "manifest")]
    wide = tmp_path / "wide.jsonl"
    wide.write_bytes("\ufeff".encode("utf-16-le") + json.dumps(row).encode("utf-16-le"))
    assert prompts(read_manifest(wide)) == ["a cat"]
    assert problems(lines(tmp_path, {"prompt": "x" * _tables.LINE})) == [(1, "line")]
    assert problems(lines(tmp_path, "[" * 100_000)) == [(1, "line")]
    monkeypatch.setattr(_tables, "LINES", 3)
    with pytest.raises(RequestError, match="at most 3 lines"):
        read_manifest(lines(tmp_path, *[row] * 6))
    monkeypatch.setattr(_tables, "BYTES", 10)
    with pytest.raises(RequestError, match="at most 0 MB"):
        read_manifest(lines(tmp_path, row))
    monkeypatch.undo()
    monkeypatch.setattr(manifest, "ITEMS", 5)
    assert problems(lines(tmp_path, {"prompt": "a cat", "n": 3}, {"prompt": "a dog", "n": 3})) == [
        (2, "manifest")
    ]
    assert problems(lines(tmp_path, {"prompt": "a cat", "n": 6})) == [(1, "seeds")]


def test_csv_cells_that_do_not_fit(tmp_path: Path) -> None:
    assert problems(lines(tmp_path, "prompt,seed", "a cat", name="a.csv")) == [(2, "line")]
    assert problems(lines(tmp_path, "prompt,prompt", "a,b", name="b.csv")) == [(1, "header")]
    assert problems(lines(tmp_path, "prompt,seed,n", "a cat,x,y", name="c.csv")) == [(2, "seed"), (2, "n")]
    assert problems(lines(tmp_path, "prompt", '"open', name="d.csv")) == [(2, "line")]
    read = read_manifest(lines(tmp_path, "prompt,seeds,matrix,steps", '"{a|b} cat",1;2,yes,', name="e.csv"))
    assert [(one.request["prompt"], one.request["seed"]) for one in read.entries] == [
        ("a cat", 1), ("a cat", 2), ("b cat", 1), ("b cat", 2),
    ]  # fmt: skip


def test_the_example_of_the_repository_is_valid() -> None:
    read = read_manifest(Path(__file__).resolve().parents[2] / "assets" / "batch" / "example.jsonl")
    assert [entry.id for entry in read.entries] == [
        "apple-1", "apple-2", "animal-1", "animal-2", "animal-3", "grid-1", "grid-2", "grid-3", "grid-4",
    ]  # fmt: skip


def test_defaults_stand_in_for_what_rows_leave_out(tmp_path: Path) -> None:
    read = read_manifest(
        lines(tmp_path, {"prompt": "a cat"}, {"prompt": "a dog", "steps": 9}),
        defaults={"steps": 2, "seed": 4},
    )
    assert [(one.request["steps"], one.request["seed"]) for one in read.entries] == [(2, 4), (9, 4)]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_row = st.dictionaries(st.sampled_from([*manifest.columns(), "other"]), _json, max_size=5)
_bounded = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@_bounded
@given(rows=st.lists(_row, max_size=4))
def test_any_rows_are_read_or_refused_in_words(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = lines(tmp_path, *rows)
    try:
        entries = read_manifest(path, defaults={"prompt": "a cat"}).entries
    except RequestError:
        return
    for entry in entries:
        assert Request.from_dict(entry.request).to_dict() == entry.request


@_bounded
@given(data=st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")),
       ending=st.sampled_from(sorted(_tables.KINDS)))  # fmt: skip
def test_any_bytes_are_read_or_refused_in_words(data: bytes, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"fuzz{ending}"
    path.write_bytes(data)
    with pytest.raises(RequestError) as caught:  # no random bytes have a prompt
        read_manifest(path)
    assert str(caught.value)


@_bounded
@given(text=st.text(alphabet="ab{}|_\\ -", max_size=60), seed=st.integers(0, 2**53 - 1))
def test_a_drawn_text_is_one_of_all_texts(text: str, seed: int, tmp_path: Path) -> None:
    try:
        template = Wildcards(tmp_path).parse(text)
    except ValueError:
        return
    if template.count <= 500:
        every = list(template.every())
        assert len(every) == template.count
        assert template.drawn(seed) in every
