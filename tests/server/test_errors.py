"""Bad input gives one sentence that names the thing, and nothing is changed on disk."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness.client import Client, ExecutionError, RejectedError
from harness.patches import patch_file
from harness.prompts import (
    CHECKPOINT,
    Prompt,
    converter,
    hswq_loader,
    node,
    stock_loader,
    text_to_latent,
    through,
)
from harness.server import ComfyUIServer, snapshot
from safetensors.torch import save_file
from toy.checkpoint import make_checkpoint

pytestmark = pytest.mark.server

UNIFORMLY = "quantize uniformly"


def error_of(client: Client, prompt: Prompt) -> str:
    """Run a prompt that fails, and return the one sentence that it fails with."""
    with pytest.raises(ExecutionError) as caught:
        client.run(prompt)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def unchanged(server: ComfyUIServer) -> Iterator[None]:
    """What a user has on disk is the same after a test."""
    folders = [server.models, server.base / "output", server.base / "input"]
    before = [snapshot(folder) for folder in folders]
    yield
    assert [snapshot(folder) for folder in folders] == before


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What exists if code in a file was run."""
    return tmp_path_factory.mktemp("trace") / "malicious code was run"


@pytest.fixture(scope="module")
def bad_checkpoints(server: ComfyUIServer, trace: Path) -> None:
    folder = server.models / "checkpoints"
    whole = (folder / CHECKPOINT).read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "half_header.safetensors").write_bytes(whole[:5000])
    (folder / "noise.safetensors").write_bytes(os.urandom(5000))
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "malicious.ckpt").write_bytes(pickle.dumps(Malicious(trace)))
    torch.save({"state_dict": Malicious(trace)}, folder / "malicious_archive.ckpt")
    save_file(patch_file("LoRA"), folder / "lora.safetensors")


class TestCheckpoint:
    @pytest.mark.parametrize("without", ["load in 16 bit", UNIFORMLY])
    @pytest.mark.parametrize(
        ("name", "problem"),
        [
            ("truncated.safetensors", "is truncated: by its header it has"),
            ("half_header.safetensors", "it has no valid header"),
            ("noise.safetensors", "it has no valid header"),
            ("empty.safetensors", "it has no valid header"),
            ("lora.safetensors", "holds no diffusion model that ComfyUI knows"),
            ("malicious.ckpt", "cannot be read"),
            ("malicious_archive.ckpt", "cannot be read"),
        ],
    )
    def test_that_is_none(
        self, client: Client, bad_checkpoints, trace: Path, unchanged, name, problem, without
    ):
        loader = hswq_loader(name, without_statistics=without)
        message = error_of(client, text_to_latent(loader))
        assert name in message
        assert problem in message
        assert client.get_json("/probe/models")["alive"] == 0
        assert not trace.exists()

    def test_without_statistics_is_refused_if_told_so(self, client: Client, unchanged):
        loader = hswq_loader(without_statistics="fail")
        message = error_of(client, text_to_latent(loader))
        assert message == f"{CHECKPOINT} has 0 of 32 images that HSWQ needs: sample with it first"


OTHER = "another_model.safetensors"


@pytest.fixture
def bad_statistics(server: ComfyUIServer, client: Client, trace: Path) -> None:
    """A real file, of another model, and what else may lie there."""
    make_checkpoint(server.models / "checkpoints" / OTHER, seed=1)
    client.run(text_to_latent(stock_loader(OTHER), steps=1))
    folder = server.models / "hswq"
    (real,) = folder.glob("*.pt")
    real.rename(folder / "other.pt")
    whole = (folder / "other.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "noise.pt").write_bytes(os.urandom(5000))
    (folder / "malicious.pt").write_bytes(pickle.dumps(Malicious(trace)))
    torch.save({"meta": {}, "layers": Malicious(trace)}, folder / "malicious_archive.pt")
    torch.save({"weights": torch.ones(3)}, folder / "weights.pt")


class TestStatistics:
    def test_that_are_of_another_model(
        self, client: Client, bad_statistics, trace: Path, unchanged
    ):
        plain = text_to_latent(stock_loader())
        for name, problem in [
            ("other.pt", f"not of {CHECKPOINT}"),
            ("truncated.pt", "cannot be read as a statistics file"),
            ("noise.pt", "cannot be read as a statistics file"),
            ("malicious.pt", "cannot be read as a statistics file"),
            ("malicious_archive.pt", "cannot be read as a statistics file"),
            ("weights.pt", "is not an HSWQ statistics file: it has no layers"),
        ]:
            for prompt in (
                text_to_latent(hswq_loader(statistics=name)),
                through(plain, "converted", converter(["loader", 0], statistics=name)),
            ):
                message = error_of(client, prompt)
                assert name in message
                assert problem in message
                assert not trace.exists()

    def test_outside_their_folder_are_refused(self, client: Client, unchanged):
        for name in (f"../checkpoints/{CHECKPOINT}", "/etc/passwd", "none.pt"):
            with pytest.raises(RejectedError, match="statistics"):
                client.run(text_to_latent(hswq_loader(statistics=name)))

    def test_damaged_ones_are_kept_aside_when_recording_goes_on(
        self, server: ComfyUIServer, client: Client
    ):
        client.run(text_to_latent(stock_loader(), seed=1))
        (path,) = (server.models / "hswq").glob("*.pt")
        path.write_bytes(b"damaged")
        client.run(text_to_latent(stock_loader(), seed=2))
        assert torch.load(path, weights_only=True)["meta"]["samples"] == 1
        assert path.with_name(path.name + ".damaged").read_bytes() == b"damaged"
        assert f"{path.name} cannot be read as a statistics file" in server.log_tail()


class TestSettings:
    @pytest.mark.parametrize("keep_ratio", [1.5, -0.1, "many"])
    def test_a_keep_ratio_out_of_range_is_not_queued(self, client: Client, unchanged, keep_ratio):
        plain = text_to_latent(stock_loader())
        for prompt in (
            text_to_latent(hswq_loader(keep_ratio=keep_ratio)),
            through(plain, "converted", converter(["loader", 0], keep_ratio=keep_ratio)),
        ):
            with pytest.raises(RejectedError, match="keep_ratio"):
                client.run(prompt)

    @pytest.mark.parametrize("keep_ratio", [1.5, -0.1, float("nan")])
    def test_a_keep_ratio_that_a_node_computes_is_checked_too(
        self, client: Client, unchanged, keep_ratio
    ):
        """ComfyUI compares with min and max only what is written in the prompt, and not NaN."""
        number = node("PrimitiveFloat", value=keep_ratio)
        prompt = text_to_latent(hswq_loader(keep_ratio=["number", 0]))
        message = error_of(client, {**prompt, "number": number})
        assert message == f"keep_ratio must be a number from 0 to 1, got {keep_ratio}"

    def test_a_session_that_is_no_plain_word_is_refused(self, client: Client, unchanged):
        for session in ("../evil", "a/b", "", ".hidden", "a" * 65, "nul\0"):
            calibrate = node("HSWQCalibration", model=["loader", 0], session=session)
            prompt = through(text_to_latent(stock_loader()), "calibrate", calibrate)
            message = error_of(client, prompt)
            assert message.startswith("the session must be 1 to 64 letters, digits, '_' or '-'")
            assert repr(session) in message

    def test_a_quantized_model_is_neither_calibrated_nor_converted(
        self, server: ComfyUIServer, recorded: Client
    ):
        prompt = text_to_latent(hswq_loader())
        recorded.run(prompt)
        files = snapshot(server.models)
        for made in (
            node("HSWQCalibration", model=["loader", 0], session="x"),
            converter(["loader", 0]),
        ):
            assert "this model is quantized" in error_of(recorded, through(prompt, "made", made))
        assert snapshot(server.models) == files
