"""The page in headless Chromium, against a gateway that listens and a worker of this process.

It needs Chromium with its driver, and the packages selenium and axe-playwright-python (for axe).
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from benchmarks.chromium import CHROMIUM, DRIVER
from benchmarks.chromium import chromium as started
from gma.model.tokenizer import Tokenizer
from gma.service.gateway.gateway import Gateway
from gma.service.gateway.model import Model, Models
from gma.service.http.app import create_app
from gma.service.http.keys import hash_of
from gma.service.http.listener import Listener
from gma.service.model_folder import ModelFolder
from gma.service.settings import Settings
from gma.service.worker import Worker
from tests.service.asgi import LocalWorkers, save_checkpoint
from tests.service.running import free_port

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs Chromium and its driver"),
    pytest.mark.skipif(not find_spec("selenium"), reason="needs selenium"),
]

Clock = Callable[[], float]

PATIENCE_S = 300
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


async def _serve(
    settings: Settings, clock: Clock, said: list[Any], listens: threading.Event
) -> None:
    worker = Worker.load(settings)
    folder = ModelFolder.of(settings)
    model = Model(folder.config, Tokenizer.load(folder.tokenizer), LocalWorkers(worker))
    gateway = Gateway(settings, Models(model))
    await worker.start()
    listener = await Listener.open(create_app(gateway, clock=clock), "127.0.0.1", settings.port)
    end = asyncio.Event()
    said += [asyncio.get_running_loop(), end]
    listens.set()
    try:
        await end.wait()
    finally:
        await listener.close()
        await worker.stop()


@contextmanager
def listening(checkpoint: str | Path, clock: Clock = time.time, **settings: Any) -> Iterator[str]:
    """The address of a service."""
    loaded = Settings.load(checkpoint=checkpoint, **{"port": free_port(), **settings})
    said: list[Any] = []
    listens = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(loaded, clock, said, listens)))
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

    def drop(self, content: str, name: str = "dropped.txt") -> None:
        self.run(
            "const given = new DataTransfer();"
            "given.items.add(new File([arguments[0]], arguments[1]));"
            "document.body.dispatchEvent("
            "new DragEvent('drop', {dataTransfer: given, bubbles: true, cancelable: true}))",
            content,
            name,
        )

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

    def drawn(self, name: str, colour: str) -> bool:
        """Whether an element's canvas has any of a colour."""
        found: bool = self.run(
            "const canvas = document.querySelector(`#${arguments[0]} canvas`);"
            "const wanted = getComputedStyle(document.body).getPropertyValue(arguments[1])"
            ".split(',').map(Number);"
            "const copy = new OffscreenCanvas(canvas.width, canvas.height)"
            ".getContext('2d', {willReadFrequently: true});"
            "copy.drawImage(canvas, 0, 0);"
            "const {data} = copy.getImageData(0, 0, canvas.width, canvas.height);"
            "for (let at = 0; at < data.length; at += 4)"
            " if (data[at + 3] === 255 && wanted.every((x, n) => data[at + n] === x)) return true;"
            "return false",
            name,
            colour,
        )
        return found

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

    @contextmanager
    def checked_by_axe(self) -> Iterator[None]:
        """In which `violations` may be asked: its script needs a page without the policy."""
        if not find_spec("axe_playwright_python"):
            pytest.skip("needs axe-playwright-python")
        self.driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})
        try:
            yield
        finally:
            self.prefers("light")
            self.driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": False})

    def prefers(self, scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    @contextmanager
    def wide(self, px: int) -> Iterator[None]:
        """On a screen of so many pixels."""
        size = {"width": px, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def tab_to(self, name: str) -> None:
        """Press Tab until an element has the focus."""
        for _ in range(60):
            self.press("\ue004")
            focused = self.driver.switch_to.active_element
            if name in (focused.get_attribute("id"), focused.get_attribute("data-excerpt")):
                return
        raise AssertionError(f"{name} is not reached")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with started(PATIENCE_S) as driver:
        yield Browser(driver)


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
        browser.find("route").click()
        browser.until(lambda: "read by itself, 256 tokens" in browser.text("route-text"))
        assert len(browser.driver.find_elements("css selector", "#mixtures canvas")) == 18
        assert not browser.seen("keep"), "there are no sessions here"
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
        assert browser.drawn("chart", "--for")
        assert browser.drawn("chart", "--against")
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
        browser.drop("The audit was long.")
        browser.until(lambda: "Read 19 B" in browser.text("status"))
        browser.run(
            "const given = new DataTransfer(); given.setData('text/plain', 'né '.repeat(50000));"
            "document.getElementById('text').dispatchEvent("
            "new ClipboardEvent('paste', {clipboardData: given, bubbles: true, cancelable: true}))"
        )
        browser.until(lambda: "the pasted text, 200 KB" in browser.text("status"))
        browser.until(lambda: "tokens/s" in browser.text("done-text"))
        browser.find("stop").click()
        browser.until(lambda: "Stopped" in browser.text("status"))
        assert not browser.seen("result")

    def test_tabs_are_within_the_lines(self, browser: Browser, contracts: str) -> None:
        browser.open(contracts)
        browser.drop("name\tamount\t" * 400)
        browser.answered()
        assert browser.run(
            "return [...document.querySelectorAll('#reader .line')]"
            ".every(line => line.scrollWidth <= line.clientWidth)"
        )

    def test_keys_of_the_browser_are_left_to_it(self, browser: Browser, contracts: str) -> None:
        browser.open(contracts)
        browser.excerpt("agreement.txt")
        browser.answered()
        for key in ("altKey", "ctrlKey", "metaKey"):
            assert browser.run(
                "return document.getElementById('strip').dispatchEvent(new KeyboardEvent("
                "'keydown', {key: 'ArrowLeft', [arguments[0]]: true, cancelable: true}))",
                key,
            )

    def test_axe(self, browser: Browser, contracts: str) -> None:
        with browser.checked_by_axe():
            browser.open(contracts)
            assert browser.violations() == []
            browser.excerpt("agreement.txt")
            browser.answered()
            browser.keys("other", "audit")
            browser.find("route").click()
            browser.until(lambda: browser.text("route-text"))
            browser.driver.find_element("tag name", "summary").click()
            for scheme in ("light", "dark"):
                browser.prefers(scheme)
                assert browser.violations() == []

    def test_on_a_narrow_screen(self, browser: Browser, contracts: str) -> None:
        with browser.wide(320):
            browser.open(contracts)
            browser.excerpt("agreement.txt")
            browser.answered()
            assert browser.run("return innerWidth") == 320
            assert browser.run("return document.documentElement.scrollWidth") <= 320


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
        assert browser.drawn("chart", "--for")
        assert not browser.drawn("chart", "--against")
        assert "logits for arthur conan doyle" in browser.text("passage")


def test_asks_for_a_key(browser: Browser, checkpoint: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(hash_of("gma_one"))
    with listening(checkpoint, api_keys_file=keys, path_prefix="/x") as url:
        browser.open(url)
        assert browser.seen("key-form")
        browser.keys("key", "gma_ключ\n")
        browser.until(lambda: "copy it again" in browser.text("error"))
        browser.find("key").clear()
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


def test_a_key_that_is_taken_no_longer(browser: Browser, checkpoint: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    port = free_port()
    keys.write_text(hash_of("gma_one"))
    with listening(checkpoint, api_keys_file=keys, port=port) as url:
        browser.open(url)
        browser.keys("key", "gma_one\n")
        browser.until(lambda: browser.text("model").startswith("The model tiny"))
        assert not browser.seen("key-form")
    keys.write_text(hash_of("gma_two"))
    with listening(checkpoint, api_keys_file=keys, port=port):
        browser.drop("The sea was calm.")
        browser.until(lambda: browser.seen("key-form"))
        browser.find("key").clear()
        browser.keys("key", "gma_two\n")
        browser.until(lambda: browser.text("model").startswith("The model tiny"))
        browser.drop("The sea was calm.")
        browser.answered()
        assert not browser.seen("key-form")
        browser.complaints()  # Chromium's own lines for a status of 401


def test_the_service_is_restarted_under_it(browser: Browser, checkpoint: Path) -> None:
    port = free_port()
    with listening(checkpoint, port=port) as url:
        browser.open(url)
    browser.keys("text", "The sea was calm.")
    browser.find("read").click()
    browser.until(lambda: "the service does not answer: see whether" in browser.text("error"))
    browser.excerpt("novel.txt")
    browser.until(lambda: "the service does not answer" in browser.text("error"))
    with listening(checkpoint, port=port):
        browser.find("read").click()
        browser.answered()
        assert "Read 17 B" in browser.text("status")
    # Chromium's own, that nobody listened
    assert all("net::ERR_CONNECTION" in each["message"] for each in browser.complaints())


def test_an_archive(browser: Browser, tmp_path: Path) -> None:
    """10 MB: the page is never busy for long, and has elements for what is in sight alone."""
    text = "".join(each["text"] for each in NOVELS)
    file = tmp_path / "archive.txt"
    file.write_text(text * 1250)
    # Its tokens are words, and so fewer.
    with listening(save_checkpoint(tmp_path / "tiny", text, vocab_size=2000, layers=1)) as url:
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


@pytest.fixture(scope="module")
def now() -> list[float]:
    """The clock of the service that keeps sessions, in seconds."""
    return [1_800_000_000.0]


@pytest.fixture(scope="module")
def keeping(now: list[float], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("sessions")
    with listening("contracts", clock=lambda: now[0], sessions=str(folder)) as url:
        yield url


class TestSessions:
    def began(self, browser: Browser, keeping: str) -> None:
        """The excerpt as a document that is open."""
        browser.driver.get("about:blank")  # so that a fragment alone loads the page anew
        browser.open(keeping)
        browser.find("keep").click()
        browser.excerpt("agreement.txt")
        browser.answered()

    def append(self, browser: Browser, text: str) -> None:
        browser.run("document.getElementById('text').value = arguments[0]", text)
        browser.find("read").click()
        browser.until(lambda: browser.text("status").startswith("Read "))
        browser.answered()

    def test_what_is_appended_counts_as_if_it_had_been_there(
        self, browser: Browser, keeping: str
    ) -> None:
        text = AGREEMENT.read_text()
        more = "Either party may terminate this Agreement at any time without cause. " * 20
        self.began(browser, keeping)
        before = browser.text("labels")
        self.append(browser, more)
        size = f"{len((text + more).encode()):,} B"
        assert f"This document is open, {size} so far" in browser.text("session-text")
        assert browser.text("labels") != before
        assert browser.find("text").get_attribute("value") == ""
        found = []
        for _ in range(2):
            browser.keys("strip", "\ue010")  # end
            assert "terminate this Agreement" in browser.text("reader")
            browser.keys("strip", "\ue008\ue011")  # with Shift, home
            assert "100.0 % of the evidence" in browser.text("passage")
            found.append([browser.text(name) for name in ("labels", "passage", "chart-title")])
            if browser.seen("session"):
                browser.find("leave").click()
                assert "session" not in browser.driver.current_url
                browser.find("keep").click()
                self.append(browser, text + more)
        assert found[0] == found[1]

    def test_the_address_leads_back(self, browser: Browser, keeping: str) -> None:
        self.began(browser, keeping)
        listed = browser.run(
            "return [...document.querySelectorAll('#labels button')].map(x => x.firstChild.data)"
        )
        address = browser.driver.current_url
        assert "#session=" in address
        browser.driver.get("about:blank")
        browser.open(address)
        browser.answered()
        assert browser.text("labels").splitlines() == listed
        assert "The open document of" in browser.text("status")
        assert not browser.seen("where")
        assert not browser.seen("passages")
        self.append(browser, "The customer may audit the books of the provider once a year. " * 90)
        browser.keys("strip", "\ue011")  # home
        assert "are not on this page" in browser.text("passage")
        assert browser.text("reader").startswith("The customer may audit")

    def test_the_address_stays_if_the_service_is_silent(
        self, browser: Browser, keeping: str
    ) -> None:
        self.began(browser, keeping)
        address = browser.driver.current_url
        browser.driver.get("about:blank")
        browser.driver.execute_cdp_cmd("Network.enable", {})
        browser.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*/v1/sessions/*"]})
        try:
            browser.open(address)
            browser.until(lambda: "Load this page again" in browser.text("error"))
        finally:
            browser.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
        assert browser.driver.current_url == address
        browser.driver.refresh()
        browser.answered()
        assert "The open document of" in browser.text("status")

    def test_what_is_being_typed_stays(self, browser: Browser, keeping: str) -> None:
        self.began(browser, keeping)
        browser.keys("text", "Not sent yet.")
        browser.drop("A file of its own.")
        browser.until(lambda: "Read 18 B" in browser.text("status"))
        assert browser.find("text").get_attribute("value") == "Not sent yet."

    def test_two_at_once_are_one(self, browser: Browser, keeping: str) -> None:
        browser.driver.get("about:blank")
        browser.open(keeping)
        browser.run(
            "window.begun = []; const real = fetch; window.fetch = async (path, options) => {"
            "const answer = await real(path, options);"
            "if (options?.method !== 'POST') return answer;"
            "window.begun.push(1);"
            "if (window.begun.length === 1)"
            " await new Promise(go => { window.goOn = go; });"  # the first to begin comes last
            "return answer;}"
        )
        browser.find("keep").click()
        browser.drop("The first.", "first.txt")
        browser.until(lambda: browser.run("return window.goOn ? true : false"))
        browser.drop("And the second.", "second.txt")
        browser.until(lambda: "Read 15 B" in browser.text("status"))
        address = browser.driver.current_url
        browser.driver.execute_async_script("window.goOn(); setTimeout(arguments[0], 0)")
        browser.drop(" More.", "third.txt")
        browser.until(lambda: "Read 6 B" in browser.text("status"))
        assert browser.driver.current_url == address
        assert "open, 21 B so far" in browser.text("session-text")

    def test_it_is_closed_while_it_is_read(self, browser: Browser, keeping: str) -> None:
        self.began(browser, keeping)
        browser.drop("A long piece, of which the end is never read. " * 4000)
        browser.until(lambda: "tokens/s" in browser.text("done-text"))
        browser.find("end").click()
        browser.until(lambda: "has nothing of it" in browser.text("status"))
        browser.drop("Another.")
        browser.until(lambda: "open, 8 B so far" in browser.text("session-text"))
        assert "Read 8 B" in browser.text("status")

    def test_it_is_closed(self, browser: Browser, keeping: str) -> None:
        self.began(browser, keeping)
        address = browser.driver.current_url
        browser.find("end").click()
        browser.until(lambda: "has nothing of it" in browser.text("status"))
        assert not browser.seen("session")
        browser.driver.get("about:blank")
        browser.open(address)
        browser.until(lambda: "there is no such session" in browser.text("error"))
        assert "session" not in browser.driver.current_url
        assert browser.complaints()  # Chromium's own line for a status of 404

    def test_it_expires(self, browser: Browser, keeping: str, now: list[float]) -> None:
        self.began(browser, keeping)
        now[0] += 100_000
        browser.keys("text", "More.")
        browser.find("read").click()
        browser.until(lambda: "the session expired at" in browser.text("error"))
        browser.until(lambda: not browser.seen("session"))
        assert browser.find("text").get_attribute("value") == "More."
        browser.find("read").click()  # which begins another
        browser.until(lambda: "open, 5 B so far" in browser.text("session-text"))
        assert browser.complaints()  # Chromium's own lines for statuses of 410

    def test_somebody_else_appends(self, browser: Browser, keeping: str) -> None:
        self.began(browser, keeping)
        name = browser.driver.current_url.rpartition("=")[2]
        request = Request(  # noqa: S310 (our own service)
            f"{keeping}v1/sessions/{name}",
            b"Something else.",
            {"content-type": "text/plain", "upload-offset": str(AGREEMENT.stat().st_size)},
            method="PATCH",
        )
        urlopen(request).close()  # noqa: S310
        browser.keys("text", "More.")
        browser.find("read").click()
        browser.until(lambda: "send what follows" in browser.text("error"))
        browser.until(lambda: "3,157 B so far" in browser.text("session-text"))
        browser.find("read").click()
        browser.until(lambda: "Read 5 B" in browser.text("status"))
        assert "3,162 B so far" in browser.text("session-text")
        assert browser.complaints()  # Chromium's own line for a status of 409

    def test_by_keyboard_alone(self, browser: Browser, keeping: str) -> None:
        browser.driver.get("about:blank")
        browser.open(keeping)
        browser.tab_to("keep")
        browser.press(" ")
        browser.run("document.activeElement.blur()")
        browser.tab_to("agreement.txt")
        browser.press("\ue007")  # Enter
        browser.answered()
        browser.tab_to("strip")
        browser.press("\ue010")  # End
        assert "Span 4 of 4" in browser.text("passage")
        browser.tab_to("end")
        browser.press("\ue007")
        browser.until(lambda: "has nothing of it" in browser.text("status"))
        assert browser.driver.switch_to.active_element.get_attribute("id") == "text"

    def test_axe_and_a_narrow_screen(self, browser: Browser, keeping: str) -> None:
        with browser.checked_by_axe(), browser.wide(320):
            self.began(browser, keeping)
            address = browser.driver.current_url
            assert browser.violations() == []
            assert browser.run("return document.documentElement.scrollWidth") <= 320
            browser.driver.get("about:blank")
            browser.open(address)
            browser.answered()
            browser.prefers("dark")
            assert browser.violations() == []
            assert browser.run("return document.documentElement.scrollWidth") <= 320
