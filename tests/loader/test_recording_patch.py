"""The one patch of ComfyUI: there while something is recorded, harmless, and gone afterwards."""

from __future__ import annotations

from pathlib import Path

import comfy.samplers
import pytest
from harness.inprocess import sample
from harness.recording import hooks, recorded
from hswq.calibration import load_statistics
from hswq.loader import store
from hswq.loader.host.folders import statistics_folder
from hswq.loader.recording import recorder as recording
from hswq.loader.recording.status import COMPLETE, RECORDING

CFGGuider = comfy.samplers.CFGGuider


class TestPatch:
    def test_is_idempotent_and_removable(self, recorder):
        ours = CFGGuider.outer_sample
        recorder.install()
        assert CFGGuider.outer_sample is ours
        recorder.remove()
        assert CFGGuider.outer_sample is ours.__wrapped__
        recorder.remove()

    def test_of_others_before_and_after(self, model, checkpoint, recorder):
        recorder.remove()
        seen = []

        def wrap(name: str):
            inner = CFGGuider.outer_sample

            def outer_sample(*args, **kwargs):
                seen.append(name)
                return inner(*args, **kwargs)

            CFGGuider.outer_sample = outer_sample
            return outer_sample

        wrap("before")
        recorder.install()
        after = wrap("after")
        sample(model)
        assert seen == ["after", "before"]
        assert recorded(checkpoint).samples == 1
        recorder.remove()
        assert CFGGuider.outer_sample is after, "it is not ours to take away"
        sample(model)
        assert recorded(checkpoint).samples == 1
        recorder.install()
        sample(model)
        assert recorded(checkpoint).samples == 2

    def test_that_another_has_taken_out(self, model, checkpoint, recorder):
        """By putting back what it had found, before we came."""
        CFGGuider.outer_sample = CFGGuider.outer_sample.__wrapped__
        sample(model)
        assert recorded(checkpoint) is None
        recorder.follow_settings()
        sample(model)
        assert recorded(checkpoint).samples == 1

    def test_of_another_that_did_not_show_yet_counts_once(self, model, checkpoint, recorder):
        """Before the first sampling nothing tells whether it leads to us."""
        inner = CFGGuider.outer_sample
        CFGGuider.outer_sample = lambda *args, **kwargs: inner(*args, **kwargs)
        for _ in range(3):
            recorder.follow_settings()
            top = CFGGuider.outer_sample
            sample(model)
        recorder.follow_settings()
        assert CFGGuider.outer_sample is top
        assert recorded(checkpoint).samples == 3


class TestOff:
    """A prompt that is queued calls `follow_settings` (tests/server/test_recording.py)."""

    @pytest.fixture
    def own(self):
        return CFGGuider.outer_sample.__wrapped__

    def test_is_comfyuis_own_function_from_the_next_prompt(self, recorder, own, choose):
        choose(Record=False)
        recorder.follow_settings()
        assert CFGGuider.outer_sample is own
        choose(Record=True)
        recorder.follow_settings()
        assert CFGGuider.outer_sample.__wrapped__ is own

    def test_for_a_prompt_that_was_queued_before(self, model, checkpoint, recorder, own, choose):
        choose(Record=False)
        sample(model, callback=lambda *_: pytest.fail("hooked") if hooks(model) else None)
        assert recorded(checkpoint) is None
        assert CFGGuider.outer_sample is own
        choose(Record=True)
        recorder.follow_settings()
        sample(model)
        assert recorded(checkpoint).samples == 1

    def test_under_the_patch_of_another(self, model, checkpoint, recorder, choose):
        """It stays in the chain, since it is not ours to change, and passes on."""
        inner = CFGGuider.outer_sample

        def others(*args, **kwargs):
            return inner(*args, **kwargs)

        CFGGuider.outer_sample = others
        for record, samples in ((False, 0), (True, 1), (False, 1), (True, 2)):
            choose(Record=record)
            recorder.follow_settings()
            sample(model)
            found = recorded(checkpoint)
            assert (found.samples if found else 0) == samples
            assert CFGGuider.outer_sample is others

    def test_while_a_sampling_runs(self, model, checkpoint, recorder, choose):
        sample(model, steps=2, callback=lambda *_: choose(Record=False))
        assert recorded(checkpoint) is None
        assert hooks(model) == 0


@pytest.fixture(scope="module")
def recorded_before() -> dict[str, bytes]:
    """The file of a model at its target, by name; empty until a test has recorded it."""
    return {}


@pytest.fixture
def complete(model, checkpoint, recorder, choose, recorded_before) -> Path:
    """The file of a model at its target, sampled once since."""
    choose(Target=32, Budget=100)
    folder = statistics_folder()
    for name, content in recorded_before.items():
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
    if not recorded_before:
        sample(model, batch=32, steps=store.USABLE_CALLS)
        recorded_before.update({path.name: path.read_bytes() for path in folder.glob("*.pt")})
    sample(model)
    assert recorder.status()[-1].state == COMPLETE
    return next(folder.glob("*.pt"))


class TestAtTheTarget:
    def test_nothing_is_looked_up(self, model, complete, recorder, monkeypatch):
        before = complete.stat().st_mtime_ns
        for name in ("record", "identity", "unrecordable"):
            monkeypatch.delattr(recording, name)
        monkeypatch.delattr(store, "statistics_of")
        during = []
        sample(model, callback=lambda *_: during.append(hooks(model)))
        assert during == [0]
        assert recorder.status()[-1].state == COMPLETE
        assert complete.stat().st_mtime_ns == before

    def test_a_higher_one_goes_on(self, model, checkpoint, complete, recorder, choose):
        choose(Target=64, Budget=100)
        sample(model)
        assert recorded(checkpoint).samples == 33
        assert recorder.status()[-1].state == RECORDING

    def test_when_the_file_is_gone_it_begins_anew(self, model, checkpoint, complete, recorder):
        complete.unlink()
        sample(model)
        assert recorded(checkpoint).samples == 1

    def test_of_one_model_another_goes_on(self, model, complete, recorder, checkpoint):
        """What else is in the folder has no say."""
        store.add_statistics(
            store.NewSums(store.statistics_of(_fingerprint(complete)), "ef" * 32, "x", "other")
        )
        sample(model)
        assert recorded(checkpoint).samples == 32


def _fingerprint(path: Path) -> str:
    return load_statistics(path).fingerprint
