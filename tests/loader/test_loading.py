"""What the loader puts into memory: kept layers as the file has them, the others in FP8."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from harness.inprocess import distance, held, parts, same, sample, unload
from helpers import make_planner
from hswq.calibration import Statistics, monitored_layers
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.loading import load_checkpoint, load_diffusion_model
from hswq.loader.files.errors import ModelFileError
from hswq.loader.files.model_file import ModelFile
from hswq.quant import Planner, SearchSettings, quantize
from safetensors.torch import load_file
from toy.checkpoint import make_checkpoint, make_diffusion_model

PREFIX = "model.diffusion_model."
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(scope="session")
def files(checkpoint: Path) -> dict[str, Path]:
    """The toy in every kind of file."""
    folder = checkpoint.parent
    files = {}
    for dtype in DTYPES:
        files[str(dtype)] = make_checkpoint(folder / f"{dtype}.safetensors", 0, dtype)
    files["ckpt"] = folder / "toy.ckpt"
    torch.save({"state_dict": load_file(checkpoint), "epoch": 3}, files["ckpt"])
    return files


class TestWeights:
    @pytest.mark.parametrize("scaled", [True, False], ids=["V2", "V1"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_are_those_of_the_file(self, memory, files, planner, dtype, scaled):
        path, source = files[str(dtype)], planner(scaled=scaled)
        patcher = load_checkpoint(str(path), source, only_model=True)[0]
        plan, weights = patcher.get_attachment(ATTACHMENT), held(patcher)
        file = {
            key.removeprefix(PREFIX): value
            for key, value in load_file(path).items()
            if key.startswith(PREFIX)
        }
        assert weights.keys() == file.keys()
        assert len(plan.kept) == int(0.25 * len(plan.layers))
        sixteen_bit = patcher.model.get_dtype()
        stock = comfy.sd.load_checkpoint_guess_config(str(path))[0].model.get_dtype()
        assert sixteen_bit in (torch.float16, torch.bfloat16)
        assert sixteen_bit == stock or stock == torch.float32
        assert sixteen_bit in (stock, dtype) or dtype == torch.float32
        for key, (data, *scale) in weights.items():
            layer = plan.layers.get(key.removesuffix(".weight"))
            if layer is not None and layer.quantized and key.endswith(".weight"):
                expected, its_scale = quantize(file[key], layer.amax, scaled=scaled)
                assert data.dtype == torch.float8_e4m3fn, key
                assert data.view(torch.uint8).equal(expected.view(torch.uint8)), key
                assert scale[0].equal(its_scale), key
            else:
                assert not scale
                assert data.dtype == sixteen_bit, key
                assert data.equal(file[key].to(data.dtype)), key

    def test_of_a_ckpt_file_are_the_same(self, models, memory, files):
        plan = models.quantized.get_attachment(ATTACHMENT)
        patcher = load_checkpoint(str(files["ckpt"]), plan, only_model=True)[0]
        assert not same(held(patcher), held(models.quantized))

    def test_of_a_diffusion_model_alone_are_the_same(self, models, checkpoint):
        plan = models.quantized.get_attachment(ATTACHMENT)
        for prefix in ("", PREFIX):
            path = checkpoint.parent / "unet.safetensors"
            make_diffusion_model(path, prefix=prefix)
            assert not same(held(load_diffusion_model(str(path), plan)), held(models.quantized))

    def test_of_a_diffusion_model_alone_are_no_checkpoints(self, checkpoint, planner):
        """ComfyUI's checkpoint loader takes it without our operations: in 16 bit."""
        path = str(make_diffusion_model(checkpoint.parent / "unet.safetensors"))
        with pytest.raises(
            ModelFileError, match=r"^unet\.safetensors holds only a diffusion model"
        ):
            load_checkpoint(path, planner())

    def test_are_no_inference_tensors(self, models):
        """Loaded in inference mode, they can be patched and moved outside of it."""
        for layer in monitored_layers(models.quantized.model.diffusion_model).values():
            for value in layer.parameters():
                assert not value.is_inference()
                assert not any(part.is_inference() for part in parts(value))

    def test_are_read_without_inference_mode(self, checkpoint):
        """So that keeping them takes no copy."""
        tensors = ModelFile(str(checkpoint)).tensors
        assert not any(tensor.is_inference() for tensor in tensors.values())

    @pytest.mark.parametrize("keep_ratio", [0.0, 1.0])
    def test_all_or_none_quantized(self, memory, checkpoint, planner, keep_ratio):
        patcher = load_checkpoint(str(checkpoint), planner(keep_ratio), only_model=True)[0]
        quantized = [isinstance(value, QuantizedTensor) for value in patcher.model.parameters()]
        assert sum(quantized) == (0 if keep_ratio else 264)
        assert sample(patcher).isfinite().all()


class TestClipAndVae:
    def test_are_those_of_the_stock_loader(self, memory, checkpoint, planner):
        _, clip, vae = load_checkpoint(str(checkpoint), planner())
        _, their_clip, their_vae, _ = comfy.sd.load_checkpoint_guess_config(str(checkpoint))
        pairs = [
            (their_clip.cond_stage_model, clip.cond_stage_model),
            (their_vae.first_stage_model, vae.first_stage_model),
        ]
        for theirs, ours in pairs:
            assert type(ours) is type(theirs)
            expected, found = theirs.state_dict(), ours.state_dict()
            assert found.keys() == expected.keys()
            # It is in no file, so nobody sets it.
            expected.pop("clip_l.transformer.text_projection.weight", None)
            for key, value in expected.items():
                assert found[key].dtype == value.dtype
                assert found[key].equal(value), key

    def test_encode_and_decode_alike(self, memory, checkpoint, planner):
        ours = load_checkpoint(str(checkpoint), planner())[1:]
        theirs = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[1:3]
        texts, pictures = [], []
        for clip, vae in (theirs, ours):
            texts.append(clip.encode_from_tokens(clip.tokenize("a red house"), return_pooled=True))
            pictures.append(vae.decode(torch.linspace(-1, 1, 1024).reshape(1, 4, 16, 16)))
        assert all(map(torch.equal, *texts))
        assert pictures[0].equal(pictures[1])

    def test_reload_by_stock_comfyui(self, memory, checkpoint, planner):
        """Their factories are ComfyUI's own."""
        _, clip, vae = load_checkpoint(str(checkpoint), planner())
        for patcher in (clip.patcher, vae.patcher):
            factory, arguments, *_ = patcher.cached_patcher_init
            again = factory(*arguments, disable_dynamic=True)
            assert again.model.state_dict().keys() == patcher.model.state_dict().keys()


class TestSize:
    def test_is_the_number_of_bytes_in_memory(self, models):
        tensors = models.quantized.model.state_dict().values()
        held_bytes = sum(part.nbytes for tensor in tensors for part in parts(tensor))
        scales = sum(len(parts(tensor)) - 1 for tensor in tensors)
        assert models.quantized.model_size() == held_bytes - 4 * scales
        assert models.quantized.model_size() < 0.7 * models.sixteen_bit.model_size()


class TestMemory:
    def test_a_model_goes_with_its_last_patcher(self, memory, checkpoint, planner):
        """At once, without waiting for the garbage collector, as the stock loader's does."""
        patcher = load_checkpoint(str(checkpoint), planner(), only_model=True)[0]
        sample(patcher)
        clone = patcher.clone()
        gone = weakref.ref(patcher.model)
        unload()
        gc.disable()
        try:
            del patcher
            assert gone() is not None
            del clone
            assert gone() is None
        finally:
            gc.enable()

    def test_statistics_go_when_it_is_loaded(self, memory, checkpoint, statistics):
        copied = Statistics(statistics)
        gone = weakref.ref(copied)
        planner = make_planner(copied, 0.25, scaled=True, settings=SearchSettings(256, 20, 1))
        del copied
        patcher = load_checkpoint(str(checkpoint), planner, only_model=True)[0]
        del planner
        gc.collect()
        assert gone() is None
        assert patcher.model is not None

    def test_the_file_goes_when_it_is_loaded(self, legacy, checkpoint, planner, tmp_path):
        """Nothing of its mapped pages stays in use: it can be deleted."""
        copied = tmp_path / "copy.safetensors"
        copied.write_bytes(checkpoint.read_bytes())
        patcher = load_checkpoint(str(copied), planner(), only_model=True)[0]
        gc.collect()
        maps = Path("/proc/self/maps")
        assert not maps.exists() or str(copied) not in maps.read_text()
        assert sample(patcher).isfinite().all()

    @pytest.mark.parametrize("how", ["error", "interrupt"])
    def test_a_load_that_fails_leaves_nothing(self, memory, checkpoint, planner, how):
        count = 0

        class Failing(Planner):
            def clipping_of(self, name, weight):
                nonlocal count
                count += 1
                if count == 100 and how == "error":
                    raise RuntimeError("in the middle")
                if count == 100:
                    comfy.model_management.interrupt_current_processing()
                return super().clipping_of(name, weight)

        source, alive = Failing(None), _models_alive()
        expected = (RuntimeError, comfy.model_management.InterruptProcessingException)
        with pytest.raises(expected):
            load_checkpoint(str(checkpoint), source, only_model=True)
        comfy.model_management.interrupt_current_processing(False)
        assert count in (100, 101)
        gone = weakref.ref(source)
        del source
        gc.collect()
        assert gone() is None
        assert _models_alive() == alive


def _models_alive() -> int:
    return sum(issubclass(type(thing), comfy.model_base.BaseModel) for thing in gc.get_objects())


class TestAgain:
    def test_with_its_plan_gives_the_same_bytes(self, models, checkpoint):
        plan = models.quantized.get_attachment(ATTACHMENT)
        again = load_checkpoint(str(checkpoint), plan, only_model=True)[0]
        assert not same(held(again), held(models.quantized))
        assert again.get_attachment(ATTACHMENT) == plan
        assert sample(again).equal(sample(models.quantized))

    def test_without_statistics_quantizes_all(self, memory, checkpoint, models):
        uniform = make_planner(None, 0.25, scaled=True, settings=SearchSettings(256, 20, 1))
        patcher = load_checkpoint(str(checkpoint), uniform, only_model=True)[0]
        assert len(patcher.get_attachment(ATTACHMENT).kept) == 0
        assert 0.01 < distance(sample(patcher), sample(models.sixteen_bit)) < 0.5

    def test_is_near_the_16_bit_model(self, models):
        assert 0.001 < distance(sample(models.quantized), sample(models.sixteen_bit)) < 0.3
        unload()
