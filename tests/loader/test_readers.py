"""A format that stock ComfyUI reads wrongly says so at every place where one meets it."""

from __future__ import annotations

import pytest
from harness.exports import wanted, written
from harness.inprocess import distance, sample
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.files.layer_formats import FILE_FORMATS
from hswq.loader.jobs.output_path import default_name
from hswq.loader.nodes.export import HSWQExport
from nodes import CheckpointLoaderSimple
from safetensors import safe_open

pytestmark = pytest.mark.usefixtures("folders")


@pytest.mark.parametrize("kind", FILE_FORMATS)
def test_what_stock_reads_wrongly_is_marked(recorded, legacy, kind):
    path, _ = written(recorded, wanted(kind))
    ours = sample(load_checkpoint(str(path), None, only_model=True)[0])
    stock = sample(CheckpointLoaderSimple().load_checkpoint(path.name)[0])
    wrong = not distance(stock, ours) < 0.05  # or not a number
    assert FILE_FORMATS[kind].only_ours == wrong
    assert default_name("toy", FILE_FORMATS[kind].short).endswith("_hswq_only") == wrong
    with safe_open(path, "pt") as file:
        assert file.metadata()["hswq.readers"].startswith("HSWQ loaders only") == wrong
    inputs = {one.id: one for one in HSWQExport.define_schema().inputs}
    lines = inputs["format"].tooltip.split("\n")
    told = {line.split(" (")[0].split(":")[0]: line for line in lines}
    assert ("black" in told[kind]) == wrong
