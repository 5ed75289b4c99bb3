"""The page in headless Chromium: first paint, what is transferred, and frames over a long document.

    python -m benchmarks.page

It needs Chromium with its driver, and selenium. A document is uploaded to a service that this
starts, and read, by a tiny model of 40 labels if no other is named. Then the strip is dragged over
by the mouse, an arrow key held on it, and the text scrolled by a screen a frame. All frames that
the browser makes meanwhile are counted. Prints Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.chromium import chromium
from benchmarks.processes import service
from benchmarks.random_models import REALISTIC, tiny_checkpoint
from benchmarks.timing import markdown

TEXT = Path(__file__).parents[1] / "docs" / "examples" / "agreement.txt"
PATIENCE_S = 1200.0
MOVES = 400
"""Places of the strip that the mouse is moved to, from one end to the other."""

COUNT = """
window.frames_ = [];
const step = new Function(arguments[0]);
const tick = (now) => { frames_.push(now); step(); window.next_ = requestAnimationFrame(tick); };
window.next_ = requestAnimationFrame(tick);
"""
"""Counts frames, and does in each what is given. It needs a page without Trusted Types."""

SCROLL = "const r = document.getElementById('reader'); r.scrollTop = (r.scrollTop + 400) % 4e6;"

LOADED = """
const all = ['navigation', 'resource'].flatMap(x => performance.getEntriesByType(x));
return [performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0,
        all.reduce((sum, x) => sum + x.transferSize, 0)];
"""


def loads(driver: Any, url: str, times: int) -> tuple[list[float], int]:
    """Milliseconds to the first paint of each of so many loads, and the bytes of one, all without
    a cache."""
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": True})
    paints, moved = [], 0
    for _ in range(times):
        driver.get(url)
        _until(lambda: driver.find_element("id", "model").text.startswith("The model"))
        _until(lambda: driver.execute_script(LOADED)[0])
        paint, moved = driver.execute_script(LOADED)
        paints.append(paint)
    return paints, moved


def frames(
    driver: Any, act: Callable[[float], None], step: str, seconds: float
) -> tuple[list[float], float]:
    """Milliseconds between frames, while `act` does something for so many seconds, and `step`, a
    script, something in each frame; and milliseconds of CPU time of the page's thread a frame."""
    driver.execute_script(COUNT, step)
    before = _cpu_s(driver)
    act(time.monotonic() + seconds)
    spent = _cpu_s(driver) - before
    found: list[float] = driver.execute_script(
        "cancelAnimationFrame(next_); return frames_.slice(1).map((x, n) => x - frames_[n]);"
    )
    return found, 1000 * spent / len(found)


def _cpu_s(driver: Any) -> float:
    metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    (spent,) = (float(each["value"]) for each in metrics if each["name"] == "TaskDuration")
    return spent


def dragging(driver: Any, end: float) -> None:
    """Press the mouse on the strip and move it to and fro."""
    box = driver.execute_script(
        "const e = document.getElementById('strip'); e.scrollIntoView();"
        "const {x, y, width, height} = e.getBoundingClientRect();"
        "return {x, y: y + height / 2, width: width - 1};"
    )

    def mouse(kind: str, part: float) -> None:
        at = {"x": box["x"] + part * box["width"], "y": box["y"]}
        more = {"button": "left", "buttons": 1, "clickCount": 1, "type": kind}
        driver.execute_cdp_cmd("Input.dispatchMouseEvent", {**at, **more})

    mouse("mousePressed", 0)
    for place in cycle([*range(MOVES), *range(MOVES, 0, -1)]):
        mouse("mouseMoved", place / MOVES)
        if time.monotonic() > end:
            break
    mouse("mouseReleased", 0)


def keys(driver: Any, end: float) -> None:
    """Hold the right arrow on the strip."""
    driver.execute_script("document.getElementById('strip').focus()")
    key = {"key": "ArrowRight", "code": "ArrowRight", "windowsVirtualKeyCode": 39}
    while time.monotonic() < end:
        driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "rawKeyDown", **key})
    driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "keyUp", **key})


def waiting(end: float) -> None:
    """Let the page be."""
    time.sleep(max(0.0, end - time.monotonic()))


def _until(what: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not what():
        if time.monotonic() > end:
            raise SystemExit("the page did not get so far")
        time.sleep(0.1)


def upload(driver: Any, file: Path) -> None:
    """Give the page a file, and wait for what it says. Raises SystemExit for an error."""
    driver.find_element("id", "file").send_keys(str(file))
    result, error = (driver.find_element("id", name) for name in ("result", "error"))
    _until(lambda: result.is_displayed() or error.is_displayed())
    if error.is_displayed():
        raise SystemExit(error.text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--bytes", type=int, default=10_000_000)
    parser.add_argument("--seconds", type=float, default=5, help="of each thing done")
    parser.add_argument("--loads", type=int, default=9)
    parser.add_argument("--log", type=Path, help="file for the service's log")
    arguments = parser.parse_args(argv)
    text = TEXT.read_bytes()
    with TemporaryDirectory() as folder, ExitStack() as stack:
        if not arguments.checkpoint:
            arguments.checkpoint = Path(folder) / "tiny"
            labels = REALISTIC.labels
            tiny_checkpoint(arguments.checkpoint, labels=labels, multi_label=True, pooling="any")
        running = stack.enter_context(service(arguments.log, checkpoint=arguments.checkpoint))
        driver = stack.enter_context(chromium(PATIENCE_S))
        paints, moved = loads(driver, running.url, arguments.loads)
        print(f"first paint after {median(paints):.0f} ms ({min(paints):.0f} to {max(paints):.0f})")
        print(f"{moved:,} bytes transferred\n")
        # The script that counts is given as text, which the page's own policy forbids.
        driver.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})
        driver.get(running.url)
        file = Path(folder) / "long.txt"
        file.write_bytes((text * (arguments.bytes // len(text) + 1))[: arguments.bytes])
        upload(driver, file)
        driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        rows = []
        for name, act, step in (
            ("nothing", waiting, ""),
            ("the strip dragged over", lambda end: dragging(driver, end), ""),
            ("the right arrow held", lambda end: keys(driver, end), ""),
            ("the text scrolled", waiting, SCROLL),
        ):
            found, spent = frames(driver, act, step, arguments.seconds)
            rate = 1000 * len(found) / sum(found)
            rows.append([name, f"{rate:.0f}", f"{max(found):.0f} ms", f"{spent:.1f} ms"])
    header = [
        "",
        "frames a second",
        "longest without one",
        "CPU time of the page's thread, a frame",
    ]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
