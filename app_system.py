"""The tab System: this computer, what each accelerator needs and whether it is here, the doctor, privacy, and facts to copy."""

from __future__ import annotations

import functools
import getpass
import importlib
import importlib.metadata
import importlib.util
import json
import re
import socket
from pathlib import Path
from typing import Any

import gradio as gr

import app_form as form
from app_page import House
from app_tables import facts, note, report, style, table
from app_views import safe, trouble
from pipelines import catalog, machine
from pipelines.request import RequestError, accelerator_kinds

_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}
PRIVACY = (
    "Pictures are made on the computer that runs this page. Prompts, pictures and settings are not sent anywhere, and nothing is "
    "counted or reported. The network is asked for one thing only: a model that you download in Models, after you pressed the "
    "button. A saved picture holds the settings that made it, with the prompt; under Output in Create you leave the prompt out, or "
    "all of it. The job ledger keeps what you asked for, in a file that only this user of the computer can read."
)
KERNELS = (
    ("triton", "block-sparse attention on NVIDIA cards; without it FlexAttention of torch does the work"),
    ("xformers", "attention kernels for NVIDIA cards, by choice"),
    ("sageattention", "quantised attention kernels for NVIDIA cards, by choice"),
    ("flash_attn", "attention kernels for NVIDIA cards, by choice"),
    ("pyarrow", "Parquet manifests"), ("ray", "batches over several computers"), ("av", "MP4 files"),
    ("psutil", "free memory, batches in the background"),
)  # fmt: skip
"""Packages that may be missing, and what they are for."""


class System:
    """Show what the page runs on."""

    label = "System"

    def __init__(self, house: House) -> None:
        self.house = house
        self.parts: dict[str, Any] = {}

    def draw(self) -> None:
        """Make the components, inside the tab."""
        parts = self.parts
        gr.HTML(style(), elem_classes="unseen")
        with gr.Row(elem_id="system-columns"):
            with gr.Column(scale=5, min_width=300):
                with gr.Column(elem_classes="stage"):
                    parts["computer"] = gr.HTML("", elem_id="system-computer")
                with gr.Column(elem_classes="stage"):
                    gr.HTML(report(f'<p class="line">Privacy</p><p>{safe(PRIVACY)}</p>'))
                with gr.Column(elem_classes="stage"):
                    parts["examine"] = gr.Button("Check this computer", size="sm", elem_id="system-examine")
                    parts["doctor"] = gr.HTML("", elem_id="system-doctor")
                    parts["copy"] = gr.Button("Show facts to copy", size="sm", elem_id="system-copy")
                    parts["facts"] = gr.HTML("", elem_id="system-facts")
            with gr.Column(scale=6, min_width=300):
                with gr.Column(elem_classes="stage"):
                    parts["model"] = gr.Dropdown(
                        [(card.title or name, name) for name, card in self.house.cards.items()],
                        value=next(iter(self.house.cards)), label="Accelerators for the model", filterable=False,
                        elem_id="system-model",
                    )  # fmt: skip
                    parts["accelerators"] = gr.HTML("", elem_id="system-accelerators")
                with gr.Column(elem_classes="stage"):
                    parts["packages"] = gr.HTML("", elem_id="system-packages")

    @property
    def inputs(self) -> dict[str, Any]:
        """The choice of a model, which learns of new ones."""
        return {"model": self.parts["model"]}

    def connect(self, page: gr.Blocks) -> None:
        """Wire the events."""
        parts = self.parts
        self.house.entered.then(
            self._shown,
            parts["model"],
            [parts["computer"], parts["packages"], parts["accelerators"]],
            **_PRIVATE,
        )
        parts["model"].change(self._accelerators, parts["model"], parts["accelerators"], **_PRIVATE)
        parts["examine"].click(self._examine, None, parts["doctor"], **_PRIVATE)
        parts["copy"].click(self._copy, None, parts["facts"], **_PRIVATE)

    def _shown(self, name: str | None) -> tuple[str, str, str]:
        rows = [(one, found or "not installed", words) for one, found, words in packages()]
        told = report('<p class="line">Packages by choice</p>', table(("package", "version", "for"), rows))
        return computer_view(computer()), told, self._accelerators(name)

    def _accelerators(self, name: str | None) -> str:
        if not self.house.models:
            return note("Which of them work is known once there is a model.")
        name = name if name in self.house.models else self.house.models[0]
        return accelerators_view(accelerators(name))

    def _examine(self) -> str:
        return doctor_view(examined(self.house.folder))

    def _copy(self) -> str:
        text = diagnostics(self.house)
        button = '<button type="button" class="copy" aria-label="Copy the facts">Copy</button>'
        head = f"<h3>Without prompts, without names of users and folders {button}</h3>"
        return report(head, f'<pre tabindex="0" aria-label="Facts">{safe(text)}</pre>')


def computer() -> dict[str, Any]:
    """Return devices, memory and versions of this computer."""
    import psutil

    known, memory = machine.environment(), psutil.virtual_memory()
    found = {
        "processor": f"{known['processor']}, {known['threads']} threads",
        "memory": f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free",
        "this page uses": f"{psutil.Process().memory_info().rss / 1e9:.2f} GB",
        "bfloat16 in hardware": "yes" if known["bfloat16_in_hardware"] else "no",
        "graphics cards": ", ".join(_cards()) or "none that torch can use",
        "pictures are made on": catalog.device_for("auto"),
    }
    return found | {f"version of {name}": number for name, number in known["versions"].items()}


def _cards() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["Apple GPU"] if torch.backends.mps.is_available() else []
    told = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        told.append(f"{torch.cuda.get_device_name(number)} ({free / 1e9:.1f} of {total / 1e9:.1f} GB free)")
    return told


def packages() -> list[tuple[str, str, str]]:
    """Return (package, its version or nothing, what it is for)."""
    found = []
    for name, words in KERNELS:
        try:
            number = importlib.metadata.version(name) if importlib.util.find_spec(name) is not None else ""
        except (importlib.metadata.PackageNotFoundError, ValueError):
            number = "of unknown version"
        found.append((name, number, words))
    return found


@functools.lru_cache(maxsize=8)
def accelerators(model: str) -> tuple[tuple[str, str, str], ...]:
    """Return (accelerator, verdict, reason) for a model, asked of its network without weights."""
    from pipelines._steering_files import sketch

    try:
        folder = catalog.find(model).folder
    except RequestError:
        folder = None
    network = sketch(folder) if folder is not None else None
    rows = []
    for name, kind in sorted(accelerator_kinds().items()):
        what = form.sentence_of(name)
        if network is None:
            rows.append(
                (name, "not known", f"{what} The model's network cannot be looked at before it is loaded.")
            )
            continue
        try:
            reason = kind().refuses(network)  # type: ignore[attr-defined]
        except (TypeError, ValueError) as error:
            rows.append((name, "needs settings", f"{what} {error}"))
            continue
        rows.append((name, "no", reason) if reason else (name, "yes", f"{what} {_kernel(name)}".strip()))
    return tuple(rows)


def _kernel(name: str) -> str:
    """Return which kernel an accelerator of attention would run on here."""
    module = importlib.import_module(accelerator_kinds()[name].__module__)
    if not any(getattr(one, "__module__", "") == "acceleration._sparse" for one in vars(module).values()):
        return ""
    import torch

    if not torch.cuda.is_available():
        return "Here: gathered keys on the processor; Triton needs an NVIDIA card."
    return (
        "Here: Triton."
        if importlib.util.find_spec("triton")
        else "Here: FlexAttention; triton is not installed."
    )


def examined(folder: Path) -> dict[str, Any]:
    """Return what `leapfrog doctor` tells."""
    from pipelines.inspection import examine

    place = folder
    while not place.exists():
        place = place.parent
    return examine(place)


def computer_view(found: dict[str, Any]) -> str:
    """Return this computer in a table."""
    return report('<p class="line">This computer</p>', facts(found.items()))


def accelerators_view(rows: tuple[tuple[str, str, str], ...]) -> str:
    """Return what works with a model, and why not."""
    return report(table(("accelerator", "works", "what it does, or why not"), rows))


def doctor_view(found: dict[str, Any]) -> str:
    """Return what the doctor found: problems first."""
    boxes = "".join(trouble(scrubbed(str(one))) for one in found["problems"])
    well = '<p class="line" role="status">Nothing is wrong.</p>' if not found["problems"] else ""
    rows = [
        (key.replace("_", " "), scrubbed(_plain(value)))
        for key, value in found.items()
        if key not in ("problems", "versions")
    ]
    return boxes + report(well, facts(rows))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items()) or "none"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def diagnostics(house: House) -> str:
    """Return facts for a report of an error as JSON: no prompts, no names of users, computers or folders."""
    known = computer() | {"packages": {name: number for name, number, _ in packages() if number}}
    found = accelerators(house.models[0]) if house.models else []
    rows = {name: f"{verdict}: {reason}" if verdict == "no" else verdict for name, verdict, reason in found}
    models = [name if name in catalog.shipped() else "a model of this computer" for name in house.models]
    counts = house.jobs.ledger.counts()
    told = {
        "computer": known,
        "accelerators": rows,
        "models": models,
        "jobs": counts,
        "problem": house.jobs.problem,
    }
    return scrubbed(json.dumps(told, indent=1, ensure_ascii=False))


def scrubbed(text: str) -> str:
    """Return a text without home folders, user names and the computer's name."""
    text = text.replace(str(Path.home()), "~")
    text = re.sub(r"(/home/|/Users/|\\Users\\)[^/\\\s\"']+", r"\1USER", text)
    for word, stands in ((_user(), "USER"), (socket.gethostname(), "COMPUTER")):
        if len(word) > 2:
            text = re.sub(rf"(?<![\w-]){re.escape(word)}(?![\w-])", stands, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return ""
