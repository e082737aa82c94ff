"""A real Chromium for the tests of the operator's page: Debian's, driven by Selenium; nothing is downloaded."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

WAIT_S: Final = 60.0
"""For facts; a slow machine takes a browser's start for it."""


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser in this context; skips the test where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install '.[dev]'")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()


class Page:
    """The operator's page in a browser."""

    def __init__(self, browser: Any, url: str, width: int = 1280, height: int = 800, *, is_dark: bool = False) -> None:
        """Open it in a window of this size, in CSS pixels, with an empty session."""
        self.browser = browser
        self.size = (width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._resize(width, height)
        browser.get(url + "/admin")
        browser.execute_script("sessionStorage.clear()")
        browser.get(url + "/admin")
        self.until("!document.getElementById('ask').hidden")
        browser.get_log("browser")  # of the page before, whose server is gone

    def _resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        return self.browser.execute_script(f"return ({expression})")

    def until(self, expression: str) -> Any:
        """Wait until an expression in the page is true; returns its value."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, WAIT_S, 0.05).until(lambda _: self.js(expression), expression)

    def text(self, selector: str) -> str:
        """The visible text of an element."""
        return self.js(f"document.querySelector({selector!r}).innerText")

    def enter(self, key: str) -> None:
        """Type a key and press Enter."""
        self.browser.find_element("id", "key").send_keys(key + "\n")

    def watch(self, key: str) -> None:
        """Enter the key and wait for the first picture."""
        self.enter(key)
        self.until("document.getElementById('link').className === 'live'")

    def stop_clock(self) -> None:
        """From now on time passes for the page's drawing only by `advance`."""
        self.browser.execute_script("window.clockMs = performance.now(); performance.now = () => window.clockMs")

    def advance(self, ms: float) -> None:
        """Let time pass."""
        self.browser.execute_script(f"window.clockMs += {ms}")

    def stop_at(self, now_s: float) -> None:
        """Show no picture after the one of this time, and stop the clock with it."""
        self.browser.execute_script(
            """
            const showing = window.show;
            window.show = (picture) => {
              if (window.clockMs !== undefined) return;
              showing(picture);
              if (picture.now_s !== WANTED) return;
              window.clockMs = performance.now();
              performance.now = () => window.clockMs;
            };
            """.replace("WANTED", str(now_s))
        )

    def press(self, *keys: str) -> None:
        """Press keys where the focus is."""
        self.browser.switch_to.active_element.send_keys(*keys)

    def errors(self) -> list[str]:
        """The errors that the browser has logged since the last call, but for refused keys."""
        entries = [e for e in self.browser.get_log("browser") if e["level"] == "SEVERE"]
        return [entry["message"] for entry in entries if "status of 40" not in entry["message"]]

    def save(self, path: Path) -> None:
        """The whole page as a PNG with a palette, in which rare colours matter as much as common ones."""
        from PIL import Image

        width, height = self.size
        self._resize(width, max(height, self.js("document.documentElement.scrollHeight")))
        self.until("new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => resolve(true))))")
        shot = Image.open(io.BytesIO(self.browser.get_screenshot_as_png())).convert("RGB")
        palette = shot.quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        palette.save(path, optimize=True)
        self._resize(width, height)
