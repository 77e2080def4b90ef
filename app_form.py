"""From the controls of the page to a `Request` and back; what a model's card says about them."""

from __future__ import annotations

import inspect
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import app_given as given_inputs
from app_speed import CUSTOM, EXACT
from pipelines import profile as profiles
from pipelines._inpainting import Outpaint
from pipelines.catalog import Card
from pipelines.form import Field, fields, read
from pipelines.request import Request, RequestError, accelerator_kinds

ANY_STYLE = "any style"
STEPS, GUIDANCE = 28, 4.0
"""Where a card says nothing."""
FIRST_METHOD = "delta-cache"
"""The accelerator that is turned on first: it asks nothing special of a model."""
LARGEST_RANDOM_SEED = 2**31 - 1
_RATIOS = ((1, 1), (3, 4), (2, 3), (4, 3), (3, 2))


def fields_by_name() -> dict[str, Field]:
    """Return the fields of a request by name."""
    return {one.name: one for one in fields(Request)}


def methods() -> dict[str, tuple[Field, ...]]:
    """Return the fields of every accelerator by its name, the one to begin with first. Imports torch."""
    kinds = accelerator_kinds()
    return {
        name: fields(kinds[name]) for name in sorted(kinds, key=lambda name: (name != FIRST_METHOD, name))
    }


def sides() -> tuple[Field, ...]:
    """Return the fields for what is added around a picture."""
    return fields(Outpaint)


def sentence_of(method: str) -> str:
    """Return in one sentence what an accelerator does."""
    return (inspect.getdoc(accelerator_kinds()[method]) or "").partition("\n")[0]


def seam_of(method: str) -> str:
    """Return what an accelerator decides about; of several that decide about the same, one can be chosen."""
    return str(getattr(accelerator_kinds()[method], "seam", ""))


def sizes(card: Card) -> list[tuple[str, str]]:
    """Return the legal sizes to choose from as (label, "WxH"); "" leaves the size to the model."""
    if card.width is None or card.height is None:
        return [("the model's own", "")]
    given = card.more.get("sizes")
    if isinstance(given, list):
        pairs = [(int(one[0]), int(one[1])) for one in given]
    else:
        area = card.width * card.height
        pairs = [(card.width, card.height)]
        pairs += [
            (_snapped(math.sqrt(area * w / h), card), _snapped(math.sqrt(area * h / w), card))
            for w, h in _RATIOS
        ]
    return [(size_label(w, h), f"{w}x{h}") for w, h in dict.fromkeys(pairs)]


def size_label(width: int, height: int) -> str:
    """Return how a size is called."""
    shape = "square" if width == height else "portrait" if width < height else "landscape"
    return f"{width} × {height} {shape}"


def _snapped(side: float, card: Card) -> int:
    low, high = -(-card.low // card.multiple), card.high // card.multiple
    return card.multiple * min(max(round(side / card.multiple), low), high)


def profile_choices(model: str) -> dict[str, Any]:
    """Return what a dropdown of a model's profiles shows; it is hidden where there are none."""
    names = [(f"{name} ({one.budget})", name) for name, one in profiles.known(model).items()]
    return {"choices": [("none: choose below", ""), *names], "value": "", "visible": bool(names)}


def profile_note(model: str, name: str) -> str:
    """Return in one sentence what a profile stands for and what was measured with it."""
    found = profiles.known(model).get(name)
    return "" if found is None else f"Measured when it was tuned: {found.measured}."


def styles_of(card: Card) -> list[str]:
    """Return the style words that a model knows."""
    given = card.more.get("styles") or []
    return [str(one) for one in (given.values() if isinstance(given, Mapping) else given)]


def concepts_of(card: Card) -> list[str]:
    """Return the things that a model knows, if its card lists them."""
    given = card.more.get("concepts") or []
    return [str(one) for one in given] if isinstance(given, list) else []


def examples_of(card: Card) -> list[list[str]]:
    """Return example prompts, one a row."""
    given = card.more.get("examples") or []
    return [[str(one)] for one in given][:8] if isinstance(given, list) else []


def about(card: Card) -> str:
    """Return in Markdown what a model knows and where its limits are."""
    facts = [
        card.summary,
        str(card.more.get("limits") or ""),
        f"Licence: {card.license}." if card.license else "",
    ]
    text = "\n\n".join(one for one in facts if one) or "This model comes without a description."
    return re.sub(r"([\\`*_{}\[\]<>#$|])", r"\\\1", text)


def restyled(prompt: str, style: str, styles: Sequence[str]) -> str:
    """Return the prompt with its style words replaced by `style`; "any style" only takes them away."""
    words = sorted(styles, key=len, reverse=True)
    plain = prompt.rstrip(" ,.\n")
    for one in words:
        plain = re.sub(rf"(?:\s*,\s*|^){re.escape(one)}(?=\s*(?:,|$))", "", plain, flags=re.IGNORECASE).strip(
            " ,"
        )
    return plain if style == ANY_STYLE or not style else f"{plain}, {style}" if plain else style


def style_in(prompt: str, styles: Sequence[str]) -> str:
    """Return the style words that a prompt ends with or holds between commas, or "any style"."""
    parts = [part.strip().lower() for part in prompt.split(",")]
    return next((one for one in styles if one.lower() in parts), ANY_STYLE)


def request_of(
    values: Mapping[str, Any],
    given: Mapping[str, Sequence[Field]],
    *,
    takes_class: bool = False,
    written: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> Request:
    """Return the request that the controls stand for; a blank seed becomes a random one.

    Args:
        values: by name; settings of an accelerator are called `delta-cache.interval`, its switch `delta-cache`.
        takes_class: whether the model takes a class number, not a prompt.
        written: the seed that the page itself wrote into the field; any other was typed, and counts.
        more: fields of the task's inputs, see `app_given.fields_of`.

    Raises:
        RequestError: with the field, what was given and what is allowed.
    """
    seed = str(values["seed"]).strip()
    new = not seed or (values["new_seed"] and seed == written)
    width, _, height = str(values["size"] or "").partition("x")
    if width and not (width.isdecimal() and height.isdecimal()):
        raise RequestError("size", values["size"], "a width and a height in px, as 512x512")
    return Request(
        model=values["model"],
        prompt="" if takes_class or "prompts" in (more or {}) else values["prompt"] or "",
        negative_prompt="" if takes_class else values["negative_prompt"] or "",
        class_label=given_inputs.whole(values["class_label"]) if takes_class else None,
        width=int(width) if width else None,
        height=int(height) if height else None,
        steps=given_inputs.whole(values["steps"]),
        guidance=values["guidance"],
        seed=secrets.randbelow(LARGEST_RANDOM_SEED) if new else read(Request, "seed", seed),
        images=given_inputs.whole(values["images"]),
        scheduler=values["scheduler"],
        tiling=bool(values["tiling"]),
        metadata=values["metadata"],
        **_speed(values, given),
        **(more or {}),
    )


def _speed(values: Mapping[str, Any], given: Mapping[str, Sequence[Field]]) -> dict[str, Any]:
    if values["speed"] != CUSTOM:
        return {}
    name = values["profile"]
    if not name:
        return {"accelerators": _accelerators(values, given)}
    names = profiles.known(values["model"])
    if name not in names:  # a browser chooses among the known, and opens no file
        raise RequestError("profile", name, f"one of {', '.join(names) or 'none that is there'}")
    return {"profile": name}


def _accelerators(values: Mapping[str, Any], given: Mapping[str, Sequence[Field]]) -> Any:
    found = []
    for name, settings in given.items():
        if values[name]:
            kind = accelerator_kinds()[name]
            found.append(
                {"name": name}
                | {one.name: _setting(kind, one, values[f"{name}.{one.name}"]) for one in settings}
            )
    if not found:
        raise RequestError("speed", CUSTOM, f"{EXACT}, or {CUSTOM} with at least one method")
    return found


def _setting(kind: Any, one: Field, value: Any) -> Any:
    if one.optional and isinstance(value, str) and not value.strip():
        return None
    if isinstance(value, str) and one.kind in ("integer", "number"):
        return read(kind, one.name, value.strip())
    return given_inputs.whole(value) if one.kind == "integer" else value


def values_of(request: Request, card: Card, given: Mapping[str, Sequence[Field]]) -> dict[str, Any]:
    """Return the values of the controls that a request stands for."""
    width, height = request.width or card.width, request.height or card.height
    values: dict[str, Any] = {
        "model": request.model,
        "prompt": given_inputs.prompt_of(request),
        "negative_prompt": request.negative_prompt,
        "class_label": request.class_label or 0,
        "style": style_in(request.prompt, styles_of(card)),
        "size": f"{width}x{height}" if width and height else "",
        "steps": request.steps or card.steps or STEPS,
        "guidance": next(one for one in (request.guidance, card.guidance, GUIDANCE) if one is not None),
        "seed": str(request.seed),
        "new_seed": False,
        "images": request.images,
        "scheduler": request.scheduler,
        "speed": CUSTOM if request.accelerators or request.profile else EXACT,
        "profile": "",
        "tiling": request.tiling,
        "metadata": request.metadata,
        "folder": "",
        "preview": True,
    } | given_inputs.values_of(request, card)
    used = {one.name: one.to_dict() for one in request.accelerators}
    for name, settings in given.items():
        values[name] = name in used or (not used and name == next(iter(given)))
        for one in settings:
            value = used.get(name, {}).get(one.name, one.default)
            values[f"{name}.{one.name}"] = ("" if value is None else f"{value:g}") if _as_text(one) else value
    return values


def _as_text(one: Field) -> bool:
    """Whether a number is asked for in a text field: gradio's own number field turns "none" into 0."""
    return one.optional and one.kind in ("integer", "number")


def control(one: Field, **more: Any) -> Any:
    """Return the gradio component for a field: kind, limits, label and default all come from its declaration."""
    import gradio as gr

    unit = f" ({one.unit})" if one.unit and one.unit.rstrip("s") not in one.label.lower() else ""
    shared: dict[str, Any] = {"label": one.label + unit, "value": one.default} | more
    if one.kind == "switch":
        return gr.Checkbox(**shared)
    if one.kind == "choice":
        pairs = [(str(choice), choice) for choice in one.choices or ()]
        return (
            gr.Radio(pairs, elem_classes="chips", **shared)
            if len(pairs) <= 4
            else gr.Dropdown(pairs, **shared)
        )
    if _as_text(one):
        return gr.Textbox(
            **shared
            | {
                "value": "" if one.default is None else f"{one.default:g}",
                "placeholder": "automatic" if one.default is None else "none",
            }
        )
    if one.kind in ("integer", "number"):
        shared |= {
            "minimum": one.low,
            "maximum": one.high,
            "step": one.step,
            "precision": 0 if one.kind == "integer" else None,
        }
        if one.low is None or one.high is None or (one.high - one.low) / (one.step or 0.01) > 200:
            return gr.Number(**shared)
        return gr.Slider(**shared, buttons=[])
    return gr.Textbox(**shared)
