"""Recording the Dual Monitor's statistics in the background of every sampling."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...calibration import DualMonitor, Rotation, Statistics, merge_sketches
from .. import store
from ..engine import ahead
from ..engine.identity import identity
from ..engine.network import own_layers, own_network
from ..engine.patchers import patches, with_clones
from ..host import settings
from .budget import share_of
from .noise_levels import levels_of
from .not_finite import explain
from .patch import SamplingPatch
from .progress import noted_steps
from .reasons import NO_FILE, UNFINISHED, unrecordable
from .status import (
    COMPLETE,
    FAILED,
    NOT_RECORDED,
    RECORDING,
    ModelStatus,
    StatusTable,
    sampling,
)
from .unrecorded import WRAPPER


class Target(NamedTuple):
    """A model to record.

    Attributes:
        name: of its file.
        fingerprint: of its weights.
        samples: latent images that were recorded before.
        meta: what its statistics state about its weights.
    """

    name: str
    fingerprint: str
    samples: int
    meta: Mapping[str, str]


class Recorder:
    """Records every sampling once installed.

    Attributes:
        enabled: whether samplings are recorded, if the user's settings allow it.
        table: the state of the recording of each model that has sampled since ComfyUI started.
    """

    def __init__(self) -> None:
        """Start without the patch."""
        self.enabled = True
        self.table = StatusTable()
        self._failed: dict[str, str] = {}  # fingerprint: what went wrong in measuring
        self._rotations: dict[str, tuple[tuple, Rotation]] = {}
        self._complete: WeakKeyDictionary[torch.nn.Module, tuple] = WeakKeyDictionary()
        self._patch = SamplingPatch(self._recording, functools.partial(explain, self.table))

    def follow_settings(self) -> None:
        """Install or remove the patch as the settings say. It is called for every queued prompt.

        ComfyUI has no event for a changed setting, but every sampling needs a queued prompt. If
        recording is turned off while a prompt waits, the patch removes itself when it samples.
        """
        if settings.current().record:
            self.install()
        else:
            self.remove()

    def install(self) -> None:
        """Patch ComfyUI so that every sampling is recorded. Idempotent."""
        self.enabled = True
        self._patch.install()

    def remove(self) -> None:
        """Remove the patch. If another extension has wrapped it, it stays and does nothing."""
        self.enabled = False
        self._patch.remove()

    def status(self) -> list[ModelStatus]:
        """Return the state of the recording of each model that has sampled since the start."""
        return self.table.all()

    @contextmanager
    def _recording(
        self, patcher: ModelPatcher, noise: torch.Tensor, args: tuple, kwargs: dict
    ) -> Iterator[None]:
        target = rotation = None
        try:  # no error here may prevent the picture
            if not settings.current().record:
                self.remove()
            target = self._target(patcher)
            rotation = target and self._rotation(target.fingerprint, patcher)
            samples = noise.shape[0]
            meta = target and {**levels_of(patcher, args, kwargs), **target.meta}
        except Exception as error:
            target = None
            reason = f"recording failed: {error}"
            self.table.note(ModelStatus(type(patcher.model).__name__, None, FAILED, 0, reason))
        if target is None:
            yield
            return

        def saved(total: Statistics) -> None:
            state = COMPLETE if store.is_complete(total) else RECORDING
            self._note(target._replace(samples=total.samples), state)
            ahead.prepare(torch.device(patcher.load_device), patcher.model.get_dtype())

        def failed(reason: str, for_good: bool) -> None:
            if for_good:
                self._failed[target.fingerprint] = reason
            self._note(target, FAILED, reason)

        def wanted() -> bool:
            is_known = self.table.forgotten(target.fingerprint) == forgotten
            return is_known and self.enabled and settings.current().record

        forgotten = self.table.forgotten(target.fingerprint)
        recording = Recording(
            target.fingerprint, store.PASSIVE_SESSION, target.name, saved, failed, wanted, meta
        )
        with record(patcher, samples, recording, rotation):
            try:
                yield
            except BaseException:
                if wanted():
                    self._note(target, RECORDING, UNFINISHED)
                raise

    def _target(self, patcher: ModelPatcher) -> Target | None:
        """Return the model to record; None if it shall not be recorded, with the reason noted."""
        state = store.state()
        if not self.enabled or self._complete.get(patcher.model) == state:
            return None
        if WRAPPER in patcher.wrappers.get(WrappersMP.OUTER_SAMPLE, {}):
            return None
        found = identity(patcher)
        if found is None or not found.is_of_file:
            reason = unrecordable(patcher) or NO_FILE
            name = type(patcher.model).__name__ if found is None else found.name
            self.table.note(ModelStatus(name, None, NOT_RECORDED, 0, reason))
            return None
        head = store.head_of(found.fingerprint)
        known = head and head.total
        samples = known.samples if known else 0
        target = Target(found.name, found.fingerprint, samples, found.whole)
        if known and store.is_complete(known):
            self._note(target, COMPLETE)
            self._complete[patcher.model] = state  # no need to look again until the state changes
            return None
        failure = self._failed.get(found.fingerprint)
        reason = failure or unrecordable(patcher)
        if reason is not None:
            self._note(target, FAILED if failure else NOT_RECORDED, reason)
            return None
        self._note(target, RECORDING)
        return target

    def _note(self, target: Target, state: str, reason: str | None = None) -> None:
        self.table.note(ModelStatus(target.name, target.fingerprint, state, target.samples, reason))

    def _rotation(self, fingerprint: str, patcher: ModelPatcher) -> Rotation:
        """Return a model's Rotation. It is kept, so that the next sampling continues the turns."""
        share = share_of(settings.current().budget, torch.device(patcher.load_device))
        names = tuple(own_layers(patcher))
        known = self._rotations.get(fingerprint)
        if known is None or known[0] != (share, names):
            known = self._rotations[fingerprint] = (share, names), Rotation(names, share)
        return known[1]


class Recording(NamedTuple):
    """Where a sampling's statistics go, and whom to tell.

    Attributes:
        fingerprint: of the model's weights; None if it has no file.
        session: of the statistics file.
        name: of the model, for messages.
        saved: is called with the file's new content.
        failed: is called with the reason of a failure, and whether it would happen again.
        wanted: tells, when the sampling has ended, whether its statistics are still wanted.
        meta: further entries of the statistics' meta.
    """

    fingerprint: str | None
    session: str
    name: str
    saved: Callable[[Statistics], None] = lambda _: None
    failed: Callable[[str, bool], None] = lambda reason, _: logging.warning(
        "HSWQ: this sampling was not recorded: %s", reason
    )
    wanted: Callable[[], bool] = lambda: True
    meta: Mapping = MappingProxyType({})


@contextmanager
def record(
    patcher: ModelPatcher, samples: int, recording: Recording, rotation: Rotation | None = None
) -> Iterator[None]:
    """Measure one sampling and add it to the model's statistics file when it has succeeded.

    Errors in measuring or saving are reported, and the sampling goes on.

    Args:
        patcher: MODEL whose diffusion model runs in the block. Its clones on other GPUs are
            measured there too.
        samples: number of latent images in the sampling.
        recording: where the statistics go.
        rotation: chooses the layers to measure in each forward; None measures all in all.
    """
    with ExitStack() as hooks:
        monitors = []
        try:
            for one in with_clones(patcher):
                monitor = DualMonitor(own_network(one), rotation=rotation, layers=own_layers(one))
                monitors.append(hooks.enter_context(monitor))
            hooks.enter_context(sampling(recording.fingerprint, samples))
            hooks.enter_context(noted_steps())
        except Exception as error:
            hooks.close()
            monitors = []
            _report(recording, f"it cannot be measured: {error}", not _is_out_of_memory(error))
        yield
    if monitors and recording.wanted():
        _save(patcher, samples, recording, monitors)


def _save(
    patcher: ModelPatcher, samples: int, recording: Recording, monitors: list[DualMonitor]
) -> None:
    try:
        first, *others = [monitor.statistics() for monitor in monitors]
        delta = functools.reduce(Statistics.merge, others, first)
        sketches = functools.reduce(merge_sketches, (one.sketches() for one in monitors))
    except Exception as error:
        _report(recording, str(error), not _is_out_of_memory(error))
        return
    if not all(layer.finite for layer in delta.values()):
        _report(recording, "the sampling produced values that are not finite")
    elif delta:
        meta = {**delta.meta, **recording.meta, "samples": samples}
        patched = patches(patcher)
        if patched is not None:
            meta["lora"] = patched
        delta = Statistics(delta, meta)
        try:
            its = recording.fingerprint, recording.session, recording.name
            total = store.add_soon(store.NewSums(delta, *its, own_layers(patcher), sketches))
            recording.saved(total)
        except Exception as error:
            _report(recording, str(error))


def _is_out_of_memory(error: Exception) -> bool:
    return any(memory.is_oom(one) for one in (error, error.__cause__) if one is not None)


def _report(recording: Recording, reason: str, for_good: bool = False) -> None:
    """Tell the listener of a failure. An error in the listener must not prevent the picture."""
    try:
        recording.failed(reason, for_good)
    except Exception as error:
        logging.warning("HSWQ: not recorded: %s (and %s)", reason, error)


recorder = Recorder()
