"""What a user chooses about quantizing."""

from __future__ import annotations

import dataclasses

from .search import DEFAULT_SETTINGS, SearchSettings


@dataclasses.dataclass(frozen=True)
class QuantizeSettings:
    """What a user chooses about quantizing.

    Attributes:
        scaled: V2 (True) or V1.
        keep_ratio: share of the measured layers that stay 16 bit.
        search: how finely amax is searched.
    """

    scaled: bool = True
    keep_ratio: float = 0.25
    search: SearchSettings = DEFAULT_SETTINGS
