"""The page in a real browser: what is seen, sorted, reached with the keyboard, and that nothing is asked for.

Needs Debian's chromium and chromium-driver (or DDKIT_CHROMIUM and DDKIT_CHROMEDRIVER) and selenium.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

selenium = pytest.importorskip("selenium", reason="selenium is not installed: pip install 'ddkit[test]'")
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

pytestmark = pytest.mark.slow

OFFICIAL, MARKED = "Official: E = 1000, 3 rounds", "marked: E = 50, 1 image a class"
DESKTOP, PHONE = (1280, 900), (390, 844)
CLASSES = ("plain", "b<b>bold", "[red]c", *(f"class {i:02}" for i in range(27)))  # more than stand open at once


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with pictures, mistakes, curves, charts and names that hold markup."""
    from ddkit.reporting.html import write_html
    from ddkit.reporting.page import gather

    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDKIT_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        page = gather(_results(folder), problems=["results.jsonl, line 3: torn"], runs_folder=_runs(folder),
                      quality=[_quality()])  # fmt: skip
        write_html(page, "r.html")
    return folder / "r.html"


def _quality() -> object:
    from ddkit.reporting.quality import SetQuality

    rows = (("Frechet distance", 3.018, 1.555, "smaller is better"), ("copies", 0.0, None, "none"))
    pixel = Image.new("RGB", (1, 1))
    return SetQuality("mine-marked", "marked: <b>mine", 30, "float32", rows, pixel, pixel)


def _results(folder: Path) -> list:
    from ddkit.data.images import normalize
    from ddkit.data.prepare import prepare
    from ddkit.data.store import dataset_spec, load_dataset
    from ddkit.results import Result
    from ddkit.runtime.files import sha256_of
    from ddkit.sets.distilled import save_set

    for split in ("train", "test"):
        for place, name in enumerate(CLASSES):
            (folder / "pictures" / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16), (8 * place, 60, 200)).save(folder / "pictures" / split / name / "0.png")
    prepare("marked", folder / "pictures")
    real, spec = load_dataset("marked", "train"), dataset_spec("marked")
    noise = torch.randint(-20, 20, real.images.shape, generator=torch.Generator().manual_seed(0))
    images = (real.images + noise).clamp(0, 255).to(torch.uint8)
    save_set("mine <i>/marked.pt", normalize(images, spec), spec, {"sampler": "dpm++"})

    def result(name: str, dataset: str, *accuracies: float, **fields: object) -> Result:
        known = {"sha256": name, "source": f"{name}/{dataset}.pt", "images": 30, "images_per_class": (1, 1),
                 "epochs_setting": 50, "loss_curves": ((4.0, 2.0, 1.0),) * len(accuracies), "track": 1,
                 "deviations": ("E = 50 instead of 1000",), "date": "2026-07-12T10:00:00+00:00"}  # fmt: skip
        return Result(name=name, dataset=dataset, accuracies=accuracies, **(known | fields))

    mine = result("mine <i>", "marked", 0.5, 0.52, sha256=sha256_of("mine <i>/marked.pt"),
                  per_class=tuple(i / 30 for i in range(30)), confusions=((1, 2, 3.5), (0, 1, 9.0)))  # fmt: skip
    random = result("random", "marked", 0.41, 0.4, kind="random-real")
    plain = [dataclasses.replace(r, augment=False, accuracies=(0.3, 0.31)) for r in (mine, random)]
    full = result("full", "marked", 0.9, kind="full-real", images_per_class=(9, 9))
    official = {"epochs_setting": 1000, "official": True, "deviations": (), "images_per_class": (10, 10)}
    return [
        mine, random, *plain, full, result("gone", "marked", 0.45, 0.44), result("weak", "marked", 0.1),
        *(result("entry", name, 0.3, 0.31, 0.32, **official) for name in ("cifar100", "tinyimagenet")),
    ]  # fmt: skip


def _runs(folder: Path) -> Path:
    run = folder / "runs" / "marked"
    run.mkdir(parents=True)
    records = [{"stage": "denoiser", "step": s, "loss": 2 / s} for s in range(10, 200, 10)]
    records += [{"stage": "score", "step": s, "name": "frechet", "value": 900 / s} for s in (50, 100, 150)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    return run.parent


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    binary = os.environ.get("DDKIT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    driver = os.environ.get("DDKIT_CHROMEDRIVER") or shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no browser: install chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                     "--disable-background-networking", "--disable-component-update", "--disable-sync",
                     f"--user-data-dir={profile}"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(service=Service(driver), options=options)
    yield started
    started.quit()


@pytest.fixture
def look(chrome, page_file):
    """Opens the page at a size, in a color scheme, with or without JavaScript; returns the browser."""

    def opened(size=DESKTOP, scheme="light", script=True):
        chrome.get("about:blank")
        chrome.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
        phone = size == PHONE
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": phone,
        })  # fmt: skip
        # Without motion, what is scrolled to or enlarged is there at once.
        media = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in media.items()]
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for kind in ("browser", "performance"):
            chrome.get_log(kind)
        chrome.get(page_file.as_uri())
        if script:  # on a busy machine `get` may return while the page is still read
            WebDriverWait(chrome, 60).until(lambda each: each.execute_script("return document.readyState") == "complete")
        return chrome

    yield opened
    chrome.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def texts(browser, selector):
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, selector)]


def board(browser, title):
    (table,) = (
        table for table in browser.find_elements(By.CSS_SELECTOR, "table.board")
        if table.find_element(By.TAG_NAME, "caption").text == title
    )  # fmt: skip
    return table


BY_ACCURACY = ["mine <i>", "gone", "random real images", "weak"]


def open_mine(browser):
    """Opens the details of the entry with pictures."""
    for entry in browser.find_elements(By.CSS_SELECTOR, "details.entry"):
        if "mine <i>" in entry.find_element(By.TAG_NAME, "summary").text:
            browser.execute_script("arguments[0].open = true", entry)


def names(table):
    return [cell.text for cell in table.find_elements(By.CSS_SELECTOR, "tbody th")]


def test_everything_is_there_and_markup_is_text(look):
    browser = look()
    assert browser.title == "ddkit report"
    assert names(board(browser, OFFICIAL)) == ["entry", "M-DATM"]
    assert names(board(browser, MARKED)) == BY_ACCURACY
    open_mine(browser)
    assert texts(browser, ".sheet .class")[:3] == ["[red]c", "b<b>bold", "class 00"]
    assert "Denoiser: loss" in texts(browser, "#training figcaption")
    assert "Frechet distance of samples" in texts(browser, "#training figcaption")
    assert texts(browser, "#quality h3") == ["marked: <b>mine"] and "3.018" in texts(browser, "#quality td")
    assert browser.find_elements(By.CSS_SELECTOR, "figure.intervals circle.mark")
    assert browser.find_elements(By.CSS_SELECTOR, "figure.classes svg.bars rect")
    scores = [text for text in texts(browser, "#entries details[open] .scores dd") if text != "–"]
    assert len(scores) == 4 and all(abs(float(score)) <= 1 for score in scores)
    assert not browser.find_elements(By.CSS_SELECTOR, "b, i, red")
    assert texts(browser, ".problems summary") == ["1 line of the records could not be used"]


def test_pictures_are_really_drawn(look):
    browser = look()
    widths = browser.execute_script("return [...document.images].map(i => [i.complete, i.naturalWidth])")
    assert widths.count([True, 16]) == 30 and all(complete and width for complete, width in widths)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_errors_and_no_request_to_anywhere(look, page_file, scheme):
    browser = look(scheme=scheme)
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert page_file.as_uri() in asked  # the log does hold requests
    assert {url for url in asked if not url.startswith("data:")} == {page_file.as_uri()}


def test_what_gets_into_the_page_can_ask_for_nothing(look):
    browser = look()
    browser.execute_script(
        "const i = document.createElement('img'); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i);"
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);"
    )
    assert browser.execute_script("return window.ran") is None
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert any("img-src" in message for message in refused) and any("script-src" in message for message in refused)


def test_a_click_on_a_heading_sorts_and_a_second_one_reverses(look):
    browser = look()
    table = board(browser, MARKED)

    def press(title):
        (button,) = (b for b in table.find_elements(By.CSS_SELECTOR, "th button") if b.text.startswith(title))
        button.click()
        return names(table)

    assert press("marked") == BY_ACCURACY
    assert press("marked") == BY_ACCURACY[::-1]
    assert press("Entry") == ["gone", "mine <i>", "random real images", "weak"]
    # Differences largest first; what has none comes last.
    assert press("To random real") == ["mine <i>", "gone", "weak", "random real images"]
    sorted_by = [th.get_attribute("aria-sort") for th in table.find_elements(By.CSS_SELECTOR, "thead th")]
    assert sorted_by.count("descending") == 1 and sorted_by.count("ascending") == 0


def test_all_controls_are_reachable_by_keyboard(look):
    browser = look()
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert browser.switch_to.active_element.text == "Skip to the leaderboard"
    reached = []
    for _ in range(80):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        element = browser.switch_to.active_element
        if element.tag_name == "summary" and "mine <i>" in element.text:
            ActionChains(browser).send_keys(Keys.ENTER).perform()
        ring = browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", element)
        assert ring != "none", element.get_attribute("outerHTML")
        reached.append(element.get_attribute("class") or element.tag_name)
        if reached[-1] == "strip":
            break
    assert {"a", "button", "summary", "strip"} <= set(reached)


def test_arrow_keys_go_from_class_to_class_and_enlarge_it(look):
    browser = look()
    open_mine(browser)
    first, second = browser.find_elements(By.CSS_SELECTOR, ".sheet .strip")[:2]
    width = second.find_element(By.TAG_NAME, "img").size["width"]
    browser.execute_script("arguments[0].focus()", first)
    ActionChains(browser).send_keys(Keys.ARROW_DOWN).perform()
    assert browser.switch_to.active_element == second
    assert "class b<b>bold" in second.accessible_name
    assert second.find_element(By.TAG_NAME, "img").size["width"] > 1.5 * width


def test_a_picture_pointed_at_is_enlarged(look):
    browser = look()
    open_mine(browser)
    picture = browser.find_element(By.CSS_SELECTOR, ".sheet img")
    ActionChains(browser).scroll_to_element(picture).move_to_element(picture).perform()
    scale = browser.execute_script("return getComputedStyle(arguments[0]).transform", picture)
    assert float(scale.removeprefix("matrix(").split(",")[0]) > 2


def test_the_name_of_an_entry_leads_to_it_and_opens_it(look):
    browser = look()
    assert not browser.find_element(By.ID, "entry-2").get_attribute("open")
    browser.find_element(By.CSS_SELECTOR, ".board a[href='#entry-2']").click()
    assert browser.execute_async_script("setTimeout(() => arguments[0](document.getElementById('entry-2').open), 100)")


def test_without_javascript_all_is_there_but_sorting(look):
    browser = look(script=False)
    assert not browser.find_elements(By.CSS_SELECTOR, "th button")
    assert names(board(browser, MARKED))[0] == "mine <i>"
    browser.find_element(By.CSS_SELECTOR, "#entry-2 > summary").click()
    summary = browser.find_element(By.CSS_SELECTOR, "#entries .sheet-box summary")
    hidden = browser.find_element(By.CSS_SELECTOR, "#entries .sheet-box .strip")
    assert not hidden.is_displayed()
    summary.click()
    assert hidden.is_displayed() and hidden.get_attribute("tabindex") == "0"
    assert texts(browser, "#entries .findings h5")


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_nothing_is_wider_than_the_screen(look, size):
    browser = look(size)
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    wide = browser.execute_script(
        "const limit = document.documentElement.clientWidth + 1;"
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg, .skip, thead'))"
        ".filter(e => e.getBoundingClientRect().right > limit).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(look, scheme, size):
    """WCAG 2.1, level AA: a contrast of 4.5 for text of ordinary size."""
    browser = look(size, scheme)
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    assert browser.execute_script(FAINT_TEXT) == []


FAINT_TEXT = """
const parts = (color) => color.match(/[\\d.]+/g).map(Number);
const light = (color) => {
  const linear = (v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const [r, g, b] = parts(color).slice(0, 3).map((v) => linear(v / 255));
  return .2126 * r + .7152 * g + .0722 * b;
};
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const color = getComputedStyle(e).backgroundColor;
    if ((parts(color)[3] ?? 1) === 1) return color;
  }
  return getComputedStyle(document.documentElement).colorScheme.includes("dark") ? "rgb(0, 0, 0)" : "rgb(255, 255, 255)";
};
const faint = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || element.closest("script, style, svg") || !element.getClientRects().length) continue;
  const [a, b] = [light(getComputedStyle(element).color), light(behind(element))].sort((x, y) => y - x);
  const contrast = (a + .05) / (b + .05);
  if (contrast < 4.5) faint.push(`${element.className} ${element.textContent.slice(0, 30)}: ${contrast.toFixed(2)}`);
}
return faint;
"""
