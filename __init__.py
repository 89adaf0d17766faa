"""HSWQ for ComfyUI: quantizes SDXL to FP8 while it loads, by statistics of your own samplings."""

import logging

from .loader.host.version import problem

if (_problem := problem()) is None:
    WEB_DIRECTORY = "./web"
else:
    logging.error("%s: its nodes are not loaded.", _problem)
    NODE_CLASS_MAPPINGS = {}  # so that ComfyUI takes no node, and asks no further


async def comfy_entrypoint() -> "ComfyExtension":  # noqa: F821
    """Return the extension to ComfyUI."""
    from .loader.extension import HSWQExtension

    return HSWQExtension()
