"""What a user chooses about an export, and what an export tells."""

from __future__ import annotations

import dataclasses

from ...quant import Plan
from ..files.layer_formats import FILE_FORMATS, FileFormat
from .allowed import check_choice
from .choice import FAIL, QUANTIZE_UNIFORMLY
from .keeping import BY_EFFECT, BY_SENSITIVITY, DEFAULT_MB, Keeping
from .outcome import Outcome

WHOLE, MODEL_ONLY = "full checkpoint", "diffusion model only"
WHAT = (WHOLE, MODEL_ONLY)


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """What a user chooses about an export.

    Attributes:
        format: one of FILE_FORMATS.
        statistics: "auto" or a file of the statistics folder.
        keep_ratio: share of the measured layers that stay 16 bit.
        without: what to do without usable statistics: choice.FAIL or QUANTIZE_UNIFORMLY.
        model_only: leave out what is not the diffusion model.
        also_keep: names of layers that stay 16 bit in any case (see also_keep.also_kept).
        compensated: whether rounding is compensated where sketches were recorded.
        selection, keep_mb, fit_gb: as of Keeping.
    """

    format: str
    statistics: str
    keep_ratio: float
    without: str
    model_only: bool = False
    also_keep: str = ""
    compensated: bool = False
    selection: str = BY_SENSITIVITY
    keep_mb: float = DEFAULT_MB
    fit_gb: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what a node's linked input may bring."""
        check_choice("format", self.format, FILE_FORMATS)
        check_choice("without_statistics", self.without, (FAIL, QUANTIZE_UNIFORMLY))

    @property
    def keeping(self) -> Keeping:
        """What stays 16 bit."""
        return Keeping(self.keep_ratio, self.also_keep, self.selection, self.keep_mb, self.fit_gb)

    @property
    def by_effect(self) -> dict[str, object]:
        """What a file says of a selection that does not go by keep_ratio."""
        if self.selection != BY_EFFECT:
            return {} if self.selection == BY_SENSITIVITY else {"selection": self.selection}
        budget = {"fit_gb": self.fit_gb} if self.fit_gb else {"keep_mb": self.keep_mb}
        return {"selection": self.selection, **budget}

    @property
    def file_format(self) -> FileFormat:
        """How the layers are written."""
        return FILE_FORMATS[self.format]


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        plan: that was applied; None where the very file was there already.
        quantized: number of quantized layers; fewer than the Plan's if the format keeps Conv2d.
        kept: number of layers in 16 bit.
        size: of the file in bytes.
        outcome: what the file's diffusion model is, as far as it is known.
        about: what else a line for users shall say, such as how layers were selected; may be empty.
    """

    plan: Plan | None
    quantized: int
    kept: int
    size: int
    outcome: Outcome
    about: str
