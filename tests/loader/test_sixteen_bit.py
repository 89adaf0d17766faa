"""In 16 bit for now: what the loader nodes give where too little was recorded."""

from __future__ import annotations

import comfy.cli_args
import folder_paths
import pytest
import torch
from harness.inprocess import held, load_16_bit, same, sample
from harness.recording import recorded
from hswq.loader.engine.patchers import is_quantized
from hswq.loader.nodes.loaders import HSWQCheckpointLoader, HSWQDiffusionModelLoader
from toy.checkpoint import make_diffusion_model

ASKED = {
    "statistics": "auto",
    "mode": "scaled",
    "keep_ratio": 0.25,
    "without_statistics": "load in 16 bit",
}
NODES = {
    "checkpoints": (HSWQCheckpointLoader, "ckpt_name"),
    "diffusion_models": (HSWQDiffusionModelLoader, "unet_name"),
}
FLAGS = ("fp8_e4m3fn_unet", "fp8_e5m2_unet", "fp8_e8m0fnu_unet")


@pytest.fixture(params=NODES)
def kind(request, checkpoint, tmp_path, monkeypatch) -> str:
    """A folder of ComfyUI's that holds the toy alone, as toy.safetensors."""
    make_diffusion_model(tmp_path / "toy.safetensors")
    place = checkpoint.parent if request.param == "checkpoints" else tmp_path
    paths = folder_paths.folder_names_and_paths
    monkeypatch.setitem(paths, request.param, ([str(place)], {".safetensors"}))
    return request.param


def load(kind: str):
    node, name = NODES[kind]
    clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    return clone.execute(**{name: "toy.safetensors"}, **ASKED).result[0]


@pytest.mark.parametrize("flag", FLAGS)
class TestUnderComfysFp8Flags:
    def test_has_the_files_weights(self, kind, folder, checkpoint, monkeypatch, flag):
        expected = held(load_16_bit(checkpoint))
        monkeypatch.setattr(comfy.cli_args.args, flag, True)
        loaded = load(kind)
        assert not is_quantized(loaded)
        assert not same(held(loaded), expected)

    def test_is_recorded(self, kind, recorder, checkpoint, monkeypatch, choose, flag):
        choose(Budget=100)
        monkeypatch.setattr(comfy.cli_args.args, flag, True)
        sample(load(kind))
        assert recorded(checkpoint).samples == 1

    def test_loads_the_same_again(self, kind, folder, checkpoint, monkeypatch, flag):
        """As ComfyUI does for a clone with weights of its own."""
        monkeypatch.setattr(comfy.cli_args.args, flag, True)
        loaded = load(kind)
        make, arguments, *index = loaded.cached_patcher_init
        again = make(*arguments, disable_dynamic=True)
        again = again[index[0]] if index else again
        assert not same(held(again), held(loaded))


class TestElsewhere:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_what_comfyui_gives(self, kind, folder, monkeypatch, dtype):
        flag = {torch.float32: "fp32_unet", torch.bfloat16: "bf16_unet"}[dtype]
        monkeypatch.setattr(comfy.cli_args.args, flag, True)
        assert load(kind).model_dtype() == dtype
