"""Keeping a statistics file that a user uploads, from another machine or from an earlier time."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
from pathlib import Path

import comfy.model_management as memory
import torch

from ...calibration import Statistics, StatisticsError, load_statistics
from .. import store
from ..engine import ahead
from ..files.owners import WHOLE
from ..host.events import changed
from ..jobs.model_files import find_source, shapes_of
from ..store import locked_file

MAX_BYTES = 64 << 20
"""SDXL's statistics are 8 MiB."""

UPLOADED = "uploaded"
_SDXL = 2_567_463_684
"""Parameters of SDXL's UNet, by which ComfyUI chooses a dtype."""

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{16}")
_NAME = re.compile(r"\w[\w .()+,@-]*")
_TIME = re.compile(r"[0-9T:+.Z-]{10,40}")
_COUNTS = ("samples", "total_steps", "layers")
_MAX_TEXT = 200


def take_in(content: bytes, name: str) -> str:
    """Keep a statistics file as a session of its own; return its model's fingerprint.

    No recording counts twice: nothing is written where a session already holds the same recordings
    with at least as many samples.

    Args:
        content: of the file.
        name: of the file where it comes from, for messages.

    Raises:
        ValueError: the name is not allowed, or the statistics do not fit the model's layers.
        StatisticsError: it is damaged, malicious or empty, or does not name the weights that it
            was recorded with.
        OSError: it cannot be written.
    """
    found = _read(content, name)
    _check_layers(found, name)
    with_id = _with_plain_meta(found, content)
    its = with_id.fingerprint
    if any(_includes(path, with_id) for path in store.statistics_files(its)):
        return its
    session = with_id.meta["session"]
    path = store.statistics_path(its, session, with_id.meta["model"])
    with locked_file.locked(path):
        before = locked_file.read_or_set_aside(path)
        if before is None or before.samples < with_id.samples:
            locked_file.write(with_id, path)
    changed()
    _prepare()
    return its


def _prepare() -> None:
    """Prepare the GPU: who sends statistics will quantize by them, and may have recorded none."""
    try:
        device = memory.get_torch_device()
        dtype = memory.unet_dtype(device, _SDXL)
        ahead.prepare(device, torch.float16 if dtype.itemsize < 2 else dtype)
    except RuntimeError as error:  # the file is kept all the same
        logging.info("HSWQ: the GPU is not prepared: %s", error)


def _read(content: bytes, name: str) -> Statistics:
    if not _NAME.fullmatch(name) or len(name.encode()) > _MAX_TEXT:
        raise ValueError(f"the file's name must be a plain one, got {name!r}")
    with tempfile.TemporaryDirectory(prefix="hswq-") as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        found = load_statistics(path)
    if not found:
        raise StatisticsError(f"{name} holds no statistics of any layer")
    if not _FINGERPRINT.fullmatch(found.fingerprint or ""):
        raise StatisticsError(
            f"{name} does not say which weights it is of: choose it in a loader's or converter's "
            "statistics, in models/hswq"
        )
    return found


def _check_layers(found: Statistics, name: str) -> None:
    """Refuse statistics that do not fit the model's file, or its other statistics."""
    source = find_source(found.fingerprint, str(found.meta.get("model")))
    if source is not None:
        layers = shapes_of(source).layers
        strange = [layer for layer in found if layer not in layers]
        if 0 < len(strange) < len(found):  # in diffusers' layout all layers have other names
            raise ValueError(f"{name} has a layer {strange[0]!r}, which is not in {source}")
        said = found.meta.get("layers")
        if _is_count(said) and said > len(layers):
            raise ValueError(f"{name} says {said} layers, and {source} has {len(layers)}")
    known = store.statistics_of(found.fingerprint)
    if known is not None:
        known.merge(found)  # raises ValueError where a layer has another number of channels


def _with_plain_meta(found: Statistics, content: bytes) -> Statistics:
    """Keep the valid values of ours in a file's meta. A recording without an id gets one."""
    meta = {key: found.meta[key] for key in _COUNTS if _is_count(found.meta.get(key))}
    for key in ("created_at", "last_run"):
        if _TIME.fullmatch(str(found.meta.get(key, ""))):
            meta[key] = found.meta[key]
    its = store.recordings(found)
    if not its or not all(map(_ID.fullmatch, its)):
        its = {hashlib.sha256(content).hexdigest()[:16]}
    if _FINGERPRINT.fullmatch(str(found.meta.get(WHOLE, ""))):
        meta[WHOLE] = found.meta[WHOLE]
    meta[store.SENT] = True
    meta[store.MERGED] = merged = " ".join(sorted(its))
    model = os.path.basename(str(found.meta.get("model", UPLOADED)))[:_MAX_TEXT]
    session = _session(str(found.meta.get("session", "")), merged)
    return Statistics(
        found, {**meta, "model": model, "session": session, "fingerprint": found.fingerprint}
    )


def _session(session: str, recordings: str) -> str:
    """Return the session's name here: equal for equal recordings. Nothing is recorded into it."""
    try:
        stem = store.check_session(session[:48])
    except ValueError:
        stem = UPLOADED
    return f"{stem}-{hashlib.sha256(recordings.encode()).hexdigest()[:8]}"


def _includes(path: Path, new: Statistics) -> bool:
    """Whether a file already has everything that a new one has."""
    try:
        known = locked_file.read(path)
    except (StatisticsError, OSError):
        return False
    return store.recordings(known) >= store.recordings(new) and known.samples >= new.samples


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
