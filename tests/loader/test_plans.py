"""Plans are made once for a model, its statistics and settings."""

from __future__ import annotations

import dataclasses
import hashlib
import re

import pytest
from bench import common
from harness.exports import decisions, weights_of
from harness.inprocess import held, same
from hswq.calibration import Statistics
from hswq.loader import store
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.loading import load_checkpoint, load_diffusion_model
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.host.folders import FOLDER, register_folder
from hswq.loader.jobs import choice
from hswq.loader.store import search_cache
from hswq.quant import (
    FP8_PLAIN,
    BySensitivity,
    Findings,
    KnownPlan,
    Planner,
    QuantizeSettings,
    SearchSettings,
    make_plan,
)
from toy.checkpoint import make_diffusion_model

SETTINGS = QuantizeSettings()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty statistics folder."""
    import folder_paths

    paths = dict(folder_paths.folder_names_and_paths)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", paths)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    paths.pop(FOLDER, None)
    register_folder()
    return tmp_path / FOLDER


def record(statistics: Statistics, of: str, samples: int) -> None:
    """Add to what was recorded of a file."""
    delta = Statistics(statistics, {"samples": samples, "total_steps": 1})
    store.add_statistics(store.NewSums(delta, of, store.PASSIVE_SESSION, "toy.safetensors"))


def chosen(of: str, settings: QuantizeSettings = SETTINGS, without=choice.FAIL) -> choice.Choice:
    return choice.choose(choice.AUTO, of, "toy.safetensors", settings, without)


class TestKeptPlan:
    def test_is_found_again_and_loads_the_same(self, checkpoint, statistics, models):
        of = fingerprint(str(checkpoint))
        record(statistics, of, 40)
        first = chosen(of)
        assert isinstance(first.decider, Planner)
        model = load_checkpoint(str(checkpoint), first.decider, only_model=True)[0]
        first.keep(model.get_attachment(ATTACHMENT))
        second = chosen(of)
        assert second.decider == KnownPlan(model.get_attachment(ATTACHMENT))
        again = load_checkpoint(str(checkpoint), second.decider, only_model=True)[0]
        assert not same(held(again), held(model))

    def test_stays_until_the_next_milestone(self, checkpoint, statistics, models):
        of = fingerprint(str(checkpoint))
        record(statistics, of, 40)
        first = chosen(of)
        first.keep(models.quantized.get_attachment(ATTACHMENT))
        record(statistics, of, 20)
        assert isinstance(chosen(of).decider, KnownPlan)
        assert chosen(of).samples == 40, "the plan's own samples, not the file's"
        record(statistics, of, 10)
        assert isinstance(chosen(of).decider, Planner)
        assert chosen(of).samples == 70

    def test_is_not_used_for_the_other_mode(self, checkpoint, statistics, models):
        of = fingerprint(str(checkpoint))
        record(statistics, of, 40)
        chosen(of).keep(models.quantized.get_attachment(ATTACHMENT))
        other = chosen(of, dataclasses.replace(SETTINGS, number_format=FP8_PLAIN)).decider
        assert all(other.searches(name) for name in statistics if other.quantizes(name))

    def test_serves_every_keep_ratio(self, checkpoint, statistics, models):
        """A higher one needs no search, a lower one that of the layers kept before."""
        of = fingerprint(str(checkpoint))
        record(statistics, of, 40)
        rough = dataclasses.replace(SETTINGS, search=SearchSettings(256, 20, 1))
        first = chosen(of, rough)
        model = load_checkpoint(str(checkpoint), first.decider, only_model=True)[0]
        plan = model.get_attachment(ATTACHMENT)
        first.keep(plan)
        higher = chosen(of, dataclasses.replace(rough, selection=BySensitivity(0.5))).decider
        assert isinstance(higher, KnownPlan)
        higher = higher.plan
        assert set(higher.quantized) < set(plan.quantized)
        assert all(higher.layers[name] == plan.layers[name] for name in higher.quantized)
        everything = dataclasses.replace(rough, selection=BySensitivity(0.0))
        lower = chosen(of, everything)
        assert {name for name in statistics if lower.decider.searches(name)} == set(plan.kept)
        model = load_checkpoint(str(checkpoint), lower.decider, only_model=True)[0]
        lower.keep(model.get_attachment(ATTACHMENT))
        fresh = make_plan(weights_of(checkpoint), statistics, 0.0, True, rough.search)
        assert chosen(of, everything).decider.plan == model.get_attachment(ATTACHMENT)
        assert decisions(fresh) == decisions(model.get_attachment(ATTACHMENT))

    def test_that_is_damaged_is_made_again(self, checkpoint, statistics, models, folder):
        of = fingerprint(str(checkpoint))
        record(statistics, of, 40)
        chosen(of).keep(models.quantized.get_attachment(ATTACHMENT))
        (path,) = (folder / "plans").glob("*.json")
        path.write_text(path.read_text()[:1000])
        assert isinstance(chosen(of).decider, Planner)

    @pytest.mark.parametrize(
        "edit",
        [
            lambda text: text.replace('"amax": 0', '"amax": 1', 1),
            lambda text: signed(re.sub(r'"amax": [0-9]', '"amax": -1', text, count=1)),
            lambda text: signed(re.sub(r'"amax": [0-9.e-]+', '"amax": Infinity', text, count=1)),
            lambda text: signed(re.sub(r'"amax": [0-9.e-]+', '"amax": 1e999', text, count=1)),
            lambda text: signed(text.replace('"samples": 256', '"samples": 1e999')),
            lambda text: signed(text.replace('"samples": 256', '"samples": ' + "9" * 10_000)),
            lambda text: signed("[" * 200_000),
            lambda text: "[" * 200_000,
        ],
        ids=["edited", "negative", "infinite", "beyond", "samples", "digits", "nested", "noise"],
    )
    def test_that_is_forged_is_made_again(self, models, folder, edit):
        plan = models.quantized.get_attachment(ATTACHMENT)
        key = "0" * 40
        search_cache.keep_findings(key, plan, 256)
        (path,) = (folder / "plans").glob("*.json")
        before = path.read_text()
        path.write_text(edit(before))
        assert path.read_text() != before
        assert search_cache.find_findings(key) is None
        search_cache.keep_findings(key, plan, 256)
        assert search_cache.find_findings(key) == Findings.of(plan, 256)

    def test_those_used_longest_ago_are_forgotten(self, models, folder):
        plan = models.quantized.get_attachment(ATTACHMENT)
        for number in range(70):
            search_cache.keep_findings(f"{number:040d}", plan, 32)
        assert len(list((folder / "plans").glob("*.json"))) == 64
        assert search_cache.find_findings(f"{69:040d}") == Findings.of(plan, 32)

    def test_of_a_model_in_use_stays(self, checkpoint, statistics, models, folder):
        of = fingerprint(str(checkpoint))
        record(statistics, of, 40)
        plan = models.quantized.get_attachment(ATTACHMENT)
        chosen(of).keep(plan)
        for number in range(70):
            search_cache.keep_findings(f"{number:040d}", plan, 32)
            again = chosen(of)
            assert isinstance(again.decider, KnownPlan)
            again.keep(again.decider.plan)


def signed(text: str) -> str:
    """Return a kept file with another text after its first line, under the right checksum."""
    text = text.partition("\n")[2] or text
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


class TestDiffusionModelAlone:
    def test_has_the_checkpoints_fingerprint_and_weights(self, checkpoint, models, tmp_path):
        alone = str(make_diffusion_model(tmp_path / "unet.safetensors"))
        assert fingerprint(alone) == fingerprint(str(checkpoint))
        plan = models.quantized.get_attachment(ATTACHMENT)
        assert not same(held(load_diffusion_model(alone, plan)), held(models.quantized))

    def test_can_be_loaded_again(self, statistics, models, tmp_path):
        alone = str(make_diffusion_model(tmp_path / "unet.safetensors"))
        model = load_diffusion_model(alone, common.planner(statistics))
        load, arguments = model.cached_patcher_init
        assert not same(held(load(*arguments, disable_dynamic=True)), held(model))
