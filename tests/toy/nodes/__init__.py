"""Test-only node pack: lets ComfyUI recognise the toy SDXL. It has no nodes.

ComfyUI recognises SDXL by its size, so the toy needs an entry of its own in the list of supported
models. Everything else about it is SDXL's: layout, sampling, latents, LoRA names, saving.
"""

from .toy_sdxl import register

register()

NODE_CLASS_MAPPINGS = {}
