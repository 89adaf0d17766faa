"""Files that are read tensor by tensor: right values, and nothing left in memory."""

from __future__ import annotations

import gc
import os
import struct
import sys

import pytest
import torch
from harness.sketches import MODEL, SHARED, new_sketches, record
from hswq.loader import store
from hswq.loader.files.errors import ModelFileError
from hswq.loader.files.mapped_file import MappedFile
from hswq.loader.store import sketches
from safetensors.torch import save, save_file

TENSORS = {
    "whole": torch.arange(12).reshape(3, 4), "number": torch.tensor(7.0),
    "small": torch.tensor([1, -2, 3], dtype=torch.int8), "none": torch.empty(0, 4),
    "fp8": torch.ones(5).to(torch.float8_e4m3fn),
}  # fmt: skip


def test_has_what_was_written(tmp_path):
    path = tmp_path / "some.safetensors"
    save_file(TENSORS, path, {"a": "b"})
    found = MappedFile(path)
    assert found.metadata == {"a": "b"}
    assert found.entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        read = found.read(name)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert read.flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))
        assert not read.is_inference()
    with pytest.raises(KeyError):
        found.read("other")


def test_a_tensor_need_not_be_aligned(tmp_path):
    path = tmp_path / "odd.safetensors"
    content = save({"number": torch.tensor(7.0)})
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length].rstrip(b" ")
    header += b" " * (1 - len(header) % 4)  # so that the data begins at an odd place
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    assert MappedFile(path).entries["number"].start % 4
    assert MappedFile(path).read("number").item() == 7


def test_outlives_a_file_that_is_replaced(tmp_path):
    path = tmp_path / "some.safetensors"
    save_file(TENSORS, path)
    found = MappedFile(path)
    save_file({"whole": torch.zeros(1)}, tmp_path / "other")
    os.replace(tmp_path / "other", path)
    assert found.read("whole").equal(TENSORS["whole"])


def test_refuses_what_is_cut_short(tmp_path):
    path = tmp_path / "some.safetensors"
    save_file(TENSORS, path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ModelFileError, match="is truncated"):
        MappedFile(path)


class TestSketches:
    @pytest.fixture(autouse=True)
    def held(self, monkeypatch: pytest.MonkeyPatch, folder) -> None:
        monkeypatch.setattr(sketches, "_held", {})
        record(0)

    def test_reading_leaves_nothing_in_memory(self):
        found = store.sketches_of(MODEL)

        def left_by(times: int) -> int:
            before = sys.getallocatedblocks()
            for _ in range(times):
                assert len([found._parts[0][name] for name in found]) == 4
            gc.collect()
            return sys.getallocatedblocks() - before

        left_by(20)
        assert left_by(200) < 100  # an integer a sketch would be 800

    def test_a_layer_is_looked_for_without_reading(self):
        found = store.sketches_of(MODEL)
        found.close()
        assert all(name in found for name in (*SHARED, "out"))
        assert "other" not in found
        assert "q" in store.sketches.Recorded(new_sketches(0))
