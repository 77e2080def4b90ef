"""What Compare, Grid and Tune share: their look, the viewer's script, and the addresses of served files.

The script is given to the page by an event, because a browser runs none that stands in a component's HTML.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from app_page import served

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
KEPT = 4000
"""Served copies that are known at once."""

_copies: OrderedDict[tuple[str, int, int], str] = OrderedDict()
_copying = threading.Lock()


def address(path: Path) -> str:
    """Return the address of a served copy of a file, the same bytes, copied once while it stays as it is. Raises: OSError."""
    state = path.stat()
    mark = (str(path), state.st_mtime_ns, state.st_size)
    with _copying:
        known = _copies.get(mark)
        if known is None or not Path(known).is_file():
            known = served(path)
        _copies[mark] = known
        _copies.move_to_end(mark)
        while len(_copies) > KEPT:
            _copies.popitem(last=False)
    return f"gradio_api/file={quote(known)}"


def connect(page: Any) -> None:
    """Give the page the look and the script of these tabs; asked for by several of them, it happens once."""
    page.load(None, None, None, js=f"() => {{ ({_SCRIPT})({json.dumps(CSS)}); }}", **PRIVATE)


# Lines of a style sheet or a script are as long as what they say.
# ruff: noqa: E501
CSS = """
.room { color: var(--neutral-800); font-size: 14px; line-height: 1.5; }
.dark .room { color: var(--neutral-200); }
.room h3 { font-size: 15px; font-weight: 620; margin: 18px 0 6px; color: inherit; }
.room .verdict { font-size: 19px; font-weight: 620; margin: 0 0 2px; color: inherit; }
#tune-status .pace, #grid-status .pace { overflow-wrap: anywhere; }
.room .hint { color: var(--neutral-600); font-size: 13px; margin: 6px 0 !important; }
.dark .room .hint { color: var(--neutral-400); }
.room .scroll { overflow: auto; max-width: 100%; }
.room table { border-collapse: separate !important; border-spacing: 0; font-size: 13px; font-variant-numeric: tabular-nums; margin: 0 !important; }
.room table, .room thead, .room tr { border: 0 !important; }
.room th, .room td { text-align: left; padding: 5px 14px 5px 0 !important; border: 0 !important; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--neutral-200) !important; }
.dark .room th, .dark .room td { border-color: var(--neutral-800) !important; }
.room th { font-weight: 560; }
.room .params td, .room td.long { max-width: 520px; min-width: 150px; white-space: normal; overflow-wrap: anywhere; }
.room svg.scatter { width: 100%; max-width: 700px; height: auto; display: block; color: inherit; }
.room svg.scatter .paper { fill: transparent; } .room svg.scatter text { fill: currentColor; }
.dark .room svg.scatter .dot:not(.best) { fill: var(--neutral-950); }
.dark .room svg.scatter .best, .dark .room svg.scatter .front { stroke: #34d399; } .dark .room svg.scatter .best { fill: #34d399; }
.room tr.best td { font-weight: 600; }

.viewer { --split: 50%; --zoom: 1; --x: 0px; --y: 0px; }
.viewer .tools { display: flex; flex-wrap: wrap; gap: 8px 14px; align-items: center; margin-bottom: 10px; }
.viewer .tools .modes { display: inline-flex; flex-wrap: wrap; gap: 2px; background: var(--neutral-200); border-radius: 12px; padding: 3px; }
.dark .viewer .tools .modes { background: var(--neutral-800); }
.viewer .tools button { border: 0; background: transparent; border-radius: 9px; padding: 6px 12px; margin: 0 !important; cursor: pointer;
  font-size: 13.5px; line-height: 1.4; font-weight: 480; color: inherit; box-shadow: none; min-height: 0; }
.viewer .tools button[aria-pressed=true] { background: white; font-weight: 600; box-shadow: 0 1px 3px rgb(0 0 0 / .16); }
.dark .viewer .tools button[aria-pressed=true] { background: var(--neutral-950); }
.viewer .tools .zoom button { border: 1px solid var(--neutral-300); min-width: 36px; padding: 5px 9px; }
.dark .viewer .tools .zoom button { border-color: var(--neutral-700); }
.viewer button:focus-visible, .viewer .panes:focus-visible, .viewer input:focus-visible { outline: 2px solid var(--primary-600); outline-offset: 2px; }
.viewer .panes { display: grid; gap: 8px; border-radius: 14px; overflow: hidden; background: var(--neutral-100); cursor: grab; }
.viewer .panes { touch-action: pan-y; }
.dark .viewer .panes { background: var(--neutral-900); }
.viewer .pane { position: relative; overflow: hidden; display: grid; place-items: center; min-height: 180px; grid-area: 1 / 1; }
.viewer .pane img, .viewer .pane video { width: min(100%, 640px); height: auto; display: block; margin: 0; border-radius: 0; user-select: none;
  transform: translate(var(--x), var(--y)) scale(var(--zoom)); image-rendering: auto; }
.viewer.pixels .pane img, .viewer.pixels .pane video { image-rendering: pixelated; }
.viewer .pane figcaption { position: absolute; left: 8px; bottom: 8px; background: rgb(0 0 0 / .72); color: white; font-size: 12px;
  padding: 1px 9px; border-radius: 99px; max-width: 90%; }
.viewer .pane.b figcaption { left: auto; right: 8px; }
.viewer .pane.heat { display: none; }
.viewer[data-mode=slider] .pane.b { clip-path: inset(0 0 0 var(--split)); }
.viewer[data-mode=slider] .panes::after { content: ""; grid-area: 1 / 1; width: 2px; justify-self: start; margin-left: calc(var(--split) - 1px);
  background: white; box-shadow: 0 0 0 1px rgb(0 0 0 / .55); pointer-events: none; z-index: 2; }
.viewer .wipe { width: 100%; margin-top: 10px; accent-color: var(--primary-600); }
.viewer:not([data-mode=slider]) .wipe { visibility: hidden; }
.viewer[data-mode=flicker][data-shown=a] .pane.b, .viewer[data-mode=flicker][data-shown=b] .pane.a { visibility: hidden; }
.viewer[data-mode=side] .panes { grid-template-columns: 1fr 1fr; } .viewer[data-mode=side] .pane.b { grid-area: 1 / 2; }
.viewer[data-mode=heat] .pane { visibility: hidden; } .viewer[data-mode=heat] .pane.heat { display: grid; visibility: visible; }
.viewer .scale { display: none; align-items: center; gap: 10px; font-size: 12.5px; margin-top: 8px; }
.viewer[data-mode=heat] .scale { display: flex; } .viewer .scale i { flex: 0 1 220px; height: 12px; border-radius: 3px; }

.sheet { overflow: auto; max-height: 78vh; border: 1px solid var(--neutral-200); border-radius: 14px; position: relative; }
.dark .sheet { border-color: var(--neutral-800); }
.sheet table th, .sheet table td { background: white; padding: 8px 10px !important; } .dark .sheet table th, .dark .sheet table td { background: var(--neutral-900); }
.sheet th.row { white-space: normal; }
.sheet thead th { position: sticky; top: 0; z-index: 2; } .sheet th.row { position: sticky; left: 0; z-index: 1; max-width: 190px; min-width: 92px;
  overflow-wrap: anywhere; }
.sheet thead th:first-child { left: 0; z-index: 3; }
.sheet th[scope=rowgroup] { position: sticky; left: 0; font-weight: 640; }
.sheet img { display: block; width: 128px; max-width: none; height: auto; border-radius: 6px; margin: 0 0 4px !important; }
.sheet img.small { image-rendering: pixelated; }
.sheet td small { color: var(--neutral-600); white-space: nowrap; } .dark .sheet td small { color: var(--neutral-400); }
.sheet .failed { display: block; white-space: normal; color: #b91c1c; max-width: 200px; font-size: 12.5px; } .dark .sheet .failed { color: #fca5a5; }
.sheet td .hint { min-width: 96px; display: inline-block; }
@media (max-width: 760px) {
  .viewer[data-mode=side] .panes { grid-template-columns: 1fr; } .viewer[data-mode=side] .pane.b { grid-area: 2 / 1; }
  .sheet th.row { max-width: 96px; font-size: 12px; } .sheet img { width: 104px; }
  .room th, .room td { padding-right: 9px !important; white-space: normal; overflow-wrap: break-word; }
  .room .params td, .room td.long { min-width: 92px; }
  .room svg.scatter text { font-size: 19px; } .room svg.scatter { overflow: visible; width: calc(100% - 16px); margin-left: 16px; }
  .viewer .tools .modes { flex-wrap: nowrap; } .viewer .tools .modes button { padding: 6px 7px; font-size: 12.5px; white-space: nowrap; }
}
"""

_SCRIPT = """(look) => {
  if (window.leapfrogRooms) return;
  window.leapfrogRooms = true;
  const style = document.createElement("style");
  style.textContent = look;
  document.head.append(style);
  const within = (event) => event.target.closest?.(".viewer");
  const set = (viewer, values) => { for (const key in values) viewer.style.setProperty("--" + key, values[key]); };
  const get = (viewer, key) => parseFloat(getComputedStyle(viewer).getPropertyValue("--" + key)) || 0;
  const zoom = (viewer, factor) => {
    const now = Math.min(32, Math.max(1, get(viewer, "zoom") * factor));
    const share = now / get(viewer, "zoom");
    set(viewer, now === 1 ? {zoom: 1, x: "0px", y: "0px"}
      : {zoom: now, x: get(viewer, "x") * share + "px", y: get(viewer, "y") * share + "px"});
    viewer.classList.toggle("pixels", now >= 3 || viewer.dataset.small === "1");
    viewer.querySelector(".factor").textContent = now.toFixed(now < 10 ? 1 : 0) + "x";
  };
  const split = (viewer, share) => {  // the attribute too, so that another pair begins in the middle again
    const wipe = viewer.querySelector(".wipe");
    set(viewer, {split: share + "%"});
    wipe.value = share;
    wipe.setAttribute("value", share);
  };
  const mode = (viewer, name) => {
    viewer.dataset.mode = name;
    viewer.querySelectorAll("[data-to]").forEach((one) => one.setAttribute("aria-pressed", String(one.dataset.to === name)));
    together(viewer);
  };
  const together = (viewer) => {
    const films = viewer.querySelectorAll(".pane video");
    films.forEach((one) => { one.currentTime = 0; one.play().catch(() => {}); });
  };
  const swap = (viewer) => {
    if (viewer.dataset.mode !== "flicker") mode(viewer, "flicker");
    viewer.dataset.shown = viewer.dataset.shown === "a" ? "b" : "a";
    viewer.querySelector(".now").textContent = "showing " + viewer.dataset.shown.toUpperCase();
  };
  document.addEventListener("click", (event) => {
    const viewer = within(event), button = event.target.closest?.("button");
    if (!viewer || !button) return;
    if (button.dataset.to) mode(viewer, button.dataset.to);
    if (button.dataset.zoom) zoom(viewer, parseFloat(button.dataset.zoom));
  });
  document.addEventListener("input", (event) => {
    const viewer = within(event);
    if (viewer && event.target.matches(".wipe")) split(viewer, event.target.value);
  });
  document.addEventListener("keydown", (event) => {
    const viewer = within(event);
    if (!viewer || event.target.closest("button, input")) return;
    const step = {ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40]}[event.key];
    if (event.key === " ") swap(viewer);
    else if (event.key === "+" || event.key === "=") zoom(viewer, 1.5);
    else if (event.key === "-") zoom(viewer, 1 / 1.5);
    else if (step && get(viewer, "zoom") > 1) set(viewer, {x: get(viewer, "x") + step[0] + "px", y: get(viewer, "y") + step[1] + "px"});
    else return;
    event.preventDefault();
  });
  document.addEventListener("wheel", (event) => {
    const viewer = within(event);
    if (!viewer || !event.target.closest(".panes") || !(event.ctrlKey || get(viewer, "zoom") > 1)) return;
    event.preventDefault();
    zoom(viewer, event.deltaY < 0 ? 1.15 : 1 / 1.15);
  }, {passive: false});
  let held = null;
  document.addEventListener("pointerdown", (event) => {
    const viewer = within(event);
    if (!viewer || !event.target.closest(".panes")) return;
    held = {viewer, panes: event.target.closest(".panes"), x: event.clientX - get(viewer, "x"), y: event.clientY - get(viewer, "y")};
    event.preventDefault();
    held.panes.focus({preventScroll: true});
    if (viewer.dataset.mode === "flicker" && get(viewer, "zoom") === 1) swap(viewer);
    drag(event);
  });
  const drag = (event) => {
    if (!held) return;
    const {viewer, panes} = held;
    if (viewer.dataset.mode === "slider" && get(viewer, "zoom") === 1) {
      const box = panes.getBoundingClientRect();
      const share = Math.min(100, Math.max(0, 100 * (event.clientX - box.left) / box.width));
      split(viewer, share);
    } else if (get(viewer, "zoom") > 1) {
      set(viewer, {x: event.clientX - held.x + "px", y: event.clientY - held.y + "px"});
    }
  };
  document.addEventListener("pointermove", drag);
  document.addEventListener("pointerup", () => { held = null; });
  document.addEventListener("loadeddata", (event) => { const viewer = within(event); if (viewer) together(viewer); }, true);
}"""
