import contextlib
import os
import re
import shutil
from collections.abc import Iterator

import pytest
from environment.install import FRONTEND_FOLDER
from harness.client import Client
from harness.fixtures import (
    client,
    pytest_runtest_makereport,
    reset_settings,
    small_sampling,
    start_over,
    toy_server,
)
from harness.panelpage import PanelPage
from harness.prompts import stock_loader
from harness.server import ComfyUIServer
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

__all__ = ["client", "pytest_runtest_makereport"]

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
READY = """window.app && app.vueAppReady && app.extensionManager
    && !app.extensionManager.spinner"""
PAGE_MILLISECONDS = 120_000  # five seconds on an idle machine
# An upload, or a question about an export, such as of a file that a test has deleted.
REFUSED = re.compile(r"status of 4(00|09) .*/statistics/(upload|\w+/export\?)")
TEAPOT = 418  # an HTTP status that no server here has


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium as the system has it: CHROMIUM_PATH, or what is on PATH."""
    program = os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, PROGRAMS)), "")
    if not program:
        pytest.skip("no Chromium: install it, or set CHROMIUM_PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUIServer]:
    """A server with the toy and the newest frontend, as most users have it."""
    assert FRONTEND_FOLDER.is_dir(), "run `dev.py test` once, which fetches it"
    options = ("--front-end-root", str(FRONTEND_FOLDER))
    with toy_server(tmp_path_factory.mktemp("newest"), options) as server:
        yield server


@pytest.fixture(scope="session")
def pinned_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUIServer]:
    """A server like the other, with the frontend that ComfyUI pins; for a few tests."""
    with toy_server(tmp_path_factory.mktemp("pinned")) as server:
        yield server


@pytest.fixture(scope="session")
def statistics(server: ComfyUIServer) -> tuple[str, bytes]:
    """Name and bytes of a file of 40 recorded images; recorded once for all tests."""
    start_over(server)
    Client(server.url).run(small_sampling(stock_loader(), 40))
    (path,) = (server.models / "hswq").glob("*.pt")
    return path.name, path.read_bytes()


@pytest.fixture
def recorded(statistics: tuple[str, bytes], server: ComfyUIServer) -> None:
    """The server has recorded 40 images of the toy."""
    start_over(server)
    name, content = statistics
    (server.models / "hswq" / name).write_bytes(content)


@pytest.fixture
def panel(recorded: None, page: Page) -> PanelPage:
    """The panel, not open yet, of a server that has recorded 40 images of the toy."""
    return PanelPage(page)


@pytest.fixture
def page(browser: Browser, server: ComfyUIServer) -> Iterator[Page]:
    """ComfyUI's page, ready. A script error, or a console error of this extension, fails a test."""
    reset_settings(server)
    with open_page(browser, server) as page:
        yield page


@contextlib.contextmanager
def open_page(browser: Browser, server: ComfyUIServer) -> Iterator[Page]:
    """Open ComfyUI's page; at the end, nothing in it may have gone wrong."""
    problems: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        """ComfyUI's own page logs errors too, such as files that a new user does not have yet."""
        told = f"{message.text} ({message.location.get('url')})"
        if REFUSED.search(told):
            return  # Chromium's own line about an answer that the panel shows
        if f"status of {TEAPOT}" in told:
            return  # its line about an answer that a test gives in the server's place
        if "net::ERR_CONNECTION" in told:
            return  # its line about a server that a test stops: the panel says that it is gone
        if message.type in ("error", "warning") and "hswq" in told.lower():
            problems.append(told)

    page = browser.new_page(viewport={"width": 1680, "height": 900})
    page.set_default_timeout(PAGE_MILLISECONDS)
    page.on("console", listen)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.url)
    page.wait_for_function(READY)
    try:
        yield page
    finally:
        page.unroute_all(behavior="ignoreErrors")  # of an answer that is still on its way
        page.close()
    assert problems == []
