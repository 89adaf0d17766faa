"""Measuring the effect of each layer's quantization, kept on disk as it goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping

import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...quant import BySensitivity, QuantizeSettings, dequantize, stored
from ..engine.effect import EffectMeasurer
from ..engine.identity import Identity, identity
from ..engine.network import own_layers
from ..store.effects import Effects, find_effects, keep_effects
from .choice import FAIL, Choice, choose
from .sampling import Picture

_VERSION = 1  # of the way of measuring
STEPS, MEASURED_STEP = 12, 3
_KEPT_EVERY_S = 5.0
_TOLD_AFTER = 16  # layers


def measure_effects(
    patcher: ModelPatcher,
    picture: Picture,
    seed: int,
    statistics: str,
    settings: QuantizeSettings,
    told: Callable[[str], None] = lambda _: None,
) -> str:
    """Measure what quantizing each layer alone changes in a step's output, and keep it.

    What was measured before an interrupt or an error is kept, and not measured again as long as
    statistics and settings are the same.

    Args:
        patcher: 16-bit MODEL of a file, in whose samplings nothing else is recorded.
        picture: what is sampled; its steps do not matter.
        seed: of the noise.
        statistics: "auto" or a file of the statistics folder.
        settings: number format and rounding; every layer is quantized, whatever the selection.
        told: is called with how long it will take.

    Returns:
        A line about it, for people.

    Raises:
        ValueError: the model is not a file's own, or its output is not finite.
        StatisticsError, FileNotFoundError: as of choice.choose.
    """
    its = identity(patcher)
    if its is None or not its.is_of_file:
        raise ValueError("effects are measured of a file's own model, which this is not")
    if not its.is_decided:
        raise ValueError(f"another file looks like {its.name} so far: try again in some minutes")
    wanted = dataclasses.replace(settings, selection=BySensitivity(0.0))
    chosen = choose(statistics, its.fingerprint, its.name, wanted, FAIL)
    job = _Job(its, chosen, settings, told)
    if job.known.whole:
        return f"the effects of all {len(job.known.layers)} layers were measured before"
    layers = own_layers(patcher)
    chosen.decider.restrict(layers)
    kept = {name: 0.0 for name in layers if not chosen.decider.quantizes(name)}
    measurer = EffectMeasurer(job.quantized, {**kept, **job.known.layers}, job.measured)
    try:
        sampled = dataclasses.replace(picture, steps=STEPS)
        sampled.sample(measurer.on(patcher, MEASURED_STEP), seed, last_step=MEASURED_STEP + 1)
    finally:
        job.keep(measurer.effects, whole=measurer.effects.keys() >= layers.keys())
    text = f"measured the effects of {len(layers)} layers in {job.seconds:.0f} s; {chosen.about}"
    logging.info("HSWQ: %s: %s", its.name, text)
    return text


class _Job:
    """One measuring: what is known before, and what is kept of it.

    Attributes:
        known: effects that need not be measured again.
    """

    def __init__(
        self,
        its: Identity,
        chosen: Choice,
        settings: QuantizeSettings,
        told: Callable[[str], None],
    ) -> None:
        self._its, self._decider, self._told = its, chosen.decider, told
        self._mode = settings.number_format.name
        rounding = settings.compensated and chosen.sketches is not None
        facts = [_VERSION, chosen.key, rounding]
        self._of = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        found = (find_effects(its.fingerprint, self._mode, whole=whole) for whole in (True, False))
        same = (one for one in found if one is not None and one.of == self._of)
        self.known = next(same, Effects({}, self._of, whole=False))
        self._progress: comfy.utils.ProgressBar | None = None
        self._began = self._kept = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def quantized(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the float weight that a layer computes with when it is quantized."""
        return dequantize(*stored(self._decider, name, weight), weight.dtype)

    def measured(self, effects: Mapping[str, float], done: int, layers: int) -> None:
        """Note that another layer is done."""
        if self._progress is None:
            self._progress = comfy.utils.ProgressBar(layers)
        self._progress.update_absolute(done)
        new = len(effects) - len(self.known.layers)
        if new == _TOLD_AFTER:
            left = (layers - done) * self.seconds / new
            self._told(f"{layers} layers, about {max(1, round(left / 60))} min")
        if time.monotonic() - self._kept > _KEPT_EVERY_S and done < layers:
            self.keep(effects, whole=False)

    def keep(self, effects: Mapping[str, float], *, whole: bool) -> None:
        """Keep what was measured so far."""
        self._kept = time.monotonic()
        keep_effects(self._its.fingerprint, self._mode, Effects(dict(effects), self._of, whole))
