"""Randomly composed samplings, and what must hold after each of them.

Import it where ComfyUI is up (tests/loader/conftest.py).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import comfy.hooks
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_merging import ModelMergeSimple
from hswq.calibration import Statistics, monitored_layers
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.quant import dequantize, quantize

from harness.changes import CHANGED, COMPILED, another_as_lora
from harness.inprocess import Conditioning, conditioning, distance, load, patched, sample, unload
from harness.inprocess import weight as weight_of
from harness.patches import KINDS, patch_file

STOCK, SCALED, COMPATIBLE = "stock", "scaled", "compatible"
_SPREAD = 2  # of a format's error: by the range that it has, and by rounding at random


@dataclasses.dataclass(frozen=True)
class Composition:
    """What one prompt does.

    Attributes:
        loader: STOCK, SCALED or COMPATIBLE.
        steps: what is done with the MODEL, in this order: names in `STEPS`.
        hooks: what the conditioning brings: names in `HOOKS`.
        batch, denoising: latent images, and steps of the sampler.
        before: whether the plain model is sampled with first.
        unloads: whether all models are unloaded before the sampling.
    """

    loader: str
    steps: tuple[str, ...]
    hooks: tuple[str, ...]
    batch: int
    denoising: int
    before: bool
    unloads: bool

    @property
    def is_recorded(self) -> bool:
        """Whether its sampling measures the 16-bit model of the file."""
        foreign = {"merge", *COMPILED, *CHANGED}
        return self.loader == STOCK and not foreign & {*self.steps} and "model" not in self.hooks

    @property
    def keeps_layers(self) -> bool:
        """Whether the network's layers are where they were."""
        return not {*COMPILED, *CHANGED} & {*self.steps}


def compose(seed: int) -> Composition:
    """Return the composition of a seed."""
    chance = random.Random(seed)
    names = list(STEPS)
    return Composition(
        loader=chance.choice([STOCK, STOCK, SCALED, COMPATIBLE]),
        steps=tuple(chance.sample(names, chance.choice([0, 1, 1, 2, 3]))),
        hooks=tuple(chance.sample(list(HOOKS), chance.choice([0, 0, 1]))),
        batch=chance.choice([1, 1, 2]),
        denoising=chance.choice([1, 2]),
        before=chance.random() < 0.5,
        unloads=chance.random() < 0.3,
    )


def _lora(kind: str) -> Callable[[ModelPatcher, ModelPatcher], ModelPatcher]:
    return lambda one, _: patched(one, patch_file(kind, every=5))


def _beside(one: ModelPatcher, _: ModelPatcher) -> ModelPatcher:
    return comfy.sd.load_bypass_lora_for_models(one, None, patch_file("LoRA", every=5), 1.0, 0)[0]


def _merge(one: ModelPatcher, other: ModelPatcher) -> ModelPatcher:
    return ModelMergeSimple().merge(one, other, 0.6)[0]


def _change(change: Callable[[ModelPatcher], None]) -> Callable:
    def made(one: ModelPatcher, _: ModelPatcher) -> ModelPatcher:
        clone = one.clone()
        change(clone)
        return clone

    return made


STEPS: dict[str, Callable[[ModelPatcher, ModelPatcher], ModelPatcher]] = {
    **{kind: _lora(kind) for kind in KINDS},
    "beside": _beside,
    "merge": _merge,
    **{name: _change(change) for name, change in {**COMPILED, **CHANGED}.items()},
}


def _hooked_lora(prompt: Conditioning, _: ModelPatcher) -> Conditioning:
    hooks = comfy.hooks.create_hook_lora(patch_file("LoRA", every=5), 1.0, 0.0)
    return comfy.hooks.set_hooks_for_conditioning(prompt, hooks)


HOOKS: dict[str, Callable[[Conditioning, ModelPatcher], Conditioning]] = {
    "lora": _hooked_lora,
    "model": another_as_lora,
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """What compositions are made of.

    Attributes:
        loaded: the model by each loader.
        other: another one, in 16 bit.
        recorded: returns what was recorded of the model's file.
        forget: removes that.
    """

    loaded: dict[str, ModelPatcher]
    other: ModelPatcher
    recorded: Callable[[], Statistics | None]
    forget: Callable[[], object]


def check(composition: Composition, parts: Parts) -> None:
    """Sample as composed and then with the plain model; see that all is right.

    Raises:
        AssertionError: a weight is wrong, or what was recorded is.
    """
    parts.forget()
    plain = parts.loaded[STOCK].clone()
    names = list(monitored_layers(parts.loaded[SCALED].model.diffusion_model))
    runs = [(1, 1)] if composition.before else []
    if composition.before:
        sample(plain)
    model = _made(composition, parts, composition.loader)
    with torch.compiler.set_stance("force_eager"):
        if composition.unloads:
            unload()
        latent = _sampled(composition, model, parts)
    assert latent.isfinite().all(), "the latent is not finite"
    runs += [(composition.batch, composition.denoising)] if composition.is_recorded else []
    assert_recorded(parts.recorded(), names, runs)
    if composition.loader != STOCK and composition.keeps_layers:
        assert_weights(model, _made(composition, parts, STOCK))
    sample(plain)
    assert_recorded(parts.recorded(), names, [*runs, (1, 1)])


def _made(composition: Composition, parts: Parts, loader: str) -> ModelPatcher:
    model = parts.loaded[loader].clone()
    for step in composition.steps:
        model = STEPS[step](model, parts.other)
    return model


def _sampled(composition: Composition, model: ModelPatcher, parts: Parts) -> torch.Tensor:
    prompt = conditioning(1)
    for hook in composition.hooks:
        prompt = HOOKS[hook](prompt, parts.other)
    return sample(model, prompt, batch=composition.batch, steps=composition.denoising)


def assert_recorded(
    found: Statistics | None, names: list[str], runs: list[tuple[int, int]]
) -> None:
    """Check that exactly these samplings, of so many images and steps, were recorded."""
    if not runs:
        assert found is None, f"{found} were recorded of what is not the model"
        return
    assert found is not None, "nothing was recorded"
    assert list(found) == names, "the layers are not the model's"
    assert found.samples == sum(images for images, _ in runs)
    assert {layer.calls for layer in found.values()} == {sum(steps for _, steps in runs)}


def assert_weights(model: ModelPatcher, expected: ModelPatcher) -> None:
    """Check every weight: a kept one is equal, a quantized one as near as its format can be."""
    plan = model.get_attachment(ATTACHMENT)
    load(model)
    found = {name: weight_of(model, name) for name in plan.layers}
    load(expected)
    for name, layer in plan.layers.items():
        right = weight_of(expected, name)
        if not layer.quantized:
            assert found[name].equal(right), f"{name} is kept, and differs"
            continue
        nearest = dequantize(*quantize(right, right.abs().amax(), scaled=plan.scaled), right.dtype)
        off, limit = distance(found[name], right), _SPREAD * distance(nearest, right)
        assert off <= limit, f"{name} is off by {off:.3f}, its format by {limit / _SPREAD:.3f}"


def parts_of(
    stock: ModelPatcher,
    scaled: ModelPatcher,
    compatible: ModelPatcher,
    other: ModelPatcher,
    recorded: Callable[[Path], Statistics | None],
    folder: Path,
    checkpoint: Path,
) -> Parts:
    """Return the parts, whose statistics are in a folder of their own."""

    def forget() -> None:
        for path in folder.glob("*.pt"):
            path.unlink()

    loaded = {STOCK: stock, SCALED: scaled, COMPATIBLE: compatible}
    return Parts(loaded, other, lambda: recorded(checkpoint), forget)
