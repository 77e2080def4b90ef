"""What a session asked for, from the page's ledger and its batches' ledgers, as one list; and whose settings can be used here.

A job's place in the queue may be changed among the session's own: nobody else's waits longer for it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app_jobs import Job as Whole
from app_jobs import _joined
from pipelines._batch_folder import BATCH
from pipelines.request import Request, RequestError

if TYPE_CHECKING:
    from app_page import House
    from pipelines.background import Batches
    from pipelines.catalog import Card
    from pipelines.jobs import Job, Ledger

MOST = 300
"""Most jobs of one ledger that are listed."""
BATCHES = 10
"""Most batches whose items are listed."""
DAY = 86_400.0
DATES = {"any": 0.0, "the last hour": 3600.0, "the last day": DAY, "the last 7 days": 7 * DAY, "the last 30 days": 30 * DAY}
"""Ages to look for, in s."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One job: `name` to ask for it with, `number` for people, `batch` it belongs to."""

    job: Job
    batch: str = ""

    @property
    def name(self) -> str:
        """The name that finds it again."""
        return f"{self.batch}/{self.job.name}" if self.batch else self.job.name

    @property
    def number(self) -> str:
        """A short name for people."""
        return f"{self.job.item.id} ({self.batch[-8:]})" if self.batch else f"#{self.job.number}"

    @property
    def state(self) -> str:
        """The state of the job."""
        return self.job.state

    @property
    def words(self) -> str:
        """What was asked for, in words."""
        asked = self.job.item.request
        return str(asked.get("prompt") or asked.get("prompts") or f"class {asked.get('class_label')}")

    @property
    def model(self) -> str:
        """The model that was asked for."""
        return str(self.job.item.request.get("model", ""))

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the accelerators that were asked for; a profile counts as one."""
        asked = self.job.item.request
        found = tuple(str(one.get("name")) for one in asked.get("accelerators") or () if isinstance(one, Mapping))
        return (*found, f"profile {Path(asked['profile']).name}") if asked.get("profile") else found

    @property
    def speed(self) -> str:
        """The accelerators in words."""
        return ", ".join(self.methods) or "exact"

    @property
    def source(self) -> str:
        """Where it was asked for."""
        return source_of(self.job, self.batch)

    @property
    def whole(self) -> Whole:
        """The job as the page's report shows it."""
        return _joined([self.job])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What entries are looked for: text, states, model, accelerator ("any", "exact" or a name), age (a name in `DATES`)."""

    text: str = ""
    states: tuple[str, ...] = ()
    model: str = "any"
    speed: str = "any"
    date: str = "any"

    @classmethod
    def of(cls, text: str | None, states: Sequence[str] | None, model: str | None, speed: str | None, date: str | None) -> Search:
        """Return the search that the controls stand for."""
        return cls(text=text or "", states=tuple(states or ()), model=model or "any", speed=speed or "any", date=date or "any")

    def fits(self, entry: Entry, now: float) -> bool:
        """Whether an entry is looked for; text and states are left to the ledger."""
        age = DATES.get(self.date, 0.0)
        speed = self.speed == "any" or (not entry.methods if self.speed == "exact" else self.speed in entry.methods)
        return speed and self.model in ("any", entry.model) and (not age or now - entry.job.created <= age)


class Records:
    """The list of a session's jobs, and what may be done with one."""

    def __init__(self, house: House) -> None:
        self.house = house

    @property
    def batches(self) -> Batches | None:
        """The batches, where the page has their tab."""
        tab = self.house.tabs.get("Batch")
        return None if tab is None else tab.batches

    def find(self, owner: str, search: Search) -> list[Entry]:
        """Return the jobs of an owner that fit, the newest first."""
        asked: dict[str, Any] = {"states": search.states, "text": search.text, "limit": MOST}
        found = [Entry(job) for job in self.house.jobs.ledger.jobs(owner=owner, **asked)]
        for name, _ in (self.batches.mine(owner) if self.batches else [])[:BATCHES]:
            ledger = self.batches.ledger(name, owner) if self.batches else None
            found += [Entry(job, name) for job in ledger.jobs(batch=BATCH, **asked)] if ledger is not None else []
        now = self.house.jobs.ledger.clock()
        return sorted((one for one in found if search.fits(one, now)), key=lambda one: -one.job.created)[:MOST]

    def get(self, owner: str, name: str) -> Entry | None:
        """Return an entry by its name; None for one of another owner."""
        try:
            ledger, batch, one = self._place(owner, name)
        except RequestError:
            return None
        job = ledger.get(one) if batch else ledger.get(one, owner)
        return None if job is None else Entry(job, batch)

    def do(self, what: str, owner: str, name: str) -> str:
        """Do something with an entry - first, earlier, later, cancel, retry - and say what came of it. Raises: RequestError."""
        entry = self.get(owner, name)
        if entry is None:
            raise RequestError("entry", name, "one of yours")
        ledger, batch, one = self._place(owner, name)
        if what == "cancel":
            return "It is stopped." if ledger.cancel(name=one) else "It was over already."
        if what == "retry":
            if not entry.job.over:
                return "It is not over yet."
            if entry.state == "done" and all(Path(file).exists() for file in entry.job.files):
                return "It is done; its settings in Create make another."
            ledger.retry(name=one, states=("done", "failed", "poisoned", "cancelled"))
            if batch and self.batches:
                self.batches.resume(batch, owner, 1)
            else:
                self.house.jobs.start()
            return "It is made again."
        return self._move(what, owner, entry, ledger)

    def _move(self, what: str, owner: str, entry: Entry, ledger: Ledger) -> str:
        mine: dict[str, Any] = {"batch": BATCH} if entry.batch else {"owner": owner}
        waiting = ledger.jobs(**mine, states=("waiting",), limit=1000)
        waiting.sort(key=lambda job: (-job.item.priority, job.number))
        places = [job.name for job in waiting]
        if entry.job.name not in places:
            return "Only what waits has a place in the queue."
        place = places.index(entry.job.name)
        to = {"first": 0, "earlier": max(0, place - 1), "later": min(len(places) - 1, place + 1)}[what]
        waiting.insert(to, waiting.pop(place))
        alone = bool(entry.batch) or len(waiting) == ledger.counts()["waiting"]
        for job, priority in zip(waiting, order([job.number for job in waiting], alone=alone), strict=True):
            if job.item.priority != priority:
                ledger.move(job.name, priority)
        return f"It is number {to + 1} of yours now."

    def _place(self, owner: str, name: str) -> tuple[Ledger, str, str]:
        batch, _, one = name.rpartition("/")
        if not batch:
            return self.house.jobs.ledger, "", one
        ledger = self.batches.ledger(batch, owner) if self.batches else None
        if ledger is None:
            raise RequestError("batch", batch, "one of yours that was begun")
        return ledger, batch, one


def order(numbers: Sequence[int], *, alone: bool) -> list[int]:
    """Return priorities that put jobs, given by their numbers, in the order of the list.

    Where others wait too (not `alone`), none is above 0: one's own jobs may stand back, but never push in front.
    """
    if alone:
        found = [0]
        for later, earlier in itertools.pairwise(reversed(numbers)):
            found.append(found[-1] + (earlier > later))
        return found[::-1][: len(numbers)]
    found = [0]
    for earlier, later in itertools.pairwise(numbers):
        found.append(found[-1] - (later < earlier))
    return found[: len(numbers)]


def source_of(job: Job, batch: str = "") -> str:
    """Return where a job was asked for."""
    if batch:
        return "batch"
    if job.item.kind == "compare":
        return "comparison"
    return str(job.item.tags.get("source") or "page")


def matched(
    asked: Mapping[str, Any], told: Mapping[str, Any], cards: Mapping[str, Card]
) -> tuple[Request | None, list[str]]:
    """Return a request for the models that are here, and sentences about what is not; None where its model is missing.

    A model is known by its name, or else by the digest of its weights in the report. Nothing that the request names is opened.
    """
    from pipelines.jobs import digests_of

    model, weights = str(asked.get("model", "")), str(told.get("weights") or "")
    said, values = [], dict(asked)
    here = {name: digests_of({"model": name}).get(name, "") for name in cards}
    short = f"{weights[:23]}..." if weights else "of which the file tells no digest"
    if model in cards:
        if weights and here[model] and weights != here[model]:
            said.append(f"{model} is here with other weights ({here[model][:23]}...) than then ({short}): pictures will differ.")
    else:
        same = next((name for name, digest in here.items() if weights and digest == weights), None)
        if same is None:
            way = "open its folder in Models" if Path(model).is_absolute() or "/" not in model else "download it in Models"
            name = Path(model).name if Path(model).is_absolute() else model
            return None, [f"The model {name} with the weights {short} is missing; {way}."]
        said.append(f"Its model is called {cards[same].title or same} here: the weights are the same ({short}).")
        values["model"] = same
    said += _not_here(asked, told, values["model"])
    return Request.from_dict(values), said


def _not_here(asked: Mapping[str, Any], told: Mapping[str, Any], model: str) -> list[str]:
    """Return sentences about files that a request was made with, by name and digest; they are to be given again."""
    said = []
    for field in ("image", "mask", "last_image", "clip"):
        if asked.get(field):
            about = told.get(field)
            about = about if isinstance(about, Mapping) else {}
            name, digest = Path(str(about.get("name") or asked[field])).name, str(about.get("sha256", "no digest"))[:23]
            said.append(f"Its {field.replace('_', ' ')} {name} ({digest}) is to be given again.")
    steering = told.get("steering")
    rows = steering.get("parts") if isinstance(steering, Mapping) else None
    for row in rows if isinstance(rows, list) else ():
        digest = str(row.get("sha256", "no digest")) if isinstance(row, Mapping) else ""
        if digest and not _adapter_here(digest, model):
            said += [f"The adapter {Path(str(row.get('given', '?'))).name} ({digest[:23]}) is missing here."]
    return said


def _adapter_here(digest: str, model: str) -> bool:
    from pipelines import catalog
    from pipelines._adapter_files import adapters_in, digest_of_file

    folder = catalog.find(model).folder
    files = adapters_in(folder).values() if folder is not None else ()
    return any(digest_of_file(file) == digest.removeprefix("sha256:") for file in files)

