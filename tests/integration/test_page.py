"""The page in a real Chromium: it needs no network, draws its charts, and links every chart point to a trace."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from deployments.cli.main import main
from tests.support.made import otlp, request, window

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here")
HOSTILE = "</script><img src=x onerror=window.harmed=1><b>"
CHARTS = ("causes", "timeline", "latency", "cold", "device", "tokens", "batches")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One minute with a slow tokenizer, three cold starts and one process whose attributes contain hostile markup."""
    spans = window({"tokenize": 90.0})
    for number in range(240, 280):
        slow: dict[str, Any] = {"cold": 2000.0} if number in (250, 251, 252) else {}
        spans += request(number, number * 250.0, client=HOSTILE, route=HOSTILE, replica=HOSTILE, **slow)
    spans = [replace(one, service=HOSTILE) if one.name == "ai.inference.respond" else one for one in spans]
    folder = tmp_path_factory.mktemp("page")
    (folder / "traces.jsonl").write_text(otlp(spans))
    target = folder / "page.html"
    assert main(["why", "--source", str(folder / "traces.jsonl"), "--format", "html", "-o", str(target)]) == 0
    return target


class Opened:
    """The open page, with the URLs it requested and its console messages and errors."""

    def __init__(self, browser: Browser, path: Path, **settings: Any) -> None:
        self.page: Page = browser.new_page(**settings)
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda asked: self.asked.append(asked.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())

    def colors(self, chart: str) -> int:
        """Return the number of distinct colours on the chart's canvas; 1 if nothing is drawn."""
        count: int = self.page.evaluate(
            """(id) => {
                const canvas = document.getElementById(id);
                const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
                return new Set(new Uint32Array(pixels.buffer)).size;
            }""",
            f"chart-{chart}",
        )
        return count


@pytest.fixture
def opened(browser: Browser, path: Path) -> Iterator[Opened]:
    opened = Opened(browser, path, viewport={"width": 1280, "height": 900})
    yield opened
    assert opened.complaints == []
    assert opened.asked == [path.as_uri()]
    opened.page.close()


def test_findings_and_all_charts_render_without_a_network(opened: Opened) -> None:
    page = opened.page
    assert page.locator(".finding h2 b").all_inner_texts() == ["cold_start", "tokenization"]
    assert page.locator("figcaption").all_inner_texts() == [
        "Latency by cause",
        "The device around the longest wait",
        "Latency by stage",
        "Cold starts",
        "GPU utilisation against latency",
        "Tokens against forward time",
        "Batch efficiency",
    ]
    assert all(opened.colors(chart) > 10 for chart in CHARTS)
    assert "tokenization" in page.locator("tbody").inner_text()


def test_a_finding_links_to_its_traces(opened: Opened) -> None:
    page = opened.page
    assert not page.locator("#trace").is_visible()
    link = page.locator(".finding a").first
    trace_id = link.inner_text()
    link.click()
    shown = page.locator("#trace").inner_text()

    assert trace_id in shown
    assert "batched_predict" in shown
    assert "cold start 2002" in shown
    assert "The model run of this request" in shown
    assert page.url.endswith(f"#{trace_id}")
    page.get_by_role("button", name="close").click()
    assert not page.locator("#trace").is_visible()


@pytest.mark.parametrize("chart", CHARTS)
def test_every_chart_point_links_to_a_trace_on_the_page(opened: Opened, chart: str) -> None:
    page = opened.page
    marks = page.evaluate(
        """(id) => Chart.getChart(id).data.datasets.filter((set) => set.pointRadius !== 0)
            .flatMap((set) => set.data).filter((mark) => mark.y).map((mark) => mark.trace)""",
        f"chart-{chart}",
    )
    assert marks
    assert page.evaluate("(marks) => marks.filter((trace) => !data.traces[trace])", marks) == []

    place = page.evaluate(
        """(id) => {
            const chart = Chart.getChart(id);
            for (let set = 0; set < chart.data.datasets.length; set++)
                for (const [index, mark] of chart.data.datasets[set].data.entries())
                    if (mark.y && mark.trace) {
                        const at = chart.getDatasetMeta(set).data[index].getCenterPoint();
                        return { x: at.x, y: at.y };
                    }
        }""",
        f"chart-{chart}",
    )
    page.locator(f"#chart-{chart}").click(position=place)
    page.wait_for_function("location.hash.length === 33")
    assert page.locator("#trace").is_visible()


def test_trace_values_are_shown_as_text_and_never_as_markup(opened: Opened) -> None:
    page = opened.page
    page.locator(".finding a").first.click()
    assert HOSTILE in page.locator("#trace").inner_text()
    assert page.evaluate("window.harmed") is None
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_in_light_and_dark_mode(browser: Browser, path: Path, scheme: Any) -> None:
    opened = Opened(browser, path, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = opened.page
    page.locator(".finding a").first.click()
    width, ground, ink = page.evaluate(
        """() => {
            const style = getComputedStyle(document.body);
            const light = (color) =>
                color.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 765;
            return [document.documentElement.scrollWidth, light(style.backgroundColor), light(style.color)];
        }"""
    )
    # Nothing overflows the screen, and text and background contrast strongly.
    assert width == 360
    assert (ground < 0.2 and ink > 0.8) if scheme == "dark" else (ground > 0.8 and ink < 0.2)
    assert all(opened.colors(chart) > 10 for chart in CHARTS)
    assert opened.complaints == []
    page.close()


def test_what_is_smuggled_into_the_page_does_not_run(browser: Browser, path: Path) -> None:
    opened = Opened(browser, path)
    smuggled = "<img src=data:x onerror=window.harmed=1>"
    with opened.page.expect_event("console"):
        opened.page.evaluate(f"document.body.insertAdjacentHTML('beforeend', '{smuggled}')")
    assert opened.page.evaluate("window.harmed") is None
    assert any("Content Security Policy" in complaint for complaint in opened.complaints)
    opened.page.close()
