"""Controls that tabs share: the choice of a model with its numbers, and where and how a result is saved."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

import app_form as form
from pipelines._paths import file_name
from pipelines.catalog import Card
from pipelines.request import RequestError

LEVELS = {
    "full": "everything: it can be made again from its file",
    "prompt-free": "everything but the prompts",
    "none": "nothing",
}
"""What a saved file may tell, by the levels of a request."""


def _as_chosen(self: gr.Dropdown, payload: Any) -> str | None:
    return payload if isinstance(payload, str) else None


_CHOICE: dict[str, Any] = {"preprocess": _as_chosen, "is_template": True, "__module__": __name__}
Choice: Any = ABCMeta.__new__(type(gr.Dropdown), "Choice", (gr.Dropdown,), _CHOICE)
"""A list whose entries another choice changes.

Gradio fails an event with an error of its own when a value is not among the newest entries; yet a browser that is just being told
of new ones asks with the old value for a moment, and asks again with the new one. Who uses the value checks it. It is no class
statement, because gradio writes a file beside the source of every class of a component.
"""


def titles(cards: Mapping[str, Card]) -> list[tuple[str, str]]:
    """Return the models to choose from as (title, name)."""
    return [(one.title or one.name, one.name) for one in cards.values()]


def model_control(cards: Mapping[str, Card], **more: Any) -> gr.Dropdown:
    """Return the choice of a model, hidden where there is only one."""
    return gr.Dropdown(titles(cards), value=next(iter(cards)), label="Model", visible=len(cards) > 1, **more)


def models_update(cards: Mapping[str, Card], value: str | None = None) -> Any:
    """Return what lets such a choice learn of new models; with a `value` it is chosen."""
    return gr.Dropdown(titles(cards), visible=len(cards) > 1, **({} if value is None else {"value": value}))


def numbers_of(card: Card) -> tuple[int, float]:
    """Return a model's own steps and guidance, or what stands for them."""
    return card.steps or form.STEPS, form.GUIDANCE if card.guidance is None else card.guidance


def number_controls(card: Card, **more: Any) -> tuple[gr.Number, gr.Number]:
    """Return the fields for steps and guidance; `more` goes to that for steps."""
    steps, guidance = numbers_of(card)
    return (
        gr.Number(steps, label="Steps", precision=0, minimum=1, maximum=1000, min_width=90, **more),
        gr.Number(guidance, label="Guidance", minimum=0, maximum=50, min_width=90),
    )


def draw_saving(inputs: dict[str, Any], parts: dict[str, Any], folder: str) -> None:
    """Make the controls for where a result is saved, what its file tells, and whether it is seen while it is made."""
    with gr.Accordion("Output", open=False, elem_classes="folded", elem_id="output"):
        inputs["folder"] = gr.Textbox(
            "",
            label=f"Folder inside {folder}",
            placeholder="that folder itself",
            max_lines=1,
            max_length=200,
            elem_id="folder",
        )
        inputs["metadata"] = gr.Radio(
            [(words, level) for level, words in LEVELS.items()], value="full", label="What the file tells of how it was made",
            elem_classes="chips", elem_id="metadata",
        )  # fmt: skip
        parts["saving_note"] = gr.Markdown(
            "The job ledger on this computer keeps the settings in any case, so that the result can be found and made again here.",
            elem_classes="note",
        )
        inputs["preview"] = gr.Checkbox(
            True, label="Show the picture while it is made", elem_id="preview-on",
            info="An estimate at low resolution, at most a fiftieth of the time; it changes no pixel of the result.",
        )  # fmt: skip


def folder_of(root: Path, text: object) -> Path:
    """Return a folder inside the output folder by the name that a browser gave; nothing is made. Raises: RequestError."""
    name = str(text or "").strip().strip("/")
    if not name:
        return root
    reason = file_name(name)
    found = root / name
    if reason is None and not found.resolve().is_relative_to(root.resolve()):
        reason = "it leads out of the output folder"
    if reason is None and any(one.is_file() for one in (found, *found.parents) if one.is_relative_to(root)):
        reason = "a file has this name"
    if reason is not None:
        raise RequestError("folder", name, f"the name of a folder inside the output folder ({reason})")
    return found
