"""Exporting: the weights that the loader would make, written to a file tensor by tensor."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import comfy.utils
import torch
from comfy.model_management import throw_exception_if_processing_interrupted as go_on

from ...calibration import atomic_file
from ...quant import Plan, QuantizeSettings
from ..engine.model_structure import layers_of, stored_dtype
from ..engine.quantizer import Quantizer, restrict
from ..files.errors import ModelFileError
from ..files.fingerprints import fingerprint, looked_up
from ..files.layer_formats import (
    DTYPE_KEY,
    MARKERS,
    Beside,
    input_scale,
)
from ..files.model_file import ModelFile
from ..files.safetensors import DTYPE_NAMES
from ..files.tensor_file import DIGEST, NO_DIGEST, TensorFile, lay_out
from .choice import AUTO, Choice
from .export_settings import Exported, ExportSettings
from .keeping import choose_keeping
from .outcome import Outcome, Sizes, known_of, outcome_of
from .output_path import ExportError, check_target, taken

VERSION = "1"
_SAMPLING_KEYS = (
    "v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min",
)  # fmt: skip
"""Keys beside a checkpoint's model, by which ComfyUI knows how the model is sampled."""


def export(
    path: str, target: Path, settings: ExportSettings, *, overwrite: bool = False
) -> Exported:
    """Write a 16-bit model file with its diffusion model quantized, as by the loader.

    Memory for one tensor is enough. After an error or an interrupt, `target` is unchanged. If the
    same export is there already, byte for byte, nothing is written unless `overwrite` is set.

    Args:
        path: of a checkpoint or a diffusion model.
        target: file to write; its folder is created.
        settings: what the user chose.
        overwrite: replace an existing file.

    Raises:
        ExportError: another file is there, the target is the source or in use, or the disk is full.
        ModelFileError: the source is damaged, unknown or quantized, or its export there is damaged.
        StatisticsError, ValueError: as for choice.choose; the statistics are another model's.
        OSError: the file cannot be written.
    """
    job = _job(path, settings)
    if target.exists() and not overwrite and job.file.is_at(target, go_on):
        return job.result(None)
    check_target(target, path, job.file.size, overwrite)
    try:
        plan = job.write(target, overwrite)
    except FileExistsError as error:  # it was created while this was writing
        raise taken(target) from error
    except PermissionError as error:  # Windows cannot replace the file of a loaded model
        raise ExportError(
            f"{target.name} cannot be written ({error.strerror}): if a loaded model or a program "
            "uses it, choose another filename"
        ) from error
    except OSError as error:
        raise OSError(f"{target.name} cannot be written: {error.strerror or error}") from error
    readers = settings.file_format.readers
    source = os.path.basename(path)
    logging.info("HSWQ: %s is %s, %s (for %s)", target.name, source, settings.format, readers)
    return job.result(plan)


def planned(path: str, settings: ExportSettings) -> Exported:
    """Return what `export` would write, to the byte; nothing is searched or written.

    Raises:
        ModelFileError, StatisticsError, ValueError: as export.
    """
    job = _job(path, settings, write=False)
    if job.chosen.decider.refined is not None:  # it is not read here
        job.chosen.decider.refined.close()
    return job.result(None)


def _job(path: str, settings: ExportSettings, *, write: bool = True) -> _Export:
    """Prepare an export. Without `write`, nothing is written and no file counts as used."""
    file = ModelFile(path)
    source = _Source(file, settings.model_only, (fingerprint if write else looked_up)(path))
    wanted = QuantizeSettings(settings.file_format.number_format, compensated=settings.compensated)
    how = settings.keeping, settings.without
    chosen = choose_keeping(settings.statistics, file, wanted, *how, write=write)
    return _Export(source, chosen, settings)


class _Source:
    """The source: its tensors that go into the new file, by their names there."""

    def __init__(self, file: ModelFile, model_only: bool, its_fingerprint: str) -> None:
        self.name = file.name
        file.check_16_bit()
        self.fingerprint, self.metadata = its_fingerprint, file.metadata or {}
        self.sizes = Sizes.of(file)
        self.dtype = stored_dtype(file)
        self.layers, self.tensors, self.prefix = layers_of(file), file.tensors, file.prefix
        if model_only and self.prefix:
            self.tensors = {
                name.removeprefix(self.prefix): tensor
                for name, tensor in self.tensors.items()
                if name.startswith(self.prefix) or name in _SAMPLING_KEYS
            }
            self.prefix = ""

    def key(self, layer: str, name: str) -> str:
        """Return a tensor's name in the new file."""
        return f"{self.prefix}{layer}.{name}"

    def others(self) -> dict[str, torch.Tensor]:
        """Return the tensors that are copied unchanged: all except the layers' weights."""
        weights = {self.key(layer, "weight") for layer in self.layers}
        return {name: tensor for name, tensor in self.tensors.items() if name not in weights}


class _Export:
    """One export: it lays out the new file, and writes it."""

    def __init__(self, source: _Source, chosen: Choice, settings: ExportSettings) -> None:
        self._source, self.chosen = source, chosen
        restrict(chosen.decider, source.layers, source.name)
        self._plan: Plan | None = None
        self._sixteen_bit = _sixteen_bit_dtype(source.layers.values())
        file_format = settings.file_format
        self._dtype = file_format.number_format.dtype
        self._beside: dict[str, Beside] = {}  # what is stored beside each quantized weight
        for layer, weight in source.layers.items():
            beside = file_format.beside(weight, chosen.decider.input_amax(layer))
            if beside is not None and chosen.decider.quantizes(layer):
                self._beside[layer] = beside
        metadata = _metadata(source, chosen, settings, len(self._beside))
        self.file: TensorFile = lay_out(self._tensors(), metadata)

    def result(self, plan: Plan | None) -> Exported:
        """Describe the file, which is written, was there, or is yet to be written."""
        quantized = len(self._beside)
        kept = len(self._source.layers) - quantized
        about = self.chosen.about
        return Exported(plan, quantized, kept, self.file.size, self._outcome(plan), about)

    def _outcome(self, plan: Plan | None) -> Outcome:
        decider = self.chosen.decider
        return outcome_of(
            self._beside,
            known_of(decider) if plan is None else plan.layers,
            self._source.sizes,
            decider.number_format,
            self.chosen.samples,
            decider.sketches or (),
        )

    def write(self, target: Path, overwrite: bool) -> Plan:
        """Write the file and return the Plan."""
        quantizer = Quantizer(self.chosen.decider)
        progress = comfy.utils.ProgressBar(self.file.size - len(self.file.header))
        written = 0
        with atomic_file(target, replace=overwrite) as stream:
            self.file.begin(stream)
            for name, tensor in self._stream(quantizer):
                go_on()
                written += self.file.write(stream, name, tensor)
                progress.update_absolute(written)
            self.file.seal(stream, go_on)
        return self._plan

    def _tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of every tensor in the new file."""
        source = self._source
        facts = {key: (kept.dtype, tuple(kept.shape)) for key, kept in source.tensors.items()}
        for layer, weight in source.layers.items():
            beside = self._beside.get(layer)
            dtype = self._kept_dtype(weight) if beside is None else self._dtype
            facts[source.key(layer, "weight")] = dtype, tuple(weight.shape)
            for key, fact in (beside or {}).items():
                name = source.key(layer, key)
                if name in source.tensors:
                    own = f"{source.name} has a tensor {name} already"
                    raise ModelFileError(f"{own}, which is a name that the format needs")
                facts[name] = fact
        return facts

    def _stream(self, quantizer: Quantizer) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every tensor of the file: first the layers, in the order that a Plan needs."""
        key = self._source.key
        for layer, weight in self._source.layers.items():
            if layer not in self._beside:
                quantizer.search(layer, weight)  # also if only this format keeps it in 16 bit
                yield key(layer, "weight"), weight.to(self._kept_dtype(weight))
                continue
            data, scale = quantizer.quantize(layer, weight)
            yield key(layer, "weight"), data
            found = {
                "comfy_quant": torch.frombuffer(bytearray(MARKERS[self._dtype]), dtype=torch.uint8),
                "input_scale": input_scale(self.chosen.decider.input_amax(layer)),
            }
            for name, (_, shape) in self._beside[layer].items():
                yield key(layer, name), found.get(name, scale).reshape(shape)
        self._plan = quantizer.finish()
        self.chosen.keep(self._plan)
        yield from self._source.others().items()

    def _kept_dtype(self, weight: torch.Tensor) -> torch.dtype:
        return self._sixteen_bit if weight.dtype.itemsize > 2 else weight.dtype


def _sixteen_bit_dtype(weights: Iterable[torch.Tensor]) -> torch.dtype:
    """Return the dtype for 32-bit layers: BF16 if most layers are BF16, else FP16."""
    found = comfy.utils.weight_dtype({str(i): weight for i, weight in enumerate(weights)})
    return found if found is torch.bfloat16 else torch.float16


def _metadata(
    source: _Source, chosen: Choice, settings: ExportSettings, quantized: int
) -> dict[str, str]:
    """Return the source's own metadata, and facts about the export.

    They have no date, so that the same export gives the same file.
    """
    own = {key: str(value) for key, value in source.metadata.items()}
    own.pop("modelspec.hash_sha256", None)  # it is of the source's tensors
    measured = chosen.samples or settings.statistics != AUTO
    facts = {
        "version": VERSION,
        "format": settings.format,
        "mode": chosen.decider.number_format.name,
        "keep_ratio": settings.keep_ratio,
        "also_keep": settings.also_keep,
        **settings.by_effect,
        "rounding": "nearest" if chosen.decider.sketches is None else "compensated",
        "source": source.name,
        "source_fingerprint": source.fingerprint,
        "statistics": settings.statistics if measured else "none",
        "samples": chosen.samples,
        "plan": chosen.key,
        "readers": settings.file_format.readers,
        "quantized_layers": quantized,
        "kept_layers": len(source.layers) - quantized,
    }
    ours = {f"hswq.{key}": str(value) for key, value in facts.items()} | {DIGEST: NO_DIGEST}
    return {"format": "pt", **own, **ours, DTYPE_KEY: DTYPE_NAMES[source.dtype]}
