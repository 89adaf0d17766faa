"""What other nodes do to a model's network, as they do it.

Import it where ComfyUI is up (tests/loader/conftest.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.hooks
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection
from comfy_api.torch_helpers import set_torch_compile_wrapper

BLOCK = "middle_block.1.transformer_blocks.0"
Change = Callable[[ModelPatcher], None]


class Around(torch.nn.Module):
    """A block with a layer of its own behind it, which changes nothing at first."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.added = inner, torch.nn.Linear(1, 1)

    def forward(self, *args, **kwargs) -> torch.Tensor:
        value = self.inner(*args, **kwargs)
        weight = self.added.to(value.device, value.dtype).weight
        return value + 0 * self.added(value[..., :1].to(weight)) if value.shape[-1] else value


class Same(torch.nn.Sequential):
    """Two times nothing, with a layer that is not called."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity())
        self.added = torch.nn.Linear(1, 1)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values


def compiled_object(patcher: ModelPatcher) -> None:
    network = torch.compile(patcher.get_model_object("diffusion_model"), backend="eager")
    patcher.add_object_patch("diffusion_model", network)


def compiled_block(patcher: ModelPatcher) -> None:
    block = torch.compile(patcher.get_model_object(f"diffusion_model.{BLOCK}"), backend="eager")
    patcher.add_object_patch(f"diffusion_model.{BLOCK}", block)


def compiled_forward(patcher: ModelPatcher) -> None:
    name = f"diffusion_model.{BLOCK}.forward"
    forward = torch.compile(patcher.get_model_object(name), backend="eager")
    patcher.add_object_patch(name, forward)


def compiled_by_core(patcher: ModelPatcher) -> None:
    set_torch_compile_wrapper(patcher, backend="eager")


def replaced_block(patcher: ModelPatcher) -> None:
    block = copy.deepcopy(patcher.get_model_object(f"diffusion_model.{BLOCK}"))
    block.to(patcher.load_device)  # ComfyUI does not, where it has loaded the model before
    patcher.add_object_patch(f"diffusion_model.{BLOCK}", block)


def injected(patcher: ModelPatcher) -> None:
    """Put a module beside the network's own, as AnimateDiff-Evolved does."""

    def inject(one: ModelPatcher) -> None:
        one.model.diffusion_model.input_blocks[1].append(Same())

    def eject(one: ModelPatcher) -> None:
        del one.model.diffusion_model.input_blocks[1][-1]

    patcher.set_injections("motion", [PatcherInjection(inject, eject)])


def moved(patcher: ModelPatcher) -> None:
    """Put the network's own layers into another module."""

    def inject(one: ModelPatcher) -> None:
        one.model.diffusion_model.out[2] = Around(one.model.diffusion_model.out[2])

    def eject(one: ModelPatcher) -> None:
        one.model.diffusion_model.out[2] = one.model.diffusion_model.out[2].inner

    patcher.set_injections("around", [PatcherInjection(inject, eject)])


COMPILED: dict[str, Change] = {
    one.__name__: one
    for one in (compiled_object, compiled_block, compiled_forward, compiled_by_core)
}
CHANGED: dict[str, Change] = {one.__name__: one for one in (replaced_block, injected, moved)}

REPLACED = replaced_block.__name__
"""The one whose layers are not the network's own.

ComfyUI 0.30.0 to 0.33.0 moves the network to the GPU with the copies in their place, and then
believes that all of it is there. So the next clone finds the network's own layers on the host.
"""

RENAMING = ("compiled_object", "compiled_block", REPLACED)
"""Changes that put one module in another's place.

Under Dynamic VRAM ComfyUI 0.30.0 to 0.33.0 cannot take them out again, of 16-bit models neither: it
puts the parts back first and then the weights, which it looks up by the names of before.
"""


def cases(changes: dict[str, Change]) -> list:
    """Return the names of changes as a test's parameters, each in the memory modes that have it."""
    marks = {name: [pytest.mark.legacy] if name in RENAMING else [] for name in changes}
    return [pytest.param(name, marks=marks[name]) for name in changes]


def changed(patcher: ModelPatcher, change: Change) -> ModelPatcher:
    """Return a clone with a change."""
    clone = patcher.clone()
    change(clone)
    return clone


@contextmanager
def compiled_in_place(patcher: ModelPatcher, how: str) -> Iterator[None]:
    """Compile the network itself, past ComfyUI: by `module.compile`, or in its place."""
    model = patcher.model
    network = model.diffusion_model
    try:
        if how == "module":
            network.compile(backend="eager")
        elif how == "forward":
            network.forward = torch.compile(network.forward, backend="eager")
        else:
            model.diffusion_model = torch.compile(network, backend="eager")
        yield
    finally:
        model.diffusion_model = network
        network._compiled_call_impl = None
        network.__dict__.pop("forward", None)


def another_as_lora(conditioning: list, other: ModelPatcher) -> list:
    """Return conditioning that brings in another model's weights, as Create Hook Model as LoRA.

    At half its strength: on top of a merge with that model, all of it gives weights that lie beyond
    both models, with which the picture of any two roundings is another one.
    """
    weights = comfy.hooks.get_patch_weights_from_model(other)
    hooks = comfy.hooks.create_hook_model_as_lora(weights, None, 0.5, 0.0)
    return comfy.hooks.set_hooks_for_conditioning(conditioning, hooks)
