"""Ways to quantize a checkpoint, each loaded as the loader node loads it, in several draws."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from hswq.calibration import monitored_layers
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.files.model_file import ModelFile
from hswq.loader.jobs import choice
from hswq.loader.jobs.also_keep import ENDS
from hswq.loader.jobs.effect import measure_effects
from hswq.loader.jobs.keeping import BY_EFFECT, Keeping, choose_keeping
from hswq.loader.jobs.sampling import Picture
from hswq.loader.recording.unrecorded import unrecorded
from hswq.loader.store import quantizing_statistics
from hswq.loader.store.effects import forget_effects
from hswq.quant import (
    FP8_SCALED,
    INT8,
    NUMBER_FORMATS,
    BySensitivity,
    KnownPlan,
    LayerPlan,
    Plan,
    QuantizeSettings,
)

JITTER = 0.02  # of amax, up and down: it changes which way every weight is rounded


MEASURED, ESTIMATED, SENSITIVITY = "measured", "estimated", "sensitivity"


class Method(NamedTuple):
    """A way to quantize, with the words of the loader node's inputs.

    Attributes:
        keep_ratio: share of the layers in 16 bit.
        also_keep: names further ones.
        compensated: rounding is compensated; else to the nearest.
        largest: amax is each layer's largest weight, instead of what HSWQ searches.
        share: layers are kept so that they add this share of all layers' bytes in FP8; None keeps
            them by keep_ratio.
        by: what ranks the layers of a share: MEASURED or ESTIMATED effect, or SENSITIVITY.
        mode: the number format.
    """

    keep_ratio: float = 0.0
    also_keep: str = ""
    compensated: bool = False
    largest: bool = False
    share: float | None = None
    by: str = MEASURED
    mode: str = FP8_SCALED.name

    @property
    def is_16_bit(self) -> bool:
        """Whether no layer is quantized, so that there is nothing to draw."""
        return self.keep_ratio == 1


STOCK, DEFAULT, SMALL = "stock FP8 cast", "the loader's default", "keep 0, ends, compensated"
PUBLISHED = "HSWQ as published, keep 0.25"
EMBEDDINGS = "time_embed.0, time_embed.2, label_emb.0.0, label_emb.0.2"
SKIPS = ", ".join(f"output_blocks.{number}.0.skip_connection" for number in range(6))
"""The skip connections of the larger test model's output blocks; the small one has nine."""
METHODS: dict[str, Method | None] = {
    "16 bit by our loader": Method(1.0),
    STOCK: None,
    "absmax": Method(largest=True),
    "absmax, ends kept": Method(also_keep=ENDS, largest=True),
    PUBLISHED: Method(0.25),
    "HSWQ as published, keep 0": Method(),
    "keep 0, ends, nearest": Method(also_keep=ENDS),
    DEFAULT: Method(0.25, ENDS, compensated=True),
    SMALL: Method(also_keep=ENDS, compensated=True),
    "keep 0, ends and embeddings, compensated": Method(
        also_keep=f"{ENDS}, {EMBEDDINGS}", compensated=True
    ),
    "keep 0, ends and skips, compensated": Method(also_keep=f"{ENDS}, {SKIPS}", compensated=True),
    "by effect, 3%, nearest": Method(also_keep=ENDS, share=0.03),
    "by effect, 1%": Method(also_keep=ENDS, compensated=True, share=0.01),
    "by effect, 3%": Method(also_keep=ENDS, compensated=True, share=0.03),
    "by effect, 10%": Method(also_keep=ENDS, compensated=True, share=0.1),
    "by effect, 25%": Method(also_keep=ENDS, compensated=True, share=0.25),
    "by effect, 47%": Method(also_keep=ENDS, compensated=True, share=0.47),
    "by estimated effect, 3%": Method(also_keep=ENDS, compensated=True, share=0.03, by=ESTIMATED),
    "by estimated effect, 25%": Method(also_keep=ENDS, compensated=True, share=0.25, by=ESTIMATED),
    "by estimated effect, 47%": Method(also_keep=ENDS, compensated=True, share=0.47, by=ESTIMATED),
    "by sensitivity, 3%": Method(also_keep=ENDS, compensated=True, share=0.03, by=SENSITIVITY),
    "by sensitivity, 25%": Method(also_keep=ENDS, compensated=True, share=0.25, by=SENSITIVITY),
    "INT8, keep 0": Method(mode=INT8.name),
    "INT8, keep 0, ends, nearest": Method(also_keep=ENDS, mode=INT8.name),
    "INT8, keep 0, compensated": Method(compensated=True, mode=INT8.name),
    "INT8, keep 0, ends, compensated": Method(also_keep=ENDS, compensated=True, mode=INT8.name),
    "INT8, by effect, 3%": Method(also_keep=ENDS, compensated=True, share=0.03, mode=INT8.name),
}
"""None is ComfyUI's own cast, which has no amax to move."""


class Loader:
    """Loads a checkpoint by what is recorded of it while `_recording.recorded` runs."""

    def __init__(self, checkpoint: str, reference: ModelPatcher, picture: Picture) -> None:
        """Take the 16-bit file, its model in 16 bit, and what effects are measured with."""
        self._file = ModelFile(checkpoint)
        self._reference, self._picture = reference, picture
        layers = monitored_layers(reference.model.diffusion_model)
        self._largest = {name: one.weight.abs().max().item() for name, one in layers.items()}
        self._sizes = {name: one.weight.numel() for name, one in layers.items()}

    def load(self, method: Method | None, draw: int) -> ModelPatcher:
        """Return the model.

        Args:
            method: how to quantize, None for ComfyUI's cast.
            draw: 0 is what a user gets. In others every amax is moved by up to JITTER.

        Raises:
            StatisticsError: too little is recorded.
        """
        if method is None:
            return _stock_cast(self._file.path)
        chosen = self._choose(method)
        if not isinstance(chosen.decider, KnownPlan):
            patcher = self._load(chosen.decider)
            chosen.keep(patcher.get_attachment(ATTACHMENT))
            if not draw and not method.largest:
                return patcher
            chosen = self._choose(method)
        plan = chosen.decider.plan
        if method.largest:
            plan = _changed(plan, lambda layer: self._largest[layer.name])
        if draw:
            plan = _jittered(plan, draw)
        return self._load(KnownPlan(plan, chosen.decider.sketches))

    def _load(self, decider) -> ModelPatcher:
        return load_checkpoint(self._file.path, decider, only_model=True)[0]

    def _choose(self, method: Method) -> choice.Choice:
        settings = QuantizeSettings(NUMBER_FORMATS[method.mode], compensated=method.compensated)
        keeping = Keeping(method.keep_ratio, method.also_keep)
        if method.share is not None:
            budget = method.share * sum(self._sizes.values())
            if method.by == SENSITIVITY:
                keeping = Keeping(self._ratio(budget), method.also_keep)
            else:
                keeping = Keeping(0.0, method.also_keep, BY_EFFECT, budget / 2**20)
                self._measure(method, settings)
        return choose_keeping(choice.AUTO, self._file, settings, keeping, choice.FAIL)

    def _ratio(self, budget: float) -> float:
        """Return the largest keep_ratio whose layers add no more bytes."""
        statistics = quantizing_statistics(fingerprint(self._file))
        ranked = BySensitivity().ranked(statistics)
        sums = itertools.accumulate(self._sizes[name] for name in ranked)
        return (sum(one <= budget for one in sums) + 0.5) / len(ranked)

    def _measure(self, method: Method, settings: QuantizeSettings) -> None:
        """Measure effects as the node does, or forget them where a method shall do without."""
        if method.by == ESTIMATED:
            forget_effects(fingerprint(self._file))
            return
        began = time.perf_counter()
        unseen = unrecorded(self._reference)
        text = measure_effects(unseen, self._picture, 0, choice.AUTO, settings)
        if "before" not in text:
            print(f"{text}: {time.perf_counter() - began:.1f} s", flush=True)


def _stock_cast(checkpoint: str) -> ModelPatcher:
    """Load as weight_dtype fp8_e4m3fn of ComfyUI's own loader does: all weights, biases, norms."""
    return comfy.sd.load_checkpoint_guess_config(
        checkpoint,
        output_vae=False,
        output_clip=False,
        model_options={"dtype": torch.float8_e4m3fn},
    )[0]


def _jittered(plan: Plan, draw: int) -> Plan:
    numbers = random.Random(draw)
    return _changed(plan, lambda layer: layer.amax * numbers.uniform(1 - JITTER, 1 + JITTER))


def _changed(plan: Plan, amax: Callable[[LayerPlan], float]) -> Plan:
    """Return a Plan with another amax for each quantized layer."""
    layers = {
        name: dataclasses.replace(layer, amax=amax(layer)) if layer.quantized else layer
        for name, layer in plan.layers.items()
    }
    return dataclasses.replace(plan, layers=MappingProxyType(layers))
