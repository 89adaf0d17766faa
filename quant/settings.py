"""What a user chooses about quantizing."""

from __future__ import annotations

import dataclasses

from .formats import FP8_SCALED, NumberFormat
from .search import DEFAULT_SETTINGS, SearchSettings
from .selection import DEFAULT_SELECTION, Selection


@dataclasses.dataclass(frozen=True)
class QuantizeSettings:
    """What a user chooses about quantizing.

    Attributes:
        number_format: of the quantized layers.
        selection: chooses the layers that stay 16 bit.
        search: how finely amax is searched.
        compensated: whether layers with sketches are rounded with compensation. Other layers are
            rounded to the nearest.
    """

    number_format: NumberFormat = FP8_SCALED
    selection: Selection = DEFAULT_SELECTION
    search: SearchSettings = DEFAULT_SETTINGS
    compensated: bool = False
