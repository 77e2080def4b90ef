"""How the page looks: a calm theme with the system's own fonts, so that nothing is fetched from elsewhere."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

SANS = [
    "ui-sans-serif",
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "Arial",
    "sans-serif",
]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace"]


def theme() -> Any:
    """Return the theme of the page."""
    import gradio as gr

    soft, line = "*neutral_50", "*neutral_200"
    return gr.themes.Base(
        primary_hue="emerald",
        neutral_hue="stone",
        radius_size="lg",
        spacing_size="lg",
        font=SANS,
        font_mono=MONO,
    ).set(
        body_background_fill=soft,
        body_background_fill_dark="*neutral_950",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_shadow="none",
        block_padding="0px",
        block_label_background_fill="transparent",
        block_title_text_weight="550",
        block_title_text_size="*text_sm",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        block_info_text_size="*text_xs",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_700",
        input_padding="10px 12px",
        input_shadow="none",
        input_shadow_focus="0 0 0 3px color-mix(in srgb, *primary_500 25%, transparent)",
        input_border_color_focus="*primary_600",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        button_secondary_background_fill="white",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_border_color=line,
        button_secondary_text_color="*neutral_800",
        slider_color="*primary_600",
        checkbox_background_color_selected="*primary_700",
        checkbox_border_color_selected="*primary_700",
    )


_DIE = (
    "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 24 24' fill='none' stroke='black' stroke-width='2'>"
    "<rect x='3.5' y='3.5' width='17' height='17' rx='4'/><g fill='black' stroke='none'>"
    + "".join(
        f"<circle cx='{x}' cy='{y}' r='1.7'/>"
        for x, y in ((8.3, 8.3), (15.7, 8.3), (12, 12), (8.3, 15.7), (15.7, 15.7))
    )
    + "</g></svg>"
)

# Gradio splits selectors at every comma to put its own class before each: no commas inside brackets, none after .dark.
CSS = """
:root { --die: url("data:image/svg+xml,DIE"); }
.gradio-container { width: 100% !important; max-width: 1200px !important;
  margin: 0 auto !important; padding: 28px clamp(14px, 4vw, 24px) 48px !important; }
.gradio-container > .main { padding: 0 !important; }
.gradio-container .form { border: 0; background: transparent; box-shadow: none; gap: 18px; overflow: visible; }
.gradio-container .block { overflow: visible; }
.gradio-container *:focus-visible { outline: 2px solid var(--primary-600); outline-offset: 2px; }

.masthead { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 14px; }
.masthead h1 { font-size: 26px; font-weight: 680; letter-spacing: -.02em; margin: 0; color: var(--neutral-900); }
.masthead p { margin: 0; color: var(--neutral-600); font-size: 15px; }
.dark .masthead h1 { color: var(--neutral-50); } .dark .masthead p { color: var(--neutral-400); }

#head { align-items: center; gap: 10px 18px; flex-wrap: wrap; margin-bottom: 6px; }
#mast { flex: 0 0 auto; width: auto; min-width: 0; } #chips { flex: 1 1 300px; min-width: 0; }
#stop-all { flex: 0 0 auto; border-color: #b91c1c; color: #991b1b; font-weight: 600; }
.dark #stop-all { color: #fecaca; border-color: #ef4444; }
.chiprow { display: flex; flex-wrap: wrap; gap: 6px; }
.chip { border: 1px solid var(--neutral-200); border-radius: 99px; background: white; padding: 3px 12px; font-size: 13px;
  color: var(--neutral-700); overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.chip .name { color: var(--neutral-600); } .chip b { font-weight: 600; color: var(--neutral-900); }
.chip small { font-size: 12px; }
.dark .chip { background: var(--neutral-900); border-color: var(--neutral-800); color: var(--neutral-300); }
.dark .chip b { color: var(--neutral-50); } .dark .chip .name { color: var(--neutral-400); }
#chips .trouble { margin-top: 8px; }
.gradio-container { overflow-x: clip !important; overflow-y: visible !important; } /* hidden would undo what is sticky */
.row:has(> .form:only-child):not(:has(> .form > *)) { display: none; }
#tabs > .tab-wrapper { margin-bottom: 0; }
#tabs > .tabitem { border: 0; padding: 20px 0 0; background: transparent; } #tabs > .tab-wrapper { border: 0; }
#tabs > .tab-wrapper button { font-size: 15px; }
#tabs > .tab-wrapper button.selected { color: var(--primary-800); font-weight: 580; }
.dark #tabs > .tab-wrapper button.selected { color: var(--primary-300); }
.gradio-container .secondary-wrap input { text-overflow: ellipsis; padding-right: 30px !important; }

#columns { gap: 40px; align-items: flex-start; }
#form-side { gap: 30px; }
#asking, #settings, #result-side { gap: 20px; }
#result-side { position: sticky; top: 20px; }

#prompt textarea { font-size: 17px; line-height: 1.45; padding: 14px 16px; border-radius: 14px; }
.chips .wrap { display: flex; flex-wrap: wrap; gap: 8px; }
.chips label { border-radius: 999px !important; padding: 5px 13px !important; font-size: 13.5px; font-weight: 480;
  border: 1px solid var(--neutral-300) !important; background: var(--input-background-fill) !important; box-shadow: none !important;
  color: var(--neutral-800) !important; cursor: pointer; }
.dark .chips label { border-color: var(--neutral-700) !important; color: var(--neutral-200) !important; }
.chips label:hover { border-color: var(--primary-600) !important; }
.chips label.selected { background: var(--primary-100) !important; border-color: var(--primary-700) !important;
  color: var(--primary-900) !important; font-weight: 580; }
.dark .chips label.selected { background: var(--primary-900) !important; color: var(--primary-100) !important; }
.chips label input { position: absolute; opacity: 0; width: 1px; height: 1px; }
.chips label:has(input:focus-visible) { outline: 2px solid var(--primary-600); outline-offset: 2px; }
.chips label span { margin: 0 !important; }

#speed .wrap { display: grid; grid-template-columns: repeat(4, 1fr); gap: 0; padding: 4px; border-radius: 14px;
  background: var(--neutral-200); }
.dark #speed .wrap { background: var(--neutral-800); }
#speed label { justify-content: center; border: 0 !important; background: transparent !important; box-shadow: none !important;
  border-radius: 11px !important; padding: 8px 6px !important; cursor: pointer; color: var(--neutral-700); }
#speed label.selected { background: white !important; color: var(--neutral-900) !important; font-weight: 600;
  box-shadow: 0 1px 3px rgb(0 0 0 / .14) !important; }
.dark #speed label { color: var(--neutral-300); }
.dark #speed label.selected { background: var(--neutral-950) !important; color: white !important; }
#speed label input { position: absolute; opacity: 0; width: 1px; height: 1px; }
#speed label:has(input:focus-visible) { outline: 2px solid var(--primary-600); outline-offset: 2px; }
.note, .note p, .note li { color: var(--neutral-600); font-size: 13.5px; line-height: 1.5; margin: 0; }
.dark .note { color: var(--neutral-400); } .dark .note p { color: var(--neutral-400); }
.dark .note li { color: var(--neutral-400); }
.method { border-left: 3px solid var(--primary-300); padding-left: 16px !important; gap: 14px; }
.dark .method { border-color: var(--primary-800); }

#settings input[type=number] { width: 62px; } #settings .method input[type=number] { width: 76px; }
.gradio-container input[type=range]:focus-visible { outline: 2px solid var(--primary-600); outline-offset: 4px; }
.dark input[type=range] { --neutral-200: var(--neutral-700); }
#seed-row { align-items: flex-end; gap: 12px; }
#die { width: 44px !important; min-width: 44px !important; height: 42px; padding: 0; font-size: 0;
  display: flex; align-items: center; justify-content: center; line-height: 0; }
#die::before { content: ""; width: 22px; height: 22px; background: currentColor; mask: var(--die) center / contain no-repeat; }
#new-seed { flex: 0 0 auto; width: auto; align-self: flex-end; }
#new-seed label { min-height: 42px; align-items: center; white-space: nowrap; font-size: 14px; }
#editor .toolbar-wrap { background: var(--background-fill-primary); }
#outpaint-row, #outpaint-row .form { align-items: flex-end; }
#go-row { gap: 10px; flex-wrap: nowrap; }
#generate { font-size: 16px; font-weight: 600; min-height: 52px; border-radius: 14px; }
#stop { min-height: 52px; border-radius: 14px; }
#listen { display: none; }
#queue-row { align-items: center; gap: 10px; flex-wrap: nowrap; }
#estimate:not(:has(.note)), #tokens:not(:has(.tokens)), #refused:not(:has(.refused)),
.coverage:not(:has(p)):not(:has(.trouble)) { display: none; }
#measure { align-self: flex-start; width: auto; flex: 0 0 auto; }
#tokens { margin-top: -12px; }
.tokens { font-size: 12.5px; color: var(--neutral-600); font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.dark .tokens { color: var(--neutral-400); } .tokens .over { color: #92400e; font-weight: 600; }
.dark .tokens .over { color: #fcd34d; }
#refused { margin-top: -12px; }
.refused { font-size: 13px; color: var(--neutral-600); } .dark .refused { color: var(--neutral-400); }
.refused summary { cursor: pointer; } .refused ul { list-style: none; margin: 6px 0 0; padding: 0; }
.refused li { margin: 3px 0; } .refused .off { border: 1px dashed var(--neutral-400); border-radius: 99px; padding: 1px 10px;
  color: var(--neutral-600); margin-right: 6px; } .dark .refused .off { color: var(--neutral-400); }
.drop { border: 1px dashed var(--neutral-400) !important; border-radius: 12px !important; overflow: hidden !important; }
.dark .drop { border-color: var(--neutral-600) !important; }
.drop .wrap { font-size: 13.5px; }
#after { gap: 8px; flex-wrap: wrap; } #after button { flex: 0 1 auto; min-width: 0; }
#player video { display: block; max-width: 100%; margin: 0 auto; border-radius: 10px; min-width: min(100%, 320px); }
#diff { gap: 12px; border: 1px solid var(--neutral-300); border-radius: 14px; padding: 14px; }
.dark #diff { border-color: var(--neutral-700); }
.keys { color: var(--neutral-600); font-size: 12.5px; }
.dark .keys { color: var(--neutral-400); }

.sofar { margin: 0 0 10px; text-align: center; } .sofar img { display: block; margin: 0 auto 6px; width: min(100%, 384px);
  height: auto; border-radius: 10px; } .sofar figcaption { font-size: 12.5px; color: var(--neutral-600); }
.dark .sofar figcaption { color: var(--neutral-400); } #preview:not(:has(.sofar)) { display: none; }
.stage:has(.sofar) #picture { display: none !important; } .stage:has(.sofar) #gallery { display: none !important; }
.stage:has(.sofar) #player { display: none !important; } .stage:has(.sofar) #after { display: none !important; }
.stage:has(.sofar) #report { display: none !important; } .stage:has(.sofar) #empty { display: none !important; }
.stage { border: 1px solid var(--neutral-200); border-radius: 20px; background: white; padding: 22px; }
.dark .stage { background: var(--neutral-900); border-color: var(--neutral-800); }
.welcome { text-align: center; padding: 40px 16px 12px; color: var(--neutral-600); }
.welcome svg { display: block; margin: 0 auto; width: 74px; height: 74px; }
.welcome svg * { stroke: var(--primary-600); }
.welcome h2 { font-size: 19px; font-weight: 620; color: var(--neutral-800); margin: 12px 0 4px; }
.welcome p { margin: 0 auto; max-width: 36em; font-size: 14.5px; line-height: 1.5; }
.dark .welcome { color: var(--neutral-400); } .dark .welcome h2 { color: var(--neutral-100); }
#first-screen { flex-direction: column; gap: 10px; }
#first-screen > .stage { flex-direction: row; flex-wrap: nowrap; align-items: center; gap: 16px;
  padding: 14px 18px; border-radius: 14px; width: 100%; min-width: 0 !important; }
#first-screen > .stage > .block { flex: 1 1 0; min-width: 0 !important; }
#first-screen > .stage > button { flex: 0 0 auto; width: auto; min-width: 84px; }
#first-screen h3 { font-size: 14.5px; font-weight: 600; margin: 0 0 2px; }
#examples .gallery { display: flex; flex-wrap: wrap; justify-content: center; gap: 8px; }
#examples .gallery-item { border-radius: 999px; border: 1px solid var(--neutral-300); background: transparent; max-width: 100%; }
#examples .gallery-item:hover { border-color: var(--primary-600); background: var(--primary-50); }
.dark #examples .gallery-item { border-color: var(--neutral-700); }
.dark #examples .gallery-item:hover { background: var(--neutral-800); }
#picture, #gallery { border-radius: 14px; }
#picture .image-container, #picture .image-frame, #picture button { width: 100%; height: auto !important; }
#picture img { width: auto !important; max-width: 100%; height: auto !important; margin: 0 auto; border-radius: 10px; }
#gallery .grid-wrap { height: auto !important; min-height: 0; max-height: none; padding: 0; }
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(130px, 100%), 1fr)) !important; min-width: 0; }
#gallery .caption-label { display: none; }
#gallery.pair .grid-container { grid-template-columns: 1fr 1fr !important; }
#gallery.pair .caption-label { display: block; max-width: 94%; }
#picture.small img { width: min(100%, 384px) !important; object-fit: contain !important; }
.stage .icon-button-wrapper { border: 0; background: transparent; }
#status:not(:has(.pace)):not(:has(.trouble)), #report:not(:has(.report)) { display: none; }

.trouble { border: 1px solid #b91c1c; background: #fef2f2; color: #7f1d1d; border-radius: 12px; padding: 12px 16px;
  font-size: 14.5px; line-height: 1.5; overflow-wrap: anywhere; }
.dark .trouble { background: #3b1111; color: #fecaca; border-color: #ef4444; }
.caution { border-color: #b45309; background: #fffbeb; color: #713f12; }
.dark .caution { background: #33210a; color: #fde68a; border-color: #d97706; }

.pace { padding: 4px 2px; font-size: 14.5px; color: var(--neutral-700); }
.pace .row { display: flex; justify-content: space-between; gap: 12px; flex-wrap: wrap; margin-bottom: 8px; }
.pace b { font-weight: 600; color: var(--neutral-900); }
.dark .pace { color: var(--neutral-300); } .dark .pace b { color: white; }
.pace .num { font-variant-numeric: tabular-nums; }
.pace .bar { height: 8px; border-radius: 99px; background: var(--neutral-200); overflow: hidden; }
.dark .pace .bar { background: var(--neutral-800); }
.pace .bar i { display: block; height: 100%; border-radius: 99px; background: var(--primary-600);
  transition: width .2s linear; }
.pace .bar.busy i { width: 30% !important; animation: busy 1.4s ease-in-out infinite alternate; }
@keyframes busy { from { margin-left: 0; } to { margin-left: 70%; } }

.report { contain: inline-size; font-size: 14px; color: var(--neutral-700); line-height: 1.5; }
.dark .report { color: var(--neutral-300); }
.report .line { font-size: 15px; color: var(--neutral-900); font-variant-numeric: tabular-nums; margin: 0 0 2px; }
.dark .report .line { color: var(--neutral-50); }
.report .likeness { margin-bottom: 14px; }
.report .files { color: var(--neutral-600); font-size: 13px; overflow-wrap: anywhere; margin: 0; }
.dark .report .files { color: var(--neutral-400); }
.report details { margin-top: 12px; border-top: 1px solid var(--neutral-200); padding-top: 10px; }
.dark .report details { border-color: var(--neutral-800); }
.report summary { cursor: pointer; font-weight: 580; color: var(--neutral-800); }
.dark .report summary { color: var(--neutral-100); }
.report h3 { font-size: 13px; font-weight: 620; margin: 16px 0 6px; color: var(--neutral-800); }
.dark .report h3 { color: var(--neutral-200); }
.report .scroll { overflow-x: auto; }
.report table, .report tr, .report thead { border: 0 !important; }
.report table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
.report th, .report td { text-align: left; padding: 4px 12px 4px 0 !important; border: 0 !important; vertical-align: top;
  border-bottom: 1px solid var(--neutral-200) !important; overflow-wrap: anywhere; }
.report td { max-width: 260px; } .report th { white-space: nowrap; overflow-wrap: break-word; }
.dark .report th { border-color: var(--neutral-800) !important; } .dark .report td { border-color: var(--neutral-800) !important; }
.report th { font-weight: 560; color: var(--neutral-600); } .dark .report th { color: var(--neutral-400); }
.report .differs td { font-weight: 600; }
.report .phases { display: flex; height: 12px; border-radius: 6px; overflow: hidden; gap: 2px; }
.report .phases i { display: block; min-width: 2px; }
.report .key { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 6px; font-size: 12.5px; }
.report .key span::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px;
  background: var(--c); }
.timeline { width: 100%; height: auto; display: block; color: var(--neutral-700); }
.dark .timeline { color: var(--neutral-300); }
.timeline text { font: 11px var(--font); fill: currentColor; }
.legend { font-size: 12.5px; margin-top: 6px; } .legend svg { display: inline-block; vertical-align: -1px; }
.timeline .C { fill: #047857; } .timeline .R { fill: url(#reused); } .timeline .F { fill: url(#forecast); }
.timeline .paper { fill: #fde9c8; } .timeline .ink { stroke: #b45309; }
.timeline .pale { fill: #ede9fe; } .timeline .dots { fill: #6d28d9; }
.dark .timeline .C { fill: #10b981; }
.folded { border-top: 1px solid var(--neutral-200) !important; border-radius: 0 !important; padding-top: 12px !important; }
.dark .folded { border-color: var(--neutral-800) !important; }
.folded > button { font-size: 14px; font-weight: 560; color: var(--neutral-700); }
.dark .folded > button { color: var(--neutral-200); }
.report pre { font: 12.5px/1.6 var(--font-mono); white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: 12px 14px;
  border-radius: 12px; background: var(--neutral-100); color: var(--neutral-800); }
.dark .report pre { background: var(--neutral-950); color: var(--neutral-200); }
.report .copy { float: right; font-size: 12px; padding: 1px 10px; border-radius: 99px; border: 1px solid var(--neutral-300);
  color: var(--neutral-700); cursor: pointer; }
.dark .report .copy { border-color: var(--neutral-700); color: var(--neutral-300); }
.quiet { color: var(--neutral-600); font-size: 13px; text-align: center; margin-top: 28px; }
.dark .quiet { color: var(--neutral-400); }
footer { display: none !important; }

@media (max-width: 760px) {
  #columns { flex-direction: column; gap: 26px; }
  #form-side { display: contents; }
  #asking, #settings, #result-side { width: 100%; min-width: 0 !important; }
  #result-side { position: static; order: 1; }
  #settings { order: 2; }
  #speed label { font-size: 13px; padding: 8px 2px !important; }
  #queue-row .keys { display: none; }
  .stage { padding: 14px; border-radius: 16px; }
  .report th { white-space: normal; } .report th, .report td { padding-right: 8px !important; }
  .welcome { padding-top: 16px; }
}
@media (prefers-reduced-motion: reduce) {
  .pace .bar i { transition: none; } .pace .bar.busy i { animation: none; width: 100% !important; opacity: .5; }
}
""".replace("DIE", quote(_DIE))

SCRIPT = """() => {
  document.documentElement.lang = "en";
  document.addEventListener("keydown", (event) => {
    if ((event.ctrlKey || event.metaKey) && event.key === "Enter") {
      event.preventDefault();
      document.querySelector(event.shiftKey ? "#queue" : "#generate")?.click();
    }
  }, true);
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.(".copy");
    if (!button) return;
    const text = button.parentElement.nextElementSibling;
    window.getSelection().selectAllChildren(text);
    navigator.clipboard?.writeText(text.textContent).then(() => { button.textContent = "Copied"; });
  });
  for (const way of ["change", "drop"]) document.addEventListener(way, (event) => {
    const editor = event.target.closest?.("#editor"), chosen = event.target.type === "file";
    if (!editor || way === "change" && !chosen || editor.querySelectorAll("canvas").length > 1) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    if (chosen) event.target.value = "";
  }, true);
  const inner = window.fetch, owed = new Map(), paid = new Set();
  let lines = 0;
  const look = () => setTimeout(() => {
    if (lines) return;
    for (const [event, times] of owed) times < 3 ? owed.set(event, times + 1) : owed.delete(event);
    if (owed.size) document.querySelector("#listen")?.click();
  }, 1000);
  const heard = (body) => {
    const decoder = new TextDecoder();
    let rest = "";
    const {readable, writable} = new TransformStream({transform: (part, to) => {
      const told = (rest + decoder.decode(part, {stream: true})).split("\\n");
      rest = told.pop();
      for (const one of told.filter((one) => one.includes('"process_completed"'))) {
        const event = one.match(/"event_id":"(\\w+)"/)?.[1];
        if (!owed.delete(event)) paid.add(event);
      }
      to.enqueue(part);
    }});
    body.pipeTo(writable).catch(() => {}).finally(() => { lines -= 1; look(); });
    return readable;
  };
  window.fetch = async (...given) => {
    const address = String(given[0]?.url ?? given[0]);
    if (!/\\/queue\\/(data|join)\\b/.test(address)) return inner(...given);
    const line = address.includes("/queue/data");
    lines += line;
    const answer = await inner(...given).catch((error) => { lines -= line; throw error; });
    if (line) return new Response(heard(answer.body), answer);
    answer.clone().json().then(({event_id}) => {
      if (event_id && !paid.delete(event_id)) owed.set(event_id, 0);
      look();
    }).catch(() => {});
    return answer;
  };
}"""
"""Ctrl+Enter, or Command+Enter, presses the button; a Copy button copies what stands under it, or at least selects it.

A picture that reaches the mask editor before both of its canvases are there would break it, and is left out.
Gradio ends its line of answers when it owes none. What is asked in that very moment stays owed, and nobody listens any more; a
press on a button that nobody sees makes it listen again.
"""
