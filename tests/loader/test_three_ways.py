"""Loaded, converted, or exported and loaded by stock ComfyUI: one model."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

import comfy.model_management
import pytest
import torch
from harness.exports import wanted, written
from harness.inprocess import distance, load, sample, weight
from hswq.loader.engine.converter import convert
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.files.layer_formats import FILE_FORMATS
from hswq.quant import Plan
from nodes import CheckpointLoaderSimple
from torch import Tensor

pytestmark = pytest.mark.usefixtures("folders")


def as_written(plan: Plan, kind: str, shapes: dict[str, Tensor]) -> Plan:
    """Return the Plan without the layers that a format keeps in 16 bit."""
    layers = {
        name: layer if FILE_FORMATS[kind].beside(shapes[name]) is not None
        else dataclasses.replace(layer, amax=None)
        for name, layer in plan.layers.items()
    }  # fmt: skip
    return dataclasses.replace(plan, layers=MappingProxyType(layers))


def weights(patcher, names) -> dict[str, Tensor]:
    """Return all weights that a model is sampled with, in real units and FP32."""
    load(patcher)
    found = {name: weight(patcher, name).cpu() for name in names}
    # In the mode that nodes run in: elsewhere stock's quantized weights cannot be unloaded.
    comfy.model_management.unload_all_models()
    return found


@pytest.mark.parametrize("kind", ["compatible", "scaled"])
class TestThreeWays:
    def test_give_the_same_weights_and_pictures(self, models, legacy, recorded, plans, kind):
        whole = plans[FILE_FORMATS[kind].number_format.scaled]
        originals = weights(models.sixteen_bit, whole.layers)
        plan = as_written(whole, kind, originals)
        assert len(plan.quantized) > 100
        path, _ = written(recorded, wanted(kind))
        ways = {
            "loaded": load_checkpoint(recorded, plan, only_model=True)[0],
            "converted": convert(models.sixteen_bit, plan),
            "stock": CheckpointLoaderSimple().load_checkpoint(path.name)[0],
        }
        found = {way: weights(patcher, plan.layers) for way, patcher in ways.items()}
        pictures = {way: sample(patcher, steps=2, cfg=4.0) for way, patcher in ways.items()}
        again = distance(sample(ways["loaded"], steps=2, cfg=4.0), pictures["loaded"])
        comfy.model_management.unload_all_models()
        # On a GPU, stock multiplies its scale in 16 bit.
        apart = {"converted": again, "stock": 0.01 if torch.cuda.is_available() else again}
        for way, limit in apart.items():
            other = [n for n in plan.layers if not found[way][n].equal(found["loaded"][n])]
            assert not other, way
            assert distance(pictures[way], pictures["loaded"]) <= limit, way
        changed = [n for n in plan.layers if not found["loaded"][n].equal(originals[n])]
        assert set(changed) == set(plan.quantized)
