"""The components of the page, from a model's card and the fields of the request and the specs; nothing happens here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import app_form as form
import app_speed as speed
import app_views as views
from app_first import FirstScreen
from app_inputs import TaskInputs
from app_settings import Choice, draw_saving, model_control
from app_tasks import NO_MODEL
from pipelines.catalog import Card
from pipelines.form import Field
from pipelines.request import PROMPT_LENGTH, Request

PICTURES = 16
"""Most pictures that the page makes at once."""
SHOWN_FIRST = 3
"""How many settings of an accelerator are shown before the rest is folded."""


class Layout:
    """What stands where: `inputs` by the name of the field they fill, `parts` are all other components.

    Args:
        cards: the models to choose from, by name.
    """

    def __init__(self, cards: Mapping[str, Card]) -> None:
        self.cards = dict(cards)
        self.first = next(iter(self.cards.values()))
        self.methods = form.methods()
        self.fields = form.fields_by_name()
        self.inputs: dict[str, Any] = {}
        self.parts: dict[str, Any] = {}
        self.given = TaskInputs(self.cards, self.inputs, self.parts)
        self.first_screen, self.newcomer, self.output = FirstScreen(self.cards), False, "outputs"

    def draw(self) -> None:
        """Make all components, inside `gr.Blocks`."""
        import gradio as gr

        self.parts["job"], self.parts["written"], self.parts["pending"] = (
            gr.State(""),
            gr.State(""),
            gr.State(None),
        )
        self.parts["form_of"] = gr.State(self.first.name)
        self.parts["remembered"] = gr.BrowserState("", storage_key="leapfrog-job", secret="not a secret")
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=5, min_width=300, elem_id="form-side"):
                with gr.Column(elem_id="asking"):
                    self._asking()
                    self._buttons()
                with gr.Column(elem_id="settings"):
                    self._numbers()
                    self._speed()
                    self._folded()
            with gr.Column(scale=6, min_width=300, elem_id="result-side"):
                self._result()

    def _asking(self) -> None:
        import gradio as gr

        card, inputs, styles = self.first, self.inputs, form.styles_of(self.first)
        inputs["model"] = model_control(self.cards)
        self.given.draw_task(card)
        inputs["prompt"] = gr.Textbox(
            label="Prompt", lines=3, max_lines=10, max_length=PROMPT_LENGTH, autofocus=True, elem_id="prompt",
            placeholder="What should be in the picture?", visible=not card.takes_class,
        )  # fmt: skip
        self.parts["tokens"] = gr.HTML("", elem_id="tokens")
        highest = (card.classes or 1_000_000) - 1
        inputs["class_label"] = gr.Number(
            0, label="Class number", precision=0, minimum=0, maximum=highest,
            visible=card.takes_class,
        )  # fmt: skip
        inputs["style"] = gr.Radio(
            [form.ANY_STYLE, *styles],
            value=form.ANY_STYLE,
            label="Style",
            elem_classes="chips",
            visible=bool(styles),
        )
        self.given.draw_inputs(card)

    def _numbers(self) -> None:
        import gradio as gr

        start = form.values_of(Request(model=self.first.name, prompt="-"), self.first, self.methods)
        choices = form.sizes(self.first)
        with gr.Row():
            self.inputs["size"] = Choice(
                choices, value=start["size"], label="Size", min_width=130, filterable=False
            )
            self.inputs["images"] = gr.Slider(
                1, PICTURES, 1, step=1, precision=0, label="How many", min_width=130, buttons=[]
            )
        with gr.Row():
            self.inputs["steps"] = gr.Slider(
                1,
                max(100, start["steps"]),
                start["steps"],
                step=1,
                precision=0,
                label="Steps",
                min_width=130,
                buttons=[],
            )
            self.inputs["guidance"] = gr.Slider(
                0, 20, start["guidance"], step=0.1, label="Guidance", min_width=130, buttons=[]
            )
        with gr.Row(elem_id="seed-row"):
            self.inputs["seed"] = gr.Textbox(
                "", label="Seed", placeholder="random", max_lines=1, min_width=110, scale=3
            )
            self.parts["die"] = gr.Button("Roll a new seed", elem_id="die", scale=0, min_width=46)
            self.inputs["new_seed"] = gr.Checkbox(
                True, label="new every time", container=False, elem_id="new-seed"
            )

    def _speed(self) -> None:
        import gradio as gr

        self.inputs["speed"] = gr.Radio(list(speed.SPEEDS), value=speed.EXACT, label="Speed", elem_id="speed")
        self.parts["speed_note"] = gr.HTML(
            views.note("Every block is computed at every step."), elem_id="speed-note"
        )
        self.parts["measure"] = gr.Button("Measure now", size="sm", elem_id="measure", visible=False)
        with gr.Column(visible=False) as self.parts["methods"]:
            self.inputs["profile"] = Choice(
                **form.profile_choices(self.first.name), label="Tuned settings", filterable=False
            )
            self.parts["profile_note"] = gr.Markdown(visible=False, elem_classes="note")
            self._methods()

    def _methods(self) -> None:
        import gradio as gr

        with gr.Column() as self.parts["by_hand"]:
            for place, (name, fields) in enumerate(self.methods.items()):
                several, on = len(self.methods) > 1, place == 0
                with gr.Column(elem_classes="method"):
                    info = form.sentence_of(name)
                    self.inputs[name] = gr.Checkbox(
                        on, label=name, info=info, container=False, visible=several
                    )
                    with gr.Column(visible=on) as self.parts[f"{name} settings"]:
                        self._method(name, fields)

    def _method(self, name: str, fields: Sequence[Field]) -> None:
        import gradio as gr

        for one in fields[:SHOWN_FIRST]:
            self.inputs[f"{name}.{one.name}"] = form.control(one)
        if fields[SHOWN_FIRST:]:
            with gr.Accordion(f"More settings of {name}", open=False, elem_classes="folded"):
                for one in fields[SHOWN_FIRST:]:
                    self.inputs[f"{name}.{one.name}"] = form.control(one)

    def rivals(self, name: str, other: str) -> bool:
        """Whether two methods decide about the same thing, so that only one of them can work."""
        return name != other and form.seam_of(name) == form.seam_of(other) != ""

    def _buttons(self) -> None:
        import gradio as gr

        self.parts["estimate"] = gr.HTML("", elem_id="estimate")
        with gr.Row(elem_id="go-row"):
            self.parts["generate"] = gr.Button(  # not before the page knows whose job it would be
                "Generate", variant="primary", size="lg", elem_id="generate", interactive=False, scale=4
            )
            self.parts["stop"] = gr.Button(
                "Stop", size="lg", elem_id="stop", interactive=False, scale=1, min_width=90
            )
        with gr.Row(elem_id="queue-row"):
            gr.HTML('<p class="keys">Ctrl + Enter; with Shift it is added to the queue</p>')
            self.parts["queue"] = gr.Button(
                "Add to queue", size="sm", elem_id="queue", scale=0, min_width=110
            )

    def _folded(self) -> None:
        import gradio as gr

        concepts = form.concepts_of(self.first)
        self.given.draw_loras(self.first)
        with gr.Accordion("What the model knows", open=False, elem_classes="folded"):
            self.parts["about"] = gr.Markdown(form.about(self.first), elem_classes="note")
            self.parts["concepts"] = gr.Dropdown(
                concepts,
                value=None,
                label="Look for a thing and put it into the prompt",
                visible=bool(concepts),
            )
        with gr.Accordion("Reuse settings from a picture", open=False, elem_classes="folded"):
            self.parts["file"] = gr.File(
                label="Drop a PNG, MP4 or JSON made by Leapfrog",
                file_types=[".png", ".mp4", ".gif", ".json"],
                height=120,
                elem_id="reuse",
                elem_classes="drop",
            )
        draw_saving(self.inputs, self.parts, self.output)
        with gr.Accordion("More settings", open=False, elem_classes="folded"):
            self.inputs["negative_prompt"] = gr.Textbox(
                label="Negative prompt", lines=2, max_length=PROMPT_LENGTH
            )
            self.inputs["scheduler"] = form.control(self.fields["scheduler"])
            self.inputs["tiling"] = form.control(self.fields["tiling"])

    def _result(self) -> None:
        import gradio as gr

        parts, examples = self.parts, form.examples_of(self.first)
        with gr.Column(elem_classes="stage"):
            parts["status"] = gr.HTML("", elem_id="status")
            with gr.Column(visible=False, elem_id="diff") as parts["diff_box"]:
                parts["diff"] = gr.HTML("")
                with gr.Row():
                    parts["apply"] = gr.Button("Apply all", variant="primary", size="sm", elem_id="apply")
                    parts["leave"] = gr.Button("Leave as it is", size="sm", elem_id="leave")
            parts["preview"] = gr.HTML("", elem_id="preview")
            parts["empty"] = gr.HTML(views.empty(bare=self.first.name == NO_MODEL), elem_id="empty")
            with gr.Column(visible=bool(examples)) as parts["example_box"]:
                parts["examples"] = gr.Dataset(
                    components=[gr.Textbox(visible=False, render=False)], samples=examples, show_label=False,
                    label="Examples", samples_per_page=8, elem_id="examples", type="values",
                )  # fmt: skip
            parts["picture"] = gr.Image(
                type="filepath", interactive=False, visible=False, show_label=False, label="Picture", elem_id="picture",
                buttons=["download", "fullscreen"], container=False,
            )  # fmt: skip
            parts["gallery"] = gr.Gallery(
                visible=False, show_label=False, label="Pictures", elem_id="gallery", columns=3, interactive=False,
                object_fit="contain", height="auto", buttons=["download", "fullscreen"], container=False,
            )  # fmt: skip
            parts["player"] = gr.HTML(visible=False, elem_id="player")
            with gr.Row(visible=False, elem_id="after") as parts["after"]:
                parts["compare"] = gr.Button(
                    "Compare with exact", size="sm", elem_id="compare", visible=False
                )
                parts["again"] = gr.Button("Reuse settings", size="sm", elem_id="again")
                parts["onward"] = gr.Button(
                    "Start from this picture", size="sm", elem_id="onward", visible=False
                )
            parts["report"] = gr.HTML("", elem_id="report")
        with gr.Column(visible=self.newcomer) as parts["first_box"]:
            self.first_screen.draw()
