"""Which statistics a model is quantized by, and what happens if there are none."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import comfy.model_management as memory
import folder_paths
import torch

from ...calibration import Statistics, StatisticsError, load_statistics, seen_levels
from ...quant import Decider, KnownPlan, Plan, Planner, QuantizeSettings
from .. import store
from ..host import folders
from ..store import refined
from ..store.search_cache import find_findings, findings_key, keep_findings, note_use
from ..store.totals import is_of
from .allowed import check_choice

AUTO = "auto"
_ROUNDING_VERSION = 2
KEEP_16_BIT = "load in 16 bit"
QUANTIZE_UNIFORMLY = "quantize uniformly"
FAIL = "fail"
WITHOUT_STATISTICS = (KEEP_16_BIT, QUANTIZE_UNIFORMLY, FAIL)


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a model will be quantized.

    Attributes:
        decider: decides about each layer; None leaves the model in 16 bit.
        about: what else a line for users shall say; it may be empty.
        samples: number of latent images that the statistics come from.
        key: under which search results are cached; None caches nothing.
        sketches: used for compensated rounding; None rounds to the nearest. The cache of rounded
            layers depends on their version.
        by_statistics: whether statistics rank the layers. Without them a selection keeps none.
    """

    decider: Decider | None
    about: str
    samples: int = 0
    key: str | None = None
    sketches: store.Sketches | None = None
    by_statistics: bool = False

    def keep(self, plan: Plan) -> None:
        """Cache what was found for a Plan, for the next load."""
        if self.key is None:
            return
        if isinstance(self.decider, KnownPlan) and plan == self.decider.plan:
            note_use(self.key)
        else:
            keep_findings(self.key, plan, self.samples)

    def keep_rounded(self, layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Cache layers that compensated rounding made, unless they came from the cache.

        Args:
            layers: stored weight and FP32 weight_scale of every quantized layer, by name.
        """
        if self.key is None or self.sketches is None:
            return
        before = self.decider.refined
        if before is not None:
            whole = before.is_whole and layers.keys() <= set(before.names)
            before.close()
            if whole:
                return
        parts = ((name, *layer) for name, layer in layers.items())
        shapes = {name: tuple(data.shape) for name, (data, _) in layers.items()}
        key = _rounded_key(self.key, self.sketches, layers)
        refined.keep(key, self.decider.number_format, parts, shapes)


def _rounded_key(key: str, sketches: store.Sketches, layers: Iterable[str]) -> str:
    """Return a file name that changes with all that the bytes of compensated layers depend on."""
    device = memory.get_torch_device().type  # a GPU and a CPU do not round exactly alike
    facts = [_ROUNDING_VERSION, key, sketches.version, device, sorted(layers)]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return f"{key.partition('.')[0]}.{digest[:32]}"


def statistics_choices() -> list[str]:
    """Return a node's choices: "auto", and the files in the statistics folder."""
    return [AUTO, *folder_paths.get_filename_list(folders.FOLDER)]


def statistics_state(choice: str, fingerprint: str | None) -> tuple:
    """Return a value that changes when a node should run again because of its statistics.

    For "auto" it is the version of the last milestone's statistics; for a file, its size and time.
    """
    if choice == AUTO:
        known = None if fingerprint is None else store.quantizing_statistics(fingerprint)
        usable = known is not None and store.is_usable(known)
        return AUTO, statistics_version(AUTO, known) if usable else None
    status = os.stat(folder_paths.get_full_path_or_raise(folders.FOLDER, choice))
    return choice, status.st_size, status.st_mtime_ns


def choose(
    choice: str,
    fingerprint: str | None,
    name: str,
    settings: QuantizeSettings,
    without: str,
    *,
    keep: bool = True,
    write: bool = True,
) -> Choice:
    """Decide how a model is quantized.

    Args:
        choice: "auto" (all that was recorded of the model) or a file of the statistics folder.
        fingerprint: of the model's weights; None if it has no file.
        name: of the model, for messages.
        settings: number format, selection and search.
        without: one of WITHOUT_STATISTICS: what to do if not enough was recorded (see
            store.missing).
        keep: use the cache of searches. False for weights that are not exactly a file's.
        write: False writes no milestone that is not on disk yet: the panel only looks.

    Raises:
        ValueError: `without` is another word.
        StatisticsError: the statistics are damaged or another model's; or not enough was recorded
            and `without` is "fail".
        FileNotFoundError: there is no such statistics file.
    """
    check_choice("without_statistics", without, WITHOUT_STATISTICS)
    statistics = _statistics(choice, fingerprint, name, write)
    if statistics and (choice != AUTO or store.is_usable(statistics)):
        key = None
        if keep and fingerprint is not None:
            key = findings_key(fingerprint, statistics_version(choice, statistics), settings)
        sketches = _sketches(choice, statistics, write) if settings.compensated else None
        return _by_statistics(statistics, settings, key, sketches)
    recorded = _recorded(statistics)
    if without == FAIL:
        raise StatisticsError(f"{name} has {recorded} that HSWQ needs: sample with it first")
    if without == QUANTIZE_UNIFORMLY:
        key = findings_key(fingerprint, "", settings) if keep and fingerprint is not None else None
        about = f"without statistics ({recorded} recorded)"
        planner = planner_for(None, settings, key)
        return Choice(_decider(planner), about, 0, key)
    # The line names the panel because ComfyUI runs the node again only at a milestone: the number
    # on the node does not grow with every picture.
    return Choice(None, f"16 bit for now: {recorded} recorded; the HSWQ panel keeps count")


def _recorded(statistics: Statistics | None) -> str:
    """Return how much was recorded of what is still missing, such as "12 of 32 images"."""
    if statistics is None:
        return f"0 of {store.USABLE_SAMPLES} images"
    layers = len(statistics)
    return {
        store.IMAGES: f"{statistics.samples} of {store.USABLE_SAMPLES} images",
        store.LAYERS: f"{layers} of {layers + store.missing_layers(statistics)} layers",
        store.CALLS: f"{statistics.fewest_calls} of {store.USABLE_CALLS} calls of a layer",
        store.NOISE: f"{seen_levels(statistics.meta)} of {store.USABLE_LEVELS} noise levels",
    }[store.missing(statistics)]


def _sketches(choice: str, statistics: Statistics, write: bool) -> store.Sketches | None:
    """Return the sketches that belong to statistics; None if none were recorded."""
    if choice == AUTO:
        return store.quantizing_sketches(statistics.fingerprint, write=write)
    path = folder_paths.get_full_path_or_raise(folders.FOLDER, choice)
    return store.sketches_beside(Path(path), statistics)


class _Matrices(Mapping[str, torch.Tensor]):
    """Sketches in the form that quant wants: maps layer name to matrix (K, in channels).

    Each matrix is read from the file when it is needed.
    """

    def __init__(self, sketches: store.Sketches) -> None:
        self._sketches = sketches

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._sketches[name].matrix

    def __contains__(self, name: object) -> bool:
        return name in self._sketches  # reads none, which Mapping's own does

    def __iter__(self) -> Iterator[str]:
        return iter(self._sketches)

    def __len__(self) -> int:
        return len(self._sketches)


def _by_statistics(
    statistics: Statistics,
    settings: QuantizeSettings,
    key: str | None,
    sketches: store.Sketches | None,
) -> Choice:
    matrices = None if sketches is None else _Matrices(sketches)
    planner = planner_for(statistics, settings, key, matrices)
    about = ""
    if planner.samples < store.target():  # a quantized model is not recorded
        about = f"sampling with a 16-bit loader adds more, up to {store.target()} images"
    decider = _decider(planner, key, sketches)
    return Choice(decider, about, planner.samples, key, sketches, by_statistics=True)


def _decider(
    planner: Planner, key: str | None = None, sketches: store.Sketches | None = None
) -> Decider:
    """Return the Planner; or a KnownPlan with its Plan if nothing needs to be searched."""
    plan = planner.known_plan()
    if plan is None:
        return planner
    known = KnownPlan(plan, planner.sketches)
    if key is not None and sketches is not None:
        known.refined = refined.find(_rounded_key(key, sketches, plan.quantized))
    return known


def planner_for(
    statistics: Statistics | None,
    settings: QuantizeSettings,
    key: str | None = None,
    sketches: Mapping[str, torch.Tensor] | None = None,
) -> Planner:
    """Return a Planner with the search results that are cached under a key."""
    found = find_findings(key) if key is not None else None
    known = statistics if found is None else found
    return Planner(
        statistics,
        settings.selection,
        settings.number_format,
        settings=settings.search,
        samples=0 if known is None else known.samples,
        known=found,
        sketches=sketches,
    )


def _statistics(choice: str, fingerprint: str | None, name: str, write: bool) -> Statistics | None:
    if choice == AUTO and fingerprint is None:
        return None
    if choice == AUTO:
        return store.quantizing_statistics(fingerprint, write=write)
    statistics = load_statistics(folder_paths.get_full_path_or_raise(folders.FOLDER, choice))
    if None not in (statistics.fingerprint, fingerprint) and not is_of(statistics, fingerprint):
        raise StatisticsError(
            f"{choice} holds statistics of {statistics.meta.get('model', 'another model')}, "
            f"not of {name}, which has different weights"
        )
    return statistics


def statistics_version(choice: str, statistics: Statistics) -> str:
    """Return a key that changes when the statistics do, so that a new Plan is made.

    For "auto" it depends on the sums, which stay the same until the next milestone.
    """
    if choice == AUTO:
        sums = [
            (name, one.output_sum, one.output_square_sum, one.calls, one.input_calls)
            for name, one in statistics.items()
        ]
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()
    with open(folder_paths.get_full_path_or_raise(folders.FOLDER, choice), "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
