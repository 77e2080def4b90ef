"""A manifest: a table of what to make, checked whole before anything is made; every problem is told with its line.

A row gives fields of a `Request` (none of them is written down here: a field added there is a column at once), and `id`, `tags`,
`output`, `n` or `seeds`, `control`, `lora`, `matrix`. Files are named relative to the manifest and lie in its folder.
Prompts may hold choices (`pipelines.wildcards`), drawn by the seed of each item; `matrix: true` makes all of them.

Differs: what is asked for twice, in other words or under other file names, is made once (the key is of contents).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines._cells import DRAWN, cell
from pipelines._inpainting import written
from pipelines._paths import Roots, file_name
from pipelines._tables import KINDS, Problem, problem, read_rows
from pipelines.request import INPUTS, LARGEST_SEED, Request, RequestError, nearest, settings
from pipelines.video_files import OTHERS
from pipelines.wildcards import Wildcards, product

ITEMS = 100_000
"""Most items of a manifest, after choices and seeds are written out."""
TAGS = 10_000
"""Most characters of the tags of an item, as JSON."""

_OWN = ("id", "tags", "output", "seeds", "matrix")
_RENAMED = {"n": "images", "control": "controls", "lora": "loras"}
_STEERING = {"adapter": "adapter", "image": "file", "weight": "strength"}
"""Short names in a control or LoRA that is written as an object, and those of `pipelines.controls`."""
_ID = re.compile(r"[^\W_][\w.-]{0,99}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One picture or clip of a manifest: its line, name, request (one picture, its own seed), wished file name and content key."""

    line: int
    id: str
    request: dict[str, Any]
    key: str
    output: str = ""
    tags: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest asks for. `duplicates` names, for an id that is not made, the id of the equal entry that is.

    `repeated` counts all equal entries that are not made, also those without a name of their own.
    """

    path: Path
    entries: tuple[Entry, ...]
    duplicates: dict[str, str]
    repeated: int = 0


class ManifestError(RequestError):
    """A manifest that cannot be used; `problems` holds all that is wrong, with line numbers."""

    SHOWN = 20

    def __init__(self, path: Path, problems: Sequence[Problem]) -> None:
        super().__init__("manifest", str(path), "without mistakes")
        self.problems = tuple(sorted(problems, key=lambda one: one.line))

    def __str__(self) -> str:
        shown = [f"  {one}" for one in self.problems[: self.SHOWN]]
        more = len(self.problems) - len(shown)
        tail = [f"  and {more} more (--json lists all)"] if more > 0 else []
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        return "\n".join([f"{self.given} has {count}, nothing was started:", *shown, *tail])


def columns() -> tuple[str, ...]:
    """Return the names of the columns that a manifest may have."""
    fields = {one.name for one in settings()}
    return (*_OWN, *(short for short, name in _RENAMED.items() if name in fields), *sorted(fields))


def read_manifest(
    path: str | Path, *, defaults: Mapping[str, Any] | None = None, roots: Sequence[Path] = (),
    models: Collection[str] | None = None,
) -> Manifest:
    """Read and check a manifest, and write out its choices and seeds. Nothing is loaded or made.

    Args:
        defaults: fields of a request for rows that do not give them.
        roots: folders beside the manifest's own in which the files that it names may lie.
        models: for a stranger's manifest the models that it may name; profiles and adapters then are these models' own, or files
            in the roots. None: any.

    Raises:
        ManifestError: with every problem. RequestError: the file cannot be read at all.
    """
    path = Path(path).expanduser()
    problems: list[Problem] = []
    rows = read_rows(path, problems)
    reader = _Reader(path, defaults or {}, (path.parent, *roots), problems, models)
    found: list[Entry] = []
    for line, row in rows:
        found += reader.entries(line, row)
        if len(found) > ITEMS:
            problems.append(
                problem(line, "manifest", f"more than {ITEMS} items", f"at most {ITEMS} items in all")
            )
            break
    if not rows and not problems:
        problems.append(problem(1, "manifest", path.name, "a table with at least one row"))
    reader.check_names(found)
    if problems:
        raise ManifestError(path, problems)
    first: dict[str, str] = {}
    kept, duplicates = [], {}
    for entry in found:
        if entry.key in first:
            duplicates[entry.id] = first[entry.key]
        else:
            first[entry.key] = entry.id
            kept.append(entry)
    named = {one: other for one, other in duplicates.items() if one != other}
    return Manifest(path, tuple(kept), named, len(found) - len(kept))


class _Reader:
    """Turns rows into entries; what is wrong goes to `problems`."""

    def __init__(
        self, path: Path, defaults: Mapping[str, Any], roots: Sequence[Path], problems: list[Problem],
        only: Collection[str] | None = None,
    ) -> None:
        self.only = only
        self.problems, self.defaults, self.roots = problems, dict(defaults), Roots(roots)
        self.text = KINDS[path.suffix.lower()] == "csv"
        self.table = KINDS[path.suffix.lower()] != "jsonl"
        self.fields = {one.name: one for one in settings()}
        self.columns, self.strange = columns(), set[str]()
        self.wildcards = Wildcards(path.parent)
        self.models: dict[str, dict[str, str]] = {}

    def entries(self, line: int, row: dict[str, Any]) -> list[Entry]:
        """Return the items of a row; none where something is wrong with it."""
        before = len(self.problems)
        values = self._values(line, row)
        seeds = self._seeds(line, values)
        name, tags, output = self._name(line, values), self._tags(line, values), self._output(line, values)
        matrix = values.pop("matrix", False)
        if not isinstance(matrix, bool):
            self._wrong(line, "matrix", matrix, "true or false")
        request = self.defaults | values
        self._check_fields(line, request)
        self._resolve(line, request)
        if len(self.problems) > before:
            return []
        try:
            texts = list(self._texts(request, seeds, matrix is True))
            requests = [Request.from_dict(request | drawn | {"images": 1}) for drawn in texts]
        except RequestError as error:
            self._wrong(line, error.field, error.given, error.allowed)
            return []
        made = []
        for number, one in enumerate(requests, 1):
            tail = f"-{number}" if len(requests) > 1 else ""
            asked, key = self._keyed(one)
            id_ = f"{name}{tail}" if name else key.removeprefix("sha256:")[:16]
            place = Path(output)
            wished = str(place.with_name(f"{place.stem}{tail}{place.suffix}").as_posix()) if output else id_
            made.append(Entry(line=line, id=id_, request=asked, key=key, output=wished, tags=tags))
        return made

    def check_names(self, entries: Sequence[Entry]) -> None:
        """Ids and file names are given once each, also where letters differ only in case; equal entries without ids may repeat."""
        ids: dict[str, Entry] = {}
        outputs: dict[str, Entry] = {}
        for entry in entries:
            same = ids.setdefault(entry.id, entry)
            own = entry.id == entry.key.removeprefix("sha256:")[:16]
            if same is not entry and not own:
                self._wrong(entry.line, "id", entry.id, f"given once; line {same.line} has it too")
                continue
            same = outputs.setdefault(entry.output.casefold(), entry)
            if same is not entry and same.id != entry.id:
                allowed = f"another file than that of line {same.line} ({same.output})"
                self._wrong(entry.line, "output", entry.output, allowed)

    def _values(self, line: int, row: dict[str, Any]) -> dict[str, Any]:
        """Return the cells by the names of their fields, texts of CSV read as what they stand for."""
        values: dict[str, Any] = {}
        for name, value in row.items():
            if name not in self.columns:
                if not (self.table and name in self.strange):
                    allowed = nearest(name, self.columns).strip(" ()") or f"one of {', '.join(self.columns)}"
                    allowed = f"a column that there is; {allowed}"
                    self._wrong(1 if self.text else line, "column", name, allowed)
                self.strange.add(name)
                continue
            if value is None or value == "":
                continue
            field = _RENAMED.get(name, name)
            if field in values:
                self._wrong(line, name, value, f"left out: {field} is given already under its other name")
                continue
            try:
                values[field] = cell(field, value) if self.text else value
            except RequestError as error:
                self._wrong(line, name, error.given, error.allowed)
        return values

    def _seeds(self, line: int, values: dict[str, Any]) -> list[int]:
        """Return the seed of every picture of a row."""
        count, seeds = values.pop("images", 1), values.pop("seeds", None)
        first = values.pop("seed", self.defaults.get("seed", 0))
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 256:
            self._wrong(line, "n", count, "a whole number from 1 to 256")
            count = 1
        if seeds is None:
            seeds = (
                [first + i for i in range(count)]
                if isinstance(first, int) and not isinstance(first, bool)
                else [first]
            )
        elif count != 1:
            self._wrong(line, "n", count, "left out where seeds are given: one picture is made of each")
        if not isinstance(seeds, list) or not 1 <= len(seeds) <= ITEMS:
            self._wrong(line, "seeds", seeds, f"a list of 1 to {ITEMS} seeds")
            return []
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
                self._wrong(line, "seed", seed, f"a whole number from 0 to {LARGEST_SEED}")
                return []
        return seeds

    def _name(self, line: int, values: dict[str, Any]) -> str:
        given = values.pop("id", "")
        name = (
            str(given)
            if isinstance(given, int) and not isinstance(given, bool) and abs(given) < 10**20
            else given
        )
        if name == "":
            return ""
        if not isinstance(name, str) or not _ID.fullmatch(name) or file_name(name) is not None:
            allowed = "1 to 100 letters, numbers, - _ and dots, with a letter or number first, and a usable file name"
            self._wrong(line, "id", given, allowed)
            return ""
        return name

    def _tags(self, line: int, values: dict[str, Any]) -> dict[str, Any]:
        tags = values.pop("tags", {})
        if isinstance(tags, str):
            tags = [tags]
        if isinstance(tags, list) and all(isinstance(one, str) for one in tags):
            tags = dict.fromkeys(tags, True)
        if not isinstance(tags, dict):
            self._wrong(line, "tags", tags, "an object, or a list of texts")
            return {}
        try:
            size = len(json.dumps(tags, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            size = TAGS + 1
        if size > TAGS:
            self._wrong(line, "tags", tags, f"at most {TAGS} characters of JSON")
        return tags

    def _output(self, line: int, values: dict[str, Any]) -> str:
        given = values.pop("output", "")
        reason = file_name(given) if given != "" else None
        if isinstance(given, str) and given.lower().endswith((".frames", *OTHERS)):
            reason = "a batch makes one file of an item; .mp4, .gif and .png hold all frames of a clip"
        if reason is not None:
            allowed = f"a file name, or folder/name, inside the output folder ({reason})"
            self._wrong(line, "output", given, allowed)
            return ""
        return str(given)

    def _check_fields(self, line: int, request: dict[str, Any]) -> None:
        """Check numbers, switches and choices one by one, so that all of them are told; `Request` checks the rest."""
        for name, value in request.items():
            field = self.fields[name]
            if field.type not in (int, float, bool) and field.choices is None:
                continue
            try:
                field.check("request", value)
            except ValueError:
                self._wrong(line, name, value, field.allowed())

    def _resolve(self, line: int, request: dict[str, Any]) -> None:
        """Put the whole path in the place of every file that a row names; it must lie in one of the roots."""
        given = {
            name: value
            for name, value in request.items()
            if name not in self.defaults or value != self.defaults[name]
        }
        for name in (one for one in INPUTS if one in given and not (one == "mask" and written(given[one]))):
            request[name] = self._file(line, name, given[name])
        for name in ("model", "profile"):
            if isinstance(given.get(name), str) and ".." in Path(given[name]).parts:
                self._wrong(line, name, given[name], "a name or a folder, without ..")
        if self.only is not None:
            self._check_known(line, request)
        for name in ("controls", "loras"):
            if name in given:
                request[name] = self._steering(line, name, given[name], str(request.get("model") or ""))

    def _check_known(self, line: int, request: Mapping[str, Any]) -> None:
        """See to it that a stranger's row names no model and no profile but known ones: nothing else is even looked at."""
        from pipelines import profile

        model = request.get("model") or self.fields["model"].default
        if model not in (self.only or ()):
            self._wrong(line, "model", model, f"one of {', '.join(self.only or ())}")
        elif request.get("profile") and request["profile"] not in profile.known(model):
            self._wrong(line, "profile", request["profile"], "the name of a profile of this model")

    def _steering(self, line: int, field: str, values: Any, model: str) -> Any:
        from pipelines.controls import KINDS as STEERING
        from pipelines.controls import read_all

        kind = next(one for one in STEERING if one.field == field)
        values = values if isinstance(values, list) else [values]
        renamed = [
            {_STEERING.get(key, key): one for key, one in value.items()} if isinstance(value, dict) else value
            for value in values
        ]
        try:
            found: Any = read_all(kind, renamed)
        except RequestError as error:
            self._wrong(line, field, error.given, error.allowed)
            return ()
        made = []
        for one in found:
            names = [name for name in ("file", "region", "adapter") if getattr(one, name, None)]
            named = {name: getattr(one, name) for name in names}
            shipped = {"adapter", "file"} if field == "loras" else {"adapter"}
            paths = {
                name: self._file(line, f"{field}.{name}", text)
                for name, text in named.items()
                if name not in shipped or "/" in text or text.endswith(".safetensors")
            }
            for name in named.keys() - paths.keys() if self.only is not None else ():
                if named[name] not in self._adapters(model):
                    allowed = "one of the model's own adapters, or a file in the manifest's folder"
                    self._wrong(line, f"{field}.{name}", named[name], allowed)
            made.append(one.replace(**{name: path for name, path in paths.items() if path}))
        return tuple(made)

    def _adapters(self, model: str) -> Collection[str]:
        from pipelines import catalog
        from pipelines._adapter_files import adapters_in

        model = model or str(self.fields["model"].default)
        folder = catalog.find(model).folder if model in (self.only or ()) else None
        return () if folder is None else adapters_in(folder)

    def _file(self, line: int, field: str, text: Any) -> str:
        try:
            return self.roots.file(text, folder=field in ("clip", "mask"))
        except ValueError as error:
            self._wrong(line, field, text, f"a file in the manifest's folder ({error})")
            return ""

    def _texts(self, request: dict[str, Any], seeds: list[int], matrix: bool) -> Iterator[dict[str, Any]]:
        """Yield the seed and the texts of every item of a row. Raises: RequestError."""
        templates = {}
        for name in (one for one in DRAWN if isinstance(request.get(one), str)):
            try:
                templates[name] = self.wildcards.parse(request[name])
            except ValueError as error:
                raise RequestError(name, request[name], f"text with whole choices: {error}") from None
        if not matrix:
            for seed in seeds:
                yield {"seed": seed} | {name: one.drawn(seed, name) for name, one in templates.items()}
            return
        count = len(seeds)
        for one in templates.values():
            count *= one.count
        if count > ITEMS:
            raise RequestError("matrix", f"{count} items", f"at most {ITEMS} items")
        for texts in product(templates):
            for seed in seeds:
                yield {"seed": seed} | texts

    def _keyed(self, request: Request) -> tuple[dict[str, Any], str]:
        from pipelines.jobs import content_key, digests_of

        values = request.to_dict()
        if request.model not in self.models:
            self.models[request.model] = digests_of({"model": request.model})
        named = {name: values[name] for name in (*INPUTS, "profile", "controls", "loras") if values.get(name)}
        digests = digests_of({"model": request.model} | named) if named else self.models[request.model]
        return values, content_key(values, digests)

    def _wrong(self, line: int, field: str, given: object, allowed: str) -> None:
        self.problems.append(problem(line, field, given, allowed))
