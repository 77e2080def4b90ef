"""What the page shows of a job, as HTML and SVG: progress, report, timeline; and the same request as a command and as Python.

Everything that came from outside goes through `safe`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import app_clips as clips
from app_copies import copies
from app_jobs import RUNS
from pipelines import timeline as drawn
from pipelines.request import Request

if TYPE_CHECKING:
    from app_jobs import Job

PHASES = {
    "wait": "Waiting",
    "memory": "Making room in memory",
    "load": "Loading the model",
    "encode": "Reading the prompt",
    "denoise": "Denoising",
    "decode": "Decoding",
    "save": "Saving",
}
COLOURS = {
    "load": "#a8a29e",
    "encode": "#0e7490",
    "denoise": "#047857",
    "decode": "#b45309",
    "save": "#6d28d9",
}
_INSIDE = {"full": "these settings", "prompt-free": "these settings, but no prompt,", "none": "no settings"}
_PREVIEW = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]{1,200000}={0,2}\Z")
_FIRST = "There is none here yet. Open one that is on this computer, or download one; then a prompt is all it takes."
STATES, SHOWN_ROWS = drawn.STATES, 200
safe, timeline = drawn.safe, drawn.timeline


def masthead() -> str:
    """Return the name of the page."""
    return '<div class="masthead"><h1>Leapfrog</h1></div>'


def chips(facts: Sequence[tuple[str, str, str]], problem: str = "") -> str:
    """Return small labels of (name, value, more), with a box under them where nothing can be worked on."""
    shown = "".join(
        f'<span class="chip"><span class="name">{safe(name)}</span> <b>{safe(value)}</b>'
        + (f" <small>{safe(more)}</small>" if more else "")
        + "</span>"
        for name, value, more in facts
    )
    return (
        f'<div class="chiprow" role="status" aria-label="State of this page">{shown}</div>{trouble(problem)}'
    )


def trouble(words: str) -> str:
    """Return a box with an error in plain words, or nothing."""
    return f'<div class="trouble" role="alert">{safe(words)}</div>' if words else ""


def note(words: str) -> str:
    """Return a quiet sentence, or nothing."""
    return f'<p class="note">{safe(words)}</p>' if words else ""


def player(path: str, words: str) -> str:
    """Return a player of the bytes of a file that the page serves."""
    return (
        f'<video controls loop muted playsinline preload="auto" aria-label="{safe(words)}" '
        f'src="gradio_api/file={quote(path)}"></video>'
    )


def differences(source: str, rows: Sequence[tuple[str, str, str]], missing: Sequence[str]) -> str:
    """Return a table of what settings would change: control, value now, value there."""
    head = f"<h3>Settings of {safe(source)}</h3>"
    more = f"<p class='note'>To be given again, because nothing that a picture names is opened: {safe(', '.join(missing))}.</p>"
    if not rows:
        return f"<div class='report'>{head}<p>Nothing in the form would change.</p>{more if missing else ''}</div>"
    told = "".join(
        f"<tr><th scope='row'>{safe(name)}</th><td>{safe(_short(now))}</td><td><b>{safe(_short(then))}</b></td></tr>"
        for name, now, then in rows
    )
    return (
        f"<div class='report'>{head}<div class='scroll'><table><thead><tr><th scope='col'>setting</th><th scope='col'>now</th>"
        f"<th scope='col'>there</th></tr></thead><tbody>{told}</tbody></table></div>{more if missing else ''}</div>"
    )


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:160]}..."


def empty(bare: bool = False) -> str:
    """Return what stands where the picture will be; `bare` where there is no model to make one."""
    frog = (
        '<svg viewBox="0 0 64 64" fill="none" stroke="currentColor" stroke-width="2.6" stroke-linecap="round" '
        'stroke-linejoin="round" aria-hidden="true"><path d="M14 27a7.5 7.5 0 1 1 13-7q5-1.2 10 0a7.5 7.5 0 1 1 13 7"/>'
        '<path d="M14 27C8 33 7 42 14 47q7 5 18 5t18-5c7-5 6-14 0-20"/><path d="M19 38q13 9 26 0"/>'
        '<path d="M20.5 20.5v.5M43.5 20.5v.5" stroke-width="4"/></svg>'
    )
    return (
        f'<div class="welcome">{frog}<h2>{"First, a model" if bare else "What shall it be?"}</h2>'
        f"<p>{_FIRST if bare else 'Write a prompt and press Generate, or start from one of these.'}</p></div>"
    )


def progress(job: Job, ahead: int = 0) -> str:
    """Return the live line of a job: phase, step, time, and an estimate of what is left."""
    now = job.progress
    words, steps, share = PHASES.get(job.phase, job.phase), "", 0.0
    if job.state == "waiting":
        words = f"Waiting: {ahead} before yours" if ahead else "Starting"
    if now is not None and now.steps:
        steps = f"step {now.step} of {now.steps}"
        share = min(1.0, (now.picture + now.step / now.steps) / max(1, job.request.images))
    if now is not None and job.request.images > 1:
        steps = f"picture {now.picture + 1} of {job.request.images}" + (f", {steps}" if steps else "")
    if now is not None and now.note.startswith("run "):
        run = int(now.note.split()[1])
        steps = now.note + (f", {steps}" if steps else "")
        share = min(1.0, (run - 1 + (now.step / now.steps if now.steps else 0)) / RUNS)
    elif now is not None and now.note:
        words = now.note
    clock = f"{job.seconds:.1f} s{_left(job)}" if job.started else ""
    busy = "" if share else " busy"
    return (
        f'<div class="pace"><div class="row"><span><b role="status">{safe(words)}</b> <span class="num">{steps}</span></span>'
        f'<span class="num">{clock}</span></div><div class="bar{busy}" role="progressbar" aria-label="Progress" '
        f'aria-valuemin="0" aria-valuemax="100" aria-valuenow="{share * 100:.0f}"><i style="width:{share:.1%}"></i></div></div>'
    )


def preview(job: Job) -> str:
    """Return the running estimate of a job as a small picture, or nothing."""
    now = job.progress
    if now is None or job.phase != "denoise" or not _PREVIEW.match(now.preview):
        return ""
    words = f"The picture so far, an estimate at step {now.step} of {now.steps}"
    return f'<figure class="sofar"><img src="{now.preview}" alt="{words}"><figcaption>So far: an estimate</figcaption></figure>'


def _left(job: Job) -> str:
    now, pace = job.progress, job.pace
    if job.comparing or now is None or pace is None or now.phase != "denoise" or now.step - pace[0] < 2:
        return ""
    each = (time.monotonic() - pace[1]) / (now.step - pace[0])
    steps = now.steps - now.step + now.steps * (job.request.images - now.picture - 1)
    return f" · about {max(1, round(each * steps))} s left" if each * steps > 1 else ""


def ended(job: Job) -> str:
    """Return what stands under the button once nothing more happens."""
    made = (
        f"{job.made} of {job.request.images} pictures were made and saved"
        if job.made
        else "Nothing was decoded or saved"
    )
    if job.stopped:
        return f'<div class="pace" role="status">Stopped. {made}.</div>'
    if job.state == "failed":
        return trouble(job.error)
    failures = job.report.get("failures", [])
    warnings = [one for one in job.report.get("warnings", []) if one not in failures]
    boxes = [trouble(f"Something is wrong with the result: {one}.") for one in failures]
    boxes += [f'<div class="trouble caution" role="status">Note: {safe(one)}.</div>' for one in warnings]
    boxes += [trouble(f"{made}. {job.error}")] if job.error else []
    return "".join(boxes)


def report(job: Job) -> str:
    """Return the run report: one line, the files, and the details to fold out."""
    found, request = job.report, job.request
    run, effective = found.get("run", {}), found.get("effective", {})
    timings = {key: float(value) for key, value in found.get("timings", {}).items()}
    peak = found.get("peak_memory_mb", {})
    parts = [f"{sum(timings.values()):.1f} s", f"{effective.get('steps')} steps", _work(run, request)]
    parts += [f"peak {peak['device'] / 1000:.1f} GB on the device"] if "device" in peak else []
    size = f"{effective.get('width')} × {effective.get('height')} px"
    files = ", ".join(path.name for path in job.paths)
    ending = job.paths[0].suffix.lower() if job.paths else ""
    kind = {".mp4": "MP4 (H.264, lossy)", ".gif": "GIF (lossy)"}.get(ending, "lossless PNG")
    clip = "".join(clips.beside(request, path, int(effective.get("frames") or 1)) for path in job.paths[:1])
    pictures = f"first of {request.images} pictures" if request.images > 1 else "this picture"
    return (
        f'<div class="report">{_likeness(job)}<p class="line">{safe(" · ".join(parts))}</p>'
        f'<p class="files">{safe(files)} · {size}, {kind} with {_INSIDE[request.metadata]} inside · '
        f"saved in {safe(job.folder)}</p>{clip}"
        f"<details><summary>Run report</summary>{_phases(timings)}"
        f"<h3>Where the work went, step by step ({pictures})</h3>{timeline(run)}"
        f"{_compared(found, request)}{_steps(run)}{_rest(found)}</details>{copies(request)}</div>"
    )


def _likeness(job: Job) -> str:
    """Return what a comparison with the exact picture has shown; nothing where there was none."""
    found = job.measured
    if found is None:
        return ""
    times, speed = found["median"], found["speedup"]
    psnr = "infinite" if found["psnr_db"] is None else f"{found['psnr_db']:.1f} dB"
    rows = [
        ("speed-up of denoising", f"{speed['denoise']:.2f}x"),
        ("speed-up end to end", f"{speed['end_to_end']:.2f}x"),
        ("exact, end to end", f"{times['exact']['end_to_end']:.2f} s"),
        ("accelerated, end to end", f"{times['accelerated']['end_to_end']:.2f} s"),
        ("PSNR to the exact picture", psnr),
        ("SSIM", f"{found['ssim']:.3f}"),
    ]
    told = "".join(f"<tr><th scope='row'>{name}</th><td>{value}</td></tr>" for name, value in rows)
    rounds = f"Left exact, right accelerated. Times: median of {found['rounds']} runs of each kind, taken in turns."
    verdict = found["verdict"][:1].upper() + found["verdict"][1:]
    return (
        f'<div class="likeness"><h3>Against the exact picture</h3><p><b>{safe(verdict)}.</b></p>'
        f"<div class='scroll'><table>{told}</table></div><p class='note'>{rounds}</p></div>"
    )


def _work(run: Mapping[str, Any], request: Request) -> str:
    total = sum(run.get(name, 0) for name in ("computed", "reused", "forecast"))
    if not total:
        return "exact" if not request.accelerators else "accelerated"
    if not request.accelerators:
        return f"exact: all {total} block calls computed"
    saved = [f"{run[name]} {name}" for name in ("reused", "forecast") if run.get(name)]
    return f"accelerated: {run.get('computed', 0)} of {total} block calls computed" + "".join(
        f", {one}" for one in saved
    )


def _phases(timings: Mapping[str, float]) -> str:
    total = sum(timings.values()) or 1.0
    bars, keys = [], []
    for name, seconds in timings.items():
        colour = COLOURS.get(name, "#78716c")
        bars.append(f'<i style="background:{colour};width:{seconds / total:.2%}"></i>')
        keys.append(f'<span style="--c:{colour}">{safe(PHASES.get(name, name))} {seconds:.2f} s</span>')
    return f'<h3>Time</h3><div class="phases" aria-hidden="true">{"".join(bars)}</div><div class="key">{"".join(keys)}</div>'


def _compared(found: Mapping[str, Any], request: Request) -> str:
    asked, took = dict(found.get("requested", {})), found.get("effective", {})
    asked["accelerators"] = [str(one) for one in request.accelerators]
    rows = []
    for name in dict.fromkeys([*asked, *took]):
        left, right = asked.get(name), took.get(name)
        plain = left in (None, "auto", "default") or name not in took or _words(left) == _words(right)
        differs = "" if plain else ' class="differs"'
        default = "the model's own" if name in asked else "–"
        rows.append(
            f"<tr{differs}><th scope='row'>{safe(name.replace('_', ' '))}</th><td>{safe(_words(left) or default)}</td>"
            f"<td>{safe(_words(right) or '–')}</td></tr>"
        )
    took_effect = found.get("run", {}).get("effective") or ["exact: nothing was left out"]
    notes = "".join(f"<li>{safe(one)}</li>" for one in [*took_effect, *found.get("run", {}).get("notes", [])])
    return (
        f"<h3>Asked for, and what took effect</h3><ul>{notes}</ul><div class='scroll'><table><thead><tr><th></th>"
        f"<th scope='col'>requested</th><th scope='col'>effective</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def _steps(run: Mapping[str, Any]) -> str:
    cells = [cell for cell in run.get("cells", []) if cell.get("states")]
    if not cells:
        return ""
    rows = "".join(
        f"<tr><td>{cell['step'] + 1}</td><td>{safe(cell.get('branch', ''))}</td>"
        + "".join(f"<td>{cell['states'].count(state)}</td>" for state in STATES)
        + "</tr>"
        for cell in cells[:SHOWN_ROWS]
    )
    more = f"<p class='note'>and {len(cells) - SHOWN_ROWS} more calls</p>" if len(cells) > SHOWN_ROWS else ""
    heads = "".join(f"<th scope='col'>{word}</th>" for word in ("step", "branch", *STATES.values()))
    return (
        f"<details><summary>Blocks in each step</summary><div class='scroll'><table><thead><tr>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{more}</details>"
    )


def _rest(found: Mapping[str, Any]) -> str:
    facts = {
        "memory": ", ".join(
            f"{name} {size / 1000:.2f} GB" for name, size in found.get("peak_memory_mb", {}).items()
        ),
        "weights": found.get("weights", ""),
        "pixels": found.get("pixels", ""),
        "versions": ", ".join(f"{name} {number}" for name, number in found.get("versions", {}).items()),
    }
    rows = "".join(
        f"<tr><th scope='row'>{name}</th><td>{safe(value)}</td></tr>"
        for name, value in facts.items()
        if value
    )
    return f"<details><summary>Memory, digests and versions</summary><div class='scroll'><table>{rows}</table></div></details>"
