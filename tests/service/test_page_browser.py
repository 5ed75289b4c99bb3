"""The page in headless Chromium, against a gateway that listens and a worker of this process.

It needs Chromium with its driver, and the packages selenium and axe-playwright-python (for axe).
"""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gma.model.tokenizer import Tokenizer
from gma.service.gateway.gateway import Gateway
from gma.service.gateway.model import Model, Models
from gma.service.http.app import create_app
from gma.service.http.keys import hash_of
from gma.service.http.listener import Listener
from gma.service.model_folder import ModelFolder
from gma.service.settings import Settings
from gma.service.worker import Worker
from tests.service.asgi import LocalWorkers
from tests.service.running import free_port

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and its driver"),
    pytest.mark.skipif(not find_spec("selenium"), reason="needs selenium"),
]

PATIENCE_S = 300
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--window-size=1200,1500",
)
ROOT = Path(__file__).parents[2]
AGREEMENT = ROOT / "docs" / "examples" / "agreement.txt"
NOVELS = [
    json.loads(line)
    for line in (ROOT / "tests" / "data" / "excerpts.jsonl").read_text().splitlines()
]
HOSTILE = (
    "<script>window.harm = 1</script><img src=x onerror='window.harm = 1'> "
    "\u202eright to left\u202c שלום عليكم 👩‍👩‍👧‍👦🚢 e\u0301\x00\x1b[31m\r\n\u2028&lt;b&gt; ${7*7} "
)


async def _serve(settings: Settings, said: list[Any], listens: threading.Event) -> None:
    worker = Worker.load(settings)
    folder = ModelFolder.of(settings)
    model = Model(folder.config, Tokenizer.load(folder.tokenizer), LocalWorkers(worker))
    gateway = Gateway(settings, Models(model))
    await worker.start()
    listener = await Listener.open(create_app(gateway), "127.0.0.1", settings.port)
    end = asyncio.Event()
    said += [asyncio.get_running_loop(), end]
    listens.set()
    try:
        await end.wait()
    finally:
        await listener.close()
        await worker.stop()


@contextmanager
def listening(checkpoint: str | Path, **settings: Any) -> Iterator[str]:
    """The address of a service."""
    loaded = Settings.load(checkpoint=checkpoint, port=free_port(), **settings)
    said: list[Any] = []
    listens = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(loaded, said, listens)))
    thread.start()
    try:
        assert listens.wait(PATIENCE_S)
        yield f"http://127.0.0.1:{loaded.port}{loaded.path_prefix}/"
    finally:
        if said:
            loop, end = said
            loop.call_soon_threadsafe(end.set)
        thread.join(PATIENCE_S)


class Browser:
    """A person at the page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.until(lambda: self.text("model").startswith(("The model", "This service")))

    def find(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def text(self, name: str) -> str:
        text: str = self.find(name).text
        return text

    def seen(self, name: str) -> bool:
        shown: bool = self.find(name).is_displayed()
        return shown

    def until(self, what: Any) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, PATIENCE_S, 0.1).until(lambda _: what())

    def give(self, file: Path) -> None:
        self.find("file").send_keys(str(file))

    def excerpt(self, name: str) -> None:
        self.driver.find_element("css selector", f"[data-excerpt='{name}']").click()

    def answered(self) -> None:
        """Wait for an answer. Raises AssertionError for an error."""
        self.until(lambda: self.seen("result") or self.seen("error"))
        assert not self.seen("error"), self.text("error")

    def keys(self, name: str, *keys: str) -> None:
        self.find(name).send_keys(*keys)

    def run(self, script: str, *given: Any) -> Any:
        return self.driver.execute_script(script, *given)

    def click_at(self, name: str, part: float) -> None:
        """Click at a part of an element's width."""
        from selenium.webdriver.common.action_chains import ActionChains

        element = self.find(name)
        x = round((part - 0.5) * element.size["width"])
        ActionChains(self.driver).move_to_element_with_offset(element, x, 0).click().perform()

    def complaints(self) -> list[Any]:
        """What the console says since it was last asked."""
        found: list[Any] = self.driver.get_log("browser")
        return found

    def violations(self) -> Any:
        """What axe finds in the page as it stands."""
        folder = Path(str(find_spec("axe_playwright_python").origin)).parent  # type: ignore[union-attr]
        self.run((folder / "axe.min.js").read_text())
        return self.driver.execute_async_script(
            "const done = arguments[0]; axe.run().then(({violations}) => done(violations.map("
            "({id, nodes}) => [id, nodes.map(({html}) => html)])), error => done(String(error)));"
        )


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(PATIENCE_S)
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def contracts() -> Iterator[str]:
    with listening("contracts", max_document_bytes=16 * 2**20) as url:
        yield url


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """Nothing may be on its console at the end."""
    chromium.complaints()
    yield chromium
    assert chromium.complaints() == []


class TestContracts:
    def test_the_excerpt(self, browser: Browser, contracts: str) -> None:
        browser.open(contracts)
        browser.excerpt("agreement.txt")
        browser.answered()
        listed = browser.text("labels")
        for label in ("cap on liability", "anti assignment", "audit rights"):
            assert label in listed
        assert "100.0 %" in browser.text("labels")
        assert len(browser.driver.find_elements("css selector", "#labels canvas")) == 7
        assert "of 4" in browser.text("passage")
        assert len(browser.driver.find_elements("css selector", "#mixtures canvas")) == 9
        paint = browser.run(
            "return performance.getEntriesByName('first-contentful-paint')[0].startTime"
        )
        moved = browser.run(
            "return ['navigation', 'resource'].flatMap(x => performance.getEntriesByType(x))"
            ".filter(x => !x.name.endsWith('.txt') && !x.name.includes('/v1/'))"
            ".reduce((sum, x) => sum + x.transferSize, 0)"
        )
        print(f"first paint after {paint:.0f} ms, {moved} bytes transferred")  # noqa: T201
        assert moved < 300_000

    def test_the_strip(self, browser: Browser, contracts: str) -> None:
        browser.open(contracts)
        browser.excerpt("agreement.txt")
        browser.answered()
        browser.click_at("strip", 0.98)
        assert "Span 4 of 4" in browser.text("passage")
        browser.keys("strip", "\ue012")  # left
        assert "Span 3 of 4" in browser.text("passage")
        assert browser.find("strip").get_attribute("aria-valuenow") == "3"
        browser.run("arguments[0].focus()", browser.find("strip"))
        browser.keys("strip", "\ue008\ue012")  # with Shift
        assert "Spans 2 to 3 of 4" in browser.text("passage")
        browser.keys("strip", "\ue011")  # home
        assert "Span 1 of 4" in browser.text("passage")
        assert "WEB SITE SERVICES AGREEMENT" in browser.text("reader")

    def test_labels_are_switched_and_compared(self, browser: Browser, contracts: str) -> None:
        browser.open(contracts)
        browser.excerpt("agreement.txt")
        browser.answered()
        browser.keys("label", "warranty")
        assert "warranty duration" in browser.text("chart-title")
        browser.keys("other", "audit")
        assert "audit rights" in browser.text("passage")
        assert browser.seen("other-strip")
        assert len(browser.driver.find_elements("css selector", "#chart path")) == 2
        button = browser.driver.find_element("css selector", "[data-label=anti_assignment]")
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert "Span 4 of 4" in browser.text("passage")

    def test_what_is_wrong_is_told(self, browser: Browser, contracts: str, tmp_path: Path) -> None:
        browser.open(contracts)
        for content, told in (
            (b"\xff\xfe", "UTF-8"),
            (b"", "is empty"),
            (b"a" * (16 * 2**20 + 1), "send a part"),
        ):
            file = tmp_path / f"{len(content)}.txt"
            file.write_bytes(content)
            browser.give(file)
            browser.until(lambda told=told: told in browser.text("error"))
        browser.complaints()  # Chromium's own line for a status of 400
        browser.excerpt("agreement.txt")
        browser.answered()

    def test_dropped_and_pasted(self, browser: Browser, contracts: str) -> None:
        browser.open(contracts)
        given = "const given = new DataTransfer();"
        browser.run(
            f"{given} given.items.add(new File(['The audit was long.'], 'one.txt'));"
            "document.body.dispatchEvent("
            "new DragEvent('drop', {dataTransfer: given, bubbles: true, cancelable: true}))"
        )
        browser.until(lambda: "Read 19 B" in browser.text("status"))
        browser.run(
            f"{given} given.setData('text/plain', 'né '.repeat(50000));"
            "document.getElementById('text').dispatchEvent("
            "new ClipboardEvent('paste', {clipboardData: given, bubbles: true, cancelable: true}))"
        )
        browser.until(lambda: "the pasted text, 200 KB" in browser.text("status"))
        browser.until(lambda: "tokens/s" in browser.text("done-text"))
        browser.find("stop").click()
        browser.until(lambda: "Stopped" in browser.text("status"))
        assert not browser.seen("result")

    def test_axe(self, browser: Browser, contracts: str) -> None:
        if not find_spec("axe_playwright_python"):
            pytest.skip("needs axe-playwright-python")
        browser.driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})
        browser.open(contracts)
        assert browser.violations() == []
        browser.excerpt("agreement.txt")
        browser.answered()
        for scheme in ("light", "dark"):
            browser.driver.execute_cdp_cmd(
                "Emulation.setEmulatedMedia",
                {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
            )
            assert browser.violations() == []
        browser.driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": False})

    def test_on_a_narrow_screen(self, browser: Browser, contracts: str) -> None:
        browser.driver.set_window_size(500, 900)
        browser.open(contracts)
        browser.excerpt("agreement.txt")
        browser.answered()
        wide = browser.run("return document.documentElement.scrollWidth - innerWidth")
        browser.driver.set_window_size(1200, 1500)
        assert wide <= 0


def test_hostile_text(browser: Browser, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "hostile.txt"
    file.write_bytes((HOSTILE * 200 + "x" * 1_000_000).encode())
    with listening(checkpoint) as url:
        browser.open(url)
        browser.give(file)
        browser.answered()
        assert browser.run("return window.harm ?? null") is None
        browser.keys("strip", "\ue011")  # home
        assert "<script>" in browser.text("reader")
        assert not browser.driver.find_elements("css selector", "#result script, #result img")
        browser.keys("strip", "\ue010")  # end
        assert "xxxx" in browser.text("reader")
        assert len(browser.driver.find_elements("css selector", "#reader .line")) < 60
        assert browser.run("return document.documentElement.scrollWidth - innerWidth") <= 0


def test_a_whole_book(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text(NOVELS[0]["text"] * 200)
    with listening("books") as url:
        browser.open(url)
        browser.give(file)
        browser.until(lambda: "tokens/s" in browser.text("done-text"))
        assert not browser.seen("result"), "no progress was seen"
        browser.answered()
        assert "arthur conan doyle" in browser.text("status")
        assert "592 KB of 592 KB" in browser.text("sent-text")
        assert len(browser.driver.find_elements("css selector", "#chart path")) == 1
        assert "logits for arthur conan doyle" in browser.text("passage")


def test_asks_for_a_key(browser: Browser, checkpoint: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(hash_of("gma_one"))
    with listening(checkpoint, api_keys_file=keys, path_prefix="/x") as url:
        browser.open(url)
        assert browser.seen("key-form")
        browser.keys("key", "gma_two\n")
        browser.until(lambda: "not, or no longer" in browser.text("error"))
        browser.find("key").clear()
        browser.keys("key", "gma_one\n")
        browser.until(lambda: browser.text("model").startswith("The model tiny"))
        browser.complaints()  # Chromium's own lines for a status of 401
        browser.keys("text", "The sea was calm.")
        browser.find("read").click()
        browser.answered()
        assert "Read 17 B" in browser.text("status")
        assert browser.run("return localStorage.length + sessionStorage.length") == 0
        assert browser.run("return document.cookie") == ""


def test_an_archive(browser: Browser, checkpoint: Path, tmp_path: Path) -> None:
    """10 MB: the page is never busy for long, and has elements for what is in sight alone."""
    file = tmp_path / "archive.txt"
    file.write_text("".join(each["text"] for each in NOVELS) * 1250)
    with listening(checkpoint) as url:
        browser.open(url)
        browser.run(
            "window.busy = []; new PerformanceObserver(list => window.busy.push("
            "...list.getEntries().map(each => each.duration))).observe({type: 'longtask'})"
        )
        browser.give(file)
        browser.answered()
        for key in ("\ue010", "\ue011", "\ue00f"):  # end, home, page down
            browser.keys("strip", key)
        assert "Span 11 of" in browser.text("passage")
        assert len(browser.driver.find_elements("css selector", "#reader .line")) < 60
        busy = browser.run("return window.busy")
        print(f"busy for {sorted(map(round, busy))} ms")  # noqa: T201
