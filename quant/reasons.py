"""Why a layer is kept in 16 bit or quantized. The panel has the sentences, in each language."""

from __future__ import annotations

import enum


class Reason(enum.Enum):
    """Why a layer is kept or quantized. Files and the panel use the values."""

    KEPT_SENSITIVE = "kept_sensitive"
    """Its output varies more than that of the quantized layers."""

    KEPT_EFFECT = "kept_effect"
    """Quantizing it changes the model's output more, for the bytes, than the quantized layers."""

    KEPT_BY_NAME = "kept_by_name"
    """It was named: by the user, or by a default such as the first and last projection."""

    KEPT_UNMEASURED = "kept_unmeasured"
    """No sampling has measured it."""

    KEPT_NOT_FINITE = "kept_not_finite"
    """Its statistics are not finite."""

    QUANTIZED = "quantized"
    """The selection did not keep it."""

    QUANTIZED_UNIFORM = "quantized_uniform"
    """There are no statistics: every channel counts alike."""

    STORED = "stored"
    """The file was quantized already, and decided about the layer."""
