"""The page in a browser: a tiny random model, from a prompt to the saved file, with nothing fetched from elsewhere."""

from __future__ import annotations

import io
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipelines.request import Request

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
WAIT = 120_000
"""Longest wait for anything, in ms: busy machines are slow."""
TRIES, PATIENCE = 6, 30_000
"""How often something is done that a browser may miss, and how long its effect is waited for before it is done again, in ms."""

# The page's process may open connections to this computer only; anything else is told and refused. While a file named "hold"
# lies in its output folder, a step takes a tenth of a second, and a run stands still at its 20th one, though it still hears when
# it is stopped. A pattern in that file lets runs pass until a picture is there that fits it.
_OFFLINE = """
import ipaddress, socket, sys
inner = socket.socket.connect
def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(address[0]).is_loopback:
        print("OUTSIDE", address, flush=True)
        raise OSError("blocked by the test")
    return inner(self, address)
socket.socket.connect = connect
import glob, os, time
from pipelines import generate
tell, hold = generate._Watch.tell, os.environ["HOLD"]
def stands(step):
    try:
        pattern = open(hold).read()
    except FileNotFoundError:
        return False
    time.sleep(0.1)
    return step >= 20 and (not pattern or bool(glob.glob(os.path.join(os.path.dirname(hold), pattern))))
def slowly(self, phase, step=0, *words, **more):
    tell(self, phase, step, *words, **more)
    while phase == "denoise" and stands(step):
        tell(self, phase, step, *words, **more)
generate._Watch.tell = slowly
import app
sys.exit(app.main(sys.argv[1:]))
"""

# Controls that a screen reader could not name.
_NAMELESS = """
[...document.querySelectorAll("input:not([type=file]), textarea, select")].filter(one => one.offsetParent
  && !one.labels?.length && !one.getAttribute("aria-label") && !one.getAttribute("aria-labelledby")).map(one => one.outerHTML)
"""

# What has the keyboard's focus, and whether what had it before looked otherwise then: outline, shadow, border or ground of it or
# of what it stands in.
_FOCUS = """
() => {
  const one = document.activeElement;
  const look = (place) => {
    const found = [];
    for (let rest = 3; rest && place; rest--, place = place.parentElement) {
      const style = getComputedStyle(place);
      found.push(style.outlineStyle, style.outlineWidth, style.boxShadow, style.borderColor, style.backgroundColor);
    }
    return found.join("|");
  };
  const before = window.focusedBefore, shown = !before || before.look !== look(before.one);
  window.focusedBefore = { one, look: look(one) };
  const name = one.getAttribute("aria-label") || one.labels?.[0]?.innerText || one.innerText || "";
  return [one === document.body ? "" : name.split("\\n")[0].trim(), shown];
}"""

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this computer"),
    # gradio_client and playwright leave event loops and pipes to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a tiny random text-to-image model with a card: 32 px pictures, four blocks."""
    import diffusers
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from dit.backbones.mmdit import MMDiT
    from dit.codec import ResampleCodec
    from pipelines.text_to_image import TextToImagePipeline

    torch.manual_seed(0)
    words = Tokenizer(
        models.WordLevel(
            {"<pad>": 0, "<unk>": 1, "a": 2, "dog": 3, "cartoon": 4, "<s>": 5}, unk_token="<unk>"
        )
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5)])
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformer = MMDiT(
        patch_size=4,
        sample_size=16,
        width=32,
        heads=2,
        dual_depth=2,
        single_depth=2,
        context_dim=16,
        pooled_dim=16,
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    pipeline = TextToImagePipeline(
        transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=transformers.BertModel(config, add_pooling_layer=False).eval(),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"
        ),
        codec=ResampleCodec(width=8, depth=1).eval(),
        text_length=16,
    )
    folder = tmp_path_factory.mktemp("page") / "tiny"
    pipeline.save_pretrained(folder)
    (folder / "card.json").write_text(
        '{"title": "tiny", "summary": "Noise on noise.", "steps": 6, "guidance": 2.0, "low": 32, "high": 32,'
        ' "styles": ["cartoon", "3d render"], "examples": ["a dog, cartoon", "a cat, 3d render"], "concepts": ["dog", "cat"]}'
    )
    return folder


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Start the page as a person would, without a network; return its address and the folder of its pictures."""
    output, state = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("state")
    with serving(output, state, "--model", str(model)) as url:
        yield url, output


@contextmanager
def serving(output: Path, state: Path, *words: str, program: str = _OFFLINE) -> Iterator[str]:
    """Run the page in a process of its own; yield its address. It may not ask other computers, nor break inside."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment |= {"LEAPFROG_STATE": str(state), "HOLD": str(output / "hold")}
    for name in ("SPACE_ID", "LEAPFROG_AUTH", "GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "GRADIO_TEMP_DIR"):
        environment.pop(name, None)
    command = [sys.executable, "-c", program, "--output", str(output), *words]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines: queue.Queue[str] = queue.Queue()
        said: list[str] = []
        reading = threading.Thread(target=_read, args=(process, lines, said), daemon=True)
        reading.start()
        try:
            while not (found := re.search(r"http://\S+", line := lines.get(timeout=3 * WAIT / 1000))):
                assert line, "".join(said)
            yield found[0]
        finally:
            process.terminate()
            try:
                assert process.wait(2 * WAIT / 1000) == 0
            finally:
                process.kill()
                reading.join(WAIT / 1000)
    text = "".join(said)
    assert "OUTSIDE" not in text, text
    # the mask editor sends its canvas on its own, and a tab that is closed meanwhile leaves half an upload
    endings = [one for one in _ENDING.findall(text) if one == "starlette.requests.ClientDisconnect"]
    assert text.count("Traceback") == len(endings), text


_ENDING = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*([\w.]*)", re.MULTILINE)
"""What a traceback ends with: the name of the error."""


def _read(process: subprocess.Popen[str], lines: queue.Queue[str], said: list[str]) -> None:
    for line in process.stdout or ():
        said.append(line)
        lines.put(line)
    lines.put("")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright.expect.set_options(timeout=WAIT)
    with playwright.sync_playwright() as found:
        opened = found.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: Any, served: tuple[str, Path]) -> Iterator[Any]:
    """Open the page; afterwards nothing may have been asked of other computers, and no script may have failed."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    outside: list[str] = []
    broken: list[str] = []
    tab.on(
        "request",
        lambda one: None if one.url.startswith((served[0], "data:", "blob:")) else outside.append(one.url),
    )
    tab.on("pageerror", lambda error: broken.append(str(error)))
    yield opened(tab, served[0])
    tab.close()
    assert (outside, broken) == ([], [])


def opened(tab: Any, url: str) -> Any:
    """Open the page and wait until it can be used: it has said who it is then."""
    tab.set_default_timeout(WAIT)
    tab.goto(url)
    playwright.expect(tab.locator("#generate")).to_be_enabled()
    return tab


@contextmanager
def held(output: Path, pattern: str = "") -> Iterator[None]:
    """Let runs stand still at their 20th step, once there is a picture that fits the pattern; see `_OFFLINE`."""
    hold = output / "hold"
    hold.write_text(pattern)
    try:
        yield
    finally:
        hold.unlink()


def insisted(does: Callable[[], Any], seen: Callable[[int], Any]) -> None:
    """Do something until it is seen, as a person does where a click was lost.

    Args:
        seen: waits for the effect as long as it is told, in ms.

    Raises: what `seen` raises when it is called for the last time.
    """
    for left in reversed(range(TRIES)):
        try:
            does()
            seen(PATIENCE)
            return
        except (AssertionError, playwright.Error):
            if not left:
                raise


def shows(tab: Any, colour: tuple[int, int, int], share: float) -> Callable[[int], None]:
    """Return what waits until a colour covers so much of the editor; a canvas tells only the eye what it holds."""
    import numpy as np
    from PIL import Image

    def wait(milliseconds: int) -> None:
        end = time.monotonic() + milliseconds / 1000
        while True:
            seen = Image.open(io.BytesIO(tab.locator("#editor canvas").first.screenshot())).convert("RGB")
            if (np.abs(np.asarray(seen, int) - colour).sum(-1) < 60).mean() >= share:
                return
            assert time.monotonic() < end, f"{colour} was not seen"
            tab.wait_for_timeout(200)

    return wait


def stroke(tab: Any) -> None:
    """Paint a stroke in the middle of the editor."""
    tab.get_by_role("button", name="Brush", exact=True).first.click()
    box = tab.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x - 12, y)
    tab.mouse.down()
    tab.mouse.move(x + 12, y, steps=5)
    tab.mouse.up()
    tab.mouse.move(box["x"] + 5, box["y"] + box["height"] - 5)


def number(tab: Any, label: str, value: int) -> None:
    tab.get_by_label(f"number input for {label}").fill(str(value))
    tab.keyboard.press("Tab")
    playwright.expect(tab.get_by_label(f"number input for {label}")).to_have_value(str(value))


def test_from_a_prompt_to_the_lossless_file(tab: Any, served: tuple[str, Path]) -> None:
    tab.locator("#prompt textarea").fill("a dog")
    tab.get_by_text("cartoon", exact=True).click()
    playwright.expect(tab.locator("#prompt textarea")).to_have_value("a dog, cartoon")
    tab.locator("#prompt textarea").press("Control+Enter")
    picture = tab.locator("#picture img")
    playwright.expect(picture).to_have_attribute("alt", "a dog, cartoon")
    assert tab.get_by_role("alert").count() == 0
    (file,) = served[1].glob("a-dog-cartoon-*.png")
    assert tab.request.get(picture.get_attribute("src")).body() == file.read_bytes()
    request = Request.from_file(file)
    playwright.expect(tab.get_by_label("Seed", exact=True)).to_have_value(str(request.seed))
    assert (request.prompt, request.steps, request.guidance, request.accelerators) == (
        "a dog, cartoon",
        6,
        2.0,
        (),
    )
    playwright.expect(tab.locator("#report")).to_contain_text("exact: all 24 block calls computed")
    tab.get_by_text("Run report", exact=True).click()
    playwright.expect(tab.locator("svg.timeline")).to_have_attribute("data-computed", "24")
    tab.get_by_text("Copy as command, Python or curl").click()
    playwright.expect(tab.get_by_label("Command", exact=True)).to_contain_text(f"--seed {request.seed}")
    tab.get_by_role("button", name="Copy Command").click()
    tab.wait_for_function("String(getSelection()).startsWith(\"leapfrog generate 'a dog, cartoon'\")")
    tab.reload()
    playwright.expect(tab.locator("#picture img")).to_have_attribute("alt", "a dog, cartoon")


def test_an_example_accelerated_and_its_settings_taken_up_again(tab: Any, served: tuple[str, Path]) -> None:
    tab.get_by_text("a cat, 3d render").click()
    playwright.expect(tab.locator("#prompt textarea")).to_have_value("a cat, 3d render")
    tab.get_by_text("Custom", exact=True).click()
    number(tab, "Compute all blocks every n-th step", 3)
    number(tab, "How many", 2)
    tab.locator("#generate").click()
    playwright.expect(tab.locator("#gallery img")).to_have_count(2)
    playwright.expect(tab.locator("#report")).to_contain_text("reused")
    tab.get_by_text("Run report", exact=True).click()
    playwright.expect(tab.locator("svg.timeline")).to_have_attribute("data-reused", re.compile("[1-9]"))
    file, other = sorted(served[1].glob("a-cat-*.png"), key=lambda one: Request.from_file(one).seed)
    assert Request.from_file(other).seed == Request.from_file(file).seed + 1

    tab.reload()
    tab.locator("#gallery img").first.wait_for()
    tab.get_by_text("Reuse settings from a picture").click()
    tab.locator("#reuse input[type=file]").set_input_files(file)
    playwright.expect(tab.locator("#diff")).to_contain_text("a cat, 3d render")
    assert tab.locator("#prompt textarea").input_value() == "", "nothing is filled in before it was asked for"
    tab.locator("#apply").click()
    playwright.expect(tab.locator("#status")).to_contain_text("Filled in from")
    playwright.expect(tab.locator("#diff")).not_to_be_visible()
    playwright.expect(tab.locator("#prompt textarea")).to_have_value("a cat, 3d render")
    playwright.expect(tab.get_by_label("Seed", exact=True)).to_have_value(str(Request.from_file(file).seed))
    every = tab.get_by_label("number input for Compute all blocks every n-th step")
    playwright.expect(every).to_have_value("3")


def test_a_comparison_with_the_exact_picture(tab: Any, served: tuple[str, Path]) -> None:
    tab.locator("#prompt textarea").fill("a dog compared")
    tab.locator("#generate").click()
    tab.locator("#picture img").wait_for()
    assert not tab.locator("#compare").is_visible(), "there is nothing to compare while everything is exact"
    tab.get_by_text("Balanced", exact=True).click()
    playwright.expect(tab.locator("#speed-note")).to_contain_text("Not measured on this model yet at 6 steps")
    tab.get_by_role("button", name="Measure now").click()
    tab.locator(".likeness").wait_for()
    playwright.expect(tab.locator("#gallery img")).to_have_count(2)
    playwright.expect(tab.locator(".likeness")).to_contain_text("PSNR to the exact picture")
    playwright.expect(tab.locator(".likeness")).to_contain_text("SSIM")
    (exact,) = served[1].glob("a-dog-compared-*-exact.png")
    requests = [Request.from_file(one) for one in (exact, exact.with_name(exact.name.replace("-exact", "")))]
    assert [len(one.accelerators) for one in requests] == [0, 1]
    assert requests[0].seed == requests[1].seed
    playwright.expect(tab.locator("#speed-note")).to_contain_text("on one picture only made on this computer")
    tab.locator("#generate").click()
    tab.get_by_role("button", name="Compare with exact").wait_for()


def test_a_reload_in_the_middle_takes_the_run_up_again_and_others_never_see_it(
    tab: Any, browser: Any, served: tuple[str, Path]
) -> None:
    expect, status = playwright.expect, tab.locator("#status")
    with held(served[1], "a-long-dog-*.png"):
        tab.locator("#prompt textarea").fill("a long dog")
        number(tab, "Steps", 30)
        number(tab, "How many", 16)
        tab.locator("#generate").click()
        expect(status).to_contain_text("picture 2 of 16, step 20 of 30")
        expect(tab.locator(".sofar img")).to_be_visible()
        tab.reload()
        expect(status).to_contain_text("picture 2 of 16, step 20 of 30")
        expect(tab.locator(".sofar img")).to_be_visible()
        expect(tab.locator("#stop-all")).to_be_visible()
        with browser.new_context() as context:
            other = opened(context.new_page(), served[0])
            expect(other.locator("#chips")).to_contain_text("0 of them yours")
            expect(other.locator("#stop-all")).not_to_be_visible()
            expect(other.locator("#picture img")).to_have_count(0)
            assert "long dog" not in other.content()
        tab.locator("#stop-all").click()
        expect(status).to_contain_text("Stopped")
        expect(status).to_contain_text("1 of 16 pictures")
    expect(tab.locator(".sofar")).to_have_count(0)
    assert len(list(served[1].glob("a-long-dog-*.png"))) == 1


def test_a_part_of_a_picture_is_made_anew_and_the_rest_stays_bit_for_bit(
    tab: Any, served: tuple[str, Path], tmp_path: Path
) -> None:
    import numpy as np
    from PIL import Image

    start = np.random.default_rng(0).integers(0, 40, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(start).save(tmp_path / "start.png")
    tab.get_by_text("Inpaint", exact=True).click()
    dropped = tab.locator("#editor input[type=file]").first
    dropped.set_input_files(tmp_path / "start.png")  # too early where the editor is not ready, which must not break it
    playwright.expect(tab.locator("#editor .zoom-number")).not_to_have_text(re.compile(r"^\s*100\s*%\s*$"))
    tab.locator("#prompt textarea").fill("a dog")
    tab.locator("#generate").click()
    told = re.compile("a picture with a part painted over|drop it once more")  # while it is still on its way
    playwright.expect(tab.get_by_role("alert")).to_contain_text(told)
    insisted(lambda: dropped.set_input_files(tmp_path / "start.png"), shows(tab, (20, 20, 20), 0.1))
    insisted(lambda: stroke(tab), shows(tab, (255, 59, 127), 0.001))

    asked: list[str] = []

    def generate() -> None:
        if asked:
            stroke(tab)
        asked.append(" ".join(["dog", *["a"] * (len(asked) + 1)]))  # another one for each try
        tab.locator("#prompt textarea").fill(asked[-1])
        tab.locator("#generate").click()

    def made(wait: int) -> None:
        playwright.expect(tab.locator("#picture img")).to_have_attribute("alt", asked[-1], timeout=wait)

    insisted(generate, made)
    shown = tab.request.get(tab.locator("#picture img").get_attribute("src")).body()
    (file,) = (one for one in served[1].glob("*.png") if one.read_bytes() == shown)
    request = Request.from_file(file)
    assert request.prompt in asked
    found = served[1].parent.glob(f"state*/uploads/page/*/*/{request.mask}")  # a picture tells no folders
    (kept,) = {one.resolve() for one in found}
    mask = np.asarray(Image.open(kept))
    made_anew = np.asarray(Image.open(file).convert("RGB"))
    assert 0 < (mask > 0).mean() < 0.9
    assert np.array_equal(made_anew[mask == 0], start[mask == 0])
    assert not np.array_equal(made_anew[mask > 0], start[mask > 0])


def test_stopping_ends_the_run_and_saves_nothing(tab: Any, served: tuple[str, Path]) -> None:
    expect, status = playwright.expect, tab.locator("#status")
    with held(served[1]):
        tab.locator("#prompt textarea").fill("never finished")
        number(tab, "Steps", 30)
        number(tab, "How many", 16)
        tab.locator("#generate").click()
        expect(status).to_contain_text("picture 1 of 16, step 20 of 30")
        tab.locator("#stop").click()
        expect(status).to_contain_text("Stopped")
        expect(status).to_contain_text("Nothing was decoded or saved")
    number(tab, "Steps", 2)
    number(tab, "How many", 1)
    tab.locator("#prompt textarea").fill("a dog afterwards")
    tab.locator("#generate").click()
    expect(tab.locator("#picture img")).to_have_attribute("alt", "a dog afterwards")
    assert list(served[1].glob("never*.png")) == [], "what comes next is made after all that came before"


# Holds back the end of the line of answers, and counts what was asked.
_LATE = """
const inner = window.fetch;
window.joined = 0;
window.fetch = async (...given) => {
  const address = String(given[0]?.url ?? given[0]), answer = await inner(...given);
  if (address.includes("/queue/join")) window.joined++;
  if (!address.includes("/queue/data")) return answer;
  const reads = new TextDecoder(), writes = new TextEncoder();
  let begun = "";  // of an event whose end has not come yet
  const late = new TransformStream({
    transform: async (part, to) => {
      const events = (begun + reads.decode(part, {stream: true})).split(/(?<=\\n\\n)/);
      begun = events.at(-1).endsWith("\\n\\n") ? "" : events.pop();
      for (const one of events) {
        const end = /^data: *{"msg": *"close_stream"/.test(one);
        while (end && window.hold) { window.held = true; await new Promise((done) => setTimeout(done, 20)); }
        to.enqueue(writes.encode(one));
      }
    },
    flush: (to) => to.enqueue(writes.encode(begun)),
  });
  return new Response(answer.body.pipeThrough(late), answer);
};
"""


def test_what_is_asked_while_the_line_of_answers_is_being_closed_is_still_answered(
    browser: Any, served: tuple[str, Path]
) -> None:
    with browser.new_context() as context:
        context.add_init_script(_LATE)
        tab = opened(context.new_page(), served[0])
        tab.evaluate("window.hold = true")
        insisted(  # asks for too little, and is soon answered
            lambda: tab.locator("#queue").click(),
            lambda wait: tab.wait_for_function("window.held", timeout=wait),
        )
        joined = tab.evaluate("window.joined")
        tab.locator("#prompt textarea").fill("a dog unheard")
        tab.locator("#generate").click()
        tab.wait_for_function("(before) => window.joined > before", arg=joined)
        tab.wait_for_timeout(500)  # for the page to take the answer in: that it waits for more can be seen nowhere
        tab.evaluate("window.hold = false")
        playwright.expect(tab.locator("#picture img")).to_have_attribute("alt", "a dog unheard")


def test_every_control_has_a_name_and_an_error_is_told_in_plain_words(tab: Any) -> None:
    assert tab.get_by_role("heading", level=1).inner_text() == "Leapfrog"
    assert tab.evaluate("document.documentElement.lang") == "en"
    for name in ("Generate", "Stop", "Roll a new seed"):
        assert tab.get_by_role("button", name=name, exact=True).count() == 1
    assert tab.evaluate(_NAMELESS) == []
    tab.locator("#generate").click()
    playwright.expect(tab.get_by_role("alert")).to_contain_text("Prompt must be text of 1 to 2000 characters")
    tab.locator("#prompt textarea").fill("dog " * 20)
    playwright.expect(tab.locator("#tokens")).to_contain_text(
        "21 / 16 tokens: too long Not read: dog dog dog dog dog"
    )
    tab.locator("#prompt textarea").fill("a dog")
    tab.get_by_label("Seed", exact=True).fill("<b>7</b> ${1+1} {{this}}")
    tab.locator("#generate").click()
    playwright.expect(tab.get_by_role("alert")).to_contain_text("<b>7</b> ${1+1} {{this}}")
    playwright.expect(tab.locator("#generate")).to_be_enabled()


def test_a_narrow_screen_needs_no_sideways_scrolling(tab: Any) -> None:
    tab.set_viewport_size({"width": 360, "height": 780})
    tab.locator("#prompt textarea").fill("a dog")
    tab.get_by_text("Custom", exact=True).click()
    tab.get_by_text("More settings of delta-cache").click()
    tab.locator("#generate").click()
    tab.locator("#picture img").wait_for()
    for words in (
        "Run report",
        "Copy as command, Python or curl",
        "Blocks in each step",
        "Memory, digests and versions",
    ):
        folded = tab.get_by_text(words, exact=True)  # summaries: what they hold is there at once when they open
        folded.click()
        playwright.expect(folded.locator("xpath=ancestor::details[1]")).to_have_attribute("open", "")
    playwright.expect(tab.get_by_label("First reused block").first).to_be_visible()
    tab.wait_for_function("document.documentElement.scrollWidth === 360")


def test_create_is_walked_and_used_by_the_keyboard_alone(tab: Any) -> None:
    tab.add_style_tag(content="* { transition: none !important; }")  # a look in between would tell nothing
    playwright.expect(tab.locator("#prompt textarea")).to_be_focused()
    tab.keyboard.type("a dog typed")
    names: list[str] = []
    hidden: list[str] = []
    for _ in range(80):
        name, shown = tab.evaluate(_FOCUS)
        hidden += [] if shown else names[-1:]
        if not name:
            break
        names.append(name)
        tab.keyboard.press("Tab")
    else:
        raise AssertionError(f"the walk does not end: {names}")
    assert hidden == [], "nobody sees where the focus is"
    wanted = [
        "Prompt",
        "cartoon",
        "Generate",
        "Add to queue",
        "Size",
        "range slider for Steps",
        "Seed",
        "Roll a new seed",
        "Exact",
    ]
    wanted += ["Custom", "LoRAs", "Output", "More settings"]
    assert [one for one in names if one in wanted] == wanted

    tab.get_by_role("radio", name="Custom", exact=True).focus()
    tab.keyboard.press("Space")
    every = tab.get_by_label("number input for Compute all blocks every n-th step")
    playwright.expect(every).to_be_visible()
    tab.get_by_role("button", name="Output").focus()
    tab.keyboard.press("Enter")
    playwright.expect(tab.locator("#folder")).to_be_visible()
    tab.locator("#generate").focus()
    tab.keyboard.press("Enter")
    playwright.expect(tab.locator("#picture img")).to_have_attribute("alt", "a dog typed")
    tab.get_by_role("tab", name="Grid", exact=True).focus()
    tab.keyboard.press("Enter")
    playwright.expect(tab.locator("#grid-prompt")).to_be_visible()


def test_a_story_from_the_form_to_its_player(tab: Any, served: tuple[str, Path]) -> None:
    tab.get_by_label("Model", exact=True).first.click()
    tab.get_by_role("option", name="motion").click()
    tab.get_by_label("Story, scene | scene | scene").check()
    playwright.expect(tab.get_by_label("Frames (0: 8 a scene)")).to_be_visible()
    tab.get_by_label("File", exact=True).first.click()
    tab.get_by_role("option").filter(has_text="MP4").first.click()
    number(tab, "Steps", 2)
    captions = "a red ball rests | a blue square falls | a green triangle moves up"
    tab.locator("#prompt textarea").fill(captions)
    tab.locator("#generate").click()
    video = tab.locator("video").first
    playwright.expect(video).to_be_visible()
    tab.wait_for_function("(document.querySelector('video') || {}).readyState >= 2")
    assert tab.evaluate("(one => [one.videoWidth, one.videoHeight, one.duration])(document.querySelector('video'))") == [64, 64, 3]
    playwright.expect(tab.locator(".scenes")).to_have_attribute("aria-label", re.compile("^3 scenes of 24 frames"))
    playwright.expect(tab.locator(".scenes")).to_contain_text("a blue square falls")
    assert tab.locator(".strip img").count() > 4
    assert tab.get_by_role("alert").count() == 0
    (file,) = served[1].glob("*.mp4")
    found = Request.from_file(file)
    assert (found.model, found.prompts, found.steps) == ("motion", captions, 2)
