"""The page: one house for all tabs, a head above them, and who is who. What happens in a tab stands in the tab's own module."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import re
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from app_jobs import Jobs
from app_serve import DAY, EVENTS
from app_tasks import NO_MODEL
from pipelines.catalog import Card
from pipelines.request import RequestError

TABS = (
    ("app_create", "Create"), ("app_compare", "Compare"), ("app_batch", "Batch"), ("app_grid", "Grid"), ("app_tune", "Tune"),
    ("app_history", "History"), ("app_models", "Models"), ("app_system", "System"),
)  # fmt: skip
"""Module and class of every tab, left to right; one whose module is not there is left out."""
NOBODY = Card(
    name=NO_MODEL, title=NO_MODEL,
    summary="There is no model here yet: open one that is on this computer, or download one, in the tab Models.",
)  # fmt: skip
"""Stands where a model would be chosen while there is none."""
SESSIONS = 5000
"""How many sessions are known by name at once."""
ENTRY = 10.0
"""Longest wait for a browser to say who it is, in s: busy computers are slow."""
_NAME = re.compile(r"[\w-]{20,64}\Z")


class House:
    """What the tabs share.

    Args:
        jobs: the ledger, and what works on it. cards: the models to choose from, by name.
    """

    def __init__(self, jobs: Jobs, cards: Mapping[str, Card]) -> None:
        self.jobs, self.cards, self.folder = jobs, dict(cards) or {NOBODY.name: NOBODY}, jobs.folder
        self.entered: Any = None
        """The event at which a browser has said who it is; a tab's first look hangs on it: `house.entered.then(...)`."""
        self.tabs: Mapping[str, Any] = {}
        """The tabs by name, once all are there: one sends settings or a model to another."""
        self.opened: dict[str, gr.Tab] = {}
        """What is clicked to see a tab, by its name: `select` is when somebody does."""
        self._owners: OrderedDict[str, str] = OrderedDict()
        self._came = threading.Condition()

    @property
    def models(self) -> list[str]:
        """The names of the models that are here, maybe none."""
        return [name for name in self.cards if name != NOBODY.name]

    def card(self, name: object) -> Card:
        """Return the card of a model that is here. Raises: RequestError."""
        if not self.models:
            raise RequestError(
                "model", None, "opened or downloaded first, in the tab Models: none is here yet"
            )
        if name not in self.models:
            raise RequestError("model", name, f"one of {', '.join(self.models)}")
        return self.cards[str(name)]

    def session(self, request: gr.Request) -> str:
        """Return the random name that this browser goes by in the ledger; its jobs have it as their owner.

        One that has not said so yet is waited for a little, and is a stranger then.
        """
        key = str(getattr(request, "session_hash", None) or "")
        with self._came:
            if key not in self._owners and not _in_loop():
                self._came.wait_for(lambda: key in self._owners, ENTRY)
            return self._owners.get(key) or self._known(key, secrets.token_urlsafe(24))

    def known(self, request: gr.Request) -> str:
        """Return the name that a browser goes by, or "" for one that has not said it yet; nobody waits."""
        return self._owners.get(str(getattr(request, "session_hash", None) or ""), "")

    def enter(self, request: gr.Request, name: str | None) -> str:
        """Take note of the name that a browser keeps; one without keeps what it was called here, or is given a name."""
        key = str(getattr(request, "session_hash", None) or "")
        with self._came:
            if not isinstance(name, str) or not _NAME.match(name):
                name = self._owners.get(key) or secrets.token_urlsafe(24)
            return self._known(key, name)

    def _known(self, key: str, name: str) -> str:
        if key:
            self._owners[key] = name
            self._owners.move_to_end(key)
            while len(self._owners) > SESSIONS:
                self._owners.popitem(last=False)
            self._came.notify_all()
        return name


class Presses:
    """What each browser asked for last: the second press of a double click says the same, and came before the answer to the first.

    After an answer the form says otherwise, for the seed that was drawn is written into it.
    """

    def __init__(self) -> None:
        self._last: OrderedDict[str, tuple[Any, Any]] = OrderedDict()
        self._guard = threading.Lock()

    def once(self, owner: str, asked: Any, submit: Callable[[], Any], over: Callable[[Any], bool]) -> Any:
        """Return the job of the last press where this one is the same and that job is not over; else that of a new one."""
        with self._guard:
            last = self._last.get(owner)
            if last is not None and last[0] == asked and not over(last[1]):
                return last[1]
            job = submit()
            self._last[owner] = (asked, job)
            self._last.move_to_end(owner)
            while len(self._last) > SESSIONS:
                self._last.popitem(last=False)
            return job


class Page:
    """The page: its head and its tabs.

    Args:
        jobs: where requests go. cards: the models to choose from, by name. tabs: module and class of each tab.
    """

    def __init__(self, jobs: Jobs, cards: Mapping[str, Card], tabs: Sequence[tuple[str, str]] = TABS) -> None:
        self.house = House(jobs, cards)
        self.tabs = {
            name: getattr(importlib.import_module(module), name)(self.house)
            for module, name in tabs
            if importlib.util.find_spec(module) is not None
        }
        self.house.tabs = self.tabs

    def build(self) -> gr.Blocks:
        """Return the page as gradio Blocks, with its own limits set; those of the server are in `app_serve`."""
        from app_header import Header

        house, header = self.house, Header(self.house)
        with gr.Blocks(title="Leapfrog", analytics_enabled=False, delete_cache=(DAY, 7 * DAY)) as page:
            name = gr.BrowserState("", storage_key="leapfrog-session", secret="not a secret")
            header.draw()
            listen = gr.Button("Listen", elem_id="listen")  # nobody sees it; the page's script presses it
            listen.click(lambda: None, None, None, trigger_mode="multiple", api_visibility="private", show_progress="hidden")
            with gr.Tabs(elem_id="tabs"):
                for key, tab in self.tabs.items():
                    with gr.Tab(tab.label, id=key.lower(), elem_id=f"tab-{key.lower()}") as house.opened[key]:
                        tab.draw()
            gr.HTML(
                '<p class="quiet">Everything happens on the computer that runs this page; nothing is sent elsewhere.</p>'
            )
            house.entered = page.load(
                house.enter, name, name, api_visibility="private", show_progress="hidden"
            )
            header.connect(page)
            for tab in self.tabs.values():
                tab.connect(page)
        page.queue(max_size=EVENTS, api_open=False, default_concurrency_limit=None)
        return page


def sentence(error: Exception) -> str:
    """Return an error as a sentence for the page."""
    text = str(error)
    if isinstance(error, RequestError):
        text = error.field.replace("_", " ") + text.removeprefix(error.field)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def served(path: Path) -> str:
    """Copy a file under gradio's own folder, in a place that nobody can guess, and return that: the same bytes are served."""
    from gradio.utils import get_upload_folder

    target = Path(get_upload_folder(), secrets.token_urlsafe(16), path.name)
    target.parent.mkdir(parents=True)
    shutil.copyfile(path, target)
    return str(target)


_served = served


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
