"""Additions by other nodes that hold a MODEL's own modules, and so do not work on a copy of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, MethodType

import comfy.model_management as memory
import comfy.utils
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from .network import PREFIX


@contextmanager
def as_built(patcher: ModelPatcher) -> Iterator[None]:
    """Show the network without object patches and injections, for the length of the block.

    All clones share one network. While one of them is loaded, its patches and injections are in it.
    """
    model, originals = patcher.model, dict(patcher.object_patches_backup)
    loaded = [one.model for one in memory.current_loaded_models if one.model is not None]
    with ExitStack() as stack:
        for one in {id(one): one for one in (patcher, *loaded) if one.is_clone(patcher)}.values():
            stack.enter_context(one.use_ejected())
        for name, original in reversed(originals.items()):
            patched = comfy.utils.set_attr(model, name, original)
            stack.callback(comfy.utils.set_attr, model, name, patched)
        yield


def check_free(patcher: ModelPatcher) -> None:
    """Refuse a MODEL with an addition that holds its modules, because a copy would not have it.

    Raises:
        ValueError: there is such an addition; the message names it and says what to do.
    """
    with as_built(patcher):
        own = set(patcher.model.diffusion_model.modules())
    found = [name for name, value in _added(patcher) if _reaches(value, own)]
    found += [f"the object patch {key!r}" for key in patcher.object_patches if _in_network(key)]
    found += [
        f"the injection {key!r}" for key, all_of_it in patcher.injections.items() if all_of_it
    ]
    if patcher.get_additional_models_with_key("multigpu"):
        found.append("its copies on other GPUs")
    if found:
        raise ValueError(
            f"{found[0]} works only on the 16-bit model, not on the FP8 model that is made from "
            "it: put the node that adds it after the HSWQ FP8 Converter"
        )


def _in_network(key: str) -> bool:
    return key.partition(".")[0] == PREFIX


def _added(patcher: ModelPatcher) -> Iterator[tuple[str, object]]:
    """Yield all that nodes can add to a MODEL besides weights, each with a name for messages."""
    for key, value in patcher.object_patches.items():
        if not _in_network(key):
            yield f"the object patch {key!r}", value
    for kind, by_type in (("wrapper", patcher.wrappers), ("callback", patcher.callbacks)):
        for called, by_key in by_type.items():
            for key, functions in by_key.items():
                yield f"the {kind} {key or called!r}", functions
    for key, functions in patcher.weight_wrapper_patches.items():
        yield f"the function on {key}", functions
    # One level flatter, so that a message names the entry and not "transformer_options".
    options = {**patcher.model_options, **patcher.model_options.get("transformer_options", {})}
    options.pop("transformer_options", None)
    for key, value in options.items():
        yield f"the model option {key!r}", value


def _reaches(value: object, own: set[torch.nn.Module]) -> bool:
    """Whether a value holds one of these modules: in a closure, a bound method or a container."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        # ComfyUI hands every function its BaseModel: holding one says nothing about the modules.
        if id(value) in seen or isinstance(value, BaseModel):
            continue
        seen.add(id(value))
        if isinstance(value, torch.nn.Module):
            if not own.isdisjoint(value.modules()):
                return True
        else:
            waiting.extend(_held(value))
    return False


def _held(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set)):
        return list(value)
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, FunctionType):
        closed = [held for cell in value.__closure__ or () for held in _content(cell)]
        return [*closed, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return []


def _content(cell: object) -> list[object]:
    try:
        return [cell.cell_contents]
    except ValueError:  # the variable of the closure has no value yet
        return []
