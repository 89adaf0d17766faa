"""LoRAs and their like for the toy SDXL, in the names and shapes of the files that people have."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection

import torch
from torch import Tensor
from toy.weights import unet_tensors

RANK = 4
STRENGTH = 0.3  # of a layer's weights, so that the result changes clearly

File = dict[str, Tensor]


class _Layer:
    """One layer to patch: its weight, and random numbers for it."""

    def __init__(self, weight: Tensor, seed: int) -> None:
        self.shape = tuple(weight.shape)
        self.weight = weight
        self.size = weight.std().item()
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    @property
    def columns(self) -> int:
        """Of the weight as a matrix with an output channel in each row."""
        return self.weight[0].numel()


def _lora(layer: _Layer) -> File:
    outputs, inputs, *kernel = layer.shape
    down = layer.random(RANK, inputs, *kernel) * STRENGTH * layer.size / RANK**0.5
    return {
        "lora_up.weight": layer.random(outputs, RANK, *[1] * len(kernel)),
        "lora_down.weight": down,
        "alpha": torch.tensor(float(RANK)),
    }


def _dora(layer: _Layer) -> File:
    norms = layer.weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (layer.weight.ndim - 1))
    return {**_lora(layer), "dora_scale": norms * (1 + STRENGTH * layer.random(*norms.shape))}


def _loha(layer: _Layer) -> File:
    outputs = layer.shape[0]
    size = (STRENGTH * layer.size) ** 0.5 / RANK**0.5
    factors = {f"hada_w{i}_a": layer.random(outputs, RANK) * size for i in (1, 2)}
    factors |= {f"hada_w{i}_b": layer.random(RANK, layer.columns) for i in (1, 2)}
    return {**factors, "alpha": torch.tensor(float(RANK))}


def _lokr(layer: _Layer) -> File:
    outputs, inputs, *kernel = layer.shape
    first = torch.eye(2) + STRENGTH * layer.random(2, 2)
    second = layer.random(outputs // 2, inputs // 2, *kernel) * STRENGTH * layer.size
    return {"lokr_w1": first, "lokr_w2": second}


def _difference(layer: _Layer) -> File:
    return {"diff": layer.random(*layer.shape) * STRENGTH * layer.size}


def _bias_difference(layer: _Layer) -> File:
    return {"diff_b": layer.random(layer.shape[0]) * STRENGTH}


def _replacement(layer: _Layer) -> File:
    return {"set_weight": layer.random(*layer.shape) * layer.size}


KINDS: dict[str, Callable[[_Layer], File]] = {
    "LoRA": _lora,
    "DoRA": _dora,
    "LoHa": _loha,
    "LoKr": _lokr,
    "difference": _difference,
    "bias": _bias_difference,
    "replacement": _replacement,
}


def patch_file(
    kind: str, layers: Collection[str] | None = None, seed: int = 0, every: int = 3
) -> File:
    """Return a file's content that patches some layers of the toy.

    Args:
        kind: one of KINDS.
        layers: names of Linear and Conv2d layers relative to the diffusion model; None for all
            that there are, but one of so many as `every` says, which is quicker.
        seed: of the values.
        every: 1 for really all.
    """
    weights = {
        name.removesuffix(".weight"): value for name, value in unet().items() if value.ndim > 1
    }
    if kind == "bias":
        weights = {name: value for name, value in weights.items() if f"{name}.bias" in unet()}
    chosen = list(weights)[::every] if layers is None else layers
    tensors = {}
    for number, (name, weight) in enumerate(weights.items()):
        if name in chosen:
            prefix = "lora_unet_" + name.replace(".", "_")
            for key, value in KINDS[kind](_Layer(weight, seed * 1000 + number)).items():
                tensors[f"{prefix}.{key}"] = value
    return tensors


@functools.cache
def unet() -> File:
    """Return the toy's diffusion model in FP32; not to be changed."""
    return unet_tensors()
