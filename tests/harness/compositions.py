"""Randomly composed samplings: what one prompt does to a model. `composed.py` checks them.

Import it where ComfyUI is up (tests/loader/conftest.py).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import comfy.cli_args
import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_merging import ModelMergeSimple
from hswq.loader.nodes.converter import HSWQConverter

from harness.changes import CHANGED, COMPILED, another_as_lora
from harness.inprocess import Conditioning, patched
from harness.patches import KINDS, patch_file

STOCK, SCALED, COMPATIBLE = "stock", "scaled", "compatible"
ASKED = {"asked for 16 bit": "load in 16 bit", "asked for FP8": "quantize uniformly"}
"""Models that the loader node loads for one sampling alone: its `without_statistics`."""

MADE_UP = "made_up.pt"
"""The statistics file that the converter takes."""

_BESIDE, _MERGE, _CONVERT = "beside", "merge", "convert"
_NEVER_BOTH = ("compiled_object", "compiled_by_core")  # together ComfyUI's own wrapper raises
_SIXTEEN_BIT = (STOCK, next(iter(ASKED)))


@dataclasses.dataclass(frozen=True)
class Composition:
    """What one prompt does.

    Attributes:
        loader: STOCK, SCALED, COMPATIBLE, or one of ASKED.
        linked: whether another node gives the loader node the file's name.
        flag: how ComfyUI was started, one of FLAGS; for ASKED only.
        steps: what is done with the MODEL, in this order: names in `STEPS`.
        hooks: what the conditioning brings: names in `HOOKS`.
        batch, denoising: latent images, and steps of the sampler.
        before: whether the plain model is sampled with first.
        unloads: whether all models are unloaded before the sampling.
    """

    loader: str
    linked: bool
    flag: str | None
    steps: tuple[str, ...]
    hooks: tuple[str, ...]
    batch: int
    denoising: int
    before: bool
    unloads: bool

    @property
    def is_recorded(self) -> bool:
        """Whether its sampling measures the 16-bit model of the file."""
        foreign = {_MERGE, _CONVERT, *COMPILED, *CHANGED}
        own = not foreign & {*self.steps} and "model" not in self.hooks
        return own and self.loader in _SIXTEEN_BIT

    @property
    def keeps_layers(self) -> bool:
        """Whether the network's layers are where they were."""
        return not {*COMPILED, *CHANGED} & {*self.steps}

    @property
    def is_exact(self) -> bool:
        """Whether weights in 16 bit are computed as the stock model's are, to the bit."""
        return self.loader not in ASKED and _CONVERT not in self.steps

    @property
    def refused(self) -> str | None:
        """What the converter says where it cannot take its input, None where it can."""
        if _CONVERT not in self.steps:
            return None
        if {_BESIDE, *COMPILED, *CHANGED} & {*self.steps[: self.steps.index(_CONVERT)]}:
            return "works only on the 16-bit model"
        return None if self.loader in _SIXTEEN_BIT else "is quantized already"

    @property
    def in_16_bit(self) -> Composition:
        """The same with the stock loader and without the converter."""
        steps = tuple(step for step in self.steps if step != _CONVERT)
        return dataclasses.replace(self, loader=STOCK, steps=steps, flag=None)


def compose(seed: int) -> Composition:
    """Return the composition of a seed."""
    chance = random.Random(seed)
    others = [step for step in STEPS if step != _CONVERT]
    steps = chance.sample(others, chance.choice([0, 1, 1, 2, 3]))
    if {*_NEVER_BOTH} <= {*steps}:
        steps.remove(_NEVER_BOTH[0])
    if chance.random() < 0.2:
        steps.insert(chance.randint(0, len(steps)), _CONVERT)
    loader = chance.choice([STOCK, STOCK, SCALED, COMPATIBLE, *ASKED])
    return Composition(
        loader=loader,
        linked=chance.random() < 0.5,
        flag=chance.choice([None, *FLAGS]) if loader in ASKED else None,
        steps=tuple(steps),
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


def _convert(one: ModelPatcher, _: ModelPatcher) -> ModelPatcher:
    node = HSWQConverter.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    rough = {"bins": 256, "candidates": 20, "refinements": 1}
    asked = {"statistics": MADE_UP, "mode": SCALED, "keep_ratio": 0.25}
    return node.execute(model=one, **asked, **rough).result[0]


def _change(change: Callable[[ModelPatcher], None]) -> Callable:
    def made(one: ModelPatcher, _: ModelPatcher) -> ModelPatcher:
        clone = one.clone()
        change(clone)
        return clone

    return made


STEPS: dict[str, Callable[[ModelPatcher, ModelPatcher], ModelPatcher]] = {
    **{kind: _lora(kind) for kind in KINDS},
    _BESIDE: _beside,
    _MERGE: _merge,
    _CONVERT: _convert,
    **{name: _change(change) for name, change in {**COMPILED, **CHANGED}.items()},
}


def _hooked_lora(prompt: Conditioning, _: ModelPatcher) -> Conditioning:
    hooks = comfy.hooks.create_hook_lora(patch_file("LoRA", every=5), 1.0, 0.0)
    return comfy.hooks.set_hooks_for_conditioning(prompt, hooks)


HOOKS: dict[str, Callable[[Conditioning, ModelPatcher], Conditioning]] = {
    "lora": _hooked_lora,
    "model": another_as_lora,
}


def _argument(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(comfy.cli_args.args, name, True)


def _built_in_place(patch: pytest.MonkeyPatch) -> None:
    """Let ComfyUI build and load models where they sample, as with --highvram on a GPU.

    A CPU with a number is another device than the host, of which ComfyUI has no number.
    """
    device = comfy.model_management.get_torch_device()
    place = torch.device("cpu", 0) if device.type == "cpu" else device
    patch.setattr(comfy.model_management, "unet_inital_load_device", lambda *_: place)


FLAGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    **{
        name: _argument(name)
        for name in (
            "fp8_e4m3fn_unet", "fp8_e5m2_unet", "fp8_e8m0fnu_unet", "fp16_unet", "bf16_unet",
        )
    },
    "highvram": _built_in_place,
}  # fmt: skip
