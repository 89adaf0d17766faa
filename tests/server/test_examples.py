"""The example workflows, run by ComfyUI's own command line as a user's automation would."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness.client import Client
from harness.fixtures import ENOUGH_STEPS
from harness.lines import QUARTER_KEPT, layers_told
from harness.prompts import CHECKPOINT
from harness.server import ROOT, ComfyUIServer

pytestmark = pytest.mark.server

EXAMPLES = ROOT / "example_workflows"
COMFY_RUN_SECONDS = 200
FLOAT8 = "float8_e4m3fn"
ENDS = frozenset(("input_blocks.0.0", "out.2"))


@pytest.fixture
def comfy_run(server: ComfyUIServer, tmp_path: Path) -> Callable[..., dict]:
    """Run an example on the toy: all that is changed is how large, how many and how long."""

    def run(name: str, batch: int) -> dict:
        workflow = json.loads((EXAMPLES / f"{name}.json").read_text("utf-8"))
        for node in workflow["nodes"]:
            if node["type"] == "EmptyLatentImage":
                node["widgets_values"] = [64, 64, batch]
            elif node["type"] == "KSampler":
                node["widgets_values"][2] = ENOUGH_STEPS
            elif node["type"] == "HSWQCheckpointLoader":  # a user chooses his own checkpoint
                node["widgets_values"] = [CHECKPOINT, "auto", "scaled", 0.25, "load in 16 bit"]
        small = tmp_path / f"{name}.json"
        small.write_text(json.dumps(workflow), "utf-8")
        return envelope(server, small, home=tmp_path)

    return run


def envelope(server: ComfyUIServer, workflow: Path, home: Path) -> dict:
    """Return comfy-cli's verdict, the last line that it prints. Its own files go to `home`."""
    command = [sys.executable, "-m", "comfy_cli", "--json", "run", "--wait"]
    command += ["--workflow", str(workflow), "--host", "127.0.0.1", "--port", str(server.port)]
    own = {"HOME": str(home), "DO_NOT_TRACK": "1"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("XDG_")}
    done = subprocess.run(
        command, env={**kept, **own}, capture_output=True, text=True, timeout=COMFY_RUN_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def lines_shown(client: Client, action: Callable[[], object]) -> list[str]:
    """Return what nodes told of the prompt that an action runs, as ComfyUI's history has it."""
    before = client.get_json("/history").keys()
    action()
    history = client.get_json("/history")
    (prompt,) = history.keys() - before
    return [text for out in history[prompt]["outputs"].values() for text in out.get("text", [])]


def loaded_layers(client: Client) -> dict[str, str]:
    """Return the dtype of each layer's weight in the one diffusion model that is loaded."""
    (model,) = client.get_json("/probe/models")["loaded"]
    return model["layers"]


def most_sensitive(path: Path, keep_ratio: float = 0.25) -> set[str]:
    """Rank a statistics file's layers by the variance of their output."""

    def variance(layer: dict) -> float:
        mean = layer["output_sum"] / layer["out_count"]
        return layer["output_sq_sum"] / layer["out_count"] - mean**2

    layers = torch.load(path, weights_only=True)["layers"]
    ranked = sorted(layers, key=lambda name: variance(layers[name]), reverse=True)
    return set(ranked[: int(len(ranked) * keep_ratio)])


def assert_quantized(
    layers: dict[str, str], statistics: Path, kept_dtype: str, also: frozenset[str] = frozenset()
) -> None:
    """In the live model the most sensitive layers have their own dtype, all others FP8."""
    kept = {name for name, dtype in layers.items() if dtype != FLOAT8}
    assert kept == most_sensitive(statistics) | also
    assert {layers[name] for name in kept} == {kept_dtype}
    assert (len(layers) - len(kept), len(kept)) in QUARTER_KEPT


def statistics_files(server: ComfyUIServer) -> list[Path]:
    return sorted((server.models / "hswq").glob("*.pt"))


class TestExamples:
    def test_first_use_records_then_loads_fp8(
        self, server: ComfyUIServer, client: Client, comfy_run: Callable[..., dict]
    ):
        shown = lines_shown(client, lambda: comfy_run("hswq_first_use", batch=20))
        assert shown == ["16 bit for now: 0 of 32 images recorded; the HSWQ panel keeps count"]
        assert FLOAT8 not in loaded_layers(client).values()

        comfy_run("hswq_first_use", batch=12)
        assert FLOAT8 not in loaded_layers(client).values()

        shown = lines_shown(client, lambda: comfy_run("hswq_first_use", batch=1))
        (line,) = shown
        assert ", 32 images, FP8; " in line
        assert "; sampling with a 16-bit loader adds more, up to 256 images; loaded in " in line
        (statistics,) = statistics_files(server)
        layers = loaded_layers(client)
        assert_quantized(layers, statistics, "float16", also=ENDS)
        told, in_fp8 = layers_told(line), list(layers.values()).count(FLOAT8)
        assert told == (in_fp8, len(layers) - in_fp8)
        assert len(list((server.base / "output" / "HSWQ").glob("first_use*.png"))) == 33

    def test_calibrate_accumulates(
        self, server: ComfyUIServer, client: Client, comfy_run: Callable[..., dict]
    ):
        for batch in (1, 2):
            comfy_run("hswq_more_calibration_node", batch=batch)
        (statistics,) = statistics_files(server)
        assert statistics.name.endswith(".calibration.pt")
        assert torch.load(statistics, weights_only=True)["meta"]["samples"] == 3

    def test_convert_quantizes_in_memory(
        self, server: ComfyUIServer, recorded: Client, comfy_run: Callable[..., dict]
    ):
        comfy_run("hswq_more_converter_node", batch=1)
        (statistics,) = statistics_files(server)
        # On a CPU ComfyUI's own loader makes float32 of everything, and kept is what was given.
        assert_quantized(loaded_layers(recorded), statistics, "float32")
