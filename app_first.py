"""The first screen: three ways to a model, in the tab Create, for a page on which nothing was made yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from app_views import safe
from pipelines import catalog
from pipelines.catalog import Card

_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


class FirstScreen:
    """Three cards for a page without a loaded model, for the tab Create: `draw` makes them, `connect` makes their buttons work.

    The first presses `on_builtin`; the others show the tab Models, with the right part of it opened.
    """

    def __init__(self, cards: Mapping[str, Card]) -> None:
        self.cards, self.parts = cards, dict[str, Any]()

    def draw(self) -> None:
        """Make the cards, inside a column."""
        own = next((card for name, card in self.cards.items() if name in catalog.shipped()), None)
        knows = (
            f"Already here, and quick on a processor. {own.summary}"
            if own is not None
            else "None is shipped here."
        )
        with gr.Row(elem_id="first-screen"):
            for name, head, words, button in (
                (
                    "builtin",
                    "Try the built-in model",
                    knows,
                    "Use it",
                ),
                (
                    "open",
                    "Open a model on this computer",
                    "A folder in the layout of diffusers, safetensors only.",
                    "Open",
                ),
                ("download", "Download a model", "Licence, size and free disk are shown first.", "Choose"),
            ):
                with gr.Column(min_width=180, elem_classes="stage"):
                    gr.HTML(f"<h3>{head}</h3><p class='note'>{safe(words)}</p>")
                    self.parts[name] = gr.Button(
                        button, size="sm", interactive=name != "builtin" or own is not None
                    )
        gr.HTML('<p class="quiet">Nothing leaves this computer.</p>')

    def connect(self) -> None:
        """Let the second and third card lead to the tab Models."""
        for name, place in (("open", "models-open"), ("download", "models-download")):
            self.parts[name].click(None, None, None, js=_LEADS.replace("PLACE", place), **_PRIVATE)


_LEADS = """() => { document.querySelector('#tab-models-button')?.click(); setTimeout(() => {
  const button = document.querySelector('#PLACE > button'); if (button && !button.classList.contains('open')) button.click();
  button?.focus(); }, 300); }"""
