"""Why a layer is kept in 16 bit or quantized. Sentences about it are made where they are shown."""

from __future__ import annotations

import enum


class Reason(enum.Enum):
    """A layer's fate and its cause; the value is the word that files and the panel use."""

    KEPT_SENSITIVE = "kept_sensitive"
    """Its output varies most, and keep_ratio leaves room for it."""

    KEPT_BY_NAME = "kept_by_name"
    """The user, or the default for the first and last projection, named it."""

    KEPT_UNMEASURED = "kept_unmeasured"
    """No sampling has measured it."""

    KEPT_NOT_FINITE = "kept_not_finite"
    """Its statistics are not finite."""

    QUANTIZED = "quantized"
    """The selection did not keep it."""

    QUANTIZED_UNIFORM = "quantized_uniform"
    """There are no statistics: every channel counts alike."""

    STORED = "stored"
    """The file was quantized already, and decided about it."""
