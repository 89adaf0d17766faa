"""Quantized models that are kept on disk: whole, or not at all."""

from __future__ import annotations

import errno
import gc
import os
import resource
import signal
import struct
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from harness.exports import identical
from harness.refined import KEY, MODEL, fp8_layers, keep, left
from harness.sketches import rewritten
from hswq.calibration import sweep
from hswq.loader.files.safetensors import read_header
from hswq.loader.store import refined, refined_file
from hswq.quant import FP8_SCALED


@pytest.fixture
def layers(checkpoint: Path, choose) -> dict:
    """The toy's layers in FP8; a folder and settings of the test's own."""
    return fp8_layers(checkpoint)


def mapped(tensor: torch.Tensor) -> torch.Tensor:
    """Leave a tensor where it is."""
    return tensor


def shapes(layers: dict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(data.shape) for name, (data, _) in layers.items()}


class TestKept:
    def test_are_the_very_bytes(self, layers):
        keep(layers)
        found = refined.find(KEY)
        assert set(found.names) == set(layers)
        for name, parts in layers.items():
            assert all(map(identical, found.read(name, mapped), parts)), name
        assert found.is_whole
        found.close()
        assert left() == [f"{KEY}.safetensors"]

    def test_are_mapped_from_the_file(self, layers):
        keep(layers)
        found = refined.find(KEY)
        entries = read_header(str(found.path))
        one, other = sorted(layers)[:2]
        apart = found.read(one, mapped)[0].data_ptr() - found.read(other, mapped)[0].data_ptr()
        places = [entries[name + refined_file.DATA].start for name in (one, other)]
        assert apart == places[0] - places[1]

    def test_outlive_the_file(self, layers):
        path = keep(layers)
        found = refined.find(KEY)
        taken = {name: found.read(name, mapped) for name in found.names}
        found.close()
        path.unlink()
        del found
        gc.collect()
        assert all(identical(taken[name][0], layers[name][0]) for name in layers)

    def test_become_parameters_outside_of_inference_mode(self, layers):
        keep(layers)
        data = refined.find(KEY).read("out.2", mapped)[0]
        with torch.inference_mode(False):
            torch.nn.Parameter(data, requires_grad=False)

    def test_nothing_is_found_under_another_key(self, layers, caplog):
        path = keep(layers)
        other = f"{MODEL[:16]}.{'1' * 32}"
        assert refined.find(other) is None
        assert not caplog.text
        path.rename(path.with_name(f"{other}.safetensors"))
        assert refined.find(other) is None
        assert "with the key in its name" in caplog.text

    def test_again_they_take_the_place_of_the_first(self, layers):
        keep(layers)
        keep({"out.2": layers["out.2"]})
        assert refined.find(KEY).names == ["out.2"]

    def test_tensors_of_any_layout_and_mode(self, choose):
        bytes_ = torch.arange(75, dtype=torch.uint8).view(torch.float8_e4m3fn)
        with torch.inference_mode(False):
            odd = bytes_.clone()[1:64].view(7, 9).mT
            keep({"odd": (odd, torch.tensor(2.0))})
        data, scale = refined.find(KEY).read("odd", mapped)
        assert identical(data, odd)
        assert scale.item() == 2.0


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def huge_header(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(struct.pack("<Q", 1 << 40))


DAMAGE = {
    "empty": lambda path: os.truncate(path, 0),
    "truncated": truncate,
    "a header of a terabyte": huge_header,
    "no safetensors": lambda path: path.write_bytes(b"x" * 1000),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "another format": lambda path: rewritten(path, lambda _, m: m.update(format="v9")),
    "another key": lambda path: rewritten(path, lambda _, m: m.update(key="0.0")),
    "no checksums": lambda path: rewritten(path, lambda t, _: t.pop("hswq_sums")),
    "fewer checksums": lambda path: rewritten(
        path, lambda t, _: t.update(hswq_sums=t["hswq_sums"][1:].clone())
    ),
    "no scale": lambda path: rewritten(path, lambda t, _: t.pop("out.2.weight_scale")),
    "two scales": lambda path: rewritten(
        path, lambda t, _: t.update({"out.2.weight_scale": torch.ones(2)})
    ),
    "no weight": lambda path: rewritten(path, lambda t, _: t.pop("out.2.weight")),
    "another dtype": lambda path: rewritten(
        path, lambda t, _: t.update({"out.2.weight": t["out.2.weight"].half()})
    ),
    "something else": lambda path: rewritten(path, lambda t, _: t.update(bias=torch.ones(2))),
}


class TestDamage:
    @pytest.fixture
    def few(self, layers) -> dict:
        return {name: layers[name] for name in ("input_blocks.0.0", "time_embed.0", "out.2")}

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_is_left_out_with_a_sentence_and_made_anew(self, few, damage, caplog):
        path = keep(few)
        DAMAGE[damage](path)
        assert refined.find(KEY) is None
        assert caplog.text.count(f"{path.name} is made again: ") == 1
        if path.is_dir():
            path.rmdir()
        keep(few)
        assert set(refined.find(KEY).names) == set(few)

    @pytest.mark.parametrize("length", [1, 100])
    def test_of_a_layer_is_the_layers_alone(self, few, length, caplog):
        path = keep(few)
        place = read_header(str(path))["out.2.weight"].start
        with open(path, "r+b") as file:
            file.seek(place)
            before = file.read(length)
            file.seek(place)
            file.write(bytes(byte ^ 16 for byte in before))
        found = refined.find(KEY)
        assert [name for name in found.names if found.read(name, mapped) is None] == ["out.2"]
        assert found.read("out.2", mapped) is None
        assert caplog.text.count("out.2 is damaged") == 1
        assert not found.is_whole
        found.close()
        assert not left()

    @pytest.mark.parametrize("scale", [0.0, -1.0, torch.inf, torch.nan])
    def test_a_scale_that_is_none(self, few, scale):
        keep({"out.2": (few["out.2"][0], torch.tensor(scale))})
        assert refined.find(KEY).read("out.2", mapped) is None


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let this process write no file beyond a size, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestNotKept:
    def test_where_the_disk_gets_full(self, layers, caplog):
        with largest_file(1 << 20):
            keep(layers)
        assert caplog.text.count("is not kept: ") == 1
        assert os.strerror(errno.EFBIG) in caplog.text
        assert not left()
        keep(layers)
        assert refined.find(KEY) is not None

    def test_where_it_would_fill_the_disk(self, layers, monkeypatch, caplog):
        usage = namedtuple("usage", "free")(1 << 20)
        monkeypatch.setattr(refined.shutil, "disk_usage", lambda _: usage)
        keep(layers)
        assert "is not kept: the disk has less than" in caplog.text
        assert not left()

    def test_where_there_is_no_folder(self, layers, folder, caplog):
        folder.mkdir()
        (folder / "refined").write_text("no folder")
        keep(layers)
        assert caplog.text.count("is not kept: ") == 1

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_what_was_interrupted(self, layers, error):
        def some():
            yield "out.2", *layers["out.2"]
            raise error

        with pytest.raises(error):
            refined.keep(
                KEY, FP8_SCALED, some(), {n: tuple(d.shape) for n, (d, _) in layers.items()}
            )
        assert not left()

    @pytest.mark.parametrize("names", [["out.2"], ["out.2", "out.2"], ["out.2", "unknown"]])
    def test_what_is_not_the_whole_model(self, layers, names):
        sizes = {name: tuple(layers[name][0].shape) for name in ("out.2", "time_embed.0")}
        parts = ((name, *layers["out.2"]) for name in names)
        with pytest.raises(ValueError, match="layer"):
            refined.keep(KEY, FP8_SCALED, parts, sizes)
        assert not left()

    def test_what_a_killed_process_has_begun(self, layers):
        """It writes all layers but one, and is killed."""

        def some():
            for name in sorted(layers)[1:]:
                yield name, *layers[name]
            os.kill(os.getpid(), signal.SIGKILL)

        child = os.fork()
        if not child:
            refined.keep(
                KEY, FP8_SCALED, some(), {n: tuple(d.shape) for n, (d, _) in layers.items()}
            )
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert refined.find(KEY) is None
        (stray,) = refined.refined_folder().iterdir()
        assert stray.stat().st_size > 1 << 20
        os.utime(stray, (1, 1))
        assert sweep(refined.refined_folder()) == 1
