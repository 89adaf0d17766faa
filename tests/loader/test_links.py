"""Nodes whose inputs are links run again at a milestone, and not in every prompt."""

from __future__ import annotations

import asyncio
from pathlib import Path

import folder_paths
import nodes
import pytest
from comfy_execution.graph import DynamicPrompt
from execution import IsChangedCache
from harness.execution import in_a_thread
from harness.prompts import converter, hswq_loader, node
from hswq.calibration import Statistics, save_statistics
from hswq.loader import store
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.jobs.links import Watch
from hswq.loader.nodes import converter as converter_node
from hswq.loader.nodes import loaders

LINK = ["source", 0]
LOADER, CONVERTER = loaders.HSWQCheckpointLoader, converter_node.HSWQConverter
PROMPTS = {
    "checkpoint": hswq_loader(LINK),
    "statistics": hswq_loader("toy.safetensors", statistics=LINK),
    "both": hswq_loader(LINK, statistics=LINK),
    "model": converter(LINK),
}


@pytest.fixture(autouse=True)
def installed(monkeypatch, checkpoint: Path, choose) -> None:
    """The nodes in ComfyUI, as in a process that has run none of them."""
    for one in (LOADER, CONVERTER):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, one.__name__, one)
    place = ([str(checkpoint.parent)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", place)
    fresh = Watch()
    monkeypatch.setattr(loaders, "watch", fresh)
    monkeypatch.setattr(converter_node, "watch", fresh)


@pytest.fixture(params=PROMPTS)
def kind(request) -> str:
    """Which input is a link."""
    return request.param


def asked(kind: str) -> object:
    """Return what ComfyUI learns of the node at a prompt's beginning."""
    prompt = {"made": PROMPTS[kind], "source": node("PrimitiveNode")}
    copied = {key: {**one, "inputs": dict(one["inputs"])} for key, one in prompt.items()}
    answer = IsChangedCache("id", DynamicPrompt(copied), None).get("made")
    return in_a_thread(asyncio.run, answer)


def run(kind: str, model, statistics: str = "auto") -> None:
    """Run the node with what its links brought."""
    inputs = {**PROMPTS[kind]["inputs"], "statistics": statistics}
    if kind == "model":
        quick = {"bins": 256, "candidates": 20, "refinements": 1}
        make, inputs = CONVERTER, {**inputs, **quick, "model": model}
    else:
        make, inputs = LOADER, {**inputs, "ckpt_name": "toy.safetensors"}
    make.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).execute(**inputs)


def record(statistics: Statistics, checkpoint: Path, samples: int) -> None:
    delta = Statistics(statistics, {"samples": samples, "total_steps": 1})
    of = fingerprint(str(checkpoint))
    store.add_statistics(store.NewSums(delta, of, store.PASSIVE_SESSION, "toy.safetensors"))


class TestLinked:
    @pytest.fixture(autouse=True)
    def ready(self, statistics, checkpoint, installed) -> None:
        record(statistics, checkpoint, 40)

    @pytest.fixture
    def model(self, models, checkpoint):
        """As the stock loader gives it, which says of which file it is."""
        import comfy.sd

        return comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False)[0]

    def test_runs_once_until_a_milestone(self, kind, model, statistics, checkpoint, caplog):
        before = asked(kind)
        assert not caplog.records
        run(kind, model)
        record(statistics, checkpoint, 1)
        assert asked(kind) == before
        record(statistics, checkpoint, 30)
        after = asked(kind)
        assert after != before
        run(kind, model)
        assert asked(kind) == after

    def test_notices_another_statistics_file(self, kind, model, statistics, folder):
        save_statistics(statistics, folder / "shared.pt")
        run(kind, model, "shared.pt")
        before = asked(kind)
        assert asked(kind) == before
        save_statistics(Statistics(statistics, {"samples": 12345}), folder / "shared.pt")
        assert asked(kind) != before

    def test_notices_a_milestone_between_being_asked_and_running(
        self, kind, model, statistics, checkpoint
    ):
        """Another node's result of before must not stand for one of after."""
        run(kind, model)
        before = asked(kind)
        record(statistics, checkpoint, 30)
        run(kind, model)
        assert asked(kind) != before
