"""The statistics file: what is written, how, and what other tools' files say."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import DTYPES, assert_same_layers, layer_statistics, statistics_of
from hswq.calibration import (
    LayerStatistics,
    Statistics,
    StatisticsError,
    load_statistics,
    save_statistics,
)
from hswq.calibration.atomic import atomic_file, sweep
from hswq.calibration.files import FILE_TYPE

LAYER = {
    "output_sum": 1.0,
    "output_sq_sum": 2.0,
    "out_count": 1,
    "input_imp_sum": torch.ones(3),
    "in_count": 1,
}


def brief(value) -> str:
    """A test's name for a value."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}-{'x'.join(map(str, value.shape))}"
    return str(value)[:20]


def assert_refused(path, change: dict, message: str) -> None:
    """Check that a file whose one layer has this instead is refused."""
    torch.save({"meta": {"type": FILE_TYPE}, "layers": {"mid.0": {**LAYER, **change}}}, path)
    with pytest.raises(StatisticsError, match=message) as raised:
        load_statistics(path)
    assert str(raised.value).startswith(f"{path.name} is not an HSWQ statistics file: ")


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.0123.recorded.pt"


@pytest.fixture
def little_space():
    """No file may grow beyond 4 KiB in the block, as if the disk were full."""
    import resource  # Windows has no such limits

    class LittleSpace:
        def __enter__(self):
            self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, self.limits[1]))

        def __exit__(self, *_):
            resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    return LittleSpace()


class TestRoundTrip:
    def test_sums_and_meta_come_back(self, path):
        meta = {"samples": 3, "total_steps": 60, "fingerprint": "abc", "model": "x", "lora": True}
        saved = statistics_of("input_blocks.1.0.in_layers.2", "out.2", "middle_block.1", **meta)
        save_statistics(saved, path)
        loaded = load_statistics(path)
        assert_same_layers(loaded, saved)
        assert (loaded.samples, loaded.fingerprint) == (3, "abc")
        assert {key: loaded.meta[key] for key in meta} == meta

    def test_saved_again_it_is_the_same(self, path):
        save_statistics(statistics_of("a", "b", samples=1), path)
        first = load_statistics(path)
        save_statistics(first, path)
        assert_same_layers(load_statistics(path), first)
        assert dict(load_statistics(path).meta) == dict(first.meta)

    def test_no_layers(self, path):
        save_statistics(Statistics(), path)
        assert len(load_statistics(path)) == 0
        assert load_statistics(path).samples == 0

    def test_extremes(self, path):
        layer = LayerStatistics(
            -1e50, 1e-300, 2**53, torch.tensor([0.0, 5e-324, 3e38], dtype=torch.float64), 1
        )
        save_statistics(Statistics({"a": layer}), path)
        assert_same_layers(load_statistics(path), Statistics({"a": layer}))

    @pytest.mark.parametrize("path_type", [str, Path])
    def test_any_path(self, path, path_type):
        save_statistics(statistics_of("a"), path_type(path))
        assert list(load_statistics(path_type(path))) == ["a"]


class TestFormat:
    """HSWQ.md, "Statistics file": ours are readable in the unofficial quantizer."""

    @pytest.fixture
    def content(self, path) -> dict:
        save_statistics(statistics_of("a", "out.2", calls=7, total_steps=7, samples=2), path)
        return torch.load(path, weights_only=True)

    def test_has_exactly_the_documented_keys(self, content):
        assert set(content) == {"meta", "layers"}
        assert {"type", "created_at", "total_steps"} <= set(content["meta"])
        assert set(content["layers"]) == {"a", "out.2"}
        documented = [set(layer) - {"input_amax"} for layer in content["layers"].values()]
        assert documented == [set(LAYER)] * 2

    def test_the_largest_input_is_a_key_of_its_own_where_it_is_known(self, path):
        known, unknown = layer_statistics(seed=0), layer_statistics(seed=2)
        save_statistics(Statistics({"known": known, "unknown": unknown}), path)
        layers = torch.load(path, weights_only=True)["layers"]
        assert type(layers["known"]["input_amax"]) is float
        assert "input_amax" not in layers["unknown"]
        loaded = load_statistics(path)
        assert loaded["known"].input_amax == known.input_amax > 0
        assert loaded["unknown"].input_amax is unknown.input_amax is None

    @pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "1", True, torch.ones(())])
    def test_a_largest_input_that_is_none(self, path, value):
        assert_refused(path, {"input_amax": value}, "input_amax of layer 'mid.0' is n")

    def test_has_the_documented_types(self, content):
        assert content["meta"]["type"] == "hswq_dual_monitor_v2"
        assert type(content["meta"]["created_at"]) is str
        assert type(content["meta"]["total_steps"]) is int
        for layer in content["layers"].values():
            assert (type(layer["output_sum"]), type(layer["output_sq_sum"])) == (float, float)
            assert (type(layer["out_count"]), type(layer["in_count"])) == (int, int)
            importance = layer["input_imp_sum"]
            assert (importance.dtype, importance.ndim) == (torch.float64, 1)
            assert importance.device.type == "cpu"

    def test_created_at_stays(self, path):
        save_statistics(statistics_of("a", created_at="yesterday"), path)
        assert load_statistics(path).meta["created_at"] == "yesterday"

    def test_total_steps_are_there_even_when_unknown(self, path):
        save_statistics(statistics_of("a"), path)
        assert torch.load(path, weights_only=True)["meta"]["total_steps"] == 0

    def test_a_view_is_saved_without_the_rest_of_its_storage(self, path):
        everything = torch.rand(1 << 17, dtype=torch.float64)
        parts = {
            str(index): LayerStatistics(1.0, 2.0, 1, everything[index :: 1 << 15], 1)
            for index in range(3)
        }
        save_statistics(Statistics(parts), path)
        assert path.stat().st_size < 8192
        assert_same_layers(load_statistics(path), Statistics(parts))


class TestUnofficialQuantizer:
    """Files of the other program that has this format."""

    def content(self) -> dict:
        def table(channels: int, calls: int, **extra) -> dict:
            return {
                "output_sum": 1.5 * calls,
                "output_sq_sum": 9.0 * calls,
                "out_count": calls,
                "input_imp_sum": torch.full((channels,), 0.5 * calls, dtype=torch.float64),
                "in_count": calls,
                **extra,
            }

        return {
            "meta": {
                "type": "hswq_dual_monitor_v2",
                "created_at": "2026-01-24 03:18:12",
                "total_steps": 25,
                "model_class": "UNetModel",
                "settings": {"keep_ratio": 0.1, "layers": ["a", "b"]},
                "nothing": None,
            },
            "layers": {
                "input_blocks.1.0.in_layers.2": table(320, 25),
                "time_embed.0": table(320, 25, input_shape=[2, 320], note="extra"),
                "never.called": {**table(1, 0), "input_imp_sum": None},
                "never.called.either": {**table(4, 0), "output_sum": 0, "output_sq_sum": 0},
                "output_only": {**table(4, 25), "in_count": 0},
                "out.2": table(1, 50),
            },
            "notes": {"anything": [1, (2.5, "three"), torch.ones(2)]},
        }

    @pytest.fixture
    def loaded(self, path) -> Statistics:
        torch.save(self.content(), path)
        return load_statistics(path)

    def test_layers_that_were_called(self, loaded):
        assert list(loaded) == ["input_blocks.1.0.in_layers.2", "time_embed.0", "out.2"]
        layer = loaded["time_embed.0"]
        assert (layer.calls, layer.sensitivity) == (25, 9 - 1.5**2)
        assert torch.equal(layer.importance, torch.full((320,), 0.5, dtype=torch.float64))

    def test_meta(self, loaded):
        assert (loaded.samples, loaded.fingerprint) == (0, None)
        assert loaded.meta["total_steps"] == 25
        assert loaded.meta["model_class"] == "UNetModel"

    def test_adds_to_ours(self, loaded):
        merged = statistics_of("mine", samples=2, fingerprint="abc", total_steps=5).merge(loaded)
        assert (merged.samples, merged.fingerprint, merged.meta["total_steps"]) == (2, "abc", 30)
        assert len(merged) == 4

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_importance_of_another_dtype(self, path, dtype):
        content = self.content()
        importance = content["layers"]["out.2"]["input_imp_sum"].to(dtype)
        content["layers"]["out.2"]["input_imp_sum"] = importance
        torch.save(content, path)
        assert load_statistics(path)["out.2"].importance_sum.dtype == torch.float64

    def test_a_part_of_a_tensor(self, path):
        content = self.content()
        whole = torch.arange(40, dtype=torch.float64)
        content["layers"]["out.2"]["input_imp_sum"] = whole[3::4]
        torch.save(content, path)
        assert torch.equal(load_statistics(path)["out.2"].importance_sum, whole[3::4])


class TestSaveStatistics:
    def files(self, path) -> list[str]:
        return sorted(os.listdir(path.parent))

    def test_leaves_nothing_beside_the_file(self, path):
        for seed in range(3):
            save_statistics(statistics_of("a", seed=seed), path)
        assert self.files(path) == [path.name]

    def test_others_may_read_it_as_any_file(self, path):
        save_statistics(statistics_of("a"), path)
        (plain := path.with_name("plain")).touch()
        assert path.stat().st_mode == plain.stat().st_mode

    def test_a_full_disk_leaves_the_old_file(self, path, little_space):
        old = statistics_of("a")
        save_statistics(old, path)
        new = Statistics({"a": layer_statistics(channels=10_000)})
        with little_space, pytest.raises(OSError, match="File too large"):
            save_statistics(new, path)
        assert self.files(path) == [path.name]
        assert_same_layers(load_statistics(path), old)

    def test_a_full_disk_leaves_nothing_where_nothing_was(self, path, little_space):
        new = Statistics({"a": layer_statistics(channels=10_000)})
        with little_space, pytest.raises(OSError, match="File too large"):
            save_statistics(new, path)
        assert self.files(path) == []

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="missing"):
            save_statistics(statistics_of("a"), tmp_path / "missing" / "a.pt")

    def test_a_folder_in_its_place(self, path):
        path.mkdir()
        with pytest.raises(IsADirectoryError):
            save_statistics(statistics_of("a"), path)
        assert self.files(path) == [path.name]

    @pytest.mark.parametrize(
        "unreadable",
        [
            {"output_sum": math.nan},
            {"output_square_sum": math.inf},
            {"importance_sum": torch.tensor([1.0, math.nan])},
            {"importance_sum": torch.tensor([-1.0])},
            {"importance_sum": torch.empty(0)},
            {"output_calls": 2**53 + 1},
            {"input_amax": math.nan},
        ],
    )
    def test_what_could_not_be_read_again_is_not_written(self, path, unreadable):
        old = statistics_of("a")
        save_statistics(old, path)
        fields = {
            "output_sum": 1.0, "output_square_sum": 2.0, "output_calls": 1,
            "importance_sum": torch.ones(3), "input_calls": 1, **unreadable,
        }  # fmt: skip
        with pytest.raises(ValueError, match="of layer 'a'"):
            save_statistics(Statistics({"a": LayerStatistics(**fields)}), path)
        assert_same_layers(load_statistics(path), old)

    @pytest.mark.parametrize("value", [Path("model"), torch.ones(1), [1, 2], {"a": 1}])
    def test_meta_that_could_not_be_read_again_is_not_written(self, path, value):
        with pytest.raises(ValueError, match=f"meta 'model' is a {type(value).__name__}"):
            save_statistics(statistics_of("a", model=value), path)
        assert self.files(path) == []

    def test_a_kill_at_any_moment_leaves_a_file_that_can_be_read(self, path):
        """Another process saves without end; this one reads all the while, then kills it."""
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "import conftest, helpers\n"
            "from hswq.calibration import Statistics, save_statistics\n"
            "layers = {'a': helpers.layer_statistics(channels=5_000)}\n"
            "for samples in range(10**9):\n"
            "    save_statistics(Statistics(layers, {'samples': samples}), sys.argv[2])\n"
        )
        tests = Path(__file__).resolve().parent.parent
        writer = subprocess.Popen([sys.executable, "-c", code, str(tests), str(path)])
        try:
            while not path.exists():
                assert writer.poll() is None
                time.sleep(0.01)
            seen = [load_statistics(path).samples]
            while seen[-1] < seen[0] + 20:
                seen.append(load_statistics(path).samples)
        finally:
            writer.kill()
            writer.wait()
        last = load_statistics(path)
        assert seen == sorted(seen)
        assert last.samples >= seen[-1]
        assert_same_layers(last, Statistics({"a": layer_statistics(channels=5_000)}))


class TestAtomicFile:
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_an_error_in_the_block_leaves_the_old_file(self, path, error):
        path.write_bytes(b"old")
        with pytest.raises(error), atomic_file(path) as file:
            file.write(b"new")
            raise error
        assert path.read_bytes() == b"old"
        assert os.listdir(path.parent) == [path.name]

    def test_the_old_file_is_there_until_the_end(self, path):
        path.write_bytes(b"old")
        with atomic_file(path) as file:
            file.write(b"new")
            file.flush()
            assert path.read_bytes() == b"old"
        assert path.read_bytes() == b"new"

    def test_two_writers_do_not_mix(self, path):
        with atomic_file(path) as one, atomic_file(path) as other:
            one.write(b"one")
            other.write(b"other")
        assert path.read_bytes() in (b"one", b"other")
        assert os.listdir(path.parent) == [path.name]


class TestLoadStatistics:
    def test_there_is_none(self, path):
        with pytest.raises(FileNotFoundError, match=path.name):
            load_statistics(path)

    def test_a_folder(self, path):
        path.mkdir()
        with pytest.raises(IsADirectoryError):
            load_statistics(path)

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
    @pytest.mark.timeout(20)
    def test_a_pipe_that_nobody_writes_to(self, path):
        os.mkfifo(path)
        with pytest.raises(OSError, match="it is not a regular file"):
            load_statistics(path)

    @pytest.mark.parametrize(
        "content",
        [
            {"meta": {"type": FILE_TYPE}},
            {"layers": {}},
            {"meta": {"type": "hswq_dual_monitor_v1"}, "layers": {}},
            {"meta": {}, "layers": {}},
            {"meta": FILE_TYPE, "layers": {}},
            {"meta": {"type": FILE_TYPE}, "layers": []},
            {"meta": {"type": FILE_TYPE, "fingerprint": 5}, "layers": {}},
            {"meta": {"type": FILE_TYPE, "samples": -1}, "layers": {}},
            {"meta": {"type": FILE_TYPE, "samples": "many"}, "layers": {}},
            {"meta": {"type": FILE_TYPE, "samples": 2**60}, "layers": {}},
            {"meta": {"type": FILE_TYPE, "total_steps": 1.5}, "layers": {}},
            [{"type": FILE_TYPE}],
            torch.ones(3),
            None,
        ],
    )
    def test_another_kind_of_file(self, path, content):
        torch.save(content, path)
        with pytest.raises(StatisticsError, match=f"^{path.name} is not an HSWQ statistics file: "):
            load_statistics(path)

    @pytest.mark.parametrize("key", ["output_sum", "output_sq_sum"])
    @pytest.mark.parametrize(
        "value", ["1", None, [1.0], True, math.nan, math.inf, 10**400, torch.ones(())], ids=brief
    )
    def test_a_sum_that_cannot_be(self, path, key, value):
        assert_refused(path, {key: value}, f"{key} of layer 'mid.0' is no")

    @pytest.mark.parametrize("key", ["out_count", "in_count"])
    @pytest.mark.parametrize(
        "value", ["1", None, [1], True, -1, 1.0, 2**54, 10**400, torch.ones(())], ids=brief
    )
    def test_a_count_that_cannot_be(self, path, key, value):
        assert_refused(path, {key: value}, f"{key} of layer 'mid.0' is not a count")

    @pytest.mark.parametrize(
        "value",
        [
            1.0,
            None,
            [1.0],
            torch.ones(()),
            torch.ones(2, 2),
            torch.ones(0),
            torch.ones(3, dtype=torch.int64),
            torch.ones(3, dtype=torch.complex64),
            torch.ones(2**20 + 1),
            torch.ones(1).expand(5),
            torch.ones(1).expand(2**23),
        ],
        ids=brief,
    )
    def test_an_importance_that_cannot_be(self, path, value):
        assert_refused(path, {"input_imp_sum": value}, "of layer 'mid.0' is not a vector of floats")

    @pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
    def test_an_importance_that_is_negative_or_not_finite(self, path, value):
        importance = torch.tensor([1.0, value, 2.0])
        message = "of layer 'mid.0' is negative or not finite"
        assert_refused(path, {"input_imp_sum": importance}, message)

    @pytest.mark.parametrize("key", sorted(LAYER))
    def test_a_layer_that_lacks_something(self, path, key):
        layer = dict(LAYER)
        del layer[key]
        torch.save({"meta": {"type": FILE_TYPE}, "layers": {"mid.0": layer}}, path)
        with pytest.raises(StatisticsError, match=f"layer 'mid.0' lacks {key}$"):
            load_statistics(path)

    @pytest.mark.parametrize("name", [5, None, "", "x" * 1001, (1, 2)])
    def test_a_name_that_cannot_be(self, path, name):
        torch.save({"meta": {"type": FILE_TYPE}, "layers": {name: {}}}, path)
        with pytest.raises(StatisticsError, match="a layer's name is not a string of 1 to 1000"):
            load_statistics(path)

    def test_one_of_two_gets_a_name_that_neither_may_replace(self, path):
        with pytest.raises(FileExistsError), atomic_file(path, replace=False) as late:
            late.write(b"late")
            with atomic_file(path, replace=False) as early:
                early.write(b"early")
        assert path.read_bytes() == b"early"
        assert os.listdir(path.parent) == [path.name]


class TestForged:
    """What no recording can have counted is not believed."""

    @pytest.mark.parametrize(
        "change",
        [
            {"output_sum": 1e39},
            {"output_sum": -1e39},
            {"output_sq_sum": 1e78},
            {"output_sq_sum": -1.0},
            {"output_sq_sum": 1e308},
            {"input_imp_sum": torch.full((3,), 1e39, dtype=torch.float64)},
            {"input_amax": 1e39},
        ],
        ids=str,
    )
    def test_sums_beyond_fp32(self, path, change):
        assert_refused(
            path, change, "the sums of layer 'mid.0' are impossible for its number of calls"
        )

    @pytest.mark.parametrize(
        ("meta", "problem"),
        [
            ({"samples": 2**53}, "it says 9007199254740992 samples, but its calls allow 4096"),
            ({"layers": 10**9}, "it says that its model has 1000000000 layers"),
            ({"layers": -1}, "it says that its model has -1 layers"),
        ],
    )
    def test_counts(self, path, meta, problem):
        torch.save({"meta": {"type": FILE_TYPE, **meta}, "layers": {"mid.0": LAYER}}, path)
        with pytest.raises(StatisticsError, match=problem):
            load_statistics(path)


HALF = """
import sys, types
package = types.ModuleType("hswq"); package.__path__ = [sys.argv[1]]; sys.modules["hswq"] = package
from hswq.calibration.atomic import atomic_file
with atomic_file(sys.argv[2]) as file:
    file.write(bytes(1000)); file.flush(); print("half", flush=True); sys.stdin.read()
"""


class TestSweep:
    @pytest.fixture
    def writing(self, path):
        """A process that is in the midst of a file."""
        root = str(Path(__file__).parents[2])
        process = subprocess.Popen(
            [sys.executable, "-c", HALF, root, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout.readline().split() == [b"half"]
        yield process
        process.kill()
        process.communicate(timeout=60)

    def aged(self, path) -> Path:
        """Return the temporary file, made older than those that are only just made."""
        (temporary,) = path.parent.iterdir()
        os.utime(temporary, (1, 1))
        return temporary

    def test_what_a_killed_process_left_is_removed(self, path, writing):
        writing.kill()
        writing.wait(60)
        temporary = self.aged(path)
        assert sweep(path.parent) == 1
        assert not temporary.exists()

    def test_what_a_live_process_writes_is_not(self, path, writing):
        temporary = self.aged(path)
        assert sweep(path.parent) == 0
        assert temporary.exists()
        writing.communicate(b"", timeout=60)
        assert path.read_bytes() == bytes(1000)

    def test_nor_what_was_made_just_now(self, path):
        temporary = path.with_name(f".{path.name}.0123abcd.tmp")
        temporary.write_bytes(b"its process has not locked it yet")
        assert sweep(path.parent) == 0

    @pytest.mark.parametrize("name", [".x.tmp", "x.0123abcd.tmp", ".x.0123ABCD.tmp", ".x.y.tmp"])
    def test_nor_what_is_not_ours(self, path, name):
        path.with_name(name).write_bytes(b"")
        os.utime(path.with_name(name), (1, 1))
        assert sweep(path.parent) == 0
