"""What the panel says that a Plan would do is what the loader then does."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import comfy.model_management as memory
import comfy.utils
import pytest
from harness.exports import SAMPLES, wanted
from harness.inprocess import held
from harness.server import snapshot
from hswq.calibration import Statistics
from hswq.loader import store
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.files.layer_formats import FILE_FORMATS
from hswq.loader.files.model_file import ModelFile
from hswq.loader.files.whole_hash import background
from hswq.loader.host.folders import FOLDER
from hswq.loader.jobs import choice, model_files
from hswq.loader.jobs.also_keep import ENDS
from hswq.loader.jobs.export import export, planned
from hswq.loader.jobs.export_settings import ExportSettings
from hswq.loader.jobs.keeping import BY_EFFECT, TO_FIT, Keeping, choose_keeping
from hswq.loader.jobs.model_files import shapes_of
from hswq.loader.jobs.search import search_all
from hswq.loader.panel.catalogue import Catalogue, Model
from hswq.loader.panel.curves import curves
from hswq.loader.panel.preview import preview, rows
from hswq.loader.store import heads, locked_file, milestones
from hswq.loader.store.effects import Effects, find_effects, keep_effects
from hswq.quant import (
    FP8_SCALED,
    NUMBER_FORMATS,
    BySensitivity,
    QuantizeSettings,
    SearchSettings,
    expected_error,
    fp8_format,
)
from safetensors.torch import load_file, save_file

ROUGH = SearchSettings(bins=256, candidates=20, refinements=1)
RATIOS = (0.0, 0.1, 0.25, 0.5, 1.0)


@pytest.fixture
def path(folders: Path, checkpoint: Path, statistics: Statistics) -> str:
    """The toy, of which all layers but one were recorded."""
    link = folders / "output" / "checkpoints" / "toy.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(checkpoint)
    measured = dict(list(statistics.items())[:-1])
    delta = Statistics(measured, {"samples": SAMPLES, "total_steps": 1})
    store.add_statistics(
        store.NewSums(delta, fingerprint(str(link)), store.PASSIVE_SESSION, "toy.safetensors")
    )
    return str(link)


def test_looking_changes_nothing_on_disk(path, folders):
    """As of statistics that were copied here, by which no model was loaded yet."""
    kept = folders / "models" / FOLDER
    background.join()
    for one in (*kept.glob("*.milestone*"), *kept.glob("weights.cache*")):
        one.unlink()
    Catalogue(list).status()  # keeps what files hold
    before = snapshot(folders)
    settings = QuantizeSettings(FP8_SCALED, BySensitivity(0.25), compensated=True)
    preview(model(), settings)
    curves(model())
    planned(path, wanted(compensated=True))
    background.join()
    assert snapshot(folders) == before
    assert not list(kept.glob("weights.cache"))


def test_looks_at_importances_once(path, statistics, monkeypatch):
    looked, look = [], sys.modules["hswq.loader.panel.preview"]._without_importance
    count = lambda one: (looked.append(one), look(one))[1]  # noqa: E731
    monkeypatch.setattr("hswq.loader.panel.preview._without_importance", count)
    for ratio in RATIOS:
        told = preview(model(), settings_of(True, ratio))
    assert len(looked) == len(statistics) - 1
    delta = Statistics(dict(statistics), {"samples": 8 * SAMPLES, "total_steps": 1})
    store.add_statistics(
        store.NewSums(delta, fingerprint(path), store.PASSIVE_SESSION, "toy.safetensors")
    )
    assert len(preview(model(), settings_of(True, 0.5))["layers"]) == len(told["layers"])
    assert len(looked) == 2 * len(statistics) - 1


def test_after_a_restart_neither_importances_nor_weights_are_read(path, monkeypatch):
    """They are most of what a first look would read."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it is read")

    load(path, settings_of(True, 0.25))
    told = curves(model())
    for cache in (locked_file._cache, heads._known, heads._files, milestones._known):
        cache.clear()
    model_files._shapes.cache_clear()
    monkeypatch.setattr(locked_file, "load_statistics", refuse)
    monkeypatch.setattr(comfy.utils, "load_torch_file", refuse)
    assert curves(model()) == told


def model() -> Model:
    """Return the only model."""
    (found,) = Catalogue(list).models()
    return found


def load(path: str, settings: QuantizeSettings):
    chosen = choice.choose(choice.AUTO, fingerprint(path), "toy", settings, choice.FAIL)
    patcher = load_checkpoint(path, chosen.decider, only_model=True)[0]
    chosen.keep(patcher.get_attachment(ATTACHMENT))
    return patcher


def bytes_of(patcher) -> int:
    return sum(part.nbytes for parts in held(patcher).values() for part in parts)


def settings_of(scaled: bool, ratio: float) -> QuantizeSettings:
    return QuantizeSettings(fp8_format(scaled), BySensitivity(ratio), ROUGH)


@pytest.mark.parametrize("scaled", [True, False])
class TestPreview:
    def test_is_the_plan_that_the_loader_attaches(self, path, statistics, scaled):
        before = {ratio: preview(model(), settings_of(scaled, ratio)) for ratio in RATIOS}
        for ratio in sorted(RATIOS, reverse=True):
            patcher = load(path, settings_of(scaled, ratio))
            plan = patcher.get_attachment(ATTACHMENT)
            after = preview(model(), settings_of(scaled, ratio))
            for found in (before[ratio], after):
                assert list(found["layers"]) == list(plan.layers)
                kept = [name for name, layer in found["layers"].items() if layer["kept"]]
                assert kept == plan.kept
                assert (found["kept"], found["quantized"]) == (len(kept), len(plan.quantized))
                reasons = {name: layer["reason"] for name, layer in found["layers"].items()}
                assert reasons == {name: layer.reason.value for name, layer in plan.layers.items()}
                assert found["bytes_after"] == bytes_of(patcher)
            assert after["searched"] == len(plan.quantized)
            for name in plan.quantized:
                layer = after["layers"][name]
                assert layer["amax"] == plan.layers[name].amax
                assert layer["relative_error"] == plan.layers[name].relative_error

    def test_of_16_bit_is_what_stock_holds(self, path, models, scaled):
        assert preview(model(), settings_of(scaled, 0.25))["bytes_before"] == bytes_of(
            models.sixteen_bit
        )

    def test_error_is_known_when_all_layers_are_searched(self, path, scaled):
        plan = load(path, settings_of(scaled, 0.25)).get_attachment(ATTACHMENT)
        assert preview(model(), settings_of(scaled, 0.2))["expected_error"] is None
        found = preview(model(), settings_of(scaled, 0.25))
        sizes = {row["layer"]: row["parameters"] for row in rows(model())}
        pairs = [(layer.relative_error or 0.0, sizes[name]) for name, layer in plan.layers.items()]
        assert found["expected_error"] == pytest.approx(expected_error(pairs))
        fewer = preview(model(), settings_of(scaled, 0.5))["expected_error"]
        assert 0 == preview(model(), settings_of(scaled, 1))["expected_error"] < fewer
        assert fewer < found["expected_error"]

    @pytest.mark.parametrize("ratio", [math.nan, 1.1, -0.1])
    def test_a_keep_ratio_out_of_range_is_refused(self, path, scaled, ratio):
        with pytest.raises(ValueError, match="keep_ratio must be"):
            preview(model(), settings_of(scaled, ratio))


class TestOtherFiles:
    def test_without_the_file_there_are_no_sizes(self, path):
        load(path, settings_of(True, 0.25))
        Path(path).unlink()
        found = preview(model(), settings_of(True, 0.25))
        assert (found["bytes_before"], found["bytes_after"], found["expected_error"]) == (None,) * 3
        assert found["searched"] == found["quantized"] > 0
        (row, *_) = rows(model())
        assert (row["shape"], row["kind"], row["parameters"]) == (None, None, None)
        assert row["sensitivity"] > 0

    def test_a_file_that_names_its_layers_otherwise_has_no_sizes(self, path):
        """As in diffusers' layout: rows are the measured layers all the same."""
        measured = load_file(path)
        Path(path).unlink()
        save_file({f"other.{name}": value for name, value in measured.items()}, path)
        found = dataclasses.replace(model(), source="checkpoints/toy.safetensors")
        assert len(rows(found)) == 263
        assert preview(found, settings_of(True, 0.25))["bytes_after"] is None

    def test_rows_are_the_models_layers(self, path, statistics, models):
        found = rows(model())
        assert [row["layer"] for row in found] == list(statistics)
        network = models.sixteen_bit.model.diffusion_model
        for row in found:
            layer = network.get_submodule(row["layer"])
            assert tuple(row["shape"]) == tuple(layer.weight.shape)
            assert row["kind"] == type(layer).__name__
        assert [row["calls"] > 0 for row in found] == [True] * (len(found) - 1) + [False]


class TestSearchAll:
    def test_makes_every_ratio_known_and_searches_what_is_missing(self, path):
        most = QuantizeSettings(selection=BySensitivity(0.9))
        load(path, most)
        missing = 263 - preview(model(), most)["quantized"]
        text = search_all(path, choice.AUTO, FP8_SCALED)
        assert text.startswith(
            f"{missing} layers searched of 263 that can be FP8; {SAMPLES} images"
        )
        for ratio in RATIOS:
            found = preview(model(), QuantizeSettings(selection=BySensitivity(ratio)))
            assert found["searched"] == found["quantized"]
            assert (found["expected_error"] > 0) == (ratio < 1)
        again = search_all(path, choice.AUTO, FP8_SCALED)
        assert again.startswith("all layers of toy.safetensors were searched before")


class TestCurves:
    def test_have_a_line_for_each_format_whose_points_are_previews(self, path):
        search_all(path, choice.AUTO, FP8_SCALED)
        lines = curves(model())["lines"]
        assert [line["mode"] for line in lines] == list(NUMBER_FORMATS)
        for line in lines:
            assert line["formats"]
            assert len(line["points"]) == 101
            for point in line["points"][::50]:
                ends = shapes_of("checkpoints/toy.safetensors").ends
                selection = BySensitivity(point["inputs"]["keep_ratio"], ends)
                number_format = NUMBER_FORMATS[line["inputs"]["mode"]]
                settings = QuantizeSettings(number_format, selection, compensated=True)
                told = preview(model(), settings)
                assert {**told["outcome"], "kept": told["kept"]} == {
                    key: point[key] for key in (*told["outcome"], "kept")
                }

    def test_rank_the_layers_once_for_all_points(self, path, monkeypatch):
        ranked, rank = [], BySensitivity.ranked
        monkeypatch.setattr(BySensitivity, "ranked", lambda *its: (ranked.append(1), rank(*its))[1])
        lines = curves(model())["lines"]
        assert 0 < len(ranked) <= 2 * len(lines)  # once to plan without keeping any


class TestByEffect:
    @pytest.fixture
    def line(self, path) -> dict:
        """The line of the one format whose effects are measured; deeper layers have more effect."""
        layers = {name: 1.0 + place for place, name in enumerate(model().statistics)}
        keep_effects(fingerprint(path), "scaled", Effects(layers, "", whole=True))
        (found,) = (line for line in curves(model())["lines"] if line["selection"] == "effect")
        return found

    def test_is_offered_where_effects_are_measured(self, path, line):
        assert line["mode"] == "scaled"
        before = model().to_json()["effects"]
        assert list(before) == ["scaled"]
        effects = find_effects(fingerprint(path), "scaled")
        keep_effects(fingerprint(path), "scaled", effects)  # measured again: the panel asks anew
        assert model().to_json()["effects"] != before
        first, *others = line["points"]
        assert (first["kept"], others[-1]["kept"]) == (2, 264)  # the ends, everything
        for point in others[:-1]:
            assert 0 <= point["after"] - first["after"] <= point["inputs"]["keep_mb"] * 2**20

    def test_each_point_is_what_loader_and_export_make_of_its_inputs(self, path, line, tmp_path):
        for point in line["points"][30:90:30]:
            inputs = point["inputs"]
            assert inputs["selection"] == BY_EFFECT
            keeping = Keeping(**inputs)
            chosen = choose_keeping(
                choice.AUTO, ModelFile(path), QuantizeSettings(FP8_SCALED), keeping, choice.FAIL
            )
            patcher = load_checkpoint(path, chosen.decider, only_model=True)[0]
            assert point["after"] == bytes_of(patcher)
            settings = wanted("scaled, convs too", also_keep=ENDS, **inputs)
            told = planned(path, settings)
            assert (told.outcome.after, told.kept) == (point["after"], point["kept"])
            target = tmp_path / f"{point['kept']}.safetensors"
            assert export(path, target, settings).kept == told.kept
            assert told.size == target.stat().st_size

    def test_tells_what_the_loader_fits_to_this_card(self, path, line, monkeypatch):
        """ComfyUI's option --reserve-vram makes the card small here."""
        least, most = line["points"][0]["after"], line["points"][-1]["after"]
        wanted = (least + most) // 2
        more = int(1.05 * (curves(model())["fits"] - wanted))
        monkeypatch.setattr(memory, "EXTRA_RESERVED_VRAM", memory.EXTRA_RESERVED_VRAM + more)
        # Where the option asks for less than ComfyUI always leaves, it changes nothing.
        more = int(1.05 * (curves(model())["fits"] - wanted))
        monkeypatch.setattr(memory, "EXTRA_RESERVED_VRAM", memory.EXTRA_RESERVED_VRAM + more)
        fits = curves(model())["fits"]
        assert abs(fits - wanted) < 9
        keeping, settings = Keeping(selection=TO_FIT), QuantizeSettings(FP8_SCALED)
        chosen = choose_keeping(choice.AUTO, ModelFile(path), settings, keeping, choice.FAIL)
        patcher = load_checkpoint(path, chosen.decider, only_model=True)[0]
        assert 0.99 * fits < bytes_of(patcher) <= fits

    def test_sums_even_the_largest_effects(self, path, line):
        layers = dict.fromkeys(model().statistics, sys.float_info.max)
        keep_effects(fingerprint(path), "scaled", Effects(layers, "", whole=True))
        assert {line["selection"] for line in curves(model())["lines"]} == {"sensitivity"}

    def test_leaves_less_effect_than_by_sensitivity_at_the_same_bytes(self, line):
        other = curves(model())["lines"][0]
        for point in line["points"][10:90:20]:
            larger = [one for one in other["points"] if one["after"] <= point["after"]]
            assert point["effect"] < larger[-1]["effect"]


class TestExport:
    @pytest.mark.parametrize("form", FILE_FORMATS)
    def test_tells_the_file_to_the_byte_before_it_is_written(self, path, tmp_path, form):
        settings = ExportSettings(form, choice.AUTO, 0.25, choice.FAIL, also_keep=ENDS)
        told = planned(path, settings)
        target = tmp_path / "written.safetensors"
        written = export(path, target, settings)
        assert told.size == target.stat().st_size
        assert (told.quantized, told.kept) == (written.quantized, written.kept)
        assert told.outcome.after == written.outcome.after
        assert planned(path, settings).outcome == written.outcome

    def test_refuses_to_tell_what_only_a_search_could(self, path):
        """The panel does not ask for it, but its route takes any request."""
        settings = wanted(selection=BY_EFFECT, also_keep=ENDS)
        with pytest.raises(ValueError, match="no effects of this model's layers are measured"):
            planned(path, settings)
