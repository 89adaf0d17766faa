"""HSWQ for ComfyUI: quantizes SDXL to FP8 while it loads, by statistics of your own samplings."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Return the extension to ComfyUI."""
    from .loader.extension import HSWQExtension

    return HSWQExtension()
