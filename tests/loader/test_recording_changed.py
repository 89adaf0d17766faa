"""What a sampling has that is not the model's own is never recorded as the model's."""

from __future__ import annotations

import pytest
import torch
from harness.changes import (
    CHANGED,
    COMPILED,
    another_as_lora,
    cases,
    changed,
    compiled_in_place,
)
from harness.fixtures import ENOUGH_STEPS
from harness.inprocess import conditioning, load_16_bit, sample
from harness.recording import hooks, recorded
from hswq.calibration import monitored_layers
from hswq.loader import store
from hswq.loader.engine import loading
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.jobs.choice import choose as choose_statistics
from hswq.loader.jobs.export import export
from hswq.loader.jobs.export_settings import ExportSettings
from hswq.loader.recording.status import NOT_RECORDED
from hswq.loader.store import milestones
from hswq.quant import QuantizeSettings, SearchSettings
from toy.checkpoint import make_checkpoint

SETTINGS = QuantizeSettings(search=SearchSettings(256, 20, 1))


@pytest.fixture(autouse=True)
def every_layer(recorder, choose):
    """In every forward."""
    choose(Budget=100)


@pytest.fixture
def not_compiled():
    """Run what is to be compiled as it is, which takes no time."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def names(checkpoint) -> list[str]:
    """The model's own layers."""
    return list(monitored_layers(load_16_bit(checkpoint).model.diffusion_model))


def why_not(recorder, patcher, *prompt) -> str:
    """Sample with a model that is not to be recorded, nor hooked; return the reason."""
    during = []
    sample(patcher, *prompt, callback=lambda *_: during.append(hooks(patcher)))
    assert during == [0]
    status = recorder.status()[-1]
    assert status.state == NOT_RECORDED
    return status.reason


class TestCompiled:
    @pytest.mark.parametrize("how", cases(COMPILED))
    def test_by_a_node(self, model, checkpoint, recorder, names, not_compiled, how):
        compiled = changed(model, COMPILED[how])
        assert why_not(recorder, compiled) == "it is compiled"
        assert recorded(checkpoint) is None
        sample(model)  # the network is still the compiled one when this begins
        assert list(recorded(checkpoint)) == names

    @pytest.mark.parametrize(
        "how", ["module", "forward", pytest.param("in its place", marks=pytest.mark.legacy)]
    )
    def test_past_comfyui(self, model, checkpoint, recorder, names, not_compiled, how):
        with compiled_in_place(model, how):
            assert why_not(recorder, model) == "it is compiled"
        assert recorded(checkpoint) is None
        sample(model)
        assert list(recorded(checkpoint)) == names

    def test_not_what_must_not_be_compiled(self, model, checkpoint, recorder, names):
        clone = model.clone()
        name = "diffusion_model.middle_block.1.forward"
        forward = clone.get_model_object(name)
        clone.add_object_patch(name, torch.compiler.disable(forward))
        sample(clone)
        assert list(recorded(checkpoint)) == names


class TestChanged:
    @pytest.mark.parametrize("how", cases(CHANGED))
    def test_by_a_node(self, model, checkpoint, recorder, names, how):
        clone = changed(model, CHANGED[how])
        assert why_not(recorder, clone) == "its network is changed by a node"
        assert recorded(checkpoint) is None
        sample(model)  # the clone's layers are still in the network when this begins
        found = recorded(checkpoint)
        assert list(found) == names
        assert {layer.calls for layer in found.values()} == {1}

    @pytest.mark.parametrize("how", cases(CHANGED))
    def test_when_first_seen(self, checkpoint, recorder, names, how):
        model = load_16_bit(checkpoint)
        assert "changed" in why_not(recorder, changed(model, CHANGED[how]))
        sample(model)
        assert list(recorded(checkpoint)) == names

    def test_for_good(self, checkpoint, recorder):
        """A part that was put in past ComfyUI."""
        model = load_16_bit(checkpoint)
        model.model.diffusion_model.out.append(torch.nn.Sequential())
        model.model.diffusion_model.out[3].added = type(model.model.diffusion_model.out[2])(1, 1, 1)
        model.model.diffusion_model.out[3].forward = lambda values: values
        assert "changed" in why_not(recorder, model)

    def test_by_another_model_in_the_conditioning(
        self, model, checkpoint, recorder, tmp_path, legacy
    ):
        other = load_16_bit(make_checkpoint(tmp_path / "other.safetensors", seed=1))
        prompt = another_as_lora(conditioning(1), other)
        assert why_not(recorder, model, prompt) == "its conditioning brings in another model"
        sample(model)
        assert recorded(checkpoint).samples == 1


class TestPoisonedFile:
    """Statistics that hold layers which a node had put into the network."""

    @pytest.fixture
    def poisoned(self, model, checkpoint):
        sample(model, batch=32, steps=ENOUGH_STEPS)
        found = recorded(checkpoint)
        foreign = {f"_orig_mod.{name}": layer for name, layer in list(found.items())[:76]}
        delta = type(found)(foreign, {"samples": 0, "total_steps": 0})
        of = fingerprint(str(checkpoint))
        total = store.add_statistics(store.NewSums(delta, of, "recorded", "toy"))
        milestones.forget(of)  # a file of before there were any
        return total

    def test_heals_when_the_model_is_recorded_again(self, model, checkpoint, poisoned, names):
        assert len(poisoned) == len(names) + 76
        sample(model)
        assert list(recorded(checkpoint)) == names
        assert recorded(checkpoint).samples == 33

    def test_loads_and_exports(self, model, checkpoint, poisoned, names, tmp_path, caplog):
        choice = choose_statistics(
            "auto", fingerprint(str(checkpoint)), "toy", SETTINGS, "fail", keep=False
        )
        loaded = loading.load_checkpoint(str(checkpoint), choice.decider, only_model=True)[0]
        assert list(loaded.get_attachment(ATTACHMENT).layers) == names
        assert caplog.text.count("76 layers that it does not have") == 1
        target = tmp_path / "exported.safetensors"
        exported = export(str(checkpoint), target, ExportSettings("scaled", "auto", 0.25, "fail"))
        assert set(exported.plan.layers) == set(names)
