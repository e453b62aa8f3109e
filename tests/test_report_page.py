"""The page of a report in a real browser: it draws, it answers, and it asks nobody for anything."""

import json
import math
import re
import shutil

import pytest

from decentral.config import dump, load
from decentral.report import write

webdriver = pytest.importorskip("selenium.webdriver")

HOSTILE = "<img src=x onerror=alert(1)>"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture
def browser():
    driver = shutil.which("chromedriver")
    if BROWSER is None or driver is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield made
    finally:
        made.quit()


@pytest.fixture
def sweep(quick, tmp_path):
    """Parallel SGD, Gossip-AGA with a period that grows, and a task with a hostile name."""
    methods = [{"name": "parallel_sgd"}, {"name": "gossip_aga"}, {"name": "gossip_sgd"}]
    for place, method in enumerate(methods):
        for seed in (0, 1):
            folder = tmp_path / "runs" / f"{place}-{seed}"
            folder.mkdir(parents=True)
            task = quick["task"] | ({"name": HOSTILE} if place == 2 else {})
            config = load(quick, {"steps": 100, "seed": seed, "algorithm": method, "task": task})
            rows = [
                {
                    "step": step,
                    "loss": (2 + seed + place) * math.exp(-step / 20),
                    "consensus_distance": 0.0 if place == 0 else step**-2.0,
                    "period": 4 + step // 30 if place == 1 else None,
                    "bytes_sent": step * (1000 + place),
                    "sim_time_s": step * 0.01,
                    "time_s": 1.0,
                    "lr": 0.1,
                    "workers": 4,
                    "eval_accuracy": 1 - math.exp(-step / 30) / (1 + seed),
                    HOSTILE: 1.0 + step,
                }
                for step in range(10, 101, 10)
            ]
            (folder / "config.yaml").write_text(dump(config))
            (folder / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
            (folder / "summary.json").write_text('{"status": "done"}')
    return tmp_path / "runs"


@pytest.mark.slow
def test_the_page_in_a_browser(browser, sweep, tmp_path):
    page = write([sweep], tmp_path / "out", figures=False)

    def emulate(scheme, media="", width=1200):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"media": media, "features": [feature]}
        )
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def ask(expression, *arguments):
        return browser.execute_script(f"return {expression}", *arguments)

    def click(selector):
        browser.execute_script("document.querySelector(arguments[0]).click()", selector)

    def lines():
        """The lines' corners, chart by chart."""
        return ask(
            "[...document.querySelectorAll('.chart')].map(chart =>"
            " [...chart.querySelectorAll('path.curve')].map(line => line.getAttribute('d')))"
        )

    def text(selector):
        return ask("document.querySelector(arguments[0]).textContent", selector)

    def brightness(selector="body"):
        colour = ask(
            "getComputedStyle(document.querySelector(arguments[0])).backgroundColor", selector
        )
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    emulate("light")
    browser.get(page.as_uri())

    titles = ask("[...document.querySelectorAll('.chart h2')].map(title => title.textContent)")
    assert titles == ["training loss", "test accuracy", "consensus distance", HOSTILE, "period H"]
    drawn = lines()
    assert [len(chart) for chart in drawn] == [3, 3, 2, 3, 1]  # zero has no place on a log axis
    assert "not above zero: parallel_sgd" in text("[data-chart='2'] svg")
    for corners in (line for chart in drawn for line in chart):
        assert re.fullmatch(r"M[\d.]+,[\d.]+(L[\d.]+,[\d.]+){9,}", corners)
    assert ask("document.querySelectorAll('.topology .worker').length") == 8  # of two tasks

    click("[data-chart='2'] .log")  # a linear axis has a place for zero
    assert len(lines()[2]) == 3
    click("[data-group='1']")
    assert [len(chart) for chart in lines()] == [2, 2, 2, 2, 0]
    click("[data-group='1']")
    click("#none")
    assert "no curve chosen" in text("[data-chart='0'] svg")
    click("#all")
    click("[data-chart='2'] .log")
    assert lines() == drawn
    click("[data-chart='1'] .log")
    assert lines()[1] != drawn[1]
    click("[data-axis='bytes']")
    assert "bytes sent (kB)" in text("[data-chart='0'] svg")
    assert lines()[0] != drawn[0]

    plot = ask("document.querySelector('[data-chart=\"0\"] .plot')")
    webdriver.ActionChains(browser).move_to_element(plot).perform()
    assert not ask("document.getElementById('tip').hidden")
    told = text("#tip")
    assert all(label in told for label in ("kB", "parallel_sgd", "gossip_aga", HOSTILE))
    webdriver.ActionChains(browser).move_to_element(ask("document.querySelector('h1')")).perform()
    assert ask("document.getElementById('tip').hidden")

    assert brightness() > 200
    emulate("dark")
    assert brightness() < 60
    click("#theme")
    assert brightness() > 200
    click("#theme")
    assert brightness(".card") < 60
    emulate("dark", "print")
    assert brightness() > 250
    assert ask("getComputedStyle(document.querySelector('#axes')).display") == "none"
    assert len(browser.execute_cdp_cmd("Page.printToPDF", {})["data"]) > 20_000

    emulate("light", width=360)
    browser.get(page.as_uri())
    assert ask("document.documentElement.scrollWidth") <= 360
    assert [len(chart) for chart in lines()] == [3, 3, 2, 3, 1]

    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    assert set(asked) == {page.as_uri()}
