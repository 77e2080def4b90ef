"""The records of the job ledger: what is asked for, and where it stands."""

from __future__ import annotations

import dataclasses
import json
import os
import sqlite3
from pathlib import Path, PurePath
from typing import Any, Self

from pipelines._jobs_keys import content_key, digests_of
from pipelines.request import RequestError

STATES = ("waiting", "running", "done", "failed", "poisoned", "cancelled")
KINDS = ("generate", "compare", "tune")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What is asked for: one picture or clip, and where it goes; its identity is the content key.

    Args:
        request: the form of `Request.to_dict`, with one picture and its seed.
        id: the caller's name for it, unique in a batch; "" for its key. A single job with a new id is always a new job.
        batch: "" for a single job.
        owner: who may see it: a random name of a session, or "" for this computer's own command line.
        kind: "generate", "compare" for the picture and its exact twin, or "tune" to search a profile (`pipelines._tuning`).
        output: wanted file name inside `folder`, "" for one made of prompt and seed; `folder`: "" for the current one.
        tags: given back as they came; priority: higher ones go first.
        ready: the content key, where the caller has it already; "" for one that is made of the request.

    Raises:
        RequestError: not one picture, an unknown kind, or an output outside of the folder.
    """

    request: dict[str, Any]
    id: str = ""
    batch: str = ""
    owner: str = ""
    kind: str = "generate"
    output: str = ""
    folder: str = ""
    tags: dict[str, Any] = dataclasses.field(default_factory=dict)
    priority: int = 0
    ready: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError("kind", self.kind, f"one of {', '.join(KINDS)}")
        if self.request.get("images", 1) != 1:
            raise RequestError("images", self.request["images"], "1: every picture is a job of its own")
        parts = PurePath(self.output.replace("\\", "/")).parts
        outside = ".." in parts or os.path.isabs(self.output) or ":" in self.output or "\0" in self.output
        if self.output and (outside or not parts or self.output.endswith(("/", "\\"))):
            raise RequestError("output", self.output, "a file name inside the output folder")
        object.__setattr__(self, "folder", str(Path(self.folder).expanduser().absolute()))

    @property
    def key(self) -> str:
        """The content key: a digest of the model's, the adapters' and the inputs' bytes and of every setting. Reads files."""
        return self.ready or content_key(self.request, digests_of(self.request))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An item on its way, as it stood when it was read; times are seconds of the ledger's clock, 0 for not yet."""

    name: str
    item: Item
    key: str
    state: str = "waiting"
    tries: int = 0
    error: str = ""
    phase: str = ""
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: list[str] = dataclasses.field(default_factory=list)
    sha256: list[str] = dataclasses.field(default_factory=list)
    report: dict[str, Any] = dataclasses.field(default_factory=dict)
    created: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    worker: str = ""
    lease: str = ""
    deadline: float = 0.0
    target: str = ""
    number: int = 0
    change: int = 0

    @property
    def over(self) -> bool:
        """Whether nothing more will happen by itself."""
        return self.state not in ("waiting", "running")

    @classmethod
    def from_row(cls, row: sqlite3.Row) -> Self:
        """Read a row of the ledger."""
        item = Item(
            request=json.loads(row["request"]), id=row["id"], batch=row["batch"], owner=row["owner"], kind=row["kind"],
            output=row["output"], folder=row["folder"], tags=json.loads(row["tags"]), priority=row["priority"],
        )  # fmt: skip
        done = row["state"] == "done"  # of any other job, what its worker meant to leave is no business of readers
        plain = ("name", "key", "state", "tries", "error", "phase", "created", "started", "ended", "worker", "lease",
                 "deadline", "target", "number", "change")  # fmt: skip
        return cls(
            item=item,
            progress=json.loads(row["progress"]),
            files=json.loads(row["files"]) if done else [],
            sha256=json.loads(row["hashes"]) if done else [],
            report=json.loads(row["report"]) if done else {},
            **{name: row[name] for name in plain},
        )
