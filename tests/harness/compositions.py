"""Randomly composed samplings: what one prompt does to a model. `composed.py` checks them.

Import it where ComfyUI is up (tests/loader/conftest.py).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import comfy.cli_args
import comfy.hooks
import comfy.sd
import pytest
from comfy.model_patcher import ModelPatcher
from hswq.loader.nodes.converter import HSWQConverter

from harness.changes import CHANGED, COMPILED, RENAMING, REPLACED, another_as_lora
from harness.graphs import AROUND, TWICE
from harness.inprocess import Conditioning, built_in_place, patched
from harness.patches import KINDS, patch_file
from harness.surroundings import CONTROLS, FOREIGN, PACKED, SHARES, STARTS, STREAMING, TURNS

STOCK, SCALED, COMPATIBLE = "stock", "scaled", "compatible"
ASKED = {"asked for 16 bit": "load in 16 bit", "asked for FP8": "quantize uniformly"}
"""Models that the loader node loads for one sampling alone: its `without_statistics`."""

MADE_UP = "made_up.pt"
"""The statistics file that the converter takes."""

_BESIDE, _MERGE, _BLOCKS, _CONVERT = "beside", "merge", "blocks", "convert"
_LORA, _KEYFRAMES, _MODEL = "lora", "keyframes", "model"
_NEVER_BOTH = (
    ("compiled_object", "compiled_by_core"),  # together ComfyUI's own wrapper raises
    # ComfyUI undoes them in the order in which it did them, which leaves the one in the other.
    ("compiled_forward", "compiled_block"),
    ("compiled_forward", REPLACED),
)
_SIXTEEN_BIT = (STOCK, next(iter(ASKED)))
_FIRST_WITH_MORE = 1000  # seeds below stay what they were


@dataclasses.dataclass(frozen=True)
class Composition:
    """What one prompt does.

    Attributes:
        loader: STOCK, SCALED, COMPATIBLE, FOREIGN, PACKED, or one of ASKED.
        linked: whether another node gives the loader node the file's name.
        flag: how ComfyUI was started, one of FLAGS; for ASKED only.
        steps: what is done with the MODEL, in this order: names in `STEPS`.
        hooks: what the conditioning brings: names in `HOOKS`.
        batch, denoising: latent images, and steps of the sampler.
        before: whether the plain model is sampled with first.
        unloads: whether all models are unloaded before the sampling.
        control: what steers the sampling, one of CONTROLS.
        turn: how another checkpoint is loaded that samples in between, one of TURNS.
        saves: whether the MODEL is saved.
        start: how ComfyUI was started beside `flag`, one of STARTS.
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
    control: str | None = None
    turn: str | None = None
    saves: bool = False
    start: str | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether its sampling measures the 16-bit model of the file."""
        foreign = {_MERGE, _BLOCKS, _CONVERT, *COMPILED, *CHANGED}
        own = not foreign & {*self.steps} and _MODEL not in self.hooks
        return own and self.loader in _SIXTEEN_BIT

    @property
    def calls(self) -> int:
        """How often the network runs in its sampling."""
        return self.denoising * (2 if TWICE in self.steps else 1)

    @property
    def keeps_layers(self) -> bool:
        """Whether the network's layers are where they were."""
        return not {*COMPILED, *CHANGED} & {*self.steps}

    @property
    def replaces(self) -> bool:
        """Whether copies stand in the place of the network's own layers."""
        return REPLACED in self.steps

    @property
    def is_exact(self) -> bool:
        """Whether weights in 16 bit are computed as the stock model's are, to the bit."""
        return self.loader not in ASKED and not self.converts

    @property
    def waits(self) -> bool:
        """Whether patches wait for the forward, so that weights show in the picture alone."""
        return self.start in STREAMING or self.loader == PACKED

    @property
    def converts(self) -> bool:
        """Whether the converter is among its steps."""
        return _CONVERT in self.steps

    @property
    def refused(self) -> str | None:
        """What the converter says where it cannot take its input, None where it can."""
        if not self.converts:
            return None
        if {_BESIDE, *COMPILED, *CHANGED} & {*self.steps[: self.steps.index(_CONVERT)]}:
            return "works only on the 16-bit model"
        return None if self.loader in (*_SIXTEEN_BIT, FOREIGN) else "is quantized already"

    @property
    def before_converting(self) -> Composition:
        """What is quantized, by the stock loader: the plain model, or the converter's input."""
        steps = self.steps[: self.steps.index(_CONVERT)] if self.converts else ()
        return dataclasses.replace(self, loader=STOCK, steps=steps, flag=None)

    @property
    def in_16_bit(self) -> Composition:
        """The same with the stock loader and without the converter."""
        steps = tuple(step for step in self.steps if step != _CONVERT)
        return dataclasses.replace(self, loader=STOCK, steps=steps, flag=None)


def compose(seed: int, *, dynamic: bool = False) -> Composition:
    """Return the composition of a seed; under Dynamic VRAM, of what ComfyUI itself can do there."""
    chance = random.Random(seed)
    apart = {_CONVERT, _BLOCKS, *AROUND, *(RENAMING if dynamic else ())}
    others = [step for step in STEPS if step not in apart]
    steps = chance.sample(others, chance.choice([0, 1, 1, 2, 3]))
    for pair in _NEVER_BOTH:
        if {*pair} <= {*steps}:
            steps.remove(pair[0])
    if chance.random() < 0.2:
        steps.insert(chance.randint(0, len(steps)), _CONVERT)
    loader = chance.choice([STOCK, STOCK, SCALED, COMPATIBLE, *ASKED])
    composition = _with_more(
        random.Random(f"more of {seed}"),
        Composition(
            loader=loader,
            linked=chance.random() < 0.5,
            flag=chance.choice([None, *FLAGS]) if loader in ASKED else None,
            steps=tuple(steps),
            hooks=tuple(chance.sample([_LORA, _MODEL], chance.choice([0, 0, 1]))),
            batch=chance.choice([1, 1, 2]),
            denoising=chance.choice([1, 2]),
            before=chance.random() < 0.5,
            unloads=chance.random() < 0.3,
        ),
    )
    if dynamic:
        composition = _as_comfyui_can(composition)
    if seed < _FIRST_WITH_MORE:
        return composition
    return _surrounded(random.Random(f"around {seed}"), composition, dynamic=dynamic)


def _as_comfyui_can(one: Composition) -> Composition:
    """Leave out what ComfyUI cannot do with its own 16-bit models under Dynamic VRAM.

    For hooks it loads such a model once more, without Dynamic VRAM. A compiled function then still
    calls the parts of the first one, which are on the host; and that load ignores --bf16-unet.
    """
    cannot = {*COMPILED} & {*one.steps} or (one.flag == "bf16_unet" and not one.converts)
    return dataclasses.replace(one, hooks=()) if one.loader in _SIXTEEN_BIT and cannot else one


def _with_more(chance: random.Random, composition: Composition) -> Composition:
    """Add what other nodes put around the model, at any place among the steps."""
    steps, hooks = list(composition.steps), composition.hooks
    more = chance.sample(list(AROUND), chance.choice([0, 0, 1, 2]))
    for step in [*more, *([_BLOCKS] if chance.random() < 0.1 else [])]:
        steps.insert(chance.randint(0, len(steps)), step)
    if not hooks and chance.random() < 0.15:
        hooks = (_KEYFRAMES,)
    return dataclasses.replace(composition, steps=tuple(steps), hooks=hooks)


def _surrounded(chance: random.Random, one: Composition, *, dynamic: bool) -> Composition:
    """Add what goes on around the sampling, as far as ComfyUI and such loaders can do it."""
    if one.loader == STOCK and not dynamic and chance.random() < 0.5:
        one = dataclasses.replace(one, loader=chance.choice([FOREIGN, PACKED]))
    if one.loader == PACKED:  # its weights are bytes to others
        steps = [step for step in one.steps if step in (_CONVERT, *KINDS, *AROUND)]
        one = dataclasses.replace(one, steps=tuple(steps), hooks=())
    own = one.keeps_layers and one.loader != PACKED
    controls = [control for control in CONTROLS if own or control != SHARES]
    one = dataclasses.replace(
        one,
        control=chance.choice([None, *controls]),
        turn=chance.choice([None, None, *TURNS]),
        start=chance.choice([None, None, *STARTS]),
    )
    # ComfyUI takes norms from the host to a GPU's latent, and loads ControlNets in that FP8, which
    # has no zero.
    if (one.control == SHARES and one.waits) or one.flag == "fp8_e8m0fnu_unet":
        one = dataclasses.replace(one, control=None)
    return dataclasses.replace(
        one, saves=own and not dynamic and not one.waits and chance.random() < 0.4
    )


def _lora(kind: str) -> Callable[[ModelPatcher, ModelPatcher], ModelPatcher]:
    return lambda one, _: patched(one, patch_file(kind, every=5))


def _beside(one: ModelPatcher, _: ModelPatcher) -> ModelPatcher:
    return comfy.sd.load_bypass_lora_for_models(one, None, patch_file("LoRA", every=5), 1.0, 0)[0]


def _merge(one: ModelPatcher, other: ModelPatcher, **shares: float) -> ModelPatcher:
    """Merge as ComfyUI's nodes do, by each part's share of the first model.

    Its nodes add one weight's patch at a time, for which ComfyUI looks at all weights every time:
    on the toy 7 s a merge.
    """
    clone, patches = one.clone(), other.get_key_patches("diffusion_model.")
    for ratio in {0.6, *shares.values()}:
        its = {key: value for key, value in patches.items() if _share(key, shares) == ratio}
        clone.add_patches(its, 1.0 - ratio, ratio)
    return clone


def _share(key: str, shares: dict[str, float]) -> float:
    name = key.removeprefix("diffusion_model.")
    return next((share for part, share in shares.items() if name.startswith(part)), 0.6)


def _merge_blocks(one: ModelPatcher, other: ModelPatcher) -> ModelPatcher:
    """Twice in a row, as merges are refined."""
    for shares in ({"input": 0.2, "middle": 0.5, "out": 0.8}, {"input": 0.9, "out": 0.7}):
        one = _merge(one, other, **shares)
    return one


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
    _BLOCKS: _merge_blocks,
    _CONVERT: _convert,
    **{name: _change(change) for name, change in {**COMPILED, **CHANGED}.items()},
    **{name: lambda one, _, around=around: around(one) for name, around in AROUND.items()},
}


def _hooked_lora(prompt: Conditioning, _: ModelPatcher) -> Conditioning:
    hooks = comfy.hooks.create_hook_lora(patch_file("LoRA", every=5), 1.0, 0.0)
    return comfy.hooks.set_hooks_for_conditioning(prompt, hooks)


def _keyframed_lora(prompt: Conditioning, _: ModelPatcher) -> Conditioning:
    """Another strength in each half of the sampling, as Create Hook Keyframes Interpolated."""
    hooks = comfy.hooks.create_hook_lora(patch_file("LoRA", every=5), 1.0, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.5, 0.0), (1.0, 0.5)):
        frames.add(comfy.hooks.HookKeyframe(strength, start))
    hooks.set_keyframes_on_hooks(frames)
    return comfy.hooks.set_hooks_for_conditioning(prompt, hooks)


HOOKS: dict[str, Callable[[Conditioning, ModelPatcher], Conditioning]] = {
    _LORA: _hooked_lora,
    _KEYFRAMES: _keyframed_lora,
    _MODEL: another_as_lora,
}


def _argument(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(comfy.cli_args.args, name, True)


FLAGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    **{
        name: _argument(name)
        for name in (
            "fp8_e4m3fn_unet", "fp8_e5m2_unet", "fp8_e8m0fnu_unet", "fp16_unet", "bf16_unet",
        )
    },
    "highvram": built_in_place,
}  # fmt: skip
