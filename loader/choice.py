"""Which statistics a model is quantized with, and what happens without any."""

from __future__ import annotations

import folder_paths

from ..calibration import Statistics, StatisticsError, load_statistics
from ..quant import Planner
from . import store
from .loading import QuantizeSettings

AUTO = "auto"
KEEP_16_BIT = "load in 16 bit"
QUANTIZE_UNIFORMLY = "quantize uniformly"
FAIL = "fail"
WITHOUT_STATISTICS = (KEEP_16_BIT, QUANTIZE_UNIFORMLY, FAIL)


def statistics_choices() -> list[str]:
    """Return what a node offers: "auto" and the files in the statistics folder."""
    return [AUTO, *folder_paths.get_filename_list(store.FOLDER)]


def choose_statistics(choice: str, fingerprint: str | None, name: str) -> Statistics | None:
    """Return the statistics for a model, None where "auto" finds none.

    Args:
        choice: "auto" (all that was recorded of the model) or a file of the statistics folder.
        fingerprint: of the model's file, None if it has none.
        name: of the model, for messages.

    Raises:
        StatisticsError: the file is damaged, or belongs to another model.
        FileNotFoundError: there is no such file.
    """
    if choice == AUTO:
        return None if fingerprint is None else store.statistics_of(fingerprint)
    statistics = load_statistics(folder_paths.get_full_path_or_raise(store.FOLDER, choice))
    if None not in (statistics.fingerprint, fingerprint) and statistics.fingerprint != fingerprint:
        raise StatisticsError(
            f"{choice} holds statistics of {statistics.meta.get('model', 'another model')}, "
            f"not of {name}: its weights are others"
        )
    return statistics


def planner_for(
    choice: str, fingerprint: str | None, name: str, settings: QuantizeSettings, without: str
) -> tuple[Planner | None, str]:
    """Return a Planner for a model, or None where it shall stay 16 bit, and a line about it.

    Args:
        choice, fingerprint, name: see choose_statistics.
        settings: mode, keep_ratio and search.
        without: one of WITHOUT_STATISTICS, for a model with fewer than 32 recorded samples.

    Raises:
        StatisticsError, FileNotFoundError: see choose_statistics; or there are no usable
            statistics and `without` is "fail".
        ValueError: keep_ratio is out of range.
    """

    def planner(statistics: Statistics | None) -> Planner:
        return Planner(
            statistics, settings.keep_ratio, scaled=settings.scaled, settings=settings.search
        )

    statistics = choose_statistics(choice, fingerprint, name)
    samples = 0 if statistics is None else statistics.samples
    if statistics and (choice != AUTO or samples >= store.USABLE_SAMPLES):
        return planner(statistics), f"{samples} of {store.TARGET_SAMPLES} samples"
    recorded = f"{samples} of {store.USABLE_SAMPLES} samples"
    if without == FAIL:
        raise StatisticsError(f"{name} has {recorded} that HSWQ needs: sample with it first")
    if without == QUANTIZE_UNIFORMLY:
        return planner(None), f"without statistics ({recorded} recorded)"
    # Validate the settings now, not on the day when there are enough samples.
    planner(None)
    return None, f"16 bit for now: {recorded} recorded"


def milestone(samples: int) -> int:
    """Return the last number of samples at which the loader makes a new Plan, 0 before the first.

    They are 32, 64, 128 and 256: in between, the same workflow gives the same picture.
    """
    reached = 0
    step = store.USABLE_SAMPLES
    while step <= min(samples, store.TARGET_SAMPLES):
        reached, step = step, step * 2
    return reached
