"""Compare, Grid and Tune in a browser, with a tiny random model: what is shown is what lies on the disk, and choices stay."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
_spec = importlib.util.spec_from_file_location("page_fixtures", ROOT / "tests" / "test_page.py")
assert _spec is not None
assert _spec.loader is not None
page_fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(page_fixtures)
model, served, browser, tab = (getattr(page_fixtures, name) for name in ("model", "served", "browser", "tab"))
expect, insisted = playwright.expect, page_fixtures.insisted
pytestmark = page_fixtures.pytestmark


def choose(tab: Any, side: str, words: str) -> None:
    """Choose a result in the tab Compare by a part of its name; new entries may come between the eye and the hand."""
    field = tab.locator(f"#compare-{side} input")

    def choosing() -> None:
        field.blur()
        field.click()
        tab.get_by_role("option").filter(has_text=words).click(timeout=page_fixtures.PATIENCE)

    insisted(choosing, lambda wait: expect(field).to_have_value(re.compile(re.escape(words)), timeout=wait))


def test_a_grid_is_made_two_of_its_cells_are_compared_and_a_search_is_stopped(
    tab: Any, served: tuple[str, Path]
) -> None:
    page, (_, output) = tab, served
    page.get_by_role("tab", name="Grid", exact=True).click()
    page.locator("#grid-prompt textarea").fill("a dog")
    page.locator("#grid-x-values textarea").fill("4, 6")
    page.locator("#grid-y-values textarea").fill("none, delta-cache:interval=3")
    page.locator("#grid-dry").click()
    expect(page.locator("#grid-status")).to_contain_text("4 pictures, 0 made")
    page.locator("#grid-start").click()
    expect(page.locator("#grid-status")).to_contain_text("4 of 4 made")
    expect(page.locator("#grid-table td[data-state=done]")).to_have_count(4)
    expect(page.locator("#grid-scatter svg")).to_have_attribute("data-dots", "2")
    files = list(output.glob("grids/*/cell-*.png"))
    assert len(files) == 4
    shown = {
        hashlib.sha256(page.request.get(one.evaluate("image => image.src")).body()).hexdigest()
        for one in page.locator("#grid-table img").all()
    }
    assert shown == {hashlib.sha256(one.read_bytes()).hexdigest() for one in files}, (
        "the bytes that are served are those on the disk"
    )

    page.get_by_role("tab", name="Compare", exact=True).click()
    for side, kind in (("a", "6 steps · seed 1 · exact"), ("b", "6 steps · seed 1 · delta-cache")):
        choose(page, side, kind)
    viewer = page.locator(".viewer")
    expect(viewer).to_have_attribute("data-mode", "slider")
    numbers = page.locator("#compare-numbers")
    expect(numbers).to_contain_text("delta-cache:interval=3")
    expect(numbers).to_contain_text("PSNR")
    page.locator(".viewer .panes").focus()
    page.keyboard.press(" ")
    expect(viewer).to_have_attribute("data-mode", "flicker")
    expect(viewer).to_have_attribute("data-shown", "b")
    page.keyboard.press("+")
    expect(page.locator(".viewer .factor")).to_have_text("1.5x")
    page.get_by_role("button", name="Difference").click()
    expect(page.locator(".pane.heat img")).to_be_visible()

    page.get_by_role("tab", name="Tune", exact=True).click()
    page.get_by_text("2 min", exact=True).click()
    page.locator("#tune-start").click()
    expect(page.locator("#tune-stop")).to_be_visible()
    page.locator("#tune-stop").click()
    expect(page.locator("#tune-status")).to_contain_text("Stopped")

    page.set_viewport_size({"width": 360, "height": 780})
    for name in ("tune-start", "tune-status"):
        expect(page.locator(f"#{name}")).to_be_visible()
    page.wait_for_function("document.documentElement.scrollWidth === 360")
    assert page.evaluate(page_fixtures._NAMELESS) == []


def test_what_a_person_has_set_in_the_viewer_stays_until_another_pair_is_chosen(tab: Any) -> None:
    """A list asks for the comparison again whenever it is left; that must not begin the viewer anew."""
    for words in ("a dog", "dog a", "a cat"):
        tab.locator("#prompt textarea").fill(words)
        tab.locator("#generate").click()
        expect(tab.locator("#picture img")).to_have_attribute("alt", words)
    tab.get_by_role("tab", name="Compare", exact=True).click()
    choose(tab, "a", "a dog · 6")
    choose(tab, "b", "dog a · 6")
    viewer, panes = tab.locator(".viewer"), tab.locator(".viewer .panes")
    expect(tab.locator("#compare-numbers")).to_contain_text("PSNR")
    tab.locator(".viewer .wipe").fill("20")
    panes.focus()
    tab.keyboard.press(" ")
    tab.keyboard.press("+")

    def left() -> None:
        tab.locator("#compare-a input").focus()
        tab.keyboard.press("Escape")
        panes.focus()

    left()
    tab.wait_for_timeout(2000)  # for an answer that would begin anew; that one is asked for is not certain
    expect(viewer).to_have_attribute("data-mode", "flicker")
    expect(viewer).to_have_attribute("data-shown", "b")
    expect(viewer).to_have_attribute("style", re.compile(r"--split: 20%.*--zoom: 1\.5"))
    expect(tab.locator(".viewer .now")).to_have_text("showing B")
    tab.get_by_role("tab", name="Create", exact=True).click()
    tab.get_by_role("tab", name="Compare", exact=True).click()
    expect(viewer).to_have_attribute("data-mode", "flicker")
    first = tab.locator(".pane.b img").get_attribute("src")
    choose(tab, "b", "a cat · 6")
    expect(tab.locator(".pane.b img")).not_to_have_attribute("src", first)
    expect(viewer).to_have_attribute("data-mode", "slider")
    expect(tab.locator(".viewer .wipe")).to_have_value("50")


def test_a_list_that_is_only_passed_changes_nothing_that_was_typed(tab: Any) -> None:
    tab.get_by_text("What the model knows").click()
    tab.get_by_label("Look for a thing and put it into the prompt").click()
    tab.get_by_role("option", name="cat", exact=True).click()
    prompt = tab.locator("#prompt textarea")
    expect(prompt).to_have_value("cat")
    expect(tab.get_by_label("Look for a thing and put it into the prompt")).to_have_value("")
    prompt.fill("a cat of mine")
    tab.get_by_role("tab", name="Grid", exact=True).click()
    values = tab.locator("#grid-x-values textarea")
    values.fill("3, 5")
    tab.locator("#grid-x-field input").click()
    tab.get_by_role("option", name="guidance", exact=True).click()
    expect(values).not_to_have_value("3, 5")
    values.fill("1.5, 2.5")
    for _ in range(2):
        tab.locator("#grid-x-field input").focus()
        tab.keyboard.press("Escape")
        tab.locator("#grid-prompt textarea").focus()
    tab.locator("#grid-dry").click()
    expect(tab.locator("#grid-status")).to_contain_text("pictures")
    expect(values).to_have_value("1.5, 2.5")
    expect(prompt).to_have_value("a cat of mine")
