"""Between milestones a model is quantized alike, by the statistics alone, whatever was cached."""

from __future__ import annotations

import shutil
from pathlib import Path

import folder_paths
import pytest
from bench import common
from harness.exports import decisions
from harness.inprocess import held, load_16_bit, same
from hswq.calibration import Statistics
from hswq.loader import store
from hswq.loader.engine.adopt import ATTACHMENT
from hswq.loader.engine.converter import convert
from hswq.loader.engine.loading import load_checkpoint
from hswq.loader.files.fingerprints import fingerprint
from hswq.loader.host.folders import FOLDER
from hswq.loader.jobs import choice
from hswq.loader.panel.catalogue import Catalogue
from hswq.loader.panel.preview import preview
from hswq.quant import Plan, QuantizeSettings, SearchSettings

SETTINGS = QuantizeSettings(search=SearchSettings(256, 20, 1))
OTHER_SESSION = "by-hand"


@pytest.fixture(scope="module")
def others(checkpoint: Path) -> Statistics:
    """What other pictures would show: sums that rank the layers otherwise."""
    return common.made_up_statistics(load_16_bit(checkpoint), seed=1)


@pytest.fixture
def of(checkpoint: Path, choose) -> str:
    """The toy's fingerprint; nothing was recorded of it."""
    return fingerprint(str(checkpoint))


def record(sums: Statistics, of: str, samples: int, session: str = store.PASSIVE_SESSION) -> None:
    delta = Statistics(sums, {"samples": samples, "total_steps": 1})
    store.add_statistics(store.NewSums(delta, of, session, "toy.safetensors"))


def chosen(of: str, **how) -> choice.Choice:
    return choice.choose(choice.AUTO, of, "toy.safetensors", SETTINGS, choice.FAIL, **how)


def loaded(checkpoint: Path, of: str) -> Plan:
    """Load as the node does."""
    its = chosen(of)
    model = load_checkpoint(str(checkpoint), its.decider, only_model=True)[0]
    its.keep(model.get_attachment(ATTACHMENT))
    return model.get_attachment(ATTACHMENT)


def files(folder: Path) -> list[Path]:
    return list(folder.glob("*.milestone"))


class TestSamePicture:
    def test_after_the_plans_are_gone(self, checkpoint, statistics, others, of, folder):
        record(statistics, of, 40)
        before = loaded(checkpoint, of)
        record(others, of, 20)
        shutil.rmtree(folder / "plans")
        assert decisions(loaded(checkpoint, of)) == decisions(before)

    def test_though_nothing_was_loaded_at_the_milestone(self, checkpoint, statistics, others, of):
        record(statistics, of, 40)
        before = store.statistics_of(of)
        record(others, of, 20)
        assert chosen(of).samples == 40
        loaded_now = loaded(checkpoint, of)
        sensitivities = {name: layer.sensitivity for name, layer in loaded_now.layers.items()}
        assert sensitivities == {name: layer.sensitivity for name, layer in before.items()}

    def test_by_the_converter_after_more_images(self, models, statistics, others, of):
        record(statistics, of, 40)
        before = convert(models.sixteen_bit, chosen(of, keep=False).decider)
        record(others, of, 1)
        after = convert(models.sixteen_bit, chosen(of, keep=False).decider)
        assert not same(held(after), held(before))

    def test_of_which_the_panel_tells(self, checkpoint, statistics, others, of):
        record(statistics, of, 40)
        record(others, of, 20)
        (model,) = Catalogue(lambda: []).models()
        plan = loaded(checkpoint, of)
        told = preview(model, SETTINGS)["layers"]
        assert {name for name in told if told[name]["kept"]} == set(plan.kept)
        assert preview(model, SETTINGS)["searched"] == len(plan.quantized)

    def test_with_another_session_or_a_merged_one(self, statistics, others, of):
        record(statistics, of, 40)
        before = choice.statistics_state(choice.AUTO, of)
        record(others, of, 20, OTHER_SESSION)
        assert choice.statistics_state(choice.AUTO, of) == before
        meta = {"samples": 1, "fingerprint": of, "model": "toy.safetensors", store.MERGED: "a b"}
        store.replace_merged(Statistics(others, meta), "merged")
        assert choice.statistics_state(choice.AUTO, of) == before

    def test_after_a_restart_of_what_was_recorded_without_one(self, statistics, others, of, folder):
        """As by an older version: the first use keeps it."""
        record(statistics, of, 40)
        files(folder)[0].unlink()
        before = choice.statistics_state(choice.AUTO, of)
        record(others, of, 1)
        assert choice.statistics_state(choice.AUTO, of) == before


class TestAnotherPicture:
    @pytest.fixture
    def before(self, statistics, others, of) -> tuple:
        record(statistics, of, 40)
        record(others, of, 10, OTHER_SESSION)
        return choice.statistics_state(choice.AUTO, of)

    def test_at_the_next_milestone(self, statistics, of, before):
        record(statistics, of, 14)
        assert choice.statistics_state(choice.AUTO, of) != before
        assert chosen(of).samples == 64

    def test_at_a_target_of_less(self, of, before, choose):
        choose(Target=45)
        assert choice.statistics_state(choice.AUTO, of) != before
        assert chosen(of).samples == 50

    def test_of_what_was_begun_anew(self, others, of, before):
        store.remove_statistics(of)
        assert choice.statistics_state(choice.AUTO, of) == (choice.AUTO, None)
        record(others, of, 40)
        assert choice.statistics_state(choice.AUTO, of) != before

    def test_without_a_session_that_was_removed(self, others, of, before, folder):
        """By the panel, or by hand."""
        record(others, of, 40, OTHER_SESSION)
        now = choice.statistics_state(choice.AUTO, of)
        store.remove_statistics(of, store.PASSIVE_SESSION)
        assert choice.statistics_state(choice.AUTO, of) != now
        assert chosen(of).samples == 50


class TestTheFile:
    def test_is_one_and_goes_with_the_statistics(self, statistics, of, folder):
        for samples in (31, 1, 40, 300):
            record(statistics, of, samples)
            assert len(files(folder)) == (samples != 31)
        store.remove_statistics(of)
        assert not files(folder)

    def test_is_no_recording(self, statistics, of, folder):
        record(statistics, of, 40)
        (session,) = folder.glob("*.pt")
        assert store.statistics_files(of) == [session]
        assert folder_paths.get_filename_list(FOLDER) == [session.name]
        assert store.statistics_of(of).samples == 40
        (model,) = Catalogue(lambda: []).models()
        assert [file.path for file in model.files] == [session]

    def test_that_is_damaged_is_made_again(self, statistics, of, folder):
        record(statistics, of, 40)
        before = choice.statistics_state(choice.AUTO, of)
        files(folder)[0].write_bytes(b"damaged")
        assert choice.statistics_state(choice.AUTO, of) == before
        assert choice.statistics_state(choice.AUTO, of) == before
        assert files(folder)[0].stat().st_size > 1000

    def test_that_cannot_be_written_costs_nobody_a_recording(self, statistics, of, folder, caplog):
        (folder / f"{of[:16]}.milestone").mkdir(parents=True)
        record(statistics, of, 40)
        assert "is not kept" in caplog.text
        assert chosen(of).samples == 40


class TestMilestone:
    @pytest.mark.parametrize(
        ("samples", "reached"),
        [(0, 0), (31, 0), (32, 32), (63, 32), (64, 64), (255, 128), (256, 256), (5000, 256)],
    )
    def test_is_the_last_doubling(self, statistics, choose, samples, reached):
        assert store.milestone(Statistics(statistics, {"samples": samples})) == reached
