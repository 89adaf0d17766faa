"""Verify: seeds sampled with two models, compared picture by picture."""

from __future__ import annotations

import itertools
import json
import math

import comfy.model_management as memory
import comfy.sd
import pytest
import torch
from harness.inprocess import conditioning
from hswq.loader.jobs import verify
from hswq.loader.jobs.sampling import Picture

EDGE = 8  # latent pixels


@pytest.fixture(scope="module")
def vae(checkpoint):
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_model=False)[2]


def picture(steps: int = 2, batch: int = 1) -> Picture:
    latent = {"samples": torch.zeros(batch, 4, EDGE, EDGE)}
    return Picture(conditioning(1), conditioning(2), latent, steps=steps, cfg=2.0)


class TestVerdict:
    def test_of_one_model_and_itself(self, models, vae, legacy):
        one = models.sixteen_bit
        verdict, sheet = verify.verify((one, one.clone()), vae, picture(), range(3, 6))
        if not torch.cuda.is_available():  # where its kernels may change with its memory
            assert {pair.psnr for pair in verdict.pairs} == {100}
        assert [pair.seed for pair in verdict.pairs] == [3, 4, 5]
        assert verdict.same == 3
        assert verdict.cosine == pytest.approx(1, abs=1e-3)
        rows = 8 * EDGE + 4
        assert sheet.shape == (1, 3 * rows, 3 * rows, 3)
        assert (sheet[0, :4, 2 * rows : 2 * rows + 4] - 0.5).abs().max() < 0.1  # no difference

    def test_of_a_quantized_model(self, models, vae):
        verdict, _ = verify.verify(tuple(models), vae, picture(batch=2), [7])
        assert [pair.seed for pair in verdict.pairs] == [7, 7]
        assert 0.9 < verdict.worst.cosine < 1
        assert verdict.worst.cosine <= verdict.cosine <= 1
        assert 10 < verdict.psnr < 60

    def test_of_other_pictures(self, models, vae):
        """By a model whose latents are those of other seeds."""
        other = models.sixteen_bit.clone()
        other.set_model_sampler_post_cfg_function(lambda its: its["denoised"].roll(1, -1))
        verdict, _ = verify.verify((models.sixteen_bit, other), vae, picture(), range(2))
        assert verdict.same == 0
        assert str(verdict).startswith("0 of 2 pictures are the same (latent cosine of 0.95 or")

    def test_puts_the_worst_first(self, models, vae):
        verdict, sheet = verify.verify(tuple(models), vae, picture(), range(3), amplify=0)
        decoded = verify._decoded(vae, picture().sample(models.sixteen_bit, verdict.worst.seed))
        first = sheet[0, : 8 * EDGE, : 8 * EDGE]
        assert (first - decoded[0].clamp(0, 1)).abs().mean() < 0.02

    def test_of_a_picture_that_is_not_finite(self, models, vae):
        """It is the worst, and not the same; what ComfyUI's page is told is valid JSON."""
        broken = models.sixteen_bit.clone()
        broken.set_model_sampler_post_cfg_function(lambda its: its["denoised"] * math.nan)
        verdict, sheet = verify.verify((models.sixteen_bit, broken), vae, picture(), range(2))
        assert sheet.isfinite().all()
        assert (verdict.same, verdict.cosine, verdict.psnr) == (0, 0, 0)
        told = json.loads(json.dumps(verdict.to_json(), allow_nan=False))
        assert (told["pictures"], told["worst"]) == (2, {"seed": 0, "cosine": 0, "psnr": 0})

    def test_counts_by_its_threshold(self):
        pairs = [verify.Pair(seed, cosine, 30.0) for seed, cosine in enumerate((1.0, 0.95, 0.94))]
        assert verify.Verdict(pairs).same == 2
        assert verify.Verdict(pairs, 0.9).same == 3
        assert verify.Verdict(pairs).worst.seed == 2

    def test_holds_no_more_than_it_needs(self, models, vae, monkeypatch):
        """As if memory were full after three latents, and the sheet after two rows."""
        monkeypatch.setattr(verify, "_HELD_BYTES", 3 * 2 * 2 * 4 * EDGE * EDGE * 4)
        monkeypatch.setattr(verify, "_MAX_ROWS", 2)
        sampled = []

        def noted(name):
            return lambda its: (sampled.append(name), its["denoised"])[1]

        pair = models.sixteen_bit, models.quantized
        for name, one in zip("ab", pair, strict=True):
            one.set_model_sampler_post_cfg_function(noted(name))
        whole = picture(1, batch=2)
        verdict, sheet = verify.verify(pair, vae, whole, range(4))
        assert [len(list(run)) for _, run in itertools.groupby(sampled)] == [3, 3, 1, 1]
        assert [one.seed for one in verdict.pairs] == [0, 0, 1, 1, 2, 2, 3, 3]
        order = sorted(range(8), key=lambda number: verdict.pairs[number].cosine)
        assert sheet.shape[1] == 2 * (8 * EDGE + 4)
        for row, number in zip(sheet[0].split(8 * EDGE + 4), order, strict=False):
            latents = (whole.sample(one, verdict.pairs[number].seed) for one in pair)
            images = (verify._decoded(vae, its)[number % 2] for its in latents)
            assert (row - verify._row(*images, 4.0)).abs().mean() < 0.02

    def test_without_seeds(self, models, vae):
        with pytest.raises(ValueError, match="no seeds"):
            verify.verify(tuple(models), vae, picture(), [])


def test_is_interrupted_between_steps(models, vae, legacy):
    steps = []

    def interrupt(*_):
        steps.append(1)
        if len(steps) == 3:
            memory.interrupt_current_processing()

    models.sixteen_bit.model_options["sampler_post_cfg_function"] = [
        lambda args: (interrupt(), args["denoised"])[1]
    ]
    with pytest.raises(memory.InterruptProcessingException):
        verify.verify(tuple(models), vae, picture(4), range(2))
    assert len(steps) == 3
