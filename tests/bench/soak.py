"""A user's long day: samplings of three models, loader switches, LoRAs, exports and cancels.

The server runs on the CPU, its page is open in Chromium where there is one. Memory is the server's
own (anonymous), with all models freed; in between it goes up and down with what is loaded.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
package = types.ModuleType("hswq")
package.__path__ = [str(ROOT)]
sys.modules["hswq"] = package

from harness.client import Client  # noqa: E402
from harness.fixtures import PROBE_NODES  # noqa: E402
from harness.server import ComfyUIServer  # noqa: E402
from harness.soak import Soak  # noqa: E402

READY = "window.app && app.vueAppReady && app.extensionManager && !app.extensionManager.spinner"
HEAP = "performance.memory.usedJSHeapSize"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=300, help="things done")
    parser.add_argument("--every", type=int, default=30, help="how often to look")
    parser.add_argument("--only", help="one kind of thing, such as: sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    return parser.parse_args()


@contextlib.contextmanager
def open_page(url: str) -> Iterator[object]:
    """ComfyUI's page with the panel open, None where there is no Chromium."""
    program = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium")
    if not program:
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--js-flags=--expose-gc"]
        browser = playwright.chromium.launch(executable_path=program, args=options)
        page = browser.new_page()
        page.on("pageerror", lambda error: print(f"the page: {error}", flush=True))
        page.goto(url)
        page.wait_for_function(READY)
        open_panel(page)
        yield page
        browser.close()


def open_panel(page: object) -> None:
    tabs = page.evaluate("app.extensionManager.getSidebarTabs().map((tab) => tab.id)")
    for tab in (tab for tab in tabs if "hswq" in tab.lower()):
        page.evaluate("(id) => app.extensionManager.command.execute(id)",
                      f"Workspace.ToggleSidebarTab.{tab}")  # fmt: skip


def look(soak: Soak, page: object, number: int, began: float) -> dict:
    """Measure, and print what was found."""
    row = {"things": number, "seconds": round(time.monotonic() - began)}
    row |= {"hooks": soak.hooks(), "server MiB": round(soak.memory() / 1024, 1)}
    row["objects"] = soak.objects()
    if page is not None:
        page.evaluate("gc()")
        row["page MiB"] = round(page.evaluate(HEAP) / 2**20, 1)
    print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    return row


def main() -> None:
    chosen = arguments()
    with (
        tempfile.TemporaryDirectory(prefix="hswq-soak-") as folder,
        ComfyUIServer(Path(folder), {"hswq_probe": PROBE_NODES}) as server,
        open_page(server.url) as page,
    ):
        soak = Soak(server, Client(server.url), chosen.seed)
        if chosen.only:
            soak.actions = {getattr(soak, chosen.only): 1}
        began, rows = time.monotonic(), []
        while not rows or rows[-1]["things"] < chosen.times:
            soak.run(chosen.every)
            rows.append(look(soak, page, sum(soak.done.values()), began))
        soak.assert_files_are_right()
    print(f"done: {soak.done}; recorded: {soak.samples}; the files are right")
    if chosen.json:
        about = {"benchmark": "soak", "done": soak.done, "results": rows}
        Path(chosen.json).write_text(json.dumps(about, indent=2) + "\n")


main()
