"""What is moved is complete: at once, or for what is placed soon, in the end."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from harness.inprocess import alike, held, parts, patched, same, sample
from harness.patches import patch_file
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.engine.transfer import Transfer

SIZES = [1, 5, 1 << 10, 40 << 20, 17 << 20, 16 << 20, 3, 30 << 20]  # the ring has 64 MiB


def made(size: int, value: int) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


class TestPlaced:
    @pytest.fixture
    def transfer(self):
        """Copies in the host's memory, the way that a GPU's tensors go."""
        transfer = Transfer(torch.device("cpu"))
        transfer._staged = True
        return transfer

    def test_is_complete_when_it_is_handed_out(self, transfer):
        placed = []
        for value, size in enumerate(SIZES, 1):
            placed.append(transfer.place(made(size, value), torch.device("cpu")))
            assert placed[-1].equal(made(size, value))
        for value, size in enumerate(SIZES, 1):  # and none is a part of the ring
            assert placed[value - 1].equal(made(size, value))

    def test_soon_is_complete_in_the_end(self, transfer):
        placed = [
            transfer.place_soon(made(size, value), torch.device("cpu"))
            for value, size in enumerate(SIZES, 1)
        ]
        transfer.finish()
        for value, (size, one) in enumerate(zip(SIZES, placed, strict=True), 1):
            assert one.equal(made(size, value))

    def test_has_dtype_and_shape(self, transfer):
        weight = torch.randn(8, 4, 3, 3).to(torch.float8_e4m3fn)
        placed = transfer.place(weight, torch.device("cpu"))
        assert placed.dtype == weight.dtype
        assert placed.view(torch.uint8).equal(weight.view(torch.uint8))
        rearranged = weight.view(torch.uint8).to(memory_format=torch.channels_last)
        assert transfer.place(rearranged, torch.device("cpu")).equal(weight.view(torch.uint8))

    @pytest.mark.parametrize("first", [True, False])
    def test_in_either_mode_after_the_other(self, transfer, first):
        for inside in (first, not first):
            with torch.inference_mode(inside):
                placed = transfer.place(made(5, 7), torch.device("cpu"))
            assert placed.equal(made(5, 7))
            assert placed.is_inference() == inside

    def test_where_there_is_no_pinned_memory(self, transfer, monkeypatch):
        """Here it fails for want of a driver, elsewhere because too much is pinned already."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert transfer.place(made(5, 7), torch.device("cpu")).equal(made(5, 7))

    @pytest.mark.gpu
    def test_from_a_gpu_as_well(self):
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
        transfer = Transfer(torch.device("cuda", 0))
        for value, size in enumerate(SIZES, 1):
            up = transfer.up(made(size, value))
            assert transfer.place(up, transfer.device) is up
            torch.cuda._sleep(10_000_000)  # the GPU is still at work
            assert transfer.place(up + 1, torch.device("cpu")).equal(made(size, value + 1))
        transfer.finish()

    @pytest.mark.gpu
    def test_soon_from_a_gpu_between_others(self):
        """What is placed soon is not overwritten by what is sent up meanwhile."""
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
        transfer = Transfer(torch.device("cuda", 0))
        pairs = []
        for value, size in enumerate(SIZES, 1):
            torch.cuda._sleep(10_000_000)  # the GPU is still at work
            up = transfer.up(made(size, value))
            pairs.append((up, transfer.place_soon(up + 1, torch.device("cpu"))))
        transfer.finish()
        for value, (size, (up, placed)) in enumerate(zip(SIZES, pairs, strict=True), 1):
            assert up.cpu().equal(made(size, value))
            assert placed.equal(made(size, value + 1))

    @pytest.mark.gpu
    def test_into_a_part_of_a_gpu_tensor(self):
        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
        transfer = Transfer(torch.device("cuda", 0))
        buffer = torch.zeros(sum(SIZES), dtype=torch.uint8, device="cuda")
        for value, (size, target) in enumerate(zip(SIZES, buffer.split(SIZES), strict=True), 1):
            torch.cuda._sleep(10_000_000)
            transfer.fill(target, made(size, value))
        expected = torch.cat([made(size, value) for value, size in enumerate(SIZES, 1)])
        assert buffer.cpu().equal(expected)


class TestRead:
    @pytest.fixture
    def file(self, tmp_path):
        path = tmp_path / "bytes"
        path.write_bytes(bytes(range(200)))
        with open(path, "rb", buffering=0) as file:
            yield file

    def test_bytes_are_the_files(self, file, device):
        file.seek(3)
        found = Transfer(torch.device(device)).read(file, 100)
        assert found.tolist() == list(range(3, 103))

    def test_bytes_that_come_little_by_little(self, device):
        """Some network file systems give less at once than is asked for, as a pipe does."""
        end, start = os.pipe()

        def write() -> None:
            with open(start, "wb", buffering=0) as pipe:
                for part in range(0, 200, 40):
                    pipe.write(bytes(range(part, part + 40)))
                    time.sleep(0.01)

        with open(end, "rb", buffering=0) as file, ThreadPoolExecutor(1) as writer:
            writer.submit(write)
            assert Transfer(torch.device(device)).read(file, 200).tolist() == list(range(200))

    def test_a_file_that_has_become_shorter_is_an_error(self, file, device):
        with pytest.raises(OSError, match="shorter"):
            Transfer(torch.device(device)).read(file, 201)

    @pytest.mark.parametrize("at_once", [1 << 30, 1_000_003, None])
    def test_many_bytes_are_the_files(self, tmp_path, device, monkeypatch, at_once):
        """Several threads read them, if the system can. Each may get less than it asks for."""
        values = torch.randint(256, (39 << 20,), dtype=torch.uint8)
        (tmp_path / "bytes").write_bytes(values.numpy())
        whole = os.preadv
        if at_once is None:
            monkeypatch.delattr(os, "preadv")
        else:
            little = lambda file, to, at: whole(file, [to[0][:at_once]], at)  # noqa: E731
            monkeypatch.setattr(os, "preadv", little)
        transfer = Transfer(torch.device(device))
        with open(tmp_path / "bytes", "rb", buffering=0) as file, torch.inference_mode():
            file.seek(5)
            assert transfer.read(file, 33_333_333).cpu().equal(values[5:33_333_338])
            assert transfer.read(file, 100).cpu().equal(values[33_333_338:33_333_438])
            with pytest.raises(OSError, match="shorter"):
                transfer.read(file, 39 << 20)


@pytest.mark.gpu
class TestBuiltOnTheGpu:
    """ComfyUI builds a model there where that has more free memory than the host.

    Under Dynamic VRAM it never does.
    """

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch, legacy):
        device = comfy.model_management.get_torch_device()
        if device.type != "cuda":
            pytest.skip("needs an NVIDIA GPU")
        monkeypatch.setattr(comfy.model_management, "unet_inital_load_device", lambda *_: device)

    @pytest.fixture
    def again(self, checkpoint, planner) -> partial[ModelPatcher]:
        """Load the toy as for a clone with weights of its own."""
        return partial(load_checkpoint, str(checkpoint), planner(), only_model=True, to_host=True)

    def test_has_the_same_weights(self, models, again):
        built = again()[0]
        assert not same(held(built), held(models.quantized))
        weights = built.model.diffusion_model.parameters()
        assert all(part.is_cuda for weight in weights for part in parts(weight))
        assert alike(sample(built), sample(models.quantized))

    def test_so_have_its_clones(self, models):
        original = patched(models.quantized, patch_file("LoRA"))
        for clone in (
            original.clone(force_deepcopy=True),
            original.deepclone_multigpu(new_load_device=original.load_device),
        ):
            assert clone.model is not original.model
            assert not same(held(clone), held(models.quantized))

    def test_goes_to_the_host_and_back(self, models, again):
        built = again()[0]
        for _ in range(2):
            comfy.model_management.unload_all_models()
            assert not same(held(built), held(models.quantized))
            assert alike(sample(built), sample(models.quantized))
