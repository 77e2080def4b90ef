"""The page in a browser: a tiny random model, from a prompt to the saved file, with nothing fetched from elsewhere."""

from __future__ import annotations

import os
import queue
import re
import shutil
import subprocess
import sys
import threading
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

# The page's process may open connections to this computer only; anything else is told and refused. While a file named "hold"
# lies in its output folder, every step takes a tenth of a second: a run then lasts longer than what a test does meanwhile.
_OFFLINE = """
import ipaddress, socket, sys
inner = socket.socket.connect
def connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and not ipaddress.ip_address(address[0]).is_loopback:
        print("OUTSIDE", address, flush=True)
        raise OSError("blocked by the test")
    return inner(self, address)
socket.socket.connect = connect
import os, time
from pipelines import generate
tell = generate._Watch.tell
def slowly(self, *words, **more):
    if os.path.exists(os.environ["HOLD"]):
        time.sleep(0.1)
    return tell(self, *words, **more)
generate._Watch.tell = slowly
import app
sys.exit(app.main(sys.argv[1:]))
"""

# Controls that a screen reader could not name.
_NAMELESS = """
[...document.querySelectorAll("input:not([type=file]), textarea, select")].filter(one => one.offsetParent
  && !one.labels?.length && !one.getAttribute("aria-label") && !one.getAttribute("aria-labelledby")).map(one => one.outerHTML)
"""

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
    # the mask editor sends its canvas on its own, and a tab that is closed meanwhile leaves half an upload
    left = [line for line in said if line.startswith("starlette.requests.ClientDisconnect")]
    broken = [line for line in said if "OUTSIDE" in line or "Traceback" in line]
    assert len(broken) == len(left), "".join(said)


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
    """Open the page and wait until it has said who it is."""
    tab.set_default_timeout(WAIT)
    with tab.expect_response(lambda one: "queue/join" in one.url):  # the page has begun to ask the server
        tab.goto(url)
    tab.locator("#generate").wait_for()
    return tab


def answered(tab: Any, does: Callable[[], Any]) -> None:
    """Do something that asks the page's queue, and wait until everything that was asked has been answered and drawn."""
    with tab.expect_event("requestfinished", lambda one: "queue/data" in one.url):
        does()
    tab.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")


def painted(tab: Any, start: Path, seconds: float) -> None:
    """Bring a picture into the editor and paint a stroke in its middle, with a wait after either."""
    tab.locator("#editor canvas").first.wait_for()
    tab.wait_for_timeout(1000 * seconds)
    bring = tab.locator("#editor input[type=file]").first
    if bring.count():
        bring.set_input_files(start)
        tab.wait_for_timeout(1000 * seconds)
    tab.get_by_role("button", name="Brush").first.click()
    tab.wait_for_timeout(1000)
    box = tab.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.mouse.move(x - 12, y)
    tab.mouse.down()
    tab.mouse.move(x + 12, y, steps=5)
    tab.mouse.up()
    tab.wait_for_timeout(1000 * seconds)


def number(tab: Any, label: str, value: int) -> None:
    tab.get_by_label(f"number input for {label}").fill(str(value))
    tab.keyboard.press("Tab")


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
    assert tab.locator("svg.timeline").get_attribute("data-computed") == "24"
    tab.get_by_text("Copy as command, Python or curl").click()
    assert f"--seed {request.seed}" in tab.get_by_label("Command", exact=True).inner_text()
    tab.get_by_role("button", name="Copy Command").click()
    assert tab.evaluate("String(window.getSelection())").startswith("leapfrog generate 'a dog, cartoon'")
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
    assert int(tab.locator("svg.timeline").get_attribute("data-reused")) > 0
    file, other = sorted(served[1].glob("a-cat-*.png"))
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
    (served[1] / "hold").touch()
    tab.locator("#prompt textarea").fill("a long dog")
    number(tab, "Steps", 100)
    number(tab, "How many", 16)
    tab.locator("#generate").click()
    playwright.expect(tab.locator(".sofar img")).to_be_visible()
    playwright.expect(tab.locator("#status")).to_contain_text("picture 2 of 16")
    tab.reload()
    playwright.expect(tab.locator("#status")).to_contain_text("of 16")
    playwright.expect(tab.locator("#stop-all")).to_be_visible()
    other = opened(browser.new_context().new_page(), served[0])
    assert not other.locator("#stop-all").is_visible()
    assert other.locator("#picture img").count() == 0
    assert "long dog" not in other.content()
    other.context.close()
    tab.get_by_role("tab", name="Create").click()
    tab.locator("#stop-all").click()
    playwright.expect(tab.locator("#status")).to_contain_text("Stopped")
    (served[1] / "hold").unlink()
    playwright.expect(tab.locator(".sofar")).to_have_count(0)
    assert 0 < len(list(served[1].glob("a-long-dog-*.png"))) < 16


def test_a_part_of_a_picture_is_made_anew_and_the_rest_stays_bit_for_bit(
    tab: Any, served: tuple[str, Path], tmp_path: Path
) -> None:
    import numpy as np
    from PIL import Image

    start = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(start).save(tmp_path / "start.png")
    tab.get_by_text("Inpaint", exact=True).click()
    tab.locator("#prompt textarea").fill("a dog inpainted")
    tab.locator("#generate").click()
    playwright.expect(tab.get_by_role("alert")).to_contain_text("a picture with a part painted over")
    for seconds in (3, 6, 12, 24):  # the canvas tells nobody when it is ready for a picture, or for a stroke
        painted(tab, tmp_path / "start.png", seconds)
        answered(tab, tab.locator("#generate").click)
        playwright.expect(tab.locator("#generate")).to_be_enabled()
        if not tab.get_by_role("alert").count():
            break
    playwright.expect(tab.locator("#picture img")).to_be_visible()
    (file,) = served[1].glob("a-dog-inpainted-*.png")
    request = Request.from_file(file)
    found = served[1].parent.glob(f"state*/uploads/page/*/*/{request.mask}")  # a picture tells no folders
    (kept,) = {one.resolve() for one in found}
    mask = np.asarray(Image.open(kept))
    made = np.asarray(Image.open(file).convert("RGB"))
    assert 0 < (mask > 0).mean() < 0.9
    assert np.array_equal(made[mask == 0], start[mask == 0])
    assert not np.array_equal(made[mask > 0], start[mask > 0])


def test_stopping_ends_the_run_and_saves_nothing(tab: Any, served: tuple[str, Path]) -> None:
    (served[1] / "hold").touch()
    tab.locator("#prompt textarea").fill("never finished")
    number(tab, "Steps", 100)
    number(tab, "How many", 16)
    tab.locator("#generate").click()
    playwright.expect(tab.locator("#status")).to_contain_text("step")
    tab.locator("#stop").click()
    playwright.expect(tab.locator("#status")).to_contain_text("Stopped")
    playwright.expect(tab.locator("#generate")).to_be_enabled()
    (served[1] / "hold").unlink()
    made = len(list(served[1].glob("never*.png")))
    assert made < 16
    told = tab.locator("#status").inner_text()
    assert (f"{made} of 16 pictures were made and saved" if made else "Nothing was decoded or saved") in told
    tab.wait_for_timeout(500)
    assert len(list(served[1].glob("never*.png"))) == made


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
        tab.get_by_text(words, exact=True).click()
    tab.wait_for_timeout(300)  # for something that would grow; the folded parts open slowly
    tab.wait_for_function("document.documentElement.scrollWidth === 360")
