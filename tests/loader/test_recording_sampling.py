"""Recording never stands in the way of a sampling, and records the right model's."""

from __future__ import annotations

import gc

import comfy.sd
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from harness.inprocess import alike, load_16_bit, patched, sample
from harness.patches import patch_file
from harness.recording import hooks, recorded
from hswq.calibration import NOISE_LEVELS, DualMonitor, monitored_layers
from hswq.loader import store
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.recording import recorder as recording
from hswq.loader.recording.recorder import Recording, record
from hswq.loader.recording.status import FAILED, NOT_RECORDED, RECORDING


class TestPassive:
    def test_changes_no_picture_and_leaves_no_hook(self, model, checkpoint, recorder):
        recorder.remove()
        expected = sample(model, steps=3, cfg=5.0)
        recorder.install()
        assert alike(sample(model, steps=3, cfg=5.0), expected)
        assert recorded(checkpoint).samples == 1
        assert hooks(model) == 0

    def test_takes_turns_over_samplings(self, model, checkpoint, recorder):
        for steps in (1, 4, 7, 8):
            sample(model, steps=steps)
        found = recorded(checkpoint)
        assert store.missing_layers(found) == 0
        assert found.meta["layers"] == len(monitored_layers(model.model.diffusion_model))
        assert {layer.calls for layer in found.values()} <= {1}
        assert found.samples == 4

    def test_keeps_the_models_order(self, model, checkpoint, recorder):
        """Layers that are measured later come where they are in the model, not last."""
        for _ in range(2):
            sample(model, steps=3)
        found = list(recorded(checkpoint))
        order = [name for name in monitored_layers(model.model.diffusion_model) if name in found]
        assert found == order

    def test_records_batches(self, model, checkpoint, recorder):
        sample(model, batch=3)
        assert recorded(checkpoint).samples == 3

    def test_notes_the_levels_of_noise(self, model, checkpoint, recorder):
        for steps in (8, 1):
            sample(model, steps=steps)
        assert recorded(checkpoint).meta[NOISE_LEVELS] == "2 1 1 1 1 1 1 1"

    def test_of_a_strange_schedule_notes_no_levels(self, model, checkpoint, recorder):
        class Strange(type(model.get_model_object("model_sampling"))):
            percent_to_sigma = None

        model.add_object_patch("model_sampling", Strange(model.model.model_config))
        sample(model)
        assert NOISE_LEVELS not in recorded(checkpoint).meta

    def test_notes_a_lora(self, model, checkpoint, recorder):
        sample(patched(model, patch_file("LoRA")))
        assert recorded(checkpoint).meta["lora"].startswith("patches on ")

    def test_notes_a_lora_beside_the_weights(self, model, checkpoint, recorder):
        lora = patch_file("LoRA")
        sample(comfy.sd.load_bypass_lora_for_models(model, None, lora, 1.0, 0.0)[0])
        assert recorded(checkpoint).meta["lora"] == "LoRAs beside the weights"


class TestStatus:
    def test_of_a_model_that_is_recorded(self, model, checkpoint, recorder):
        assert recorder.status() == []
        sample(model)
        (status,) = recorder.status()
        assert (status.state, status.samples, status.reason) == (RECORDING, 1, None)
        assert (status.name, status.fingerprint) == (checkpoint.name, fingerprint(str(checkpoint)))
        assert status.last_run

    def why_not(self, recorder, patcher) -> str:
        sample(patcher)
        status = recorder.status()[-1]
        assert status.state == NOT_RECORDED
        assert hooks(patcher) == 0
        return status.reason

    def test_of_a_merge(self, model, recorder):
        merge = model.clone()
        merge.add_patches(model.get_key_patches("diffusion_model.out."), 0.5, 0.5)
        assert "merge" in self.why_not(recorder, merge)

    def test_of_a_quantized_one(self, models, recorder):
        assert "quantized" in self.why_not(recorder, models.quantized)

    def test_of_a_compiled_one(self, model, recorder):
        def compiled(run, *args, **kwargs):
            return run(*args, **kwargs)

        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", compiled)
        assert "compiled" in self.why_not(recorder, model)

    def test_of_one_in_training(self, model, recorder):
        model.model.diffusion_model.train()
        try:
            assert "trained" in self.why_not(recorder, model)
        finally:
            model.model.diffusion_model.eval()

    def test_of_an_unknown_file(self, checkpoint, recorder):
        model = load_16_bit(checkpoint)
        model.cached_patcher_init = None
        assert "not loaded from a file" in self.why_not(recorder, model)


class TestInTheWay:
    @pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError, KeyboardInterrupt])
    def test_after_an_error_of_the_sampling(self, model, checkpoint, recorder, error):
        def fail(step, *_):
            if step == 1:
                raise error("in the sampling")

        with pytest.raises(error, match="in the sampling"):
            sample(model, steps=3, callback=fail)
        assert hooks(model) == 0
        assert recorded(checkpoint) is None
        sample(model)
        assert recorded(checkpoint).samples == 1

    @pytest.mark.parametrize(
        "broken",
        [(DualMonitor, "__init__"), (DualMonitor, "__enter__"), (DualMonitor, "_add"),
         (DualMonitor, "statistics"), (DualMonitor, "_hook")],
        ids=lambda broken: broken[1],
    )  # fmt: skip
    def test_measuring_that_fails_ends_for_the_model(
        self, model, checkpoint, recorder, monkeypatch, broken, caplog
    ):
        recorder.remove()
        expected = sample(model)
        recorder.install()

        def fail(*_, **__):
            raise RuntimeError("broken")

        with monkeypatch.context() as patch:
            patch.setattr(*broken, fail)
            assert sample(model).equal(expected)
        for _ in range(2):
            assert sample(model).equal(expected)
            (status,) = recorder.status()
            assert status.state == FAILED
            assert "broken" in status.reason
        assert caplog.text.count("broken") == 1
        assert hooks(model) == 0
        assert recorded(checkpoint) is None

    def test_memory_that_was_too_small_once(self, model, checkpoint, recorder, monkeypatch):
        def fail(*_):
            raise torch.OutOfMemoryError("too small")

        with monkeypatch.context() as patch:
            patch.setattr(DualMonitor, "_add", fail)
            sample(model)
        assert recorder.status()[-1].state == FAILED
        assert recorded(checkpoint) is None
        sample(model)
        assert recorder.status()[-1].state == RECORDING
        assert recorded(checkpoint).samples == 1

    @pytest.mark.parametrize("broken", ["identity", "unrecordable", "share_of"])
    def test_what_else_fails(self, model, recorder, monkeypatch, broken):
        recorder.remove()
        expected = sample(model)
        recorder.install()

        def fail(*_):
            raise RuntimeError("broken")

        monkeypatch.setattr(recording, broken, fail)
        assert sample(model).equal(expected)
        assert recorder.status()[-1].state == FAILED

    def test_a_folder_that_cannot_be_made(self, model, recorder, folder):
        folder.write_bytes(b"a file has its name")
        sample(model)
        assert recorder.status()[-1].state == FAILED

    def test_what_is_not_finite_is_not_recorded(self, model, checkpoint, recorder):
        layer = model.model.diffusion_model.get_submodule("out.2")
        handle = layer.register_forward_hook(lambda *args: args[-1] * torch.nan)
        for _ in range(25):  # until it is the layer's turn
            sample(model)
        handle.remove()
        assert all(layer.finite for layer in recorded(checkpoint).values())
        assert recorded(checkpoint).samples < 25


class TestClones:
    def test_on_other_gpus_are_summed(self, model, checkpoint, folder):
        other = model.clone()
        model.set_additional_models("multigpu", [other])
        images = torch.zeros(1, 4, 16, 16)
        first = model.model.diffusion_model.input_blocks[0]
        found = []
        where = Recording("cd" * 32, "recorded", "toy", saved=found.append)
        with record(model, 2, where):
            first[0](images.to(first[0].weight.device, first[0].weight.dtype))
        # Both are hooked: here they share their layers, so every call counts in both.
        assert found[0]["input_blocks.0.0"].calls == 2
        assert found[0].samples == 2
        assert hooks(model) == 0


class TestMemory:
    SAMPLINGS = 20  # a round of the rotation

    def test_is_flat(self, model, recorder, choose):
        """ComfyUI keeps a little of every sampling itself."""
        choose(Target=4096)

        def growth() -> int:
            gc.collect()
            before = len(gc.get_objects())
            for _ in range(self.SAMPLINGS):
                sample(model)
            gc.collect()
            return len(gc.get_objects()) - before

        growth()
        while_recording = growth()
        recorder.remove()
        growth()
        assert while_recording - growth() < self.SAMPLINGS
        assert hooks(model) == 0
