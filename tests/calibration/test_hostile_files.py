"""Statistics files that are damaged, or made to harm.

Each is read right or refused with our error: no other error, no crash, no code run, no memory
beyond what a file of statistics needs.
"""

import io
import pickle
import random
import re
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import assert_same_layers, layer_statistics, statistics_of
from hswq.calibration import Statistics, StatisticsError, load_statistics, save_statistics
from hswq.calibration.archive import (
    MAX_FILE_BYTES,
    MAX_MEMBERS,
    MAX_PICKLE_BYTES,
    checked_archive,
)
from hswq.calibration.files import FILE_TYPE, MAX_LAYERS, MAX_NAME

MUTATIONS = 500


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "hostile.pt"


@pytest.fixture
def statistics() -> Statistics:
    return statistics_of("input_blocks.1.0", "middle_block.1", "out.2", samples=3)


@pytest.fixture
def content(path, statistics) -> bytes:
    """A good file's bytes."""
    save_statistics(statistics, path)
    return path.read_bytes()


def assert_refused(path: Path, content: bytes, message: str | None = None) -> None:
    path.write_bytes(content)
    with pytest.raises(StatisticsError, match=message) as raised:
        load_statistics(path)
    text = str(raised.value)
    assert text.startswith(f"{path.name} ")
    assert "\n" not in text
    assert len(text) < 300
    assert "weights_only" not in text  # torch's advice: how to run the file's code after all


def with_members(content: bytes, change) -> bytes:
    """A good archive again, with `change(name, data)` as every member's data."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w") as target:
        for member in source.infolist():
            target.writestr(member.filename, change(member.filename, source.read(member)))
    return out.getvalue()


def with_pickle(content: bytes, data: bytes) -> bytes:
    return with_members(content, lambda name, old: data if name.endswith("data.pkl") else old)


class TestDamagedFiles:
    def test_truncated_anywhere(self, path, content):
        lengths = {*range(0, len(content), 97), *range(1, 40), len(content) - 1}
        for length in sorted(lengths):
            assert_refused(path, content[:length])

    def test_any_flipped_bit(self, path, content, statistics):
        """A flip that the archive's checksums miss lies where nothing is read from."""
        numbers = random.Random(1)
        refused = 0
        for _ in range(MUTATIONS):
            damaged = bytearray(content)
            damaged[numbers.randrange(len(damaged))] ^= 1 << numbers.randrange(8)
            refused += self.is_refused(path, damaged, statistics)
        assert refused > MUTATIONS / 4

    def test_any_overwritten_or_moved_part(self, path, content, statistics):
        numbers = random.Random(2)
        for _ in range(MUTATIONS):
            damaged = bytearray(content)
            start = numbers.randrange(len(damaged))
            length = numbers.choice((1, 2, 4, 8, 64, 512))
            part = numbers.choice(
                (b"\x00" * length, b"\xff" * length, numbers.randbytes(length), b"")
            )
            damaged[start : start + length] = part
            self.is_refused(path, damaged, statistics)

    def is_refused(self, path, damaged: bytes, statistics) -> bool:
        """Whether it was refused; if not, it must say what it said before."""
        path.write_bytes(damaged)
        try:
            found = load_statistics(path)
        except StatisticsError:
            return True
        assert_same_layers(found, statistics)
        return False

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:pickletools")
    def test_any_mutation_under_right_checksums(self, path, content):
        """Here the pickle itself is another: refused, or read as other statistics."""
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
            original = archive.read(name)
        numbers = random.Random(3)
        refused = 0
        for _ in range(MUTATIONS):
            mutated = bytearray(original)
            for _ in range(numbers.choice((1, 1, 2, 8))):
                mutated[numbers.randrange(len(mutated))] = numbers.randrange(256)
            path.write_bytes(with_pickle(content, bytes(mutated)))
            try:
                assert isinstance(load_statistics(path), Statistics)
            except StatisticsError:
                refused += 1
        assert refused > MUTATIONS / 4

    @pytest.mark.parametrize(
        "content",
        [b"", b"PK", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"{}", b"\x80\x02}.", bytes(5000)],
    )
    def test_something_else(self, path, content):
        assert_refused(path, content)

    def test_a_safetensors_file(self, path):
        from safetensors.torch import save

        assert_refused(path, save({"a": torch.ones(3)}), "not an archive that torch.save writes")

    def test_an_archive_of_something_else(self, path):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("readme.txt", "hello")
        assert_refused(path, out.getvalue())

    def test_the_good_file_is_good(self, path, content, statistics):
        path.write_bytes(with_members(content, lambda name, data: data))
        assert_same_layers(load_statistics(path), statistics)


class MakesFile:
    """Unpickled, it makes a file: code that runs."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


class TestMaliciousPickles:
    @pytest.fixture
    def marker(self, tmp_path) -> Path:
        return tmp_path / "it-ran"

    def malicious(self, marker: Path, **options) -> bytes:
        out = io.BytesIO()
        content = {"meta": {"type": FILE_TYPE}, "layers": {"a": MakesFile(marker)}}
        torch.save(content, out, **options)
        return out.getvalue()

    def test_code_does_not_run(self, path, marker):
        content = self.malicious(marker)
        assert_refused(path, content, "not just tensors and plain values")
        assert not marker.exists()
        # It would have, otherwise:
        torch.load(path, weights_only=False)
        assert marker.exists()

    def test_code_does_not_run_where_another_extension_trusts_it(self, path, marker):
        with torch.serialization.safe_globals([Path.touch, type(marker), getattr]):
            assert_refused(path, self.malicious(marker), "not just tensors and plain values")
        assert not marker.exists()

    @pytest.mark.parametrize("protocol", [2, 4, 5])
    def test_any_pickle_protocol(self, path, marker, content, protocol):
        data = pickle.dumps({"meta": {}, "layers": MakesFile(marker)}, protocol=protocol)
        assert_refused(path, with_pickle(content, data))
        assert not marker.exists()

    def test_files_before_archives(self, path, marker):
        legacy = self.malicious(marker, _use_new_zipfile_serialization=False)
        assert_refused(path, legacy, "not an archive that torch.save writes")
        assert not marker.exists()

    def test_a_harmless_file_before_archives(self, path):
        out = io.BytesIO()
        content = {"meta": {"type": FILE_TYPE}, "layers": {}}
        torch.save(content, out, _use_new_zipfile_serialization=False)
        assert_refused(path, out.getvalue(), "not an archive that torch.save writes")

    def test_an_old_file_with_an_archive_at_its_end(self, path, marker, content):
        """A zip reader looks for the end of a file, torch at its beginning."""
        legacy = self.malicious(marker, _use_new_zipfile_serialization=False)
        assert_refused(path, legacy + content, "not an archive that torch.save writes")
        assert not marker.exists()

    @pytest.mark.parametrize(
        "data",
        [
            b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x0f\x85R.",
            b"\x80\x02ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x0f\x85R.",
            b"\x80\x02ctorch\nTensor\nJ\xff\xff\xff\x0f\x85R.",
            b"\x80\x02ccollections\nCounter\n)R.",
        ],
        ids=lambda data: re.search(rb"c(.*)\n(.*)\n", data)[2].decode(),
    )
    def test_what_torch_would_make_of_a_few_bytes(self, path, content, data):
        assert_refused(path, with_pickle(content, data), "not just tensors and plain values")

    def test_objects_with_a_state_of_their_own(self, path, content):
        data = b"\x80\x02ccollections\nOrderedDict\n)R}X\x03\x00\x00\x00getK\x05sb."
        assert_refused(path, with_pickle(content, data), "it holds objects")


class TestMemory:
    """A small file must not become a large one in memory."""

    def assert_refused_in_little_memory(self, path, content, message) -> None:
        tracemalloc.start()
        try:
            assert_refused(path, content, message)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 2 * len(content) + (8 << 20)

    @pytest.mark.parametrize(
        ("length", "message"),
        [
            (30 << 20, "its pickle has 31457286 bytes, and none has more than"),
            (MAX_PICKLE_BYTES - 7, "its pickle has more than 262144 operations"),
        ],
    )
    def test_a_pickle_of_empty_tables(self, path, content, length, message):
        """A byte of the file makes 64 in memory, and a step of Python."""
        bomb = with_pickle(content, b"\x80\x02(" + b"}" * length + b"t0.")
        began = time.monotonic()
        self.assert_refused_in_little_memory(path, bomb, message)
        assert time.monotonic() - began < 5  # tracing memory takes most of it

    def test_many_empty_members(self, path, content):
        out = io.BytesIO(content)
        with zipfile.ZipFile(out, "a") as archive:
            for index in range(MAX_MEMBERS + 1):
                archive.writestr(f"archive/data/x{index}", b"")
        self.assert_refused_in_little_memory(path, out.getvalue(), "it has more than 8192 members")

    def test_what_would_be_refused_is_not_written(self, path):
        one = layer_statistics()
        many = Statistics({str(number): one for number in range(MAX_LAYERS + 1)})
        with pytest.raises(ValueError, match="it has 4097 layers, and none has more than 4096"):
            save_statistics(many, path)
        assert not path.exists()
        long = {f"{number:04}".ljust(MAX_NAME, "x"): one for number in range(MAX_LAYERS)}
        save_statistics(Statistics(long), path)
        assert len(load_statistics(path)) == MAX_LAYERS

    def test_a_compressed_archive(self, path, content):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(60 << 20))
        bomb = out.getvalue()
        assert len(bomb) < 1 << 20
        self.assert_refused_in_little_memory(path, bomb, "it is compressed")

    def test_a_compressed_archive_that_lies_about_its_size(self, path):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(50 << 20))
        lie = out.getvalue().replace(struct.pack("<I", 50 << 20), struct.pack("<I", 100))
        self.assert_refused_in_little_memory(path, lie, "it is compressed")

    def test_members_that_are_one_and_the_same(self, path, content):
        """Many names for the bytes of one member."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("archive/data/0", bytes(1 << 20))
            (member,) = archive.infolist()
            for index in range(1, 1000):
                twin = zipfile.ZipInfo(f"archive/data/{index}")
                for field in ("header_offset", "file_size", "compress_size", "CRC"):
                    setattr(twin, field, getattr(member, field))
                archive.filelist.append(twin)
        self.assert_refused_in_little_memory(path, out.getvalue(), "its members overlap")

    def test_a_member_twice(self, path, content):
        out = io.BytesIO(content)
        with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(out, "a") as archive:
            archive.writestr(archive.namelist()[0], b"another")
        assert_refused(path, out.getvalue(), "its members overlap")

    def test_a_file_too_large(self, path):
        with open(path, "wb") as file:
            file.truncate(MAX_FILE_BYTES + 1)  # sparse
        with pytest.raises(StatisticsError, match="it has 268435457 bytes, and none has more"):
            load_statistics(path)

    def test_many_layers_that_share_one_large_storage(self, path):
        shared = torch.zeros(1 << 20, dtype=torch.float16)
        layer = {"output_sum": 1.0, "output_sq_sum": 2.0, "out_count": 1, "in_count": 1}
        layers = {str(index): {**layer, "input_imp_sum": shared[:]} for index in range(17)}
        torch.save({"meta": {"type": FILE_TYPE}, "layers": layers}, path)
        assert_refused(path, path.read_bytes(), "its layers have more than 16777216 channels")

    def test_one_element_seen_a_trillion_times(self, path):
        layer = {"output_sum": 1.0, "output_sq_sum": 2.0, "out_count": 1, "in_count": 1}
        layer["input_imp_sum"] = torch.ones(1).expand(2**40)
        torch.save({"meta": {"type": FILE_TYPE}, "layers": {"mid.0": layer}}, path)
        content = path.read_bytes()
        self.assert_refused_in_little_memory(path, content, "its layers have more than")

    @pytest.mark.parametrize("place", range(3))
    def test_a_tensor_larger_than_its_storage(self, path, content, place):
        """The pickle says 100,000 where it said 3: elements of a storage, of a tensor."""

        def enlarge(name: str, data: bytes) -> bytes:
            if not name.endswith("data.pkl"):
                return data
            at = [match.start() for match in re.finditer(b"K\x03", data)][place]
            return data[:at] + b"J" + struct.pack("<i", 100_000) + data[at + 2 :]

        path.write_bytes(with_members(content, enlarge))
        try:
            layers = load_statistics(path).values()
        except StatisticsError:
            return
        assert all(layer.importance_sum.numel() < 10 for layer in layers)


class TestCheckedArchive:
    def test_torch_gets_only_what_was_checked(self, path, content):
        out = io.BytesIO(content)
        with zipfile.ZipFile(out, "a") as archive:
            archive.writestr("archive/DATA.PKL", b"torch's reader takes no notice of case")
            archive.writestr("archive/code/evil.py", b"")
        path.write_bytes(out.getvalue())
        with zipfile.ZipFile(checked_archive(path)) as archive:
            names = set(archive.namelist())
        assert "archive/data.pkl" in names
        read_by_torch = r"archive/(data\.pkl|version|byteorder|data/\d+)"
        assert all(re.fullmatch(read_by_torch, name) for name in names)
