"""ComfyUI's merging nodes, with a quantized model on either side or on both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_merging import (
    ModelAdd,
    ModelMergeSimple,
    ModelSubtract,
)
from harness.inprocess import distance, held, load, parts, patched, same, sample, unload, weight
from harness.patches import patch_file
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.converter import convert
from hswq.loader.engine.identity import identity
from torch import Tensor

Merge = Callable[[ModelPatcher, ModelPatcher], ModelPatcher]
ONE_STEP = 0.05  # a weight's error by quantizing it once, relative


def finetune(patcher: ModelPatcher) -> ModelPatcher:
    """Return a model with other weights, by a LoRA."""
    return patched(patcher, patch_file("LoRA", seed=7, every=1))


def pair(models, side: str) -> tuple[ModelPatcher, ModelPatcher]:
    """Return a model and its finetune, quantized on the given side and else in 16 bit."""
    first = models.sixteen_bit if side == "second" else models.quantized
    second = models.sixteen_bit if side == "first" else models.quantized
    return first, finetune(second)


def weights(patcher: ModelPatcher, layers) -> dict[str, Tensor]:
    """Return the weights that a model is sampled with, in real units."""
    load(patcher)
    found = {name: weight(patcher, name) for name in layers}
    unload()
    return found


MERGES: dict[str, tuple[Merge, Callable[[Tensor, Tensor], Tensor]]] = {
    "ModelMergeSimple": (
        lambda one, two: ModelMergeSimple().merge(one, two, 0.3)[0],
        lambda one, two: 0.3 * one + 0.7 * two,
    ),
    "ModelMergeAdd": (lambda one, two: ModelAdd().merge(one, two)[0], lambda one, two: one + two),
    "ModelMergeSubtract": (
        lambda one, two: ModelSubtract().merge(one, two, 0.5)[0],
        lambda one, two: 0.5 * one - 0.5 * two,
    ),
}


class TestMerge:
    def test_gives_the_result_of_the_16_bit_merge(self, models):
        theirs = (models.sixteen_bit, finetune(models.sixteen_bit))
        merge = MERGES["ModelMergeSimple"][0]
        latent = sample(merge(*theirs))
        apart = distance(*map(sample, theirs))
        assert apart > 0.5
        for side in ("first", "second"):
            assert distance(sample(merge(*pair(models, side))), latent) < apart / 2, side

    @pytest.mark.parametrize(
        ("node", "side"),
        [
            ("ModelMergeSimple", "first"),
            ("ModelMergeSimple", "second"),
            ("ModelMergeSimple", "both"),
            ("ModelMergeAdd", "second"),
            ("ModelMergeSubtract", "first"),
        ],
    )
    def test_is_right_in_every_weight(self, models, legacy, node, side):
        layers = models.quantized.get_attachment(ATTACHMENT).layers
        merge, expected = MERGES[node]
        # Merged as the files have them, and quantized once.
        theirs = models.sixteen_bit, finetune(models.sixteen_bit)
        first, second = (weights(patcher, layers) for patcher in theirs)
        found = weights(merge(*pair(models, side)), layers)
        wrong = {
            name: off
            for name in layers
            if (off := distance(found[name], expected(first[name], second[name]))) > ONE_STEP
        }
        assert not wrong

    def test_leaves_both_as_they_were(self, models):
        before = held(models.quantized)
        latent = sample(models.quantized)
        merged = ModelMergeSimple().merge(*pair(models, "both"), 0.5)[0]
        assert not sample(merged).equal(latent)
        assert sample(models.quantized).equal(latent)
        unload()
        assert not same(held(models.quantized), before)
        assert identity(models.quantized).is_of_file
        assert not identity(merged).is_of_file, "a merge has other weights than the file"

    def test_is_converted_from_16_bit_weights(self, models):
        merged = ModelMergeSimple().merge(models.sixteen_bit, finetune(models.sixteen_bit), 0.5)[0]
        converted = convert(merged, models.quantized.get_attachment(ATTACHMENT))
        assert not converted.patches
        assert distance(sample(converted), sample(merged)) < 0.5
        assert any(len(parts(value)) > 1 for value in converted.model.parameters())
