"""Model files are read without trusting them."""

from __future__ import annotations

import collections
import json
import logging
import os
import random
import struct
import threading
import time
from pathlib import Path

import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from hswq.loader.engine import model_structure
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.files import model_file
from hswq.loader.files.errors import ModelFileError
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.files.model_file import ModelFile
from hswq.loader.files.safetensors import MAX_HEADER_BYTES, MAX_TENSORS, read_header
from hswq.loader.jobs.keeping import SELECTIONS
from hswq.loader.nodes import loaders
from hswq.loader.store.effects import Effects, keep_effects
from safetensors.torch import save_file
from toy.checkpoint import make_checkpoint

MUTATIONS = int(os.environ.get("HSWQ_MUTATIONS", "500"))


def fingerprint_of(path: Path) -> str:
    return ModelFile(path).read_fingerprint()


@pytest.fixture
def small(tmp_path) -> Path:
    """A safetensors file whose header is most of it."""
    tensors = {f"model.diffusion_model.{i}.weight": torch.randn(4, 4).half() for i in range(20)}
    save_file(tensors, tmp_path / "small.safetensors", metadata={"format": "pt"})
    return tmp_path / "small.safetensors"


def one_tensor(shape: str) -> bytes:
    """Return a header of one tensor."""
    return b'{"a": {"dtype": "F16", "shape": [%s], "data_offsets": [0, 2]}}' % shape.encode()


def mutated(data: bytes, header: int, source: random.Random) -> bytes:
    """Change, remove or repeat some bytes of the header, or its length."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 6)):
        at = source.randrange(8 + header)
        kind = source.randrange(5)
        if kind == 0:
            changed[at] = source.randrange(256)
        elif kind == 1:
            changed[at : at + 1] = bytes([source.choice(b'0123456789-.e[]{}",:')])
        elif kind == 2:
            del changed[at : at + source.randint(1, 40)]
        elif kind == 3:
            changed[at:at] = changed[at : at + source.randint(1, 40)]
        else:
            changed[:8] = struct.pack("<Q", source.choice([0, 1, header - 1, header + 1, 2**63]))
    return bytes(changed)


class TestHeader:
    def test_gives_every_tensors_place(self, small):
        entries = read_header(str(small))
        assert len(entries) == 20
        assert {(entry.dtype, entry.shape, entry.end - entry.start) for entry in entries.values()}
        assert max(entry.end for entry in entries.values()) == small.stat().st_size

    def test_mutations_are_refused_or_read_within_the_file(self, small, tmp_path):
        data = small.read_bytes()
        header = struct.unpack("<Q", data[:8])[0]
        source = random.Random(0)
        refused = 0
        for number in range(MUTATIONS):
            path = tmp_path / f"{number}.safetensors"
            path.write_bytes(mutated(data, header, source))
            try:
                for entry in read_header(str(path)).values():
                    assert 0 <= entry.start <= entry.end <= path.stat().st_size
                fingerprint_of(path)
                assert ModelFile(path).tensors
            except ModelFileError as error:
                refused += 1
                assert path.name in str(error)
            path.unlink()
        assert refused > MUTATIONS / 2

    @pytest.mark.parametrize(
        "header",
        [
            b"[]",
            b'"' + b"[" * 5000,
            b"[" * 100_000,
            b'{"a": {"dtype": "F16", "shape": [1e400], "data_offsets": [0, 2]}}',
            b'{"a": {"dtype": "F16", "shape": [-1], "data_offsets": [0, -2]}}',
            b'{"a": {"dtype": "F16", "shape": [9999999999999], "data_offsets": [0, 2]}}',
            b'{"a": {"dtype": "NONE", "shape": [1], "data_offsets": [0, 2]}}',
            b'{"a": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2, 4]}}',
            b'{"a": {"dtype": ["F16"], "shape": [1], "data_offsets": [0, 2]}}',
            b'{"a": null}',
        ],
    )
    def test_hostile_ones_are_refused(self, tmp_path, header):
        path = tmp_path / "hostile.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
        with pytest.raises(ModelFileError, match=r"hostile\.safetensors"):
            read_header(str(path))

    @pytest.mark.parametrize(
        ("header", "problem"),
        [
            (one_tensor(",".join(["9" * 4000] * 650)), "damaged safetensors header: "),
            (one_tensor("9" * (2 << 20)), "damaged safetensors header: "),
            (one_tensor(",".join("1" * 100_000)), "'a' has 100000 dimensions"),
            (b'{"a":' * (MAX_TENSORS + 1), "a header of more than 65536 tensors"),
            (b" " * (MAX_HEADER_BYTES + 1), "a header of 16777217 bytes, and none has more"),
        ],
        ids=["many digits", "one number", "dimensions", "tensors", "bytes"],
    )
    def test_nothing_is_held_up_by_one(self, tmp_path, header, problem):
        """It is read when the panel looks for a model, with Python's lock held: 15 s and more."""
        path = tmp_path / "hostile.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
        began = time.monotonic()
        with pytest.raises(ModelFileError, match=problem) as raised:
            read_header(str(path))
        assert time.monotonic() - began < 2
        assert len(str(raised.value)) < 300

    @pytest.mark.parametrize(
        ("dtype", "size"),
        [("F8_E4M3FNUZ", 8), ("F8_E5M2FNUZ", 8), ("F6_E2M3", 6), ("F6_E3M2", 6), ("F4", 4)],
    )
    def test_every_dtype_of_the_library_is_read(self, tmp_path, dtype, size):
        path = tmp_path / "narrow.safetensors"
        place = {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, size]}
        header = json.dumps({"0.weight": place}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
        assert read_header(str(path))["0.weight"].dtype == dtype
        with pytest.raises(ModelFileError, match=f"is quantized already, its 0.weight to {dtype}"):
            assert ModelFile(path).is_quantized

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
    @pytest.mark.timeout(20)
    def test_a_pipe_that_nobody_writes_to(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.safetensors")
        with pytest.raises(OSError, match="it is not a regular file"):
            read_header(str(tmp_path / "pipe.safetensors"))

    @pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
    def test_a_truncated_file_is_refused(self, small, keep):
        data = small.read_bytes()
        small.write_bytes(data[:keep])
        with pytest.raises(ModelFileError, match=r"small\.safetensors"):
            read_header(str(small))


class TestIsStoredQuantized:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
    def test_reads_a_ckpt_once(self, tmp_path, dtype):
        """It takes memory for all of the file, twice over while the file is being loaded."""
        path = tmp_path / "model.ckpt"
        torch.save({"0.weight": torch.ones(4, 4).to(dtype)}, path)
        quantized = dtype is torch.float8_e4m3fn
        file = ModelFile(path)
        assert file.is_quantized == quantized
        path.write_bytes(b"damaged")
        assert list(file.own) == list(file.tensors) == ["0.weight"]
        with pytest.raises(ModelFileError, match=r"model\.ckpt cannot be read"):
            assert ModelFile(path).is_quantized


class TestWhatIsSaid:
    @pytest.mark.parametrize("how", ["code", "cut short", "no archive", "empty"])
    def test_of_a_ckpt_is_ours_and_torchs_goes_to_the_log(self, tmp_path, caplog, how):
        path = tmp_path / "model.ckpt"
        torch.save({"0.weight": torch.ones(64, 64), "by": Path("x") if how == "code" else 1}, path)
        whole = path.read_bytes()
        changed = {"cut short": whole[:-300], "no archive": b"damaged", "empty": b""}
        path.write_bytes(changed.get(how, whole))
        caplog.set_level(logging.INFO)
        with pytest.raises(ModelFileError) as raised:
            ModelFile(path).tensors  # noqa: B018
        reason = "it is damaged, or holds more than tensors; the log says more"
        assert str(raised.value) == f"model.ckpt cannot be read: {reason}"
        began = str(raised.value.__cause__)[:40]  # the terminal's colours are left out
        assert f"model.ckpt cannot be read: {began}" in caplog.text


class TestFingerprint:
    def test_is_of_the_weights_and_not_of_the_name(self, checkpoint, tmp_path):
        renamed = tmp_path / "another name.safetensors"
        renamed.write_bytes(checkpoint.read_bytes())
        assert fingerprint_of(renamed) == fingerprint_of(checkpoint)
        other = make_checkpoint(tmp_path / "finetune.safetensors", seed=1)
        assert fingerprint_of(other) != fingerprint_of(checkpoint)

    def test_is_the_same_of_a_ckpt(self, checkpoint, tmp_path):
        tensors = ModelFile(str(checkpoint)).tensors
        torch.save({"state_dict": tensors}, tmp_path / "toy.ckpt")
        assert fingerprint_of(tmp_path / "toy.ckpt") == fingerprint_of(checkpoint)

    def test_changes_with_the_file(self, small):
        before = fingerprint_of(small)
        data = bytearray(small.read_bytes())
        length = struct.unpack("<Q", data[:8])[0]
        places = json.loads(data[8 : 8 + length])["model.diffusion_model.3.weight"]["data_offsets"]
        data[8 + length + places[0]] ^= 1
        small.write_bytes(data)
        assert fingerprint_of(small) != before


class TestOpenedOnce:
    """A load asks one ModelFile; what ComfyUI itself parses is its own."""

    @pytest.fixture
    def counted(self, monkeypatch) -> collections.Counter:
        calls = collections.Counter()
        for module, name in (
            (model_file, "parse_header"),
            (model_file, "diffusion_model_prefix"),
            (model_structure, "_detect"),
        ):
            monkeypatch.setattr(module, name, self.counting(getattr(module, name), calls))
        return calls

    @staticmethod
    def counting(function, calls):
        def counting(*args, **kwargs):
            if threading.current_thread() is threading.main_thread():  # not what hashes files
                calls[function.__name__] += 1
            return function(*args, **kwargs)

        return counting

    def test_by_a_load(self, checkpoint, planner, counted):
        load_checkpoint(ModelFile(checkpoint), planner())
        assert counted == {"parse_header": 1, "diffusion_model_prefix": 1, "_detect": 1}

    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_by_a_node(self, folder, recorded, statistics, counted, selection, monkeypatch):
        """It builds one network, also where it must know beforehand what a step will take."""
        effects = Effects(dict.fromkeys(statistics, 1.0), "", whole=True)
        keep_effects(fingerprint(recorded), "scaled", effects)
        building = self.counting(UNetModel.__init__, counted)
        monkeypatch.setattr(UNetModel, "__init__", building)
        wanted = loaders._Wanted("auto", "scaled", 0.25, "fail", selection=selection)
        name = os.path.basename(recorded)
        loaders._load("checkpoints", name, wanted, load_checkpoint, load_checkpoint)
        once = {"parse_header": 1, "diffusion_model_prefix": 1, "_detect": 1}
        assert counted == {**once, "__init__": 1}
