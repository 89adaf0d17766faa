"""Prompts that ComfyUI's own executor runs in this process, without a server.

Import it where ComfyUI is up (tests/loader/conftest.py).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
from collections.abc import Callable
from pathlib import Path

import folder_paths
import nodes
import pytest
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_primitive import String
from execution import CacheType, PromptExecutor
from hswq.loader.nodes.loaders import HSWQCheckpointLoader
from server import PromptServer

from harness.prompts import Prompt, hswq_loader, node

_CACHE = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}


def load_by_prompt(checkpoint: Path, *, linked: bool, **inputs: object) -> ModelPatcher:
    """Load a checkpoint by the loader node, in two prompts alike; ComfyUI runs the first alone.

    Args:
        checkpoint: to load.
        linked: whether another node gives the checkpoint's name.
        inputs: of the loader, where they are not its defaults.
    """
    name = ["name", 0] if linked else checkpoint.name
    prompt = {
        "name": node("PrimitiveString", value=checkpoint.name),
        "loader": hswq_loader(name, **inputs),
        "keep": node("Keep", model=["loader", 0]),
    }
    kept: list[ModelPatcher] = []
    place = ([str(checkpoint.parent)], {".safetensors"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(folder_paths.folder_names_and_paths, "checkpoints", place)
        for name, one in {"Keep": _keeper(kept), "PrimitiveString": String}.items():
            patch.setitem(nodes.NODE_CLASS_MAPPINGS, name, one)
        patch.setitem(nodes.NODE_CLASS_MAPPINGS, "HSWQCheckpointLoader", HSWQCheckpointLoader)
        executor = PromptExecutor(_server(), CacheType.CLASSIC, _CACHE)
        for _ in range(2):
            _run(executor, prompt)
    assert len(kept) == 1, "the loader ran again though nothing had changed"
    return kept[0]


@functools.cache
def _server() -> PromptServer:
    """Return a server that listens nowhere, and that nothing else in this process finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptServer, "instance", None, raising=False)
        return PromptServer(asyncio.new_event_loop())


def _run(executor: PromptExecutor, prompt: Prompt) -> None:
    copied = {key: {**one, "inputs": dict(one["inputs"])} for key, one in prompt.items()}
    in_a_thread(executor.execute, copied, "composed", {}, ["keep"])
    assert executor.success, executor.status_messages[-1]


def in_a_thread(function: Callable, *arguments: object) -> object:
    """Call a function in a thread, as ComfyUI runs prompts: Playwright may have a loop here."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def _keeper(kept: list[ModelPatcher]) -> type:
    """Return a node that keeps each MODEL that reaches it."""

    class Keep:
        CATEGORY = "test"
        FUNCTION = "keep"
        RETURN_TYPES = ()
        OUTPUT_NODE = True

        @classmethod
        def INPUT_TYPES(cls):  # noqa: N802 (ComfyUI's own name)
            return {"required": {"model": ("MODEL",)}}

        def keep(self, model: ModelPatcher) -> tuple:
            kept.append(model)
            return ()

    return Keep
