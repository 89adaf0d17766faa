"""TorchCompileModel: the compiled diffusion model computes what it computes without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import TorchCompileModel
from harness.inprocess import assert_same_effect, distance, held, patched, same, sample, unload
from harness.patches import patch_file
from hswq.quant import fp8
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

# Linear and Conv2d, quantized and kept; the whole model takes a compiler minutes.
PARTS = [
    "diffusion_model.time_embed",
    "diffusion_model.middle_block.0.in_layers",
    "diffusion_model.middle_block.1.transformer_blocks.0",
]

NEAR = 0.02 if torch.cuda.is_available() else 1e-3
"""In FP16, as on a GPU, a compiler rounds at other places than torch."""


@pytest.fixture(autouse=True)
def fresh():
    """Nothing that was compiled before is left."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def compiled(patcher: ModelPatcher, backend: str, **how) -> ModelPatcher:
    """Return what the node TorchCompileModel returns, for other backends and parts too."""
    clone = patcher.clone(disable_dynamic=True)
    set_torch_compile_wrapper(clone, backend, **how)
    return clone


def is_float8(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.float8_e4m3fn


class TestParts:
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compute_the_same(self, models, backend):
        latent = sample(models.quantized)
        ours = compiled(models.quantized, backend, keys=PARTS, fullgraph=True)
        assert distance(sample(ours), latent) < NEAR
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(PARTS)
        assert not torch._dynamo.utils.counters["graph_break"]

    def test_give_no_float8_to_what_is_compiled(self, models, monkeypatch):
        """For a card from before Ada; a compiler refuses all kernels that are given one."""
        latent = sample(models.quantized)
        old_card = torch.compiler.assume_constant_result(lambda: True)
        monkeypatch.setattr(fp8, "compilers_lack_fp8", old_card)
        takers, results = [], []

        def look(graph: torch.fx.GraphModule, _: list) -> Callable:
            for node in graph.graph.nodes:
                given = [one for one in node.all_input_nodes if is_float8(one)]
                if given and node.op != "output":
                    takers.append(str(node.target))
                results.extend([node.name] if node.op != "placeholder" and is_float8(node) else [])
            return make_boxed_func(graph.forward)

        ours = compiled(models.quantized, aot_autograd(fw_compiler=look), keys=PARTS)
        assert distance(sample(ours), latent) < NEAR
        assert set(takers) == {"hswq.dequantize.default"}
        assert not results

    def test_follow_loras(self, models):
        file, how = patch_file("LoRA"), {"keys": PARTS, "fullgraph": True}
        ours = compiled(models.quantized, "aot_eager", **how)
        theirs = models.sixteen_bit
        sample(ours)
        assert_same_effect((theirs, ours), lambda patcher: patched(patcher, file))
        alone = models.quantized.clone(disable_dynamic=True)  # which rounds LoRAs otherwise
        assert distance(sample(patched(ours, file)), sample(patched(alone, file))) < 0.05

    def test_give_the_bytes_back(self, models):
        before = held(models.quantized)
        ours = patched(compiled(models.quantized, "aot_eager", keys=PARTS), patch_file("LoRA"))
        sample(ours)
        unload()
        assert not same(held(models.quantized), before)
        assert sample(models.quantized).isfinite().all()


class TestWhole:
    def test_is_one_graph(self, models, legacy):
        """Where ComfyUI's own code breaks it, ours must not break it further."""
        latent = sample(models.quantized)
        ours = compiled(models.quantized, "eager")
        assert distance(sample(ours), latent) < NEAR
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]

    def test_node_marks_it_compiled(self, models):
        ours = TorchCompileModel.execute(models.quantized, "inductor").result[0]
        assert ours.get_wrappers(WrappersMP.APPLY_MODEL, "torch.compile")
        assert not ours.is_dynamic()
        assert not same(held(ours), held(models.quantized))
