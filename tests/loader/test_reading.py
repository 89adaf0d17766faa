"""ComfyUI's nodes that read a model's weights, or scale them, by themselves."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_attention_multiply import UNetCrossAttentionMultiply
from comfy_extras.nodes_lora_extract import LoraSave
from comfy_extras.nodes_model_merging import ModelSubtract
from harness.inprocess import assert_same_effect, distance, held, patched, same, unload
from harness.patches import patch_file
from safetensors.torch import load_file


class TestExtractLora:
    """Of the difference of two models, each once in 16 bit and once quantized."""

    @pytest.mark.parametrize("kind", ["standard", "full_diff"])
    def test_finds_what_it_finds_in_16_bit(self, models, legacy, kind):
        """Under Dynamic VRAM ComfyUI 0.30.0 patches layers below 16 KB twice, 16-bit ones too."""
        file = patch_file("LoRA", every=20)
        theirs, ours = (self.extracted(patcher, file, kind) for patcher in models)
        assert ours.keys() == theirs.keys()
        assert all(value.isfinite().all() for value in ours.values())
        changed = [key for key, value in theirs.items() if value.norm() > 0.01]
        assert len(changed) > 10
        if kind == "full_diff":
            assert max(distance(ours[key], theirs[key]) for key in changed) < 0.5
            others = theirs.keys() - set(changed)
            assert max(ours[key].norm() for key in others) < 0.01

    def extracted(self, patcher: ModelPatcher, file: dict, kind: str) -> dict:
        difference = ModelSubtract().merge(patched(patcher, file), patcher, 1.0)[0]
        LoraSave.execute(f"loras/{kind}", 4, kind, True, model_diff=difference)
        files = Path(folder_paths.get_output_directory(), "loras").glob("*.safetensors")
        return load_file(max(files, key=lambda path: path.stat().st_mtime_ns))


class TestScaleAttention:
    def test_has_the_effect_that_it_has_on_16_bit(self, models, legacy):
        """Under Dynamic VRAM ComfyUI 0.30.0 fails at it, on 16-bit models too."""
        before = held(models.quantized)
        scale = UNetCrossAttentionMultiply.execute
        assert_same_effect(models, lambda patcher: scale(patcher, 1.0, 1.0, 4.0, 2.0).result[0])
        unload()
        assert not same(held(models.quantized), before)
