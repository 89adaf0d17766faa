"""Effects of layers: measured in a sampling step, kept on disk, used by loader and export."""

from __future__ import annotations

import dataclasses
import gc
import math

import comfy.model_management as memory
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from harness.inprocess import held, same
from harness.trained import sample
from hswq.calibration import monitored_layers
from hswq.loader import store
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.effect import EffectMeasurer
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.engine.model_structure import needed_beside
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.files.model_file import ModelFile
from hswq.loader.jobs import choice, effect
from hswq.loader.jobs.card import OTHERS_BYTES, Card
from hswq.loader.jobs.export import export
from hswq.loader.jobs.export_settings import ExportSettings
from hswq.loader.jobs.keeping import BY_EFFECT, TO_FIT, Keeping, above_noise, choose_keeping
from hswq.loader.jobs.sampling import Picture
from hswq.loader.recording.recorder import recorder
from hswq.loader.recording.unrecorded import unrecorded
from hswq.loader.store.effects import (
    Effects,
    _checked,
    _path,
    find_effects,
    forget_effects,
    keep_effects,
    measured_in,
)
from hswq.quant import LARGEST_EFFECT, BySensitivity, QuantizeSettings, Reason, dequantize, stored

SETTINGS = QuantizeSettings(compensated=True)
EDGE = 8  # latent pixels: measuring takes a forward a layer


@pytest.fixture
def picture(trained) -> Picture:
    latent = {"samples": torch.zeros(1, 4, EDGE, EDGE)}
    return Picture(trained.prompt, trained.prompt, latent, cfg=2.0)


@pytest.fixture(autouse=True)
def forgotten(trained):
    forget_effects(fingerprint(trained.path))


def measure(trained, picture, **how) -> str:
    its = unrecorded(trained.patcher)
    return effect.measure_effects(its, picture, 5, choice.AUTO, SETTINGS, **how)


def found(trained, **which) -> Effects | None:
    return find_effects(fingerprint(trained.path), "scaled", **which)


class TestMeasured:
    def test_is_what_the_layer_alone_changes(self, trained, picture):
        """Against the step computed anew with the quantized weight in the layer's place."""
        measure(trained, picture)
        effects = found(trained)
        layers = monitored_layers(trained.patcher.model.diffusion_model)
        assert effects.whole
        assert list(effects.layers) == list(layers)
        decider = choice.choose(
            choice.AUTO, fingerprint(trained.path), "toy",
            dataclasses.replace(SETTINGS, selection=BySensitivity(0.0)), choice.FAIL,
        ).decider  # fmt: skip
        names = list(layers)
        expected = step(trained, picture)
        for name in (*names[::24], "out.2"):
            values = layers[name].weight
            changed = dequantize(*stored(decider, name, values), values.dtype)
            change = step(trained, picture, layers[name], changed) - expected
            direct = (change.double().square().sum() / expected.double().square().sum()).item()
            assert effects.layers[name] == pytest.approx(direct, rel=1e-3), name

    def test_changes_nothing(self, trained, picture):
        before, weights = sample(trained.patcher, trained.prompt, 3), held(trained.patcher)
        images = store.statistics_of(fingerprint(trained.path)).samples
        recorder.install()
        try:
            measure(trained, picture)
        finally:
            recorder.remove()
        assert not same(held(trained.patcher), weights)
        assert sample(trained.patcher, trained.prompt, 3).equal(before)
        assert store.statistics_of(fingerprint(trained.path)).samples == images
        modules = trained.patcher.model.diffusion_model.modules()
        assert not any("forward" in vars(module) for module in modules)

    def test_leaves_no_clone_in_comfyuis_list(self, trained, picture):
        """ComfyUI would tell of a memory leak from then on."""
        measure(trained, picture)
        gc.collect()
        assert None not in [one.model for one in memory.current_loaded_models]

    def test_goes_on_after_an_interrupt(self, trained, picture):
        measure(trained, picture)
        whole = found(trained)
        forget_effects(fingerprint(trained.path))

        def interrupt(_: str) -> None:
            memory.interrupt_current_processing()

        with pytest.raises(memory.InterruptProcessingException):
            measure(trained, picture, told=interrupt)
        assert found(trained) is None
        begun = found(trained, whole=False)
        assert 0 < len(begun.layers) < len(whole.layers)
        # What is known is not measured again: it stays, though it is wrong here.
        changed = dict.fromkeys(begun.layers, 7.0)
        keep_effects(
            fingerprint(trained.path), "scaled", dataclasses.replace(begun, layers=changed)
        )
        measure(trained, picture)
        assert found(trained, whole=False) is None
        for name, value in found(trained).layers.items():
            assert value == (7.0 if name in changed else whole.layers[name])
        assert measure(trained, picture).endswith("layers were measured before")

    def test_what_is_damaged_counts_as_none(self, trained, picture):
        measure(trained, picture)
        (path,) = (
            store.statistics_path(fingerprint(trained.path), "x", "x").parent / "effects"
        ).glob("*")
        content = path.read_bytes()
        path.write_bytes(content.replace(b"true", b"null"))
        assert found(trained) is None
        keep_effects("ab" * 32, "scaled", Effects({"a": 1.0}, "", whole=True))
        assert find_effects("ab" * 32, "scaled").layers == {"a": 1.0}
        assert find_effects("ab" * 31 + "cd", "scaled") is None

    def test_an_output_that_is_not_finite_is_the_largest_effect(self, trained, picture):
        names = ("middle_block.1.proj_in", "out.2")
        known = dict.fromkeys(monitored_layers(trained.patcher.model.diffusion_model), 0.0)
        for name in names:
            del known[name]

        def quantized(_: str, weight: torch.Tensor) -> torch.Tensor:
            return torch.full_like(weight, math.inf)

        measurer = EffectMeasurer(quantized, known)
        how = dataclasses.replace(picture, steps=effect.STEPS)
        how.sample(measurer.on(unrecorded(trained.patcher), 0), 5, last_step=1)
        assert {measurer.effects[name] for name in names} == {LARGEST_EFFECT}
        assert math.isfinite(math.fsum(measurer.effects.values()))

    @pytest.mark.parametrize("wrong", [1e101, math.inf, math.nan, -1.0])
    def test_an_effect_out_of_range_counts_as_damaged(self, wrong):
        its = {"layers": {"a": wrong}, "of": "", "whole": True}
        with pytest.raises(ValueError, match="out of range"):
            _checked({"version": 1, "fingerprint": "ab", **its}, "ab")

    def test_is_told_of_number_formats_alone(self):
        keep_effects("cd" * 32, "int8", Effects({"a": 1.0}, "", whole=True))
        path = _path("cd" * 32, "int8", whole=True)
        path.with_name(path.name.replace("int8", "<b>")).write_bytes(b"")
        assert list(measured_in("cd" * 32)) == ["int8"]


def step(trained, picture, layer=None, weight=None) -> torch.Tensor:
    """Return what the guider predicts in the step that is measured, there with another weight."""
    predicted = []

    def predict(executor, *args, **kwargs):
        changes = layer is not None and len(predicted) == effect.MEASURED_STEP
        original = layer.weight if changes else None
        if changes:
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        try:
            predicted.append(executor(*args, **kwargs))
        finally:
            if changes:
                layer.weight = original
        return predicted[-1]

    clone = unrecorded(trained.patcher)
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", predict)
    how = dataclasses.replace(picture, steps=effect.STEPS)
    how.sample(clone, 5, last_step=effect.MEASURED_STEP + 1)
    return predicted[effect.MEASURED_STEP]


def bytes_of(patcher) -> int:
    return sum(part.nbytes for parts in held(patcher).values() for part in parts)


def chosen(trained, without=choice.FAIL, **keeping):
    file, wanted = ModelFile(trained.path), Keeping(**{"selection": BY_EFFECT, **keeping})
    return choose_keeping(choice.AUTO, file, SETTINGS, wanted, without)


def load(trained, **keeping):
    return load_checkpoint(trained.path, chosen(trained, **keeping).decider, only_model=True)[0]


class TestNoise:
    def test_of_16_bit_rounding_is_left_out(self):
        measured = {"a": 7.0e-5, "b": 7.1e-5, "c": 6.9e-5, "d": 7.2e-5, "e": 9.0e-5, "f": 1e-3}
        found = above_noise(measured)
        assert found["f"] == pytest.approx(1e-3 - 7e-5)
        assert found["e"] == pytest.approx(2e-5)
        assert found["c"] == found["a"] == pytest.approx(7e-7)
        assert above_noise({}) == {}


class TestLoaded:
    def test_keeps_the_layers_that_matter(self, trained):
        file = ModelFile(trained.path)
        layers = dict.fromkeys(monitored_layers(trained.patcher.model.diffusion_model), 1e-6)
        layers |= {"out.2": 1.0, "time_embed.0": 1.0}
        keep_effects(fingerprint(file), "scaled", Effects(layers, "", whole=True))
        plan = load(trained, keep_mb=0.004, also_keep="last").get_attachment(ATTACHMENT)
        assert plan.layers["out.2"].reason is Reason.KEPT_BY_NAME
        assert plan.layers["time_embed.0"].reason is Reason.KEPT_EFFECT
        assert chosen(trained, keep_mb=1).about.startswith("by measured effect; ")

    def test_spends_no_more_than_its_budget(self, trained):
        least = bytes_of(load(trained, keep_mb=0, also_keep=""))
        for megabytes in (0.01, 0.1, 0.5):
            found = load(trained, keep_mb=megabytes, also_keep="")
            added = bytes_of(found) - least
            assert 0.9 * megabytes * 2**20 < added <= megabytes * 2**20

    def test_fits_what_it_shall_fit(self, trained):
        least = bytes_of(load(trained, keep_mb=0, also_keep=""))
        found = bytes_of(load(trained, fit_gb=1.2 * least / 2**30))
        assert 1.15 * least < found <= 1.2 * least
        with pytest.raises(ValueError, match=r"does not fit into 0\.001 GiB: with every layer"):
            chosen(trained, fit_gb=0.001)

    def test_fits_this_card(self, trained, monkeypatch):
        """ComfyUI's option --reserve-vram makes it a small one here."""
        total = memory.get_total_memory(memory.get_torch_device())
        card = Card.of(needed_beside(ModelFile(trained.path)))
        assert card.total == total
        assert int(memory.minimum_inference_memory()) <= card.beside < total
        least = bytes_of(load(trained, keep_mb=0))
        room = total - OTHERS_BYTES - card.beside
        reserved = memory.EXTRA_RESERVED_VRAM
        monkeypatch.setattr(memory, "EXTRA_RESERVED_VRAM", reserved + room - 1.05 * 1.2 * least)
        found = chosen(trained, selection=TO_FIT)
        assert f"; this card's {total / 2**30:.1f} GiB have room for 0.0" in found.about
        patcher = load_checkpoint(trained.path, found.decider, only_model=True)[0]
        assert 1.15 * least < bytes_of(patcher) <= 1.2 * least
        monkeypatch.setattr(memory, "EXTRA_RESERVED_VRAM", total)
        found = chosen(trained, selection=TO_FIT)
        assert "0.00, the model needs 0.00: some layers are streamed" in found.about
        again = load_checkpoint(trained.path, found.decider, only_model=True)[0]
        assert bytes_of(again) == least

    def test_a_large_card_has_room_for_16_bit(self, trained):
        found = chosen(trained, selection=TO_FIT)
        patcher = load_checkpoint(trained.path, found.decider, only_model=True)[0]
        assert not patcher.get_attachment(ATTACHMENT).quantized

    def test_without_measured_effects_by_what_sketches_say(self, trained):
        wanted = chosen(trained, keep_mb=0.05)
        assert wanted.about.startswith("by estimated effect; ")
        plan = load_checkpoint(trained.path, wanted.decider)[0].get_attachment(ATTACHMENT)
        assert Reason.KEPT_EFFECT in {layer.reason for layer in plan.layers.values()}
        unknown = {name for name in plan.quantized if plan.layers[name].output_error is None}
        assert len(unknown) < 0.1 * len(plan.quantized), unknown

    @pytest.mark.parametrize("measured", [True, False])
    def test_without_statistics_none_is_kept_for_its_effect(self, trained, folder, measured):
        if measured:
            layers = dict.fromkeys(monitored_layers(trained.patcher.model.diffusion_model), 1.0)
            keep_effects(fingerprint(trained.path), "scaled", Effects(layers, "", whole=True))
        for without, about in (
            (choice.QUANTIZE_UNIFORMLY, "without statistics (0 of 32 images recorded)"),
            (choice.KEEP_16_BIT, "16 bit for now: 0 of 32 images recorded"),
        ):
            wanted = chosen(trained, without, selection=TO_FIT)
            assert wanted.about.startswith(about)
            if wanted.decider is not None:
                patcher = load_checkpoint(trained.path, wanted.decider, only_model=True)[0]
                assert patcher.get_attachment(ATTACHMENT).kept == ["input_blocks.0.0", "out.2"]

    def test_is_what_is_exported(self, trained, tmp_path):
        settings = ExportSettings(
            "scaled, convs too", choice.AUTO, 0.0, choice.FAIL, compensated=True,
            selection=BY_EFFECT, keep_mb=0.1,
        )  # fmt: skip
        exported = export(trained.path, tmp_path / "exported.safetensors", settings)
        assert exported.about.startswith("by estimated effect; ")
        read = load_checkpoint(str(tmp_path / "exported.safetensors"), None, only_model=True)[0]
        assert not same(held(read), held(load(trained, keep_mb=0.1, also_keep="")))

    @pytest.mark.parametrize(
        "wrong",
        [
            {"keep_mb": -1}, {"keep_mb": 1e308}, {"fit_gb": float("nan")}, {"fit_gb": 10**400},
            {"selection": 1}, {"also_keep": ["first"]},
        ],
    )  # fmt: skip
    def test_refuses_what_makes_no_sense(self, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Keeping(**wrong)
