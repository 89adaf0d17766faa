"""What a diffusion model in memory is made of."""

import ctypes
import gc
import hashlib
import sys

import comfy.model_management
import torch
from aiohttp import web
from comfy.model_base import BaseModel
from comfy.samplers import CFGGuider
from server import PromptServer


def add_route():
    """Serve GET /probe/models: looking is no prompt, so ComfyUI's cache stays as it is.

    What is imported by now stays anyway, and no look goes through it: it takes half a second.
    """
    gc.freeze()

    @PromptServer.instance.routes.get("/probe/models")
    async def models(request):
        gc.collect()
        if sys.platform == "linux":  # what malloc keeps for later is in nobody's use
            ctypes.CDLL(None).malloc_trim(0)
        patchers = [loaded.model for loaded in comfy.model_management.current_loaded_models]
        models = [patcher.model for patcher in patchers if patcher is not None]
        models = [model for model in models if isinstance(model, BaseModel)]
        objects = gc.get_objects()
        alive = sum(issubclass(type(thing), BaseModel) for thing in objects)
        patched = hasattr(CFGGuider.outer_sample, "__wrapped__")
        answer = {"loaded": [facts(model) for model in models], "alive": alive}
        return web.json_response({**answer, "objects": len(objects), "patched": patched})


class ProbeModel:
    """Shows the facts of a MODEL and passes it on, so that a test can say when it looks."""

    CATEGORY = "test"
    FUNCTION = "look"
    OUTPUT_NODE = True
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 (ComfyUI's own name)
        return {"required": {"model": ("MODEL",)}}

    def look(self, model):
        return {"ui": {"facts": [facts(model.model)]}, "result": (model,)}


def facts(model):
    """Layers' dtypes by name, hooks left on it, and the number and a hash of its weights' bytes."""
    network = model.diffusion_model
    weights = {name: getattr(part, "weight", None) for name, part in network.named_modules()}
    return {
        "layers": {
            name: str(stored(weight)[0].dtype).removeprefix("torch.")
            for name, weight in weights.items()
            if weight is not None and weight.ndim > 1  # norms have one axis
        },
        "hooks": sum(
            len(part._forward_hooks) + len(part._forward_pre_hooks) for part in network.modules()
        ),
        "bytes": sum(part.nbytes for part in parts(network)),
        "digest": digest(network),
    }


def stored(tensor):
    """The tensors that a weight is held in: itself, or FP8 bytes and their scale."""
    if hasattr(tensor, "_qdata"):
        return tensor._qdata, tensor._params.scale
    return (tensor,)


def parts(network):
    """Every tensor that weights and buffers are held in."""
    for tensor in (*network.parameters(), *network.buffers()):
        yield from stored(tensor)


def digest(network):
    hashed = hashlib.sha256()
    for part in parts(network):
        hashed.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()
