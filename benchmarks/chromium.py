"""Headless Chromium, driven by selenium: both have to be there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it may run as root
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--window-size=1200,1500",
)


@contextmanager
def chromium(patience_s: float = 300) -> Iterator[Any]:
    """A browser, as selenium's driver of it, until the context ends.

    `patience_s`: how long its scripts may take.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(patience_s)
    try:
        yield driver
    finally:
        driver.quit()
