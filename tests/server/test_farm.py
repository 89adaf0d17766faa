"""docs/farm.md, step by step: two ComfyUIs sample one model, and one of them merges."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness.client import Client
from harness.fixtures import small_sampling
from harness.lines import QUARTER_KEPT, layers_told
from harness.prompts import CHECKPOINT, hswq_loader, node, stock_loader, text_to_latent
from harness.server import ROOT, ComfyUIServer
from hswq.calibration import Statistics, load_statistics

pytestmark = pytest.mark.server

IMAGES, BATCH = 4, 5
QUEUE_SECONDS = 120


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script that the page shows."""
    text = (ROOT / "docs" / "farm.md").read_text("utf-8")
    path = tmp_path_factory.mktemp("farm") / "farm.py"
    path.write_text(re.search("```python\n(.*?)```", text, re.DOTALL).group(1), "utf-8")
    return path


def sample(script: Path, *machines: ComfyUIServer) -> None:
    """Do step 1, and wait for its end."""
    workflow = script.with_name("workflow.json")
    prompt = small_sampling(stock_loader(), BATCH)
    workflow.write_text(json.dumps(prompt), "utf-8")
    urls = [machine.url for machine in machines]
    subprocess.run([sys.executable, script, workflow, str(IMAGES), *urls], check=True, timeout=60)
    began = time.monotonic()
    for url in urls:
        while any(Client(url).get_json("/queue").values()):
            assert time.monotonic() - began < QUEUE_SECONDS
            time.sleep(0.1)


def collect(machine: ComfyUIServer, folder: Path) -> Path:
    """Do step 2: take a machine's file away into a folder of its own; return it there."""
    (path,) = (machine.models / "hswq").glob("*.pt")
    folder.mkdir(parents=True)
    return Path(shutil.move(path, folder))


def merge(client: Client) -> str:
    """Do step 3; return what the node says."""
    run = client.run({"merge": node("HSWQMergeStatistics", folder="farm", session="merged")})
    return run.text("merge")


def assert_same_sums(one: Statistics, other: Statistics) -> None:
    assert one.keys() == other.keys()
    assert (one.samples, one.meta["total_steps"]) == (other.samples, other.meta["total_steps"])
    for name, layer in one.items():
        assert layer.calls == other[name].calls
        assert layer.output_square_sum == pytest.approx(other[name].output_square_sum, rel=1e-6)
        torch.testing.assert_close(
            layer.importance_sum, other[name].importance_sum, rtol=1e-6, atol=0
        )


def test_equals_one_machine_that_sampled_it_all(
    server: ComfyUIServer, client: Client, packed_server: ComfyUIServer, script: Path, tmp_path
):
    for path in (packed_server.models / "hswq").glob("*.pt"):
        path.unlink()
    sample(script, server, server)
    as_one = load_statistics(collect(server, tmp_path / "one"))

    sample(script, server, packed_server)
    farm = server.models / "hswq" / "farm"
    names = {collect(machine, farm / host).name
             for machine, host in ((server, "host1"), (packed_server, "host2"))}  # fmt: skip
    assert len(names) == 1, "both files have one name, so each machine has a folder"

    (name,) = names
    merged = name.replace(".recorded.", ".merged.")
    said = f"{2 * IMAGES * BATCH} images of 2 files in {merged}"
    assert merge(client) == said
    assert_same_sums(load_statistics(server.models / "hswq" / merged), as_one)
    assert merge(client) == said, "nothing counts twice"

    run = client.run(text_to_latent(hswq_loader(CHECKPOINT)))
    assert layers_told(run.text("loader")) in QUARTER_KEPT
    assert ", 40 images, FP8; " in run.text("loader")
