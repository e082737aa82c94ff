"""
The operator's page in a real Chromium, with recorded pictures of 1, 2 and 64 simulated instances.

With `--page-figures FOLDER` the figures of docs/operating.md are written there (2 and 64 instances, light and dark).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from support.browser import Page, chromium
from support.pictures import MANY, ONE, TWO, Recording, record
from support.served_page import ADMIN_KEY, API_KEY, Recorded, serving

SHIFT_LIMIT: Final = 0.02
"""Of the browser's layout shift score, over all pictures after the first; 0.1 is what pages may have in all."""
PIXELS: Final = """(() => {
  const canvas = document.getElementById("canvas"), style = getComputedStyle(document.documentElement);
  const probe = document.createElement("canvas").getContext("2d");
  const rgb = (name) => { probe.fillStyle = style.getPropertyValue(name).trim(); probe.fillRect(0, 0, 1, 1);
    return probe.getImageData(0, 0, 1, 1).data; };
  const found = {}, wanted = { "--tick": 0, "--out": 0, "--good": 0 };
  const data = canvas.getContext("2d").getImageData(0, 44, canvas.width, canvas.height - 44).data;
  for (const name in wanted) {
    const [r, g, b] = rgb(name);
    found[name] = 0;
    for (let i = 0; i < data.length; i += 4)
      if (data[i + 3] > 150 && Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) < 24)
        found[name]++;
  }
  return found;
})()"""
"""Opaque pixels of the lanes in the colours of ticks inside and outside their stage, and of moves."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One browser for all tests."""
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def recorded() -> Callable[[Recording], list[dict[str, Any]]]:
    """Recordings, each made once."""
    made: dict[Recording, list[dict[str, Any]]] = {}

    def pictures(recording: Recording) -> list[dict[str, Any]]:
        if recording not in made:
            made[recording] = record(recording)
        return made[recording]

    return pictures


def test_the_key_is_asked_for_and_kept_in_the_tab(browser: Any, recorded: Any) -> None:
    """A wrong key and the API key are refused in words; the admin key survives a reload, and can be forgotten."""
    with serving(Recorded(recorded(ONE))) as url:
        page = Page(browser, url)
        page.enter("wrong")
        page.until("document.getElementById('why').textContent.includes('does not know this key')")
        page.enter(API_KEY)
        page.until("document.getElementById('why').textContent.includes('needs the admin key')")
        assert page.js("sessionStorage.length") == 0
        page.watch(ADMIN_KEY)
        browser.refresh()
        page.until("document.getElementById('link').className === 'live'")
        assert page.js("localStorage.length + document.cookie.length") == 0
        browser.find_element("id", "forget").click()
        page.until("!document.getElementById('ask').hidden && document.getElementById('page').hidden")
        assert page.js("sessionStorage.length") == 0
        assert page.errors() == []


@pytest.mark.parametrize("recording", [ONE, TWO, MANY], ids=["1", "2", "64"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_instance_has_its_lane(browser: Any, recorded: Any, recording: Recording, width: int) -> None:
    """All lanes are there, in the order of the stages, with their figures; nothing is wider than the window."""
    pictures = recorded(recording)
    with serving(Recorded(pictures[-1:])) as url:
        page = Page(browser, url, width)
        page.watch(ADMIN_KEY)
        instances = pictures[-1]["instances"]
        last = len(recording.stages)
        wanted = sorted(instances, key=lambda i: (last if i["stage"] is None else i["stage"], int(i["id"])))
        shown = page.js("[...document.querySelectorAll('#names .id')].map((id) => id.textContent)")
        assert shown == [instance["id"] for instance in wanted]
        cells = page.js("[...document.querySelectorAll('#stats .row')].map((r) => r.querySelector('.n').textContent)")
        assert cells == [str(instance["running"]) for instance in wanted]
        assert page.js("document.documentElement.scrollWidth") == width
        told = page.text("#legend")
        assert all(words in told for words in ("running request", "outside its stage", "move under way", "recomputed"))
        assert page.js("document.getElementById('legend').scrollWidth <= document.getElementById('lanes').clientWidth")
        assert "tokens" in page.js("document.querySelector('#names .head').textContent")
        heights = [page.js(f"document.getElementById('{name}').clientHeight") for name in ("names", "plot", "stats")]
        assert len(set(heights)) == 1
        drawn = page.js(PIXELS)
        n_running = sum(instance["running"] for instance in instances)
        assert drawn["--tick"] > n_running * (1 if recording is MANY else 5)
        n_up = sum(instance["up"] for instance in instances)
        assert f"{n_up} of {len(instances)}" in page.text("#strip")
        assert page.errors() == []


def test_lengths_outside_their_stage_stand_out(browser: Any, recorded: Any) -> None:
    """A request that has outgrown its instance's stage has another colour; without any, that colour is not there."""
    picture = dict(recorded(TWO)[-1])
    low, high = ({**instance, "waiting": 0} for instance in picture["instances"])
    boundary = picture["stages"][1]["lo"]
    inside = {**picture, "instances": [{**low, "lengths": [100]}, {**high, "lengths": [boundary]}]}
    outside = {**picture, "instances": [{**low, "lengths": [100, boundary]}, {**high, "lengths": [boundary]}]}
    for shown, is_seen in ((inside, False), (outside, True)):
        shown["moves"] = {"under_way": [], "recent": [], "ended": []}
        with serving(Recorded([shown])) as url:
            page = Page(browser, url)
            page.watch(ADMIN_KEY)
            assert (page.js(PIXELS)["--out"] > 0) == is_seen


def test_a_move_is_drawn_once_and_fades(browser: Any, recorded: Any) -> None:
    """A move that has ended is drawn from lane to lane, and is gone after a few seconds, however often it is told."""
    picture = dict(recorded(TWO)[-1])
    move = {
        "id": "m", "request": "r", "source": "0", "target": "1", "tokens": 200, "reason": "outgrew_stage",
        "outcome": "moved", "detail": "", "pause_s": 0.02, "seconds_ago": 0.1,
    }  # fmt: skip
    still = {**picture, "moves": {"under_way": [], "recent": [], "ended": []}}
    moved = {**still, "moves": {**still["moves"], "recent": [move]}}
    with serving(shown := Recorded([still, moved])) as url:
        page = Page(browser, url)
        page.stop_clock()
        page.watch(ADMIN_KEY)
        page.until("now.moves.recent.length === 1")
        assert page.js(PIXELS)["--good"] > 20
        page.advance(3000)
        page.until(f"{PIXELS}['--good'] === 0")
        looks = shown.n_looks
        while shown.n_looks < looks + 3:  # told again, and drawn
            page.until("now.moves.recent.length === 1")
        assert page.js(PIXELS)["--good"] == 0


def test_the_keyboard_is_enough(browser: Any, recorded: Any) -> None:
    """Arrow keys go along the lanes, Enter opens an instance, Escape closes it; a request's story likewise."""
    from selenium.webdriver.common.keys import Keys

    pictures = recorded(TWO)
    with serving(Recorded(pictures[-1:])) as url:
        page = Page(browser, url)
        page.watch(ADMIN_KEY)
        page.js("document.querySelector('#names button').focus()")
        page.press(Keys.ARROW_DOWN)
        assert page.js("document.activeElement.getAttribute('aria-label')").startswith("instance 1, up")
        page.press(Keys.ENTER)
        page.until("document.getElementById('dialog').open")
        assert "Instance 1" in page.text("#dialog")
        assert "failed pulls" in page.text("#dialog")
        page.press(Keys.ESCAPE)
        page.until("!document.getElementById('dialog').open")
        page.js("document.querySelector('#oldest button').focus()")
        page.press(Keys.ENTER)
        page.until("document.getElementById('dbody').innerText.includes('arrived')")
        told = page.text("#dialog")
        assert pictures[-1]["story"]["id"] in told
        assert "dispatched to" in told
        assert page.errors() == []


def test_pictures_do_not_shift_the_page(browser: Any, recorded: Any) -> None:
    """From one picture to the next, with moves, a drain and moving boundaries, everything stays in its place."""
    with serving(recorded_server := Recorded(recorded(MANY))) as url:
        page = Page(browser, url)
        page.watch(ADMIN_KEY)
        page.js(
            "(() => { window.shift = 0; new PerformanceObserver((list) => { for (const entry of list.getEntries()) "
            "window.shift += entry.value; }).observe({ type: 'layout-shift' }); })()"
        )
        begun = recorded_server.n_looks
        page.until(f"now.now_s === {recorded_server.pictures[-1]['now_s']}")
        assert recorded_server.n_looks > begun
        assert page.js("window.shift") < SHIFT_LIMIT


def test_a_server_that_goes_is_missed(browser: Any, recorded: Any) -> None:
    """When the server drains, the page says so and keeps the last picture; it tries again by itself."""
    with serving(shown := Recorded(recorded(ONE))) as url:
        page = Page(browser, url)
        page.watch(ADMIN_KEY)
        shown.is_ending = True
        page.until("document.getElementById('link').textContent.includes('the server drains; trying again')")
        assert not page.js("document.getElementById('page').hidden")
        shown.is_ending = False
        page.until("document.getElementById('link').className === 'live'")


@pytest.mark.parametrize("name", ["2", "64"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures(browser: Any, recorded: Any, pytestconfig: pytest.Config, name: str, scheme: str) -> None:
    """The figures of the documentation, at a moment with moves."""
    folder = pytestconfig.getoption("--page-figures")
    if folder is None:
        pytest.skip("writes the documentation's figures: --page-figures FOLDER")
    pictures = recorded({"2": TWO, "64": MANY}[name])
    until = max(range(2, len(pictures)), key=lambda n: len(pictures[n]["moves"]["recent"]))
    with serving(Recorded(pictures[: until + 1])) as url:
        page = Page(browser, url, is_dark=scheme == "dark")
        page.stop_at(pictures[until]["now_s"])
        page.watch(ADMIN_KEY)
        page.until("window.clockMs !== undefined")
        path = Path(folder) / f"operator-page-{name}-{scheme}.png"
        page.save(path)
        assert path.stat().st_size < 200_000
