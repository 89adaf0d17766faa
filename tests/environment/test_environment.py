"""The setup's own rules, without network: when a step is made again, what is unpacked, errors."""

import importlib.util
import io
import shutil
import subprocess
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from environment import newest
from environment.host import RELEASES, ROOT, Host, SetupError, choose_host, python_of
from environment.install import is_whole, unpack
from environment.steps import ensure, explain


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """An empty ComfyUI tree that COMFYUI_PATH names."""
    tree = tmp_path / "ComfyUI"
    (tree / "comfy").mkdir(parents=True)
    (tree / "main.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tree))
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    return tree


def module_of(script: Path) -> ModuleType:
    """Import a file as it lies there."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestEnsure:
    @pytest.fixture
    def made(self, tmp_path) -> Path:
        return tmp_path / "made"

    def ensure(self, made: Path, inputs: str = "1") -> bool:
        """Whether the step ran."""
        ran = []

        def make() -> list[Path]:
            ran.append(True)
            made.touch()
            return [made]

        ensure("step", made.with_name("stamp.json"), inputs, make)
        return bool(ran)

    def test_runs_once(self, made):
        assert self.ensure(made)
        assert not self.ensure(made)

    def test_runs_again_for_other_inputs(self, made):
        self.ensure(made)
        assert self.ensure(made, inputs="2")

    def test_runs_again_when_what_it_made_is_gone(self, made):
        self.ensure(made)
        made.unlink()
        assert self.ensure(made)

    def test_runs_again_after_a_failure(self, made):
        def fail() -> list[Path]:
            raise KeyboardInterrupt

        self.ensure(made)
        with pytest.raises(KeyboardInterrupt):
            ensure("step", made.with_name("stamp.json"), "2", fail)
        assert self.ensure(made, inputs="1")

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
    def test_a_broken_stamp_is_no_stamp(self, made, text):
        made.with_name("stamp.json").write_text(text)
        assert self.ensure(made)


class TestUnpack:
    def sdist(self, path: Path, *names: str) -> Path:
        with tarfile.open(path, "w:gz") as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = 4
                archive.addfile(member, io.BytesIO(b"text"))
            member = tarfile.TarInfo("package/vendor/ComfyUI/link")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            archive.addfile(member)
        return path

    def test_takes_only_comfyui(self, tmp_path):
        names = ("setup.py", "package/setup.py", "package/vendor/other/x.py")
        wanted = ("package/vendor/ComfyUI/main.py", "package/vendor/ComfyUI/comfy/sd.py")
        unpack(self.sdist(tmp_path / "x.tar.gz", *names, *wanted), tmp_path / "target")
        files = {path for path in (tmp_path / "target").rglob("*") if not path.is_dir()}
        assert files == {tmp_path / "target/main.py", tmp_path / "target/comfy/sd.py"}

    def test_stays_in_the_target(self, tmp_path):
        name = "package/vendor/ComfyUI/../../outside"
        unpack(self.sdist(tmp_path / "x.tar.gz", name), tmp_path / "a" / "b" / "target")
        assert [path.name for path in tmp_path.iterdir()] == ["x.tar.gz"]


class TestIsWhole:
    @pytest.fixture
    def record(self, tmp_path) -> Path:
        record = tmp_path / "thing-1.0.dist-info"
        record.mkdir()
        (tmp_path / "thing.py").touch()
        (record / "RECORD").write_text("thing.py,sha256=x,0\n__pycache__/thing.pyc,,\n")
        return record

    def test_bytecode_may_be_gone(self, record):
        assert is_whole(record)

    def test_files_may_not(self, record):
        (record.parent / "thing.py").unlink()
        assert not is_whole(record)

    def test_without_the_list_pip_did_not_finish(self, record):
        (record / "RECORD").unlink()
        assert not is_whole(record)


class TestChooseHost:
    def test_fetches_the_pinned_release(self, monkeypatch):
        monkeypatch.delenv("COMFYUI_PATH", raising=False)
        host = choose_host(None)
        assert (host.release, host.lender) == ("0.30.0", None)
        assert [host.comfyui.name, host.venv.name] == ["ComfyUI", "venv"]

    @pytest.mark.parametrize("release", sorted(RELEASES))
    def test_each_release_has_a_place_of_its_own(self, monkeypatch, release):
        monkeypatch.delenv("COMFYUI_PATH", raising=False)
        host, others = choose_host(release), map(choose_host, RELEASES.keys() - {release})
        own = {host.comfyui, host.venv, host.base}
        assert not any(own & {other.comfyui, other.venv, other.base} for other in others)

    def test_a_tree_without_python_runs_in_our_venv(self, tree):
        host = choose_host(None)
        assert (host.comfyui, host.venv.name, host.lender) == (tree, "venv", None)

    def test_a_tree_with_python_lends_it(self, tree):
        python = python_of(tree / "venv")
        python.parent.mkdir(parents=True)
        python.touch()
        host = choose_host(None)
        assert host.lender == python
        assert not host.python.is_relative_to(tree)

    def test_not_comfyui(self, tree):
        (tree / "main.py").unlink()
        with pytest.raises(SetupError, match=r"COMFYUI_PATH: .*ComfyUI has no ComfyUI"):
            choose_host(None)

    def test_a_folder_is_as_good_as_its_variable(self, tree, monkeypatch):
        host = choose_host(None)
        monkeypatch.delenv("COMFYUI_PATH")
        assert choose_host(str(tree)) == host
        assert host.comfyui == tree

    def test_neither_a_folder_nor_a_release(self, monkeypatch, tmp_path):
        monkeypatch.delenv("COMFYUI_PATH", raising=False)
        with pytest.raises(SetupError, match=r"--comfyui: .*0\.99\.0 has no .* and is no release"):
            choose_host(str(tmp_path / "0.99.0"))

    def test_two_answers_to_one_question(self, tree):
        with pytest.raises(SetupError, match="choose one"):
            choose_host("0.30.0")

    def test_trees_that_share_a_setup_know_it_by_one_path(self, tmp_path):
        folder, tree = tmp_path / "first" / ".dev", tmp_path / "second"
        folder.mkdir(parents=True)
        script = tree / "tests" / "environment" / "host.py"
        script.parent.mkdir(parents=True)
        shutil.copyfile(ROOT / "tests" / "environment" / "host.py", script)
        (tree / ".dev").symlink_to(folder, target_is_directory=True)
        assert folder == module_of(script).DEV

    def test_environment_is_that_of_the_venv(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PYTHONPATH", "elsewhere")
        host = Host(tmp_path / "ComfyUI", tmp_path / "venv", tmp_path / "base")
        assert host.environment["PATH"].startswith(str(host.python.parent))
        assert "PYTHONPATH" not in host.environment


class TestNewest:
    @pytest.fixture
    def repository(self, tmp_path) -> str:
        """A git repository whose releases were not made in their order."""
        folder = tmp_path / "repository"

        def git(*words: str) -> None:
            own = ("-c", "user.name=test", "-c", "user.email=test@localhost")
            subprocess.run(["git", "-C", folder, *own, *words], check=True, capture_output=True)

        folder.mkdir()
        git("init")
        for version in ("0.9.1", "0.30.0", "0.4.0"):
            (folder / "main.py").write_text(version)
            git("add", "main.py")
            git("commit", "-m", version)
            git("tag", f"v{version}")
        git("tag", "latest")
        return folder.as_uri()

    def test_is_the_highest_release(self, repository, tmp_path):
        assert newest.tag(repository) == "v0.30.0"
        host = Host(tmp_path / "home" / "ComfyUI", tmp_path / "venv", tmp_path / "base")
        (path,) = newest.fetch(host, repository, "v0.30.0")
        assert (path.name, path.read_text()) == ("main.py", "0.30.0")

    def test_without_network_a_folder_is_asked_for(self, tmp_path):
        with pytest.raises(SetupError, match="give its folder: --comfyui FOLDER"):
            newest.tag((tmp_path / "nothing").as_uri())


class TestCommandLine:
    @pytest.fixture
    def dev(self) -> ModuleType:
        return module_of(ROOT / "dev.py")

    @pytest.mark.parametrize(
        "words",
        [
            ["--comfyui", "0.27.0", "test", "tests/quant", "-k", "golden"],
            ["test", "--comfyui", "0.27.0", "tests/quant", "-k", "golden"],
            ["test", "tests/quant", "-k", "golden", "--comfyui=0.27.0"],
        ],
    )
    def test_the_release_may_stand_anywhere(self, dev, words):
        assert dev.release_first(words) == [
            "--comfyui", "0.27.0", "test", "tests/quant", "-k", "golden",
        ]  # fmt: skip

    def test_all_else_is_left_alone(self, dev):
        words = ["serve", "--port", "8189", "--", "-x", "--comfy"]
        assert dev.release_first(words) == words


class TestExplain:
    @pytest.mark.parametrize(
        ("output", "advice"),
        [
            ("The virtual environment was not created: ensurepip is not available", "python3-venv"),
            ("OSError: [Errno 28] No space left on device", "disk space"),
            ("ERROR: No matching distribution found for torch==2.11.0", "registry"),
            ("something else", "delete the folder"),
        ],
    )
    def test_says_what_to_do(self, output, advice):
        message = explain(["pip", "install"], f"many lines\n{output}\n")
        assert output in message
        assert advice in message.splitlines()[-1]
