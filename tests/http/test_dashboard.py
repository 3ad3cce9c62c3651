"""The page of ``fwdllm serve`` in a real browser, against a real server.

FWDLLM_SCREENSHOTS names a folder for pictures of it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runs import MODEL, QUICK, TRAIN, make_cli
from serving import Server

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}

# The one for containers, and what keeps it from calling home.
OPTIONS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
SECONDS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("serve") / "state") as server:
        yield server


class Page:
    """An open page. faults: what the browser complained about."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(accept_downloads=True, **options)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(SECONDS)
        self.faults: list[str] = []
        self.tab.on("pageerror", lambda error: self.faults.append(str(error)))
        self.tab.on("console", self._heard)
        self.tab.goto(url)

    def _heard(self, message: Any) -> None:
        if message.type == "error":
            self.faults.append(message.text)

    def __enter__(self) -> Page:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def number(self, selector: str, attribute: str) -> float:
        return float(self.tab.get_attribute(selector, attribute) or "nan")

    def await_points(self, count: int) -> None:
        """Waits until the curve has so many points."""
        while self.number("#loss-chart", "data-points") < count:
            self.tab.wait_for_timeout(50)

    def await_text(self, selector: str) -> str:
        """What an element says, once it says something."""
        self.tab.wait_for_selector(f"{selector}:not(:empty)")
        return str(self.tab.text_content(selector))

    def overflows(self) -> bool:
        """Whether it must be scrolled sideways."""
        root = "document.documentElement"
        return bool(self.tab.evaluate(f"{root}.scrollWidth > {root}.clientWidth"))

    def keep(self, name: str) -> None:
        folder = os.environ.get("FWDLLM_SCREENSHOTS")
        if folder:
            self.tab.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_a_job_is_started_watched_and_used(server: Server, browser: Any, tmp_path: Path) -> None:
    with Page(browser, server.url, viewport=DESKTOP) as page:
        tab = page.tab
        tab.wait_for_selector('#connection[data-state="live"]')
        assert page.await_text("#model") == "fwdllm-tiny"
        tab.set_input_files("#job-file", TRAIN)
        tab.fill("#job-steps", "30")
        tab.fill("#job-suffix", "pirate")
        tab.click("#job-advanced summary")
        tab.select_option("#job-method", "forward-ad")
        tab.fill('[name="perturbations"]', "4")
        tab.fill('[name="batch_size"]', "4")
        tab.fill('[name="learning_rate"]', "0.01")
        tab.fill('[name="rank"]', "2")
        tab.click("#job-start")
        tab.wait_for_selector('#runs li[data-status="running"]')
        page.await_points(3)
        page.await_points(12)  # the curve moves by itself
        assert "pirate" in page.await_text("#run-title")
        page.keep("dashboard-running")
        tab.wait_for_selector('#runs li[data-status="succeeded"]')
        assert page.number("#loss-chart", "data-points") == 30
        assert page.number("#loss-chart", "data-last-loss") < 6.6  # 6.95 of the model as it is
        with tab.expect_download() as download:
            tab.click("#download-adapter")
        saved = tmp_path / download.value.suggested_filename
        download.value.save_as(saved)
        assert saved.suffix == ".gguf"
        [job] = server.get("/v1/fine_tuning/jobs")["data"]
        assert saved.read_bytes() == server.content(job["adapter"])
        tab.fill("#try-prompt", "What does a cow say?")
        tab.press("#try-prompt", "Enter")
        base, tuned = page.await_text("#try-base"), page.await_text("#try-tuned")
        assert base
        assert tuned
        tab.wait_for_selector("#try-send:enabled")
        assert not page.overflows()
        assert page.faults == []
        page.keep("dashboard-desktop")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(server: Server, browser: Any, scheme: str) -> None:
    options = {"viewport": PHONE, "color_scheme": scheme, "device_scale_factor": 2}
    with Page(browser, server.url, has_touch=True, is_mobile=True, **options) as page:
        page.tab.wait_for_selector('#connection[data-state="live"]')
        if server.get("/v1/runs")["data"]:
            page.await_points(1)
        assert not page.overflows()
        background = page.tab.evaluate("getComputedStyle(document.body).backgroundColor")
        lightness = sum(map(int, background.strip("rgb()").split(", ")[:3]))
        assert (lightness < 200) == (scheme == "dark")
        assert page.faults == []
        page.keep(f"dashboard-phone-{scheme}")


def test_what_the_server_says_of_a_bad_file_is_shown(
    server: Server, browser: Any, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with Page(browser, server.url, viewport=DESKTOP) as page:
        page.tab.wait_for_selector('#connection[data-state="live"]')
        page.tab.set_input_files("#job-file", bad)
        page.tab.click("#job-start")
        assert page.await_text("#job-error") == "bad.jsonl:2: completion is missing"


def test_names_from_outside_stay_text(server: Server, browser: Any) -> None:
    name = "<img src=x onerror=document.title='owned'>.jsonl"
    server.upload(b'{"text": "hello"}\n', name)
    with Page(browser, server.url, viewport=DESKTOP) as page:
        page.tab.wait_for_selector('#connection[data-state="live"]')
        page.tab.wait_for_selector("#job-uploaded option >> text=onerror", state="attached")
        assert page.tab.locator("img[src=x]").count() == 0
        assert page.tab.title() != "owned"


def test_it_says_when_the_server_is_gone_and_comes_back(browser: Any, tmp_path: Path) -> None:
    with Server(tmp_path / "state") as server:
        port = server.url.rpartition(":")[2]
        with Page(browser, server.url, viewport=DESKTOP) as page:
            page.tab.wait_for_selector('#connection[data-state="live"]')
            server.kill()
            page.tab.wait_for_selector('#connection[data-state="offline"]')
            server._options = ("--port", port)
            server.start()
            page.tab.wait_for_selector('#connection[data-state="live"]')


def test_it_asks_for_the_key(browser: Any, tmp_path: Path) -> None:
    with (
        Server(tmp_path / "state", "--api-key", "sesame", key="sesame") as server,
        Page(browser, server.url, viewport=DESKTOP) as page,
    ):
        for key in ("wrong", "sesame"):
            page.tab.wait_for_selector("#key-dialog[open]")
            page.tab.fill("#key", key)
            page.tab.press("#key", "Enter")
        page.tab.wait_for_selector('#connection[data-state="live"]')
        assert page.await_text("#model") == "fwdllm-tiny"


def test_folders_of_runs_are_shown(
    browser: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cli, runs = make_cli(capfd), tmp_path / "runs"
    runs.mkdir()
    local = ("tune", MODEL, TRAIN, "-o", tmp_path / "a.gguf", "--run-dir", runs / "local", *QUICK)
    assert cli(*local).code == 0
    federation = ("simulate", MODEL, TRAIN, "--run-dir", runs / "federation", "--clients", 4)
    assert cli(*federation, "--per-round", 2, "--rounds", 3).code == 0
    with (
        Server(tmp_path / "state", "--runs", runs) as server,
        Page(browser, server.url, viewport=DESKTOP) as page,
    ):
        shown = {run["name"]: run for run in server.get("/v1/runs")["data"]}
        assert set(shown) == {"local", "federation"}
        for name, points in (("local", 4), ("federation", 3)):
            page.tab.click(f"#runs li[data-run={json.dumps(shown[name]['id'])}] a")
            page.tab.wait_for_selector(f"#run-title >> text={name}")
            page.await_points(points)
        figures = page.tab.inner_text("#figures")
        assert "Received by clients" in figures
        assert "Resident memory" not in figures  # nobody has written it down
        page.keep("dashboard-federation")
        assert page.faults == []
