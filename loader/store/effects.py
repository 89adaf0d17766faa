"""Effects on disk: how a model's output changes if one layer alone is quantized.

Measuring takes a forward for each layer. So effects are also kept while measuring goes on, in a
second file. Until that is complete, the effects that were measured before count. A damaged file
counts as missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
from collections.abc import Mapping
from pathlib import Path

from ...quant import LARGEST_EFFECT, NUMBER_FORMATS
from ..files import kept_json
from ..host.events import changed
from ..host.folders import statistics_folder
from .paths import SHORT

_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Effects:
    """Effects of some or all layers of a model, all measured in one way.

    Attributes:
        layers: by layer name, the squared change of the model's output when this layer alone is
            quantized, over the square of that output.
        of: a key of what was measured; effects with the same key may be put together.
        whole: whether every layer was measured.
    """

    layers: Mapping[str, float]
    of: str
    whole: bool


def find_effects(fingerprint: str, mode: str, *, whole: bool = True) -> Effects | None:
    """Return the effects of a model in a number format; None if none were measured.

    Args:
        fingerprint: of the model's weights.
        mode: name of the number format.
        whole: True returns effects of all layers only; False those of a measuring that was begun.
    """
    try:
        found = _checked(kept_json.read(_path(fingerprint, mode, whole)), fingerprint)
        return found if found.whole == whole else None
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        reason = "they are damaged"
    logging.warning("HSWQ: measured effects cannot be read and are measured again: %s", reason)
    return None


def keep_effects(fingerprint: str, mode: str, effects: Effects) -> None:
    """Keep effects in place of earlier ones. Whole effects end a measuring that was begun.

    A file that cannot be written raises nothing: the effects are measured again.
    """
    content = {"version": _VERSION, "fingerprint": fingerprint, **dataclasses.asdict(effects)}
    try:
        kept_json.write(_path(fingerprint, mode, effects.whole), content)
        if effects.whole:
            _path(fingerprint, mode, False).unlink(missing_ok=True)
    except OSError as error:
        logging.warning("HSWQ: the measured effects are not kept: %s", error)
    changed()


def measured_in(fingerprint: str) -> dict[str, str]:
    """Return when all effects of a model were measured (ISO 8601), by number format."""
    found = {}
    for mode in sorted(NUMBER_FORMATS):
        with contextlib.suppress(OSError):  # nothing was measured
            status = _path(fingerprint, mode, whole=True).stat()
            time = datetime.datetime.fromtimestamp(status.st_mtime, datetime.timezone.utc)
            found[mode] = time.isoformat()
    return found


def forget_effects(fingerprint: str) -> None:
    """Remove all effects of a model."""
    for path in _folder().glob(f"{fingerprint[:SHORT]}.*.json"):
        with contextlib.suppress(OSError):
            path.unlink()


def _checked(content: dict, fingerprint: str) -> Effects:
    """Rebuild effects.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: they are another model's, or damaged.
    """
    if (content["version"], content["fingerprint"]) != (_VERSION, fingerprint):
        raise ValueError("they belong to another model or version")
    layers = {str(name): float(effect) for name, effect in content["layers"].items()}
    if not all(0 <= effect <= LARGEST_EFFECT for effect in layers.values()):
        raise ValueError("an effect is out of range")
    return Effects(layers, str(content["of"]), bool(content["whole"]))


def _folder() -> Path:
    return statistics_folder() / "effects"


def _path(fingerprint: str, mode: str, whole: bool) -> Path:
    return _folder() / f"{fingerprint[:SHORT]}.{mode}.{'whole' if whole else 'begun'}.json"
