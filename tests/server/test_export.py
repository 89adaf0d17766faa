"""The export node over HTTP: a one-node prompt, as the panel's button queues it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness.client import Client, ExecutionError, InterruptedPromptError, RejectedError
from harness.large import add_zeros
from harness.lines import QUARTER_KEPT, layers_told, sentence
from harness.prompts import CHECKPOINT, Prompt, hswq_loader, node, stock_loader, text_to_latent
from harness.server import ComfyUIServer
from safetensors import safe_open

pytestmark = pytest.mark.server

NODE = "hswq:export"
LARGE = "large.safetensors"
UNIFORMLY = "quantize uniformly"


def export(source: str = f"checkpoints/{CHECKPOINT}", **inputs: object) -> Prompt:
    """Return the one-node prompt with the node's defaults, but for `inputs`."""
    defaults = {
        "statistics": "auto",
        "format": "scaled",
        "keep_ratio": 0.25,
        "what": "full checkpoint",
        "filename": "exported",
        "overwrite": False,
        "without_statistics": "fail",
    }
    return {NODE: node("HSWQExport", source=source, **{**defaults, **inputs})}


@pytest.fixture(autouse=True)
def output(server: ComfyUIServer):
    """The output folder, without models before and after."""
    folder = server.base / "output"
    yield folder
    for path in exported(folder):
        path.unlink()


def exported(folder: Path) -> list[Path]:
    """Return all files of the models in the output folder, temporary ones too."""
    found = [*folder.glob("checkpoints/**/*"), *folder.glob("diffusion_models/**/*")]
    return sorted(path for path in found if path.is_file())


def history_of(client: Client, events: list[dict]) -> dict:
    """Return what ComfyUI's history says of a prompt; it is written just after the last event."""
    prompt_id = events[0]["data"]["prompt_id"]
    end = time.monotonic() + 10
    while not (history := client.get_json(f"/history/{prompt_id}")):
        assert time.monotonic() < end, "the prompt is not in the history"
        time.sleep(0.05)
    return history[prompt_id]


@pytest.fixture(scope="module")
def large(server: ComfyUIServer) -> Iterator[str]:
    """The toy with a GiB of zeros, that takes a while to copy and no room on the disk."""
    path = server.models / "checkpoints" / LARGE
    add_zeros(path.with_name(CHECKPOINT), path)
    yield f"checkpoints/{LARGE}"
    path.unlink()


class TestExport:
    def test_writes_a_file_that_loads_as_the_checkpoint_does(self, recorded: Client, output: Path):
        ours = recorded.latent(recorded.run(text_to_latent(hswq_loader())))
        events = []
        run = recorded.run(export(format="scaled, convs too"), events.append)
        saved = {
            "filename": "exported.safetensors", "subfolder": "checkpoints", "type": "output",
            "existed": False,
        }  # fmt: skip
        (told,) = run.outputs[NODE]["models"]
        (path,) = exported(output)
        outcome, seconds = told["outcome"], told["seconds"]
        facts = {"seconds": seconds, "bytes": path.stat().st_size, "outcome": outcome}
        assert told == {**saved, **facts}
        assert 0 < outcome["error"] < 0.1
        who = "written (for the HSWQ loaders only)"
        assert run.text(NODE).startswith(f"checkpoints/exported.safetensors {who}: ")
        assert f"{sentence(outcome)}, {max(1, round(seconds))} sec; " in run.text(NODE)
        assert layers_told(run.text(NODE)) in QUARTER_KEPT
        assert "; sampling with a 16-bit loader adds more, up to " in run.text(NODE)
        assert history_of(recorded, events)["outputs"][NODE]["models"] == [told]
        assert [path.name for path in exported(output)] == ["exported.safetensors"]
        stored = recorded.run(text_to_latent(hswq_loader("exported.safetensors")))
        assert torch.equal(recorded.latent(stored), ours)

    def test_is_read_by_the_stock_loaders(self, client: Client, server: ComfyUIServer):
        client.run(export(filename="sub/stock", without_statistics=UNIFORMLY))
        before = server.log.stat().st_size
        run = client.run(text_to_latent(stock_loader("sub/stock.safetensors")))
        assert client.latent(run).isfinite().all()
        log = server.log.read_bytes()[before:].decode()
        assert "Using mixed precision operations" in log
        assert "unet unexpected" not in log
        assert "unet missing" not in log

    def test_reports_progress(self, client: Client, large: str):
        events = []
        client.run(export(large, without_statistics=UNIFORMLY), events.append)
        progress = [event["data"] for event in events if event["type"] == "progress"]
        values = [data["value"] for data in progress if data["node"] == NODE]
        assert len(values) > 3
        assert values == sorted(values)
        assert values[-1] == progress[-1]["max"] > 1 << 30

    def test_of_the_model_alone_goes_to_the_diffusion_models(self, client: Client):
        run = client.run(export(what="diffusion model only", without_statistics=UNIFORMLY))
        assert run.outputs[NODE]["models"][0]["subfolder"] == "diffusion_models"

    def test_names_itself_after_the_source(self, client: Client, output: Path):
        client.run(export(filename="", without_statistics=UNIFORMLY))
        (path,) = exported(output)
        assert path.name == "sd_xl_base_1.0_hswq_scaled.safetensors"
        with safe_open(path, "pt") as file:
            assert file.metadata()["hswq.source"] == CHECKPOINT


class TestCancelled:
    def test_while_it_runs_leaves_nothing(self, client: Client, large: str, output: Path):
        def cancel(event: dict) -> None:
            if event["type"] == "progress":
                client.post(f"/api/jobs/{event['data']['prompt_id']}/cancel", {})

        with pytest.raises(InterruptedPromptError):
            client.run(export(large, without_statistics=UNIFORMLY), cancel)
        assert not exported(output)
        client.run(export(without_statistics=UNIFORMLY))
        assert [path.name for path in exported(output)] == ["exported.safetensors"]


class TestRefused:
    @pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "nul\0", "con", "a\\b", ".x"])
    def test_a_name_that_is_unsafe(self, client: Client, server: ComfyUIServer, name: str):
        before = set(server.base.rglob("*.safetensors"))
        with pytest.raises(ExecutionError, match="the filename must be letters") as caught:
            client.run(export(filename=name, without_statistics=UNIFORMLY))
        assert "\n" not in str(caught.value)
        assert set(server.base.rglob("*.safetensors")) == before

    def test_a_source_outside_its_folders(self, client: Client):
        for source in ("/etc/passwd", "checkpoints/../../x.safetensors", "vae/x", "checkpoints/"):
            with pytest.raises(RejectedError, match="source"):
                client.run(export(source))

    @pytest.mark.parametrize(
        ("inputs", "problem"),
        [
            ({}, f"{CHECKPOINT} has 0 of 32 images that HSWQ needs: sample with it first"),
            ({"keep_ratio": ["number", 0]}, "keep_ratio must be a number from 0 to 1, got nan"),
        ],
    )
    def test_what_cannot_be_done(self, client: Client, output: Path, inputs, problem):
        without = {} if not inputs else {"without_statistics": UNIFORMLY}
        prompt = export(**inputs, **without)
        prompt["number"] = node("PrimitiveFloat", value=float("nan"))
        with pytest.raises(ExecutionError, match=problem):
            client.run(prompt)
        assert not exported(output)

    def test_a_name_that_is_taken(self, client: Client, output: Path):
        client.run(export(without_statistics=UNIFORMLY))
        (path,) = exported(output)
        before = path.read_bytes()
        with pytest.raises(ExecutionError, match=r"exported\.safetensors is there already"):
            client.run(export(format="compatible", without_statistics=UNIFORMLY))
        assert path.read_bytes() == before
        run = client.run(export(without_statistics=UNIFORMLY))
        assert run.text(NODE).startswith("checkpoints/exported.safetensors is there already, ")
        assert path.read_bytes() == before
        client.run(export(format="compatible", without_statistics=UNIFORMLY, overwrite=True))
        assert path.read_bytes() != before
