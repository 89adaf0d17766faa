"""A node's linked input may bring any value: what it does not know is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest
from harness.inprocess import conditioning
from hswq.loader.jobs import choice
from hswq.loader.nodes.converter import HSWQConverter
from hswq.loader.nodes.effect import HSWQMeasureEffect
from hswq.loader.nodes.export import HSWQExport
from hswq.loader.nodes.loaders import HSWQCheckpointLoader, HSWQDiffusionModelLoader
from hswq.loader.nodes.plan import HSWQPlan

LOADED = {"statistics": "auto", "mode": "scaled", "keep_ratio": 0.25, "without_statistics": "fail"}
INPUTS = {
    HSWQCheckpointLoader: {"ckpt_name": "toy.safetensors", **LOADED},
    HSWQDiffusionModelLoader: {"unet_name": "toy.safetensors", **LOADED},
    HSWQConverter: {
        "statistics": "auto", "mode": "scaled", "keep_ratio": 0.25, "bins": 64, "candidates": 8,
        "refinements": 0,
    },
    HSWQMeasureEffect: {
        "positive": conditioning(1), "negative": conditioning(2), "latent_image": {}, "cfg": 2.0,
        "statistics": "auto", "mode": "scaled",
    },
    HSWQPlan: {"source": "checkpoints/toy.safetensors", "statistics": "auto", "mode": "scaled"},
    HSWQExport: {
        "source": "checkpoints/toy.safetensors", "statistics": "auto", "format": "scaled",
        "keep_ratio": 0.25, "what": "full checkpoint", "filename": "", "overwrite": False,
        "without_statistics": "fail",
    },
}  # fmt: skip
OTHERS = {
    "mode": list(INPUTS)[:-1], "format": [HSWQExport], "what": [HSWQExport],
    "rounding": [HSWQCheckpointLoader, HSWQDiffusionModelLoader, HSWQMeasureEffect, HSWQExport],
    "without_statistics": [HSWQCheckpointLoader, HSWQDiffusionModelLoader, HSWQExport],
    "selection": [HSWQCheckpointLoader, HSWQDiffusionModelLoader, HSWQExport],
}  # fmt: skip
CASES = [(node, name) for name, takers in OTHERS.items() for node in takers]


@pytest.fixture(autouse=True)
def place(checkpoint: Path, choose, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy where each of the nodes finds it, and no statistics."""
    for kind in ("checkpoints", "diffusion_models"):
        known = ([str(checkpoint.parent)], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, known)


@pytest.mark.parametrize(("node", "name"), CASES, ids=lambda one: getattr(one, "__name__", one))
def test_is_refused_in_a_sentence(node, name, models):
    model = {"model": models.sixteen_bit} if node in (HSWQConverter, HSWQMeasureEffect) else {}
    for wrong in ("x" * 3000, ["scaled"], None, 8):
        inputs = {**INPUTS[node], **model, name: wrong}
        with pytest.raises(ValueError, match=rf"^{name} must be one of .*, not ") as caught:
            node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).execute(**inputs)
        assert len(str(caught.value)) < 250
        assert "\n" not in str(caught.value)


def test_a_choice_of_statistics_is_never_taken_for_another(checkpoint):
    with pytest.raises(ValueError, match="without_statistics must be one of"):
        choice.choose("auto", None, "toy", None, "keep on")
