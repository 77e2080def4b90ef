"""What is shown of a finished job: the original bytes of pictures and clips, what can be done with them, and the run report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

import app_tasks as tasks
import app_views as views
from app_jobs import Job
from app_page import served
from pipelines.catalog import Card

PARTS = (
    "empty",
    "first_box",
    "example_box",
    "picture",
    "gallery",
    "player",
    "after",
    "compare",
    "onward",
    "report",
)
SMALL = 192
"""Pictures up to this width, in px, are shown enlarged."""


def updates(job: Job, parts: Mapping[str, Any], card: Card | None) -> dict[Any, Any]:
    """Return the updates that show a finished job."""
    words = job.request.words
    several, one = len(job.paths) > 1, job.paths[0]
    film = not several and one.suffix.lower() == ".mp4"
    files = [served(path) for path in job.paths]
    small = ["small"] if job.report["effective"]["width"] <= SMALL else []
    seed, panels = job.request.seed, job.request.panels
    captions = [f"{words} (seed {seed + place})" for place in range(len(files))]
    if panels:
        captions = [f"{words}: panel {place % panels + 1}" for place in range(len(files))]
    if job.comparing:
        captions = ["exact", "accelerated"]
    return {
        parts["empty"]: gr.HTML(visible=False),
        parts["first_box"]: gr.Column(visible=False),
        parts["example_box"]: gr.Column(visible=False),
        parts["picture"]: gr.Image(
            None if several or film else files[0],
            visible=not several and not film,
            alt_text=words,
            elem_classes=small,
        ),
        parts["gallery"]: gr.Gallery(
            list(zip(files, captions, strict=True)) if several else None,
            visible=several,
            columns=2 if job.comparing else 3,
            elem_classes=["pair"] if job.comparing else [],
        ),
        parts["player"]: gr.HTML(views.player(files[0], words) if film else "", visible=film),
        parts["after"]: gr.Row(visible=True),
        parts["compare"]: gr.Button(visible=bool(job.request.accelerators) and not job.comparing),
        parts["onward"]: gr.Button(
            visible=card is not None and one.suffix.lower() == ".png" and _goes_on(card)
        ),
        parts["report"]: views.report(job),
    }


def _goes_on(card: Card) -> bool:
    possible = tasks.possible(card)
    return not possible["image"] or not possible["animate"]
