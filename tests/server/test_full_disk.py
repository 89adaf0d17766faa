"""A disk that is full loses the new statistics, and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from harness.client import Client
from harness.fixtures import free
from harness.lines import QUARTER_KEPT, layers_told
from harness.prompts import Prompt, hswq_loader, node, stock_loader, text_to_latent, through
from harness.server import ComfyUIServer, snapshot

resource = pytest.importorskip("resource", reason="limits of a process are Unix's")
if not hasattr(resource, "prlimit"):
    pytest.skip("only Linux limits a running process", allow_module_level=True)

pytestmark = pytest.mark.server


@contextlib.contextmanager
def no_room_for(server: ComfyUIServer, size: int) -> Iterator[None]:
    """While the block runs, the server cannot write files of more than so many bytes."""
    soft, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (soft, hard))


class TestFullDisk:
    @pytest.mark.parametrize("session", ["recorded", "by-hand"])
    def test_leaves_the_statistics_as_they_were(
        self, server: ComfyUIServer, client: Client, session: str
    ):
        def prompt(seed: int) -> Prompt:
            plain = text_to_latent(stock_loader(), seed=seed)
            if session == "recorded":
                return plain
            calibrate = node("HSWQCalibration", model=["loader", 0], session=session)
            return through(plain, "calibrate", calibrate)

        client.run(prompt(1))
        before = snapshot(server.models)
        (path,) = (server.models / "hswq").glob("*.pt")
        with no_room_for(server, path.stat().st_size // 2):
            run = client.run(prompt(2))
        assert client.latent(run).isfinite().all()
        assert snapshot(server.models) == before
        lines = server.log_tail().splitlines()
        warning = next(line for line in reversed(lines) if "not recorded" in line)
        assert path.name in warning
        if session != "recorded":
            assert run.text("calibrate").startswith(f"not recorded: {path.name}")
        client.run(prompt(3))
        assert torch.load(path, weights_only=True)["meta"]["samples"] == 2

    def test_loads_without_keeping_the_plan(self, server: ComfyUIServer, recorded: Client):
        before = snapshot(server.models)
        with no_room_for(server, 10_000):
            run = recorded.run(text_to_latent(hswq_loader()))
        assert layers_told(run.text("loader")) in QUARTER_KEPT
        assert snapshot(server.models) == before
        free(recorded)
        again = recorded.run(text_to_latent(hswq_loader()))
        assert recorded.latent(again).equal(recorded.latent(run))
        assert snapshot(server.models) != before
