"""What must hold after each randomly composed sampling (see compositions).

Import it where ComfyUI is up (tests/loader/conftest.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from comfy.model_patcher import ModelPatcher
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
from harness.inprocess import Conditioning, conditioning, distance, sample, unload
from harness.recording import recorded
from harness.rounding import assert_weights

_ANOTHER_PICTURE = 0.5  # of a latent's size; FP8 makes 0.2 at most of it


@dataclasses.dataclass(frozen=True)
class Parts:
    """What compositions are made of.

    Attributes:
        checkpoint: the model's file.
        stock: the model in 16 bit, by the stock loader.
        scaled, compatible: it in FP8, by ours.
        other: another model in 16 bit.
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
    model, prompt = parts.model(composition), conditioning(1)
    for hook in composition.hooks:
        prompt = HOOKS[hook](prompt, parts.other)
    if composition.unloads:
        unload()
    latent = _latent(model, prompt, composition)
    assert latent.isfinite().all(), "the latent is not finite"
    if composition.is_recorded:
        runs.append((composition.batch, composition.calls))
    assert_recorded(recorded(parts.checkpoint), parts.layers, runs)
    if not composition.keeps_layers or (composition.is_exact and composition.loader == STOCK):
        return
    expected = parts.model(composition.in_16_bit)
    if model.is_dynamic() or expected.is_dynamic():
        # Patches wait for the forward there, so that weights can be judged by what they do alone.
        off = distance(latent, _latent(expected, prompt, composition))
        assert off < _ANOTHER_PICTURE, f"the latent is off by {off:.2g}"
        if composition.in_16_bit.is_recorded:
            runs.append((composition.batch, composition.calls))
        return
    before = parts.model(composition.before_converting)
    how = {"converted": composition.converts, "exact": composition.is_exact}
    assert_weights(model, before, expected, **how)


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
