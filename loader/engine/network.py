"""A model's own network, whatever nodes have put into it or around it for the moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...calibration import monitored_layers

PREFIX = "diffusion_model"
BYPASS_LORA = "bypass_lora"
"""Key of ComfyUI's injections that put a LoRA beside a layer: they add no module."""

_ORIGINAL = "_orig_mod"
"""Where torch.compile's module has the one that it compiles; importing its class takes seconds."""


def own_network(patcher: ModelPatcher) -> torch.nn.Module:
    """Return the diffusion model itself, neither a clone's replacement nor a compiled one."""
    network = patcher.object_patches_backup.get(PREFIX, patcher.model.diffusion_model)
    while _ORIGINAL in network._modules:
        network = network._modules[_ORIGINAL]
    return network


def own_layers(patcher: ModelPatcher) -> dict[str, torch.nn.Module]:
    """Return the Linear and Conv2d layers that the model itself has, by name, in its order.

    ComfyUI takes a clone's object patches and injections out when it loads another clone: until
    then they are in the network, and so are their layers.
    """
    with _ejected(patcher):
        layers = monitored_layers(own_network(patcher))
    for key, original in patcher.object_patches_backup.items():
        part = key.removeprefix(f"{PREFIX}.")
        if part != key and isinstance(original, torch.nn.Module):
            layers = _with_part(layers, part, original)
    return layers


def _with_part(layers: dict, part: str, original: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Put a part's own layers where those of its replacement are."""
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
    """Take out what any loaded clone has injected, and put it back."""
    loaded = [one.model for one in memory.current_loaded_models]
    clones = [one for one in loaded if one is not None and one.is_clone(patcher)]
    with ExitStack() as stack:
        for one in {id(one): one for one in (patcher, *clones)}.values():
            if one.is_injected and one.injections.keys() - {BYPASS_LORA}:
                stack.enter_context(one.use_ejected())
        yield


def is_compiled(patcher: ModelPatcher) -> bool:
    """Whether any part of what a MODEL samples with is compiled by torch, in whatever way."""
    if patcher.get_wrappers(WrappersMP.APPLY_MODEL, "torch.compile"):
        return True
    called = [patcher.model, getattr(patcher.model, "apply_model", None)]
    called += [*patcher.object_patches.values(), *_own_parts(patcher)]
    return any(map(_is_compiled, called))


def _own_parts(patcher: ModelPatcher) -> Iterator[object]:
    """Yield a network's modules and their forwards, but for those that a clone has replaced."""
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
    """Tell a module or function that torch.compile has made or changed."""
    if isinstance(part, torch.nn.Module):
        return part._compiled_call_impl is not None or _ORIGINAL in part._modules
    disabled = getattr(part, "_torchdynamo_disable", False)  # by torch.compiler
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
