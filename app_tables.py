"""Tables and numbers as the tabs Batch, History, Models and System show them; everything given goes through `safe`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from app_views import safe

CSS = """
.unseen { display: none; } .report table.listed td { overflow-wrap: break-word !important; }
.report table.wide { min-width: 470px; }
.drop { border: 1px dashed var(--neutral-400) !important; border-radius: 14px !important;
  background: var(--input-background-fill); }
.drop > label, .drop > .block-label { border: 0 !important; background: transparent; }
.drop button { font-size: 13.5px; } .drop button .wrap { min-height: 0; padding: 30px 0 8px; }
.drop .icon-wrap { width: 24px; margin: 0; }
.thumbs .grid-wrap { height: auto !important; min-height: 0; max-height: none; padding: 0; overflow: visible; }
.thumbs .grid-container { grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)) !important; min-width: 0; }
.thumbs .caption-label { font-size: 11px; padding: 1px 5px; max-width: 100%; }
.big .grid-container { grid-template-columns: minmax(0, 384px) !important; justify-content: center; }
.big .grid-container.several { grid-template-columns: 1fr 1fr !important; }
.big .grid-wrap { height: auto !important; min-height: 0; max-height: none; padding: 0; } .big .caption-label { display: none; }
.actions { gap: 8px !important; flex-wrap: wrap; } .actions > button { flex: 0 1 auto; min-height: 34px; }
#history-refresh { align-self: flex-end; min-height: 42px; }
#history-table table, #history-table .cell-wrap, #history-table th { font-family: var(--font); font-size: 13.5px; }
#batch-standing .chiprow { margin: 12px 0; } #batch-standing .report h3 { margin-top: 14px; }
#system-columns, #models-columns, #batch-columns, #history-columns { gap: 32px; align-items: flex-start; }
#system-columns .column, #models-columns .column { gap: 20px; }
@media (max-width: 760px) {
  #batch-columns, #models-columns, #system-columns, #history-columns { flex-direction: column; gap: 22px; }
  #batch-columns > *, #models-columns > *, #system-columns > *, #history-columns > * { width: 100%; min-width: 0 !important; } }
"""


def style() -> str:
    """Return how these tabs look, as an element for the page; drawn by each of them, so that one alone looks right too."""
    return f"<style>{CSS}</style>"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table that scrolls sideways inside itself; nothing where there are no rows."""
    body = "".join(f"<tr>{''.join(f'<td>{_soft(safe(cell))}</td>' for cell in row)}</tr>" for row in rows)
    top = "".join(f"<th scope='col'>{safe(word)}</th>" for word in heads)
    if not body:
        return ""
    kind = "listed wide" if len(heads) > 3 else "listed"
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _soft(text: str) -> str:
    """Let long names of classes and parts break where a reader would break them."""
    return re.sub(r"(?<=[a-z])([._])(?=[A-Za-z])", r"\1<wbr>", text)


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Return a table of names and what they are."""
    rows = "".join(f"<tr><th scope='row'>{safe(name)}</th><td>{safe(value)}</td></tr>" for name, value in pairs)
    return f'<div class="scroll"><table>{rows}</table></div>' if rows else ""


def report(*parts: str) -> str:
    """Return parts in the style of a run report."""
    return f'<div class="report">{"".join(parts)}</div>'


def note(words: str) -> str:
    """Return a quiet sentence that a screen reader tells; nothing for no words."""
    return f'<p class="note" role="status">{safe(words)}</p>' if words else ""


def span(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Return a number of bytes in words."""
    return (
        f"{count / 1e9:.1f} GB"
        if count >= 1e9
        else f"{count / 1e6:.1f} MB"
        if count >= 1e5
        else f"{count / 1e3:.1f} kB"
    )
