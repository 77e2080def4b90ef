"""The components of what a task asks for: pictures, mask editor, frames, panels, controls and LoRAs; shown for their task alone."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

import app_form as form
import app_given as given
import app_tasks as tasks
import app_views as views
from app_page import sentence
from app_settings import Choice
from pipelines.catalog import Card
from pipelines.request import RequestError

GROUPS = (
    "image",
    "strength",
    "editor",
    "outpaint",
    "last_image",
    "controls",
    "panels",
    "layout",
    "known",
    "frames",
    "fps",
    "file_type",
)
"""What is shown for some tasks alone; `outpaint` and `controls` stand for whole sections."""
_PRIVATE = {"api_visibility": "private", "show_progress": "hidden"}


class TaskInputs:
    """The inputs of tasks on a form.

    Args:
        cards: the models, by name. inputs, parts: of the form; the components are put in there.
    """

    def __init__(self, cards: Mapping[str, Card], inputs: dict[str, Any], parts: dict[str, Any]) -> None:
        self.cards, self.inputs, self.parts = cards, inputs, parts

    def draw_task(self, card: Card) -> None:
        """Make the choice of the task, and what the model cannot do below it."""
        choices = tasks.choices(card)
        self.inputs["task"] = gr.Radio(
            choices,
            value=_first(card),
            label="Task",
            elem_classes="chips",
            elem_id="task",
            visible=len(choices) > 1,
        )
        self.parts["refused"] = gr.HTML(refused(card), elem_id="refused")

    def draw_inputs(self, card: Card) -> None:
        """Make the inputs, all hidden but those of the first task."""
        shown, fields = tasks.TASKS[_first(card)].shown, form.fields_by_name()
        picture: dict[str, Any] = {
            "type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"], "height": 220, "buttons": [],
            "elem_classes": "drop",
        }  # fmt: skip
        inputs = self.inputs
        inputs["image"] = gr.Image(
            label="Starting picture", visible="image" in shown, elem_id="start-picture", **picture
        )
        inputs["last_image"] = gr.Image(
            label="Last picture", visible="last_image" in shown, elem_id="last-picture", **picture
        )
        radius = max(
            1, (card.width or 800) // 25
        )  # gradio would take a part of its canvas, which is larger than our pictures
        inputs["editor"] = gr.ImageEditor(
            label="Picture", type="filepath", image_mode="RGBA", format="png",
            sources=["upload", "clipboard"], transforms=[], layers=False, visible="editor" in shown, elem_id="editor",
            brush=gr.Brush(default_size=radius, colors=["#ff3b7f"], default_color="#ff3b7f", color_mode="fixed"), height=420,
            canvas_size=given.CANVAS, buttons=[], elem_classes="drop",
        )  # fmt: skip
        self._outpaint(visible="outpaint" in shown)
        inputs["strength"] = form.control(fields["strength"], visible="strength" in shown)
        with gr.Row():
            inputs["panels"] = gr.Slider(
                2,
                16,
                4,
                step=1,
                precision=0,
                label="Panels",
                visible="panels" in shown,
                buttons=[],
                min_width=130,
            )
            inputs["layout"] = form.control(fields["layout"], label="Layout", visible="layout" in shown)
        inputs["known"] = form.control(
            fields["known"], label="How a starting picture is held", visible="known" in shown
        )
        with gr.Row():  # gradio shows and says 0 of a number field without a value, so that must be a legal one
            inputs["frames"] = gr.Number(
                card.more.get("frames") or given.FRAMES, label="Frames", precision=0, minimum=0, maximum=1000,
                visible="frames" in shown, min_width=110,
            )  # fmt: skip
            inputs["fps"] = gr.Number(
                card.more.get("fps"), label="Frames a second", minimum=0, maximum=120, visible="fps" in shown, min_width=110,
                placeholder="the model's own",
            )  # fmt: skip
            kinds = [("PNG, lossless", ".png"), ("MP4", ".mp4"), ("GIF", ".gif")]
            inputs["file_type"] = gr.Dropdown(
                kinds,
                value=".png",
                label="File",
                visible="file_type" in shown,
                filterable=False,
                min_width=110,
            )
        with gr.Column(visible="controls" in shown, elem_id="controls") as self.parts["controls"]:
            for place in range(1, given.CONTROLS + 1):
                self._control(place, card)

    def _outpaint(self, *, visible: bool) -> None:
        """Make the fields for what is added around a picture."""
        with gr.Column(visible=visible, elem_id="outpaint") as self.parts["outpaint"]:
            gr.Markdown(
                "Paint over what is to be made anew. Or paint nothing and add pixels at the sides: more is made around the picture;"
                " the whole must then have the shape of the size below.",
                elem_classes="note",
            )
            with gr.Row(elem_id="outpaint-row"):
                for side in form.sides():
                    self.inputs[f"outpaint.{side.name}"] = form.control(side, min_width=110)

    def draw_loras(self, card: Card) -> None:
        """Make the list of LoRAs."""
        with gr.Accordion("LoRAs", open=False, elem_classes="folded"):
            for place in range(1, given.LORAS + 1):
                with gr.Column(visible=place == 1, elem_classes="method") as self.parts[f"lora{place}"]:
                    self._adapter(f"lora{place}", card, "LoRA", pictures=False)
                    self._strength(f"lora{place}", "Weight")
            self.parts["more_loras"] = gr.Button("Add another LoRA", size="sm")

    def _control(self, place: int, card: Card) -> None:
        key = f"control{place}"
        with gr.Column(visible=place == 1, elem_classes="method") as self.parts[key]:
            self._adapter(key, card, "Adapter", pictures=True)
            self.inputs[f"{key}.picture"] = gr.Image(
                label=f"Picture of control {place}", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=180,
                buttons=[], elem_id=f"{key}-picture", elem_classes="drop",
            )  # fmt: skip
            self.inputs[f"{key}.made_by"] = gr.Dropdown(
                given.made_by_choices(),
                value=given.AS_TRAINED,
                label=f"How picture {place} becomes a condition",
            )
            self.parts[f"{key} preview"] = gr.Image(
                label=f"What adapter {place} is given", interactive=False, visible=False, height=180, buttons=["fullscreen"],
                elem_id=f"{key}-preview",
            )  # fmt: skip
            self._strength(key, "Strength")
            with gr.Row():
                for name, words in (("start", "begins"), ("end", "ends")):
                    self.inputs[f"{key}.{name}"] = gr.Slider(
                        0, 1, given.WINDOW[name], step=0.05, label=f"Control {place} {words} at this part of the steps",
                        min_width=120, buttons=[],
                    )  # fmt: skip
            if place < given.CONTROLS:
                self.parts[f"more {key}"] = gr.Button("Add another control", size="sm")

    def _adapter(self, key: str, card: Card, words: str, *, pictures: bool) -> None:
        number = key[-1]
        self.inputs[f"{key}.adapter"] = Choice(
            given.adapters(card, pictures=pictures), value="", label=f"{words} {number}", filterable=False
        )
        self.inputs[f"{key}.file"] = gr.File(
            label=f"{words} {number}: a .safetensors file",
            file_types=[".safetensors"],
            height=130,
            elem_id=f"{key}-file",
            elem_classes="drop",
        )
        self.parts[f"{key} told"] = gr.HTML("", elem_classes="coverage")

    def _strength(self, key: str, words: str) -> None:
        self.inputs[f"{key}.strength"] = gr.Slider(
            0, 2, 1, step=0.05, label=f"{words} {key[-1]} (0 is off, 1 as trained)", buttons=[]
        )

    def connect(self) -> None:
        """Show what a task needs, the coverage of adapters, and what a control is given."""
        inputs, parts = self.inputs, self.parts
        groups = [inputs.get(name, parts.get(name)) for name in GROUPS]
        inputs["task"].change(_groups, inputs["task"], groups, queue=False, **_PRIVATE)
        inputs["task"].input(
            self._frames, [inputs[name] for name in ("task", "model", "frames")], inputs["frames"], queue=False, **_PRIVATE
        )
        for key in (*_keys("control", given.CONTROLS), *_keys("lora", given.LORAS)):
            chosen = [inputs["model"], inputs[f"{key}.adapter"], inputs[f"{key}.file"]]
            told = parts[f"{key} told"]
            gr.on([one.change for one in chosen], self._covered, chosen, told, **_PRIVATE)
            # a file is asked for where none of the model's own is chosen: it would not be used beside one
            chosen[1].change(
                lambda name: gr.File(visible=not name), chosen[1], chosen[2], queue=False, **_PRIVATE
            )
        for key in _keys("control", given.CONTROLS):
            names = ("model", f"{key}.adapter", f"{key}.file", f"{key}.picture", f"{key}.made_by", "size")
            asked = [inputs[name] for name in names]
            triggers = [one.change for one in asked[1:]]
            gr.on(
                triggers,
                self._preview,
                asked,
                parts[f"{key} preview"],
                trigger_mode="always_last",
                **_PRIVATE,
            )
            if f"more {key}" in parts:
                following = f"control{int(key[-1]) + 1}"
                parts[f"more {key}"].click(
                    lambda: (gr.Column(visible=True), gr.Button(visible=False)), None,
                    [parts[following], parts[f"more {key}"]], queue=False, **_PRIVATE,
                )  # fmt: skip
        count = gr.State(1)
        columns = [parts[key] for key in _keys("lora", given.LORAS)]
        parts["more_loras"].click(
            _one_more, count, [count, parts["more_loras"], *columns], queue=False, **_PRIVATE
        )

    def of_model(self, card: Card) -> dict[Any, Any]:
        """Return the updates that another model brings."""
        inputs, choices = self.inputs, tasks.choices(card)
        found = {
            inputs["task"]: gr.Radio(choices, value=_first(card), visible=len(choices) > 1),
            self.parts["refused"]: refused(card),
            inputs["frames"]: gr.Number(card.more.get("frames") or given.FRAMES, label="Frames"),
            inputs["fps"]: gr.Number(card.more.get("fps")),
        }
        for key in (*_keys("control", given.CONTROLS), *_keys("lora", given.LORAS)):
            found[inputs[f"{key}.adapter"]] = gr.Dropdown(
                given.adapters(card, pictures=key.startswith("control")), value=""
            )
        return found

    def _frames(self, task: str, model: str, now: float | None) -> Any:
        """Leave the frames of a story to its scenes, where the model knows how long these are."""
        more = self.cards[model].more if model in self.cards else {}
        own = more.get("scene_frames") if task == "story" else None
        if isinstance(own, int):
            return gr.Number(0, label=f"Frames (0: {own} a scene)")
        return gr.Number(now or more.get("frames") or given.FRAMES, label="Frames")

    def _covered(self, model: str, name: str, file: str | None) -> str:
        try:
            words, fits = given.coverage(self.cards[model], name, file)
        except (RequestError, ValueError, OSError) as error:
            words, fits = _plain(error), False
        if not words:
            return ""
        return f'<p class="note">{views.safe(words)}</p>' if fits else views.trouble(f"Does not fit: {words}")

    def _preview(
        self, model: str, name: str, file: str | None, picture: str | None, made_by: str, size: str
    ) -> Any:
        width, _, height = (size or "").partition("x")
        wanted = (int(width), int(height)) if width.isdigit() and height.isdigit() else None
        try:
            found = given.preview(self.cards[model], name, file, picture, made_by, wanted)
        except (RequestError, ValueError, OSError) as error:
            gr.Warning(views.safe(_plain(error)))
            found = None
        if found is None:
            return gr.Image(None, visible=False)
        return gr.Image(
            kept(found), visible=True, alt_text=f"The condition made from {Path(picture or '').name}"
        )


def refused(card: Card) -> str:
    """Return what a model cannot do, greyed, each with its reason."""
    found = tasks.refused(card)
    if not found or card.name == tasks.NO_MODEL:
        return ""
    rows = "".join(
        f'<li><span class="off" aria-disabled="true">{views.safe(label)}</span> {views.safe(reason)}</li>'
        for label, reason in found
    )
    return f'<details class="refused"><summary>{len(found)} tasks need another model</summary><ul>{rows}</ul></details>'


def kept(picture: Any) -> str:
    """Save a picture as PNG under gradio's own folder, where nobody can guess it, and return its path."""
    from gradio.utils import get_upload_folder

    target = Path(get_upload_folder(), secrets.token_urlsafe(16), "condition.png")
    target.parent.mkdir(parents=True)
    picture.save(target)
    return str(target)


def _groups(task: str) -> list[Any]:
    shown = tasks.TASKS[task].shown if task in tasks.TASKS else ()
    return [gr.update(visible=name in shown) for name in GROUPS]


def _one_more(count: int) -> list[Any]:
    count = min(count + 1, given.LORAS)
    return [
        count,
        gr.Button(visible=count < given.LORAS),
        *(gr.Column(visible=place < count) for place in range(given.LORAS)),
    ]


def _keys(kind: str, count: int) -> list[str]:
    return [f"{kind}{place}" for place in range(1, count + 1)]


def _first(card: Card) -> str:
    return next(iter(tasks.choices(card)), ("", tasks.FIRST_TASK))[1]


def _plain(error: Exception) -> str:
    """Return an error without the place of an upload, which is nobody's business."""
    words = sentence(error)
    if isinstance(error, RequestError):
        words = words.replace(str(error.given), Path(str(error.given)).name)
    return words
