"""What the panel changes: statistics begun anew, deleted and sent."""

from __future__ import annotations

import socket
import threading

import pytest
from harness.client import Client
from harness.http import BYTES
from harness.panel import SESSION, Panel, sampled
from harness.prompts import node, stock_loader, text_to_latent, through
from harness.server import ComfyUIServer

pytestmark = pytest.mark.server


class TestReset:
    def test_begins_anew(self, server, panel: Panel, ready: str, client: Client):
        answer = panel.reset(ready, SESSION)
        assert answer.json() == panel.model()
        assert (answer.json()["samples"], answer.json()["sessions"]) == (0, [])
        folder = server.models / "hswq"
        assert not [*folder.glob("*.pt"), *(folder / "plans").glob("*.json")]
        sampled(client, 2)
        assert panel.model()["samples"] == 2

    def test_of_one_session_leaves_the_others(self, panel: Panel, ready: str, client: Client):
        calibrate = node("HSWQCalibration", model=["loader", 0], session="mine")
        client.run(through(text_to_latent(stock_loader(), steps=1), "calibrate", calibrate))
        model = panel.model()
        assert model["samples"] == 33
        assert panel.reset(model["id"], "mine").json()["samples"] == 32
        assert [one["session"] for one in panel.model()["sessions"]] == [SESSION]
        assert panel.reset(model["id"], "mine").status == 404

    def test_while_a_sampling_runs(self, panel: Panel, ready: str, client: Client):
        """What it adds then begins a new file."""
        done = []

        def on_event(event: dict) -> None:
            if event["type"] == "progress" and not done:
                done.append(panel.reset(ready))

        client.run(text_to_latent(stock_loader(), batch=3, steps=4, seed=1), on_event)
        assert done[0].json()["samples"] == 0
        assert panel.model()["samples"] == 3


class TestDelete:
    def test_leaves_nothing_but_locks_and_fingerprints(self, server, panel: Panel, ready: str):
        assert panel.delete(ready).json() == {"deleted": 1}
        files = [path for path in (server.models / "hswq").rglob("*") if path.is_file()]
        assert {path.suffix for path in files} <= {".lock", ".cache"}
        assert all(model["id"] is None for model in panel.status()["models"])
        assert panel.delete(ready).status == 404


class TestUpload:
    def test_brings_statistics_back_once(self, panel: Panel, content: bytes):
        for _ in range(2):
            model = panel.upload(content).json()
            assert model == panel.model()
            assert model["samples"] == 32
        (session,) = model["sessions"]
        assert session["session"].startswith(f"{SESSION}-")

    def test_of_what_is_there_counts_once(
        self, panel: Panel, ready: str, client: Client, content: bytes
    ):
        before = panel.model()
        assert panel.upload(content).json() == before
        sampled(client, 2, seed=1)
        assert panel.upload(content).json()["samples"] == 34

    def test_adds_what_others_recorded(self, panel: Panel, client: Client, content: bytes):
        sampled(client, 3, seed=1)
        assert panel.upload(content).json()["samples"] == 35
        assert len(panel.model()["sessions"]) == 2

    def test_is_refused_in_a_sentence(self, server, panel: Panel, content: bytes):
        for wrong, problem in [
            (content[:5000], "theirs.pt cannot be read as a statistics file"),
            (b"", "theirs.pt cannot be read as a statistics file"),
        ]:
            answer = panel.upload(wrong)
            assert answer.status == 400
            assert problem in answer.json()["error"]
        assert panel.upload(content, "../theirs.pt").status == 400
        assert not list((server.models / "hswq").glob("*.pt"))

    def test_waits_for_the_one_before(self, panel: Panel, server: ComfyUIServer, content: bytes):
        """Many at once would take many times 64 MiB."""
        answers: list[int] = []
        path = "/hswq/statistics/upload?name=theirs.pt"
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as before:
            before.sendall(f"{head}Content-Type: application/octet-stream\r\n\r\nPK".encode())
            panel.status()  # the server has read so far by then
            after = threading.Thread(target=lambda: answers.append(panel.upload(content).status))
            after.start()
            after.join(1)
            assert answers == []
            before.sendall(b"nothing")
            assert before.recv(12) == b"HTTP/1.1 400"
        after.join(60)
        assert answers == [200]

    def test_is_limited_while_it_is_read(self, panel: Panel, server: ComfyUIServer):
        """The server need not have all of it to refuse it."""
        headers = {**BYTES, "Content-Length": str(1 << 40)}
        assert panel.ask("POST", "/hswq/statistics/upload?name=x.pt", b"", headers).status == 413
        chunks = [b"100000\r\n" + bytes(1 << 20) + b"\r\n"] * 65
        headers = {**BYTES, "Content-Length": None, "Transfer-Encoding": "chunked"}
        body = b"".join(chunks) + b"0\r\n\r\n"
        answer = panel.ask("POST", "/hswq/statistics/upload?name=x.pt", body, headers)
        assert answer.status == 413
        assert "at most" in answer.json()["error"]
