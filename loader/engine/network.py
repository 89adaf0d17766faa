"""A model's own network, without what nodes have temporarily put into it or around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...calibration import monitored_layers

PREFIX = "diffusion_model"
"""Name of the network in ComfyUI's model, with which its layers' names begin there."""

BYPASS_LORA = "bypass_lora"
"""Key of ComfyUI's injections that compute a LoRA beside a layer. They add no module."""

_ORIGINAL = "_orig_mod"
"""Name under which a module of torch.compile holds the module that it compiles.

The name is used because importing torch.compile's class takes seconds.
"""


def own_network(patcher: ModelPatcher) -> torch.nn.Module:
    """Return the model's own diffusion model, not a clone's replacement or a compiled wrapper."""
    network = patcher.object_patches_backup.get(PREFIX, patcher.model.diffusion_model)
    while _ORIGINAL in network._modules:
        network = network._modules[_ORIGINAL]
    return network


def own_layers(patcher: ModelPatcher) -> dict[str, torch.nn.Module]:
    """Return the Linear and Conv2d layers that the model itself has, by name, in its order.

    A clone's object patches and injections stay in the network until ComfyUI loads another clone,
    and may have layers of their own. Those are not returned.
    """
    with _ejected(patcher):
        layers = monitored_layers(own_network(patcher))
    for key, original in patcher.object_patches_backup.items():
        part = key.removeprefix(f"{PREFIX}.")
        if part != key and isinstance(original, torch.nn.Module):
            layers = _with_part(layers, part, original)
    return layers


def _with_part(layers: dict, part: str, original: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return layers with those of a replaced part exchanged for the original part's."""
    own = monitored_layers(original)
    named = {f"{part}.{name}" if name else part: layer for name, layer in own.items()}
    names = list(layers)
    replaced = [name for name in names if name == part or name.startswith(f"{part}.")]
    start = names.index(replaced[0]) if replaced else len(names)
    before = {name: layers[name] for name in names[:start]}
    after = {name: layers[name] for name in names[start:] if name not in replaced}
    return {**before, **named, **after}


@contextmanager
def _ejected(patcher: ModelPatcher) -> Iterator[None]:
    """Take out what loaded clones have injected, and put it back after the block."""
    loaded = [one.model for one in memory.current_loaded_models]
    clones = [one for one in loaded if one is not None and one.is_clone(patcher)]
    with ExitStack() as stack:
        for one in {id(one): one for one in (patcher, *clones)}.values():
            if one.is_injected and one.injections.keys() - {BYPASS_LORA}:
                stack.enter_context(one.use_ejected())
        yield


def is_compiled(patcher: ModelPatcher) -> bool:
    """Whether torch has compiled any part that a MODEL samples with, in any of its ways."""
    if patcher.get_wrappers(WrappersMP.APPLY_MODEL, "torch.compile"):
        return True
    called = [patcher.model, getattr(patcher.model, "apply_model", None)]
    called += [*patcher.object_patches.values(), *_own_parts(patcher)]
    return any(map(_is_compiled, called))


def _own_parts(patcher: ModelPatcher) -> Iterator[object]:
    """Yield a network's modules and their forwards, with originals for what a clone replaced."""
    originals = {
        key: one
        for key, one in patcher.object_patches_backup.items()
        if key.startswith(f"{PREFIX}.")
    }
    network = patcher.object_patches_backup.get(PREFIX, patcher.model.diffusion_model)
    for name, part in network.named_modules(prefix=PREFIX):
        if not any(f"{name}.".startswith(f"{key}.") for key in originals):
            yield part
            yield originals.get(f"{name}.forward", part.forward)
    for one in originals.values():
        yield from one.modules() if isinstance(one, torch.nn.Module) else [one]


def _is_compiled(part: object) -> bool:
    """Whether torch.compile has made or changed a module or function."""
    if isinstance(part, torch.nn.Module):
        return part._compiled_call_impl is not None or _ORIGINAL in part._modules
    disabled = getattr(part, "_torchdynamo_disable", False)  # set by torch.compiler.disable
    return hasattr(part, "_torchdynamo_orig_callable") and not disabled


def is_changed(patcher: ModelPatcher) -> bool:
    """Whether a node has put modules or weights of its own into a MODEL's network."""
    patches = (
        value
        for key, value in patcher.object_patches.items()
        if key == PREFIX or key.startswith(f"{PREFIX}.")
    )
    parts = (torch.nn.Module, torch.Tensor)
    return any(isinstance(value, parts) for value in patches) or any(
        injections and key != BYPASS_LORA for key, injections in patcher.injections.items()
    )
