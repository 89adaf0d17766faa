"""INT8 in files: what we write, stock ComfyUI and we read; what others write, we read or refuse."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.model_management
import pytest
import torch
from harness.exports import record, use_folders, wanted, written
from harness.inprocess import distance, held, same, sample
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.loading import load_checkpoint, load_diffusion_model
from hswq.loader.files.errors import ModelFileError
from hswq.quant import INT8
from nodes import CheckpointLoaderSimple
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.usefixtures("folders")

LAYER = "middle_block.1.transformer_blocks.0.ff.net.2"
KEY = f"model.diffusion_model.{LAYER}."


@pytest.fixture
def source(checkpoint, statistics, folders) -> str:
    """The toy with enough recorded samples."""
    record(str(checkpoint), statistics)
    return str(checkpoint)


@pytest.fixture(scope="module")
def path(checkpoint, statistics, tmp_path_factory) -> Path:
    """An export of the toy, the same for all tests."""
    with pytest.MonkeyPatch.context() as monkeypatch, torch.inference_mode():
        use_folders(tmp_path_factory.mktemp("exported"), monkeypatch)
        record(str(checkpoint), statistics)
        return written(str(checkpoint), wanted("int8", keep_ratio=0.1))[0]


def loaded(path: Path | str, how=None, **more):
    return load_checkpoint(str(path), how, only_model=True, **more)[0]


class TestExport:
    def test_of_linears_gives_stock_comfyui_the_same_latents(self, legacy, source):
        path, plan = written(source, wanted("int8", keep_ratio=0.1))
        ours, stock = loaded(path), CheckpointLoaderSimple().load_checkpoint(path.name)[0]
        assert ours.get_attachment(ATTACHMENT).number_format is INT8
        held_layers = ours.get_attachment(ATTACHMENT).quantized
        assert 100 < len(held_layers) < len(plan.quantized)
        assert LAYER in held_layers
        whole = held(loaded(source, plan))
        own = held(ours)
        for name in held_layers:
            assert all(map(torch.equal, own[f"{name}.weight"], whole[f"{name}.weight"]))
        # ComfyUI 0.30 rounds the inputs of such layers, whatever their marker says.
        ours = loaded(path, int8_matmul=True)
        limit = 0.02 if torch.cuda.is_available() else 1e-3
        assert distance(sample(stock, steps=2), sample(ours, steps=2)) < limit
        comfy.model_management.unload_all_models()

    @pytest.mark.parametrize("model_only", [False, True])
    def test_of_convolutions_too_gives_our_loader_its_own_weights(self, source, model_only):
        settings = wanted("int8, convs too", keep_ratio=0.1, model_only=model_only)
        path, plan = written(source, settings)
        assert path.stat().st_size < 0.75 * Path(source).stat().st_size
        found = load_diffusion_model(str(path), None) if model_only else loaded(path)
        assert not same(held(found), held(loaded(source, plan)))
        load_again, arguments = found.cached_patcher_init
        assert not same(held(load_again(*arguments, disable_dynamic=True)), held(found))

    def test_says_what_a_layer_is(self, path):
        tensors = load_file(path)
        marker = json.loads(bytes(tensors[KEY + "comfy_quant"].tolist()))
        assert marker == {"format": "int8_tensorwise", "full_precision_matrix_mult": True}
        assert tensors[KEY + "weight_scale"].shape == (len(tensors[KEY + "weight"]), 1)
        assert tensors[KEY + "weight"].dtype is torch.int8


def changed(path: Path, tmp_path: Path, **parts: torch.Tensor | None) -> Path:
    """Write a file again with other tensors beside LAYER's weight; None leaves one out."""
    tensors = load_file(path)
    for name, value in parts.items():
        tensors[KEY + name] = value
    target = tmp_path / "changed.safetensors"
    save_file({name: value for name, value in tensors.items() if value is not None}, target)
    return target


def marker(**content) -> torch.Tensor:
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


class TestOthers:
    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_one_scale_for_a_layer(self, path, tmp_path, shape):
        """As ComfyUI's int8_tensorwise has it, and OneTrainer."""
        scale = torch.full(shape, 0.0123)
        patcher = loaded(changed(path, tmp_path, weight_scale=scale))
        weight = patcher.model.diffusion_model.get_submodule(LAYER).weight
        assert weight._params.scale.shape == (len(weight), 1)
        expected = (weight._qdata.cpu().double() * 0.0123).to(weight.dtype)
        torch.testing.assert_close(weight.dequantize().cpu(), expected, rtol=1e-3, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_a_scale_a_row_in_one_axis_and_other_dtypes(self, path, tmp_path, dtype):
        scale = load_file(path)[KEY + "weight_scale"].flatten().to(dtype)
        patcher = loaded(changed(path, tmp_path, weight_scale=scale, comfy_quant=None))
        found = patcher.model.diffusion_model.get_submodule(LAYER).weight._params.scale
        assert torch.equal(found.cpu(), scale.float()[:, None])
        assert sample(patcher).isfinite().all()

    @pytest.mark.parametrize(
        "parts, told",
        [
            ({"weight_scale": None}, "without a weight_scale"),
            ({"weight_scale": torch.ones(3, 1)}, "1 or [0-9]+ positive numbers"),
            ({"weight_scale": torch.tensor(-1.0)}, "positive numbers"),
            ({"weight_scale": torch.tensor(torch.nan)}, "positive numbers"),
            ({"weight_scale": torch.tensor(torch.inf)}, "positive numbers"),
            ({"weight_scale": torch.tensor(1)}, "positive numbers"),
            ({"comfy_quant": marker(format="convrot_w4a4")}, "in the format 'convrot_w4a4'"),
            ({"comfy_quant": marker(format="int8_tensorwise", convrot=True)}, "rotated inputs"),
            (
                {"comfy_quant": marker(format="int8_tensorwise", params={"convrot": True})},
                "rotated inputs",
            ),
            ({"comfy_quant": torch.zeros(4, dtype=torch.uint8)}, "damaged comfy_quant"),
            ({"comfy_quant": torch.tensor([91, 93], dtype=torch.uint8)}, "no object"),
        ],
    )
    def test_what_cannot_be_read_is_told_in_a_sentence(self, path, tmp_path, parts, told):
        with pytest.raises(ModelFileError, match=told) as error:
            loaded(changed(path, tmp_path, **parts))
        assert str(error.value).startswith("changed.safetensors: ")
        assert LAYER in str(error.value)

    def test_exported_again_it_is_refused(self, path, source):
        with pytest.raises(ModelFileError, match="quantized already"):
            written(str(path), wanted("int8"))
