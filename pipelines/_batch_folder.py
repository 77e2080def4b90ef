"""The output folder of a batch: finished files, and in `.leapfrog` the ledger and what was settled when it was begun."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipelines.manifest import Entry, Manifest
from pipelines.request import RequestError
from pipelines.shards import FORMS, MEMBERS, MOST_MEMBERS, Shards

if TYPE_CHECKING:
    from pipelines.jobs import Item, Job, Ledger

BATCH = "batch"
"""What the items of a folder's ledger are called together."""
VERSION = 1
_PAGE = 200


class Folder:
    """A batch's folder; nothing is made before `begin`."""

    def __init__(self, output: Path) -> None:
        self.output = output.expanduser().absolute()
        self.state = self.output / ".leapfrog"
        self.path = self.state / "jobs.sqlite"
        self.about: dict[str, Any] = self._read()

    @property
    def exists(self) -> bool:
        """Whether a batch was begun here."""
        return bool(self.about) and self.path.is_file()

    def require(self) -> Self:
        """Return the folder. Raises: RequestError where no batch was begun."""
        if not self.exists:
            raise RequestError("folder", str(self.output), "the output folder of a batch that was begun")
        return self

    def settled(self, form: str | None, members: int | None) -> tuple[str, int]:
        """Return the form and the members of a shard: those the batch was begun with, else those given, else the usual ones.

        Raises:
            RequestError: given otherwise than the batch was begun with, or not possible at all.
        """
        if form is not None and form not in FORMS:
            raise RequestError("format", form, f"one of {', '.join(FORMS)}")
        if members is not None and not 1 <= members <= MOST_MEMBERS:
            raise RequestError("members", members, f"a whole number from 1 to {MOST_MEMBERS}")
        for name, given in (("format", form), ("members", members)):
            if self.about and given not in (None, self.about[name]):
                raise RequestError(
                    name, given, f"{self.about[name]}, as the batch in {self.output} was begun"
                )
        return self.about.get("format", form or "files"), self.about.get("members", members or MEMBERS)

    def begin(self, form: str, members: int, manifest: Manifest) -> None:
        """Make the folder, and note what the batch is. Raises: SaveError."""
        from pipelines.result import SaveError, check_target, write_file

        before, duplicates = self.about, self.about.get("duplicates", {}) | manifest.duplicates
        made = {"version": VERSION, "format": form, "members": members, "duplicates": duplicates}
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            check_target(self.output)
            self.about = made
            self.state.mkdir(exist_ok=True, mode=0o700)
            self.items.mkdir(exist_ok=True)
        except OSError as error:
            raise error if isinstance(error, SaveError) else SaveError(self.output, error) from error
        if made != before:
            write_file(self.state / "batch.json", json.dumps(made).encode(), overwrite=True)
        if not self.path.exists():
            with self.ledger():
                pass

    @property
    def items(self) -> Path:
        """Where single files go: the folder itself, or a place of their own until they are packed into shards."""
        return self.output if self.about.get("format", "files") == "files" else self.state / "items"

    def item(self, entry: Entry) -> Item:
        """Return an entry of a manifest as an item of the ledger."""
        from pipelines.jobs import Item

        return Item(
            request=entry.request,
            id=entry.id,
            batch=BATCH,
            output=entry.output,
            folder=str(self.items),
            tags=entry.tags,
            ready=entry.key,
        )

    @contextlib.contextmanager
    def ledger(self) -> Iterator[Ledger]:
        """Open the ledger for a while."""
        from pipelines.jobs import Ledger

        found = Ledger(self.path)
        try:
            yield found
        finally:
            found.close()

    def shards(self, ledger: Ledger) -> Shards | None:
        """Return the shards, where the batch goes into some."""
        if self.about["format"] == "files":
            return None
        return Shards(self.output, self.state, self.about["format"], ledger, BATCH, self.about["members"])

    def _read(self) -> dict[str, Any]:
        path = self.state / "batch.json"
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except NotADirectoryError:
            raise RequestError("folder", str(self.output), "a folder: a file is in its place") from None
        except OSError as error:
            raise RequestError("folder", str(path), f"readable ({error.strerror})") from None
        except (ValueError, RecursionError):
            raise RequestError("folder", str(path), "the whole note of a batch: it is damaged") from None
        if not isinstance(found, dict) or found.get("version") != VERSION or found.get("format") not in FORMS:
            raise RequestError(
                "folder",
                str(path),
                f"the note of a batch of version {VERSION}; update leapfrog to read newer ones",
            )
        return found


def pages(ledger: Ledger, *states: str) -> Iterator[Job]:
    """Yield every job of a folder (in some states), oldest first, reading a few at a time."""
    offset = 0
    while found := ledger.jobs(batch=BATCH, states=states, limit=_PAGE, offset=offset, newest_first=False):
        yield from found
        offset += len(found)
