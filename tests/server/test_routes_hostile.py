"""Requests of somebody who means ill: nothing changes, and nothing breaks."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from harness import hostile, hostile_random
from harness.fixtures import change_settings
from harness.http import Answer, Connection
from harness.panel import Panel
from harness.server import ComfyUIServer, snapshot

pytestmark = pytest.mark.server

COUNT = int(os.environ.get("HSWQ_REQUESTS", "100"))

GROUPS = {
    "ids": hostile.ids,
    "sessions": hostile.sessions,
    "settings": hostile.settings,
    "elsewhere": hostile.elsewhere,
    "hosts": hostile.hosts,
    "bodies": hostile.bodies,
    "methods": hostile.methods,
    "uploads": hostile.uploads,
    "random": lambda: hostile_random.requests(0, COUNT),
}
REFUSED = {400, 403, 404, 405, 409, 413, 415}
LOOKS = {200, 206, 304, 412, 416}
HARMLESS = {"methods": {*LOOKS, 417, 501}, "random": LOOKS}
"""What looks only, whatever its headers say, and what aiohttp answers to methods and headers."""


@pytest.fixture(scope="module")
def table(content: bytes) -> dict[str, list[hostile.Request]]:
    """Every group's requests."""
    made = {
        name: list(make(content) if name == "uploads" else make()) for name, make in GROUPS.items()
    }
    return {name: list(dict.fromkeys(requests)) for name, requests in made.items()}


@pytest.fixture
def connection(server: ComfyUIServer):
    connection = Connection(server.url)
    yield connection
    connection.close()


def test_there_are_a_thousand(table):
    assert sum(map(len, table.values())) >= 1000


@pytest.mark.parametrize("group", GROUPS)
def test_nothing_changes(server, panel: Panel, ready: str, connection, table, group: str):
    status, before = panel.status(), everything(server)  # the first question fills a cache
    logged = server.log.stat().st_size
    answers = Counter()
    for request in table[group]:
        answer = send(connection, request, ready, server)
        assert answer.status in REFUSED | HARMLESS.get(group, set()), (request, answer)
        if answer.status in REFUSED and answer.body and "json" in answer.headers["content-type"]:
            assert "\n" not in json.loads(answer.body)["error"]
        answers[answer.status] += 1
    assert sum(answers[status] for status in REFUSED) > len(table[group]) / 2
    assert everything(server) == before
    assert panel.status() == status
    # aiohttp logs what it cannot parse, with a traceback of its own.
    assert b"loader/panel/" not in server.log.read_bytes()[logged:]


def test_a_get_changes_nothing(server, panel: Panel, ready: str):
    status, before = panel.status(), everything(server)  # the first question fills a cache
    for path in ("status", "statistics", f"statistics/{ready}",
                 f"statistics/{ready}/plan?mode=scaled&keep_ratio=0.5",
                 f"statistics/{ready}/plan?mode=int8&keep_mb=0.5", f"statistics/{ready}/curves",
                 f"statistics/{ready}/export?format=int8&what=full%20checkpoint&keep_ratio=0.5",
                 f"statistics/{ready}/file?session=recorded"):  # fmt: skip
        for rest in ("", "&" if "?" in path else "?"):
            query = rest and f"{rest}_method=DELETE&session=null"
            panel.ask("GET", f"/hswq/{path}{query}", hostile.RESET, hostile.JSON)
    assert everything(server) == before
    assert panel.status() == status


def test_names_of_this_server_are_answered(server, panel: Panel):
    for name in ("localhost", "LOCALHOST.", "127.0.0.1", "[::1]", "192.168.7.7", None):
        host = name and f"{name}:{server.port}"
        assert panel.ask("GET", "/hswq/status", headers={"Host": host}).status in (200, 400)
    answer = panel.ask("GET", "/hswq/status", headers={"Host": "box.example"})
    assert answer.status == 403
    assert "settings, HSWQ, Other names of this server" in answer.json()["error"]
    change_settings(server, {"HSWQ.Names": "Box.example, other"})
    try:
        for host, status in (("box.example:80", 200), ("x.example", 403), ("box.example.x", 403)):
            assert panel.ask("GET", "/hswq/status", headers={"Host": host}).status == status
    finally:
        change_settings(server, {"HSWQ.Names": ""})


def send(
    connection: Connection, request: hostile.Request, its_id: str, server: ComfyUIServer
) -> Answer:
    """Send a request with the real id and host in it."""

    def real(text: str | tuple | None) -> str | tuple | None:
        if isinstance(text, tuple):
            return tuple(map(real, text))
        return text and text.replace("ID", its_id).replace("HOST", f"127.0.0.1:{server.port}")

    headers = {key: real(value) for key, value in request.headers}
    return connection.ask(request.method, real(request.target), request.body, headers)


def everything(server: ComfyUIServer) -> dict[Path, bytes]:
    """Return what is in the base folder, but for logs."""
    folders = [server.base / name for name in ("models", "input", "output", "user", "temp")]
    found = {path: data for folder in folders for path, data in snapshot(folder).items()}
    return {path: data for path, data in found.items() if path.suffix != ".log"}
