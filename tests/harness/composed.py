"""What must hold after each randomly composed sampling (see compositions).

Import it where ComfyUI is up (tests/loader/conftest.py).
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_merging import ModelSave
from hswq.calibration import Statistics, save_statistics
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.host.folders import statistics_folder

from harness.compositions import (
    ASKED,
    COMPATIBLE,
    FLAGS,
    HOOKS,
    MADE_UP,
    SCALED,
    STEPS,
    STOCK,
    Composition,
)
from harness.execution import load_by_prompt
from harness.foreign import load_foreign
from harness.inprocess import (
    Conditioning,
    alike,
    conditioning,
    distance,
    load,
    sample,
    unload,
    weight,
)
from harness.recording import recorded
from harness.rounding import assert_weights
from harness.surroundings import FOREIGN, PACKED, STARTS, TURNS, controlled

_ANOTHER_PICTURE = 0.5  # of a latent's size; FP8 makes 0.2 at most of it


@dataclasses.dataclass(frozen=True)
class Parts:
    """What compositions are made of.

    Attributes:
        checkpoint: the model's file.
        stock: the model in 16 bit, by the stock loader.
        scaled, compatible: it in FP8, by ours.
        other: another checkpoint's model in 16 bit.
        measured: statistics for the converter.
    """

    checkpoint: Path
    stock: ModelPatcher
    scaled: ModelPatcher
    compatible: ModelPatcher
    other: ModelPatcher
    measured: Statistics

    @property
    def layers(self) -> list[str]:
        """The model's own layers, whatever is in its network for the moment."""
        return list(self.scaled.get_attachment(ATTACHMENT).layers)

    @property
    def other_checkpoint(self) -> Path:
        """The file of the other model."""
        return Path(self.other.cached_patcher_init[1][0])

    @functools.cached_property
    def foreign(self) -> dict[str, ModelPatcher]:
        """The model by another extension's loader."""
        kinds = {FOREIGN: False, PACKED: True}
        return {kind: load_foreign(self.checkpoint, packed=how) for kind, how in kinds.items()}

    def forget(self) -> None:
        """Remove what was recorded."""
        folder = statistics_folder()
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.recorded.*"):
            path.unlink()
        if not (folder / MADE_UP).exists():
            save_statistics(self.measured, folder / MADE_UP)

    def model(self, composition: Composition) -> ModelPatcher:
        """Load the MODEL and do all steps with it."""
        loaded = {STOCK: self.stock, SCALED: self.scaled, COMPATIBLE: self.compatible}
        if composition.loader in ASKED:
            how = {"without_statistics": ASKED[composition.loader]}
            model = load_by_prompt(self.checkpoint, linked=composition.linked, **how)
        elif composition.loader in (FOREIGN, PACKED):
            model = self.foreign[composition.loader].clone()
        else:
            model = loaded[composition.loader].clone()
        for step in composition.steps:
            model = STEPS[step](model, self.other)
        return model


def check(composition: Composition, parts: Parts) -> None:
    """Sample as composed and then with the plain model; see that all is right.

    Raises:
        AssertionError: a weight is wrong, or what was recorded is.
    """
    parts.forget()
    plain, runs = parts.stock.clone(), []
    if composition.before:
        sample(plain)
        runs.append((1, 1))
    with pytest.MonkeyPatch.context() as patch:
        if composition.flag is not None:
            FLAGS[composition.flag](patch)
        if composition.start is not None:
            STARTS[composition.start](patch)
        if composition.refused is not None:
            _assert_refused(composition, parts)
        else:
            _sample(composition, parts, runs)
    if composition.replaces:
        unload()  # ComfyUI itself would leave the layers that were replaced on the host
    sample(plain)
    assert_recorded(recorded(parts.checkpoint), parts.layers, [*runs, (1, 1)])
    if not composition.keeps_layers:
        unload()  # ComfyUI looks up a LoRA's layers in the network as it is at the moment


def _assert_refused(composition: Composition, parts: Parts) -> None:
    try:
        parts.model(composition)
    except ValueError as error:
        assert composition.refused in str(error), error
    else:
        raise AssertionError("the converter takes what it cannot carry over")


def _sample(composition: Composition, parts: Parts, runs: list[tuple[int, int]]) -> None:
    """Sample with the MODEL and look at it; add to the runs if it is one to be recorded."""
    model, prompt = parts.model(composition), _prompt(composition, parts)
    if composition.unloads:
        unload()
    latent = _latent(model, prompt, composition)
    assert latent.isfinite().all(), "the latent is not finite"
    runs += [(composition.batch, composition.calls)] * composition.is_recorded
    assert_recorded(recorded(parts.checkpoint), parts.layers, runs)
    if composition.turn is not None:
        _sample_other(composition, parts)
        _assert_same(_latent(model, prompt, composition), latent, composition)
        runs += [(composition.batch, composition.calls)] * composition.is_recorded
    if not composition.keeps_layers or (composition.is_exact and composition.loader == STOCK):
        return
    expected = parts.model(composition.in_16_bit)
    waits = composition.waits or model.is_dynamic() or expected.is_dynamic()
    if waits or composition.control is not None:
        off = distance(latent, _latent(expected, prompt, composition))
        assert off < _ANOTHER_PICTURE, f"the latent is off by {off:.2g}"
        runs += [(composition.batch, composition.calls)] * composition.in_16_bit.is_recorded
    if not waits:
        before = parts.model(composition.before_converting)
        how = {"converted": composition.converts, "exact": composition.is_exact}
        assert_weights(model, before, expected, **how)
    if composition.saves:
        _assert_saved(model, parts)


def _prompt(composition: Composition, parts: Parts) -> Conditioning:
    prompt = conditioning(1)
    for hook in composition.hooks:
        prompt = HOOKS[hook](prompt, parts.other)
    return prompt if composition.control is None else controlled(prompt, composition.control)


def _assert_same(again: torch.Tensor, latent: torch.Tensor, composition: Composition) -> None:
    """Check that a second sampling gives the latent of the first."""
    off = distance(again, latent)
    # Other layers may stream now. Where a layer streams, a LoRA's weights are not rounded.
    same = off < _ANOTHER_PICTURE if composition.waits else alike(again, latent)
    assert same, f"the latent is another: it is off by {off:.2g}"


def _sample_other(composition: Composition, parts: Parts) -> None:
    """Sample with another checkpoint, and see that this is recorded as its own, or not at all."""
    uniform, other = TURNS[composition.turn], parts.other.clone()
    if uniform is not None:
        other = load_by_prompt(parts.other_checkpoint, linked=False, without_statistics=uniform)
    sample(other)
    found = recorded(parts.other_checkpoint)
    assert_recorded(found, parts.layers, [] if uniform else [(1, 1)])


def _assert_saved(model: ModelPatcher, parts: Parts) -> None:
    """See that ComfyUI saves each weight as it is sampled with, so that stock ComfyUI reads it."""
    node, folder = ModelSave(), parts.checkpoint.parent / "saved"
    node.output_dir = str(folder)
    node.save(model, "model")
    path = max(folder.glob("*.safetensors"))
    stock = comfy.sd.load_diffusion_model(str(path), {"dtype": model.model_dtype()})
    path.unlink()
    load(model)
    for name in parts.layers:
        its = weight(model, name).to(model.model_dtype()).float()
        assert weight(stock, name).equal(its), f"{name} is saved as another"


def _latent(model: ModelPatcher, prompt: Conditioning, composition: Composition) -> torch.Tensor:
    with torch.compiler.set_stance("force_eager"):
        return sample(model, prompt, batch=composition.batch, steps=composition.denoising)


def assert_recorded(
    found: Statistics | None, names: list[str], runs: list[tuple[int, int]]
) -> None:
    """Check that exactly these samplings, of so many images and calls, were recorded."""
    if not runs:
        assert found is None, f"{found} were recorded of what is not the model"
        return
    assert found is not None, "nothing was recorded"
    assert list(found) == names, "the layers are not the model's"
    assert found.samples == sum(images for images, _ in runs)
    assert {layer.calls for layer in found.values()} == {sum(calls for _, calls in runs)}
