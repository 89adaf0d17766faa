"""The input_scale of exported layers: what a product in FP8 scales their inputs by."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import MappingProxyType

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from harness.exports import record, wanted, written
from harness.inprocess import sample
from hswq.calibration import Statistics
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.files.layer_formats import input_scale, stored_input_amax
from hswq.loader.jobs import choice
from hswq.quant import QuantizeSettings, fp8_format
from nodes import CheckpointLoaderSimple
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("folders")

PREFIX = "model.diffusion_model."
UNKNOWN = 10


@pytest.fixture
def amax(statistics) -> dict[str, float]:
    """The largest inputs of the toy's layers; of the first few they were not recorded."""
    return {name: 1.0 + index for index, name in enumerate(statistics) if index >= UNKNOWN}


@pytest.fixture
def source(checkpoint, statistics, plans, amax) -> str:
    """The toy with enough samples and known inputs, searched before."""
    path = str(checkpoint)
    known = {k: dataclasses.replace(v, input_amax=amax.get(k)) for k, v in statistics.items()}
    record(path, Statistics(known, statistics.meta))
    for scaled, plan in plans.items():
        layers = {
            name: dataclasses.replace(layer, input_amax=amax.get(name))
            for name, layer in plan.layers.items()
        }
        chosen = choice.choose(
            choice.AUTO, fingerprint(path), "", QuantizeSettings(fp8_format(scaled)), choice.FAIL
        )
        chosen.keep(dataclasses.replace(plan, layers=MappingProxyType(layers)))
    return path


@pytest.fixture
def multiplies(monkeypatch) -> None:
    """What ComfyUI's option --supports-fp8-compute does."""
    monkeypatch.setattr(comfy.model_management, "SUPPORT_FP8_OPS", True)


def in_file(path: Path) -> dict[str, float]:
    """Return the input_scale of every layer of a file."""
    tensors, end = load_file(path), ".input_scale"
    scales = {key.removesuffix(end): tensors[key] for key in tensors if key.endswith(end)}
    assert all(scale.dtype == torch.float32 and not scale.ndim for scale in scales.values())
    return {name.removeprefix(PREFIX): scale.item() for name, scale in scales.items()}


def in_memory(patcher: ModelPatcher) -> dict[str, float]:
    """Return the input_scale of every layer that multiplies in FP8."""
    weights = patcher.model.diffusion_model.named_parameters()
    found = {n: w._params.input_scale for n, w in weights if isinstance(w, QuantizedTensor)}
    return {n.removesuffix(".weight"): s.item() for n, s in found.items() if s is not None}


class TestExported:
    @pytest.mark.parametrize("kind", ["scaled", "scaled, convs too"])
    def test_is_beside_each_linear_whose_input_is_known(self, source, amax, kind):
        path, plan = written(source, wanted(kind))
        tensors = load_file(path)
        linear = [name for name in plan.quantized if tensors[f"{PREFIX}{name}.weight"].ndim == 2]
        known = [name for name in linear if name in amax]
        assert 100 < len(known) < len(linear)
        assert in_file(path) == {name: torch.tensor(amax[name] / 448).item() for name in known}

    @pytest.mark.parametrize("kind", ["compatible", "original V2"])
    def test_is_not_in_formats_that_have_none(self, source, kind):
        assert not in_file(written(source, wanted(kind))[0])

    def test_changes_nothing_in_stock_comfyui(self, source, caplog):
        """The flag full_precision_matrix_mult keeps its products in 16 bit."""
        path, _ = written(source, wanted())
        plain = path.with_name("plain.safetensors")
        tensors = load_file(path)
        save_file({k: v for k, v in tensors.items() if not k.endswith(".input_scale")}, plain)
        with caplog.at_level(logging.INFO):
            ours, without = (
                CheckpointLoaderSimple().load_checkpoint(file.name)[0] for file in (path, plain)
            )
        assert not [line for line in caplog.messages if "unexpected" in line]
        assert sample(ours).equal(sample(without))

    def test_is_what_our_loader_multiplies_by(self, source, multiplies):
        path, plan = written(source, wanted())
        how = {"fp8_matmul": True, "only_model": True}
        expected = in_memory(load_checkpoint(source, plan, **how)[0])
        assert len(expected) > 100
        assert in_memory(load_checkpoint(str(path), None, **how)[0]) == expected == in_file(path)
        assert not in_memory(load_checkpoint(str(path), None, only_model=True)[0])


class TestStored:
    @pytest.mark.parametrize("amax", [1e-20, 0.3, 1.0, 448.0, 65504.0])
    def test_comes_back(self, amax):
        scale = input_scale(amax)
        for key in ("input_scale", "scale_input"):
            for shape in ((), (1,)):
                found = stored_input_amax({f"a.{key}": scale.reshape(shape)}, "a.")
                assert found == pytest.approx(amax, rel=1e-6)
                assert input_scale(found).equal(scale)

    @pytest.mark.parametrize("value", [[1.0, 2.0], [torch.nan], 0.0, -1.0, torch.inf, []])
    def test_one_that_makes_no_sense_is_none(self, value):
        assert stored_input_amax({"a.input_scale": torch.tensor(value)}, "a.") is None

    def test_unknown_is_none(self):
        assert stored_input_amax({"b.input_scale": torch.ones(())}, "a.") is None
        assert input_scale(None) is None
