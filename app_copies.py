"""A request as a command, as Python and as a call of HTTP: what is copied makes the same picture."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from pipelines import timeline
from pipelines.form import fields
from pipelines.request import Request

SERVED = "http://127.0.0.1:7861"
"""Where `leapfrog serve` answers unless told otherwise."""
_LISTS: Mapping[str, str] = {"accelerators": "accelerate", "controls": "control", "loras": "lora"}
"""Fields that are lists, and their flags."""


def copies(request: Request) -> str:
    """Return the three forms as HTML, each with a button that copies it."""
    ways = (("Command", command_of(request)), ("Python", python_of(request)), ("curl", curl_of(request)))
    blocks = "".join(
        f'<h3>{name} <button type="button" class="copy" aria-label="Copy {name}">Copy</button></h3>'
        f'<pre tabindex="0" aria-label="{name}">{timeline.safe(text)}</pre>'
        for name, text in ways
    )
    return f"<details><summary>Copy as command, Python or curl</summary>{blocks}</details>"


def command_of(request: Request) -> str:
    """Return the command that makes the same picture."""
    from pipelines.cli import _FLAGS as FLAGS

    words = ["leapfrog generate"]
    words += [shlex.quote(request.prompt)] if request.prompt and not request.prompt.startswith("-") else []
    for name, value in _changed(request).items():
        flag, text = FLAGS.get(name, name).replace("_", "-"), str(value)
        words.append(f"--{flag}{'=' if text.startswith('-') else ' '}{shlex.quote(text)}")
    for name, flag in _LISTS.items():
        words += [f"--{flag} {shlex.quote(text)}" for text in _texts(request, name)]
    words += [f"-- {shlex.quote(request.prompt)}"] if request.prompt.startswith("-") else []
    return " ".join(words)


def python_of(request: Request) -> str:
    """Return the lines of Python that make the same picture."""
    given = ({"prompt": request.prompt} if request.prompt else {}) | _changed(request)
    given |= {name: _texts(request, name) for name in _LISTS if getattr(request, name)}
    lines = [f"    {name}={value!r}," for name, value in given.items()]
    return "\n".join([
        "from pipelines.generate import generate", "from pipelines.request import Request", "",
        "result = generate(Request(", *lines, "))", "result.save()",
    ])  # fmt: skip


def curl_of(request: Request) -> str:
    """Return the call of `leapfrog serve` that makes the same picture; files are uploaded there first, and named by their ids."""
    given = ({"prompt": request.prompt} if request.prompt else {}) | _changed(request)
    given |= {name: [one.to_dict() for one in getattr(request, name)] for name in _LISTS if getattr(request, name)}
    body = json.dumps(given, ensure_ascii=False)
    return (
        f"curl {SERVED}/v1/jobs -H 'Authorization: Bearer '\"$LEAPFROG_TOKEN\" -H 'Content-Type: application/json' \\\n"
        f"  --data {shlex.quote(body)}"
    )


def _texts(request: Request, name: str) -> list[str]:
    return [str(one) if name == "accelerators" else one.text for one in getattr(request, name)]


def _changed(request: Request) -> dict[str, Any]:
    values = {one.name: (getattr(request, one.name), one.default) for one in fields(Request)}
    return {
        name: value
        for name, (value, default) in values.items()
        if name not in ("prompt", *_LISTS) and (value != default or name in ("seed", "model"))
    }
