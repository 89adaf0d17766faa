"""The user's settings of HSWQ, read from ComfyUI's own settings file."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from pathlib import Path

import folder_paths

RECORD, TARGET, BUDGET = "HSWQ.Record", "HSWQ.Target", "HSWQ.Budget"
REFINED, NAMES = "HSWQ.RefinedGB", "HSWQ.Names"
COMPENSATE_LORAS = "HSWQ.CompensateLoras"
"""Ids of the settings; web/settings.mjs has the same."""

_RANGES = {TARGET: (32, 4096), BUDGET: (0.1, 100), REFINED: (0, 4096)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user has chosen.

    Attributes:
        record: whether samplings are recorded in the background.
        target: latent images after which recording ends; the original recommends 256.
        budget: percent by which recording may make a step longer.
        refined_gb: GiB for the cache of quantized models on disk; 0 keeps none.
        names: further host names under which the server may be opened, in lower case.
        compensate_loras: whether a weight with a LoRA is rounded by sketches, as without one.
    """

    record: bool = True
    target: int = 256
    budget: float = 2.0
    refined_gb: float = 20.0
    names: frozenset[str] = frozenset()
    compensate_loras: bool = True


class SettingsFile:
    """ComfyUI's file of a user's settings. It is read again when it has changed.

    ComfyUI writes it when the user changes a setting, so that the next sampling follows it.
    """

    def __init__(self, path: Path) -> None:
        """Take the file; it need not exist."""
        self._path = path
        self._version: tuple | None = None
        self._settings = Settings()

    def current(self) -> Settings:
        """Return the present settings."""
        try:
            status = os.stat(self._path)
            version = (status.st_mtime_ns, status.st_size)
            if version != self._version:
                self._settings = parse(json.loads(self._path.read_text("utf-8")))
                self._version = version
        except FileNotFoundError:
            self._settings, self._version = Settings(), None
        except (OSError, ValueError, RecursionError) as error:  # ComfyUI may be writing it
            logging.info("HSWQ: the settings cannot be read now: %s", error)
        return self._settings


def parse(values: object) -> Settings:
    """Return our settings from the content of ComfyUI's file; an invalid one has its default.

    Raises:
        ValueError: the content is not a JSON object.
    """
    if not isinstance(values, dict):
        raise ValueError("comfy.settings.json is not a JSON object")
    chosen = {}
    for key, field, kinds in (
        (RECORD, "record", (bool,)),
        (TARGET, "target", (int, float)),
        (BUDGET, "budget", (int, float)),
        (REFINED, "refined_gb", (int, float)),
        (COMPENSATE_LORAS, "compensate_loras", (bool,)),
    ):
        value = values.get(key)
        if value is None:
            continue
        if type(value) not in kinds or not _in_range(key, value):
            logging.warning("HSWQ: the setting %s cannot be %r; its default is used", key, value)
            continue
        chosen[field] = int(value) if key == TARGET else value
    return Settings(**chosen, names=_names(values.get(NAMES)))


def _names(value: object) -> frozenset[str]:
    """Return the words of a text with commas or spaces between them."""
    return frozenset(re.findall(r"[^\s,;]+", value.lower() if isinstance(value, str) else ""))


def _in_range(key: str, value: float) -> bool:
    low, high = _RANGES.get(key, (value, value))
    return low <= value <= high


def current() -> Settings:
    """Return the settings of ComfyUI's default user; with several users, the defaults."""
    global _file
    path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    if _file is None or _file[0] != path:
        _file = path, SettingsFile(path)
    return _file[1].current()


_file: tuple[Path, SettingsFile] | None = None
