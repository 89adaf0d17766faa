"""Small prompts in API format, of stock nodes but for what a test puts in."""

from __future__ import annotations

CHECKPOINT = "sd_xl_base_1.0.safetensors"
"""The toy checkpoint's name in the tests: the example workflows name it."""

Prompt = dict[str, dict]


def node(class_type: str, **inputs: object) -> dict:
    """Return one node; an input from another node is [its id, output number]."""
    return {"class_type": class_type, "inputs": inputs}


def stock_loader(name: str = CHECKPOINT) -> dict:
    """Return ComfyUI's own checkpoint loader."""
    return node("CheckpointLoaderSimple", ckpt_name=name)


def hswq_loader(name: str = CHECKPOINT, **inputs: object) -> dict:
    """Return the loader with its defaults, but for `inputs`."""
    defaults = {
        "statistics": "auto",
        "mode": "scaled",
        "keep_ratio": 0.25,
        "without_statistics": "load in 16 bit",
    }
    return node("HSWQCheckpointLoader", ckpt_name=name, **{**defaults, **inputs})


def converter(model: list, **inputs: object) -> dict:
    """Return the converter with its defaults, but for `inputs`."""
    defaults = {
        "statistics": "auto",
        "mode": "compatible",
        "keep_ratio": 0.25,
        "bins": 4096,
        "candidates": 200,
        "refinements": 3,
    }
    return node("HSWQConverter", model=model, **{**defaults, **inputs})


def text_to_latent(
    loader: dict, *, size: int = 64, batch: int = 1, steps: int = 2, seed: int = 0
) -> Prompt:
    """Return a prompt that samples and saves the latent.

    Its nodes: loader, positive, negative, empty, sampler, save.
    """
    return {
        "loader": loader,
        "positive": node("CLIPTextEncode", clip=["loader", 1], text="a lighthouse in a storm"),
        "negative": node("CLIPTextEncode", clip=["loader", 1], text="blurry"),
        "empty": node("EmptyLatentImage", width=size, height=size, batch_size=batch),
        "sampler": node(
            "KSampler",
            model=["loader", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
            seed=seed,
            steps=steps,
            cfg=5.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "save": node("SaveLatent", samples=["sampler", 0], filename_prefix="latents/test"),
    }


def through(prompt: Prompt, name: str, made: dict) -> Prompt:
    """Return a prompt whose sampler takes its model from a new node."""
    sampler = {**prompt["sampler"], "inputs": {**prompt["sampler"]["inputs"], "model": [name, 0]}}
    return {**prompt, name: made, "sampler": sampler}


def numbered(prompt: Prompt) -> Prompt:
    """Return a prompt whose ids are numbers, as those of ComfyUI's page are."""
    numbers = {name: str(number) for number, name in enumerate(prompt, 1)}

    def moved(value: object) -> object:
        return [numbers[value[0]], value[1]] if isinstance(value, list) else value

    return {
        numbers[name]: {**one, "inputs": {key: moved(its) for key, its in one["inputs"].items()}}
        for name, one in prompt.items()
    }
