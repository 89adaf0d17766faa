"""What the registry gives to users is all that they need, and no more."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import pytest
from harness.client import Client
from harness.fixtures import small_sampling
from harness.lines import QUARTER_KEPT, layers_told
from harness.packing import NAME, comfy
from harness.prompts import hswq_loader, text_to_latent
from harness.server import ComfyUIServer

pytestmark = pytest.mark.server

ROOMS = {"calibration", "docs", "example_workflows", "loader", "locales", "quant", "web"}
FILES = {"CHANGELOG.md", "LICENSE", "README.md", "__init__.py", "pyproject.toml"}
ENDINGS = {"", ".css", ".jpg", ".js", ".json", ".md", ".mjs", ".png", ".py", ".svg", ".toml"}
MAX_BYTES = 2 << 20


def below(pack: zipfile.ZipFile, folder: str) -> list[str]:
    """Return the names of the files below a folder, relative to it."""
    return [name.removeprefix(folder) for name in pack.namelist() if name.startswith(folder)]


class TestContent:
    def test_is_what_is_needed(self, pack: zipfile.ZipFile):
        tops = {name.partition("/")[0] for name in pack.namelist()}
        assert FILES <= tops <= ROOMS | FILES
        assert {Path(name).suffix for name in pack.namelist()} <= ENDINGS
        assert sum(info.file_size for info in pack.infolist()) < MAX_BYTES

    def test_is_all_of_it(self, pack: zipfile.ZipFile, clone: Path):
        for room in ROOMS:
            files = (path for path in (clone / room).rglob("*.*") if path.suffix in ENDINGS)
            assert {path.relative_to(clone).as_posix() for path in files} <= set(pack.namelist())

    def test_the_registry_accepts_it(self, clone: Path, tmp_path: Path):
        printed = comfy("node", "validate", folder=clone, home=tmp_path)
        assert "All validation checks passed" in printed
        assert not re.search("warning|error", printed, re.IGNORECASE)


class TestServer:
    @pytest.fixture
    def client(self, packed_server: ComfyUIServer) -> Client:
        return Client(packed_server.url)

    def test_starts_without_a_complaint(self, packed_server: ComfyUIServer, client: Client):
        log = packed_server.log.read_text("utf-8")
        assert NAME in log
        assert not re.search("Traceback|IMPORT FAILED|Cannot import", log)

    def test_has_the_nodes(self, client: Client, clone: Path):
        files = (clone / "loader" / "nodes").glob("*.py")
        declared = "".join(path.read_text("utf-8") for path in files)
        nodes = set(re.findall(r'node_id="(\w+)"', declared))
        known = client.get_json("/object_info")
        assert len(nodes) >= 6
        ours = f"custom_nodes.{NAME}"
        assert {node for node in known if known[node]["python_module"] == ours} == nodes

    def test_serves_the_page_its_files(self, client: Client, pack: zipfile.ZipFile):
        scripts = set(client.get_json("/extensions"))
        for name in below(pack, "web/"):
            assert client.get(f"/extensions/{NAME}/{name}") == pack.read(f"web/{name}")
            assert (f"/extensions/{NAME}/{name}" in scripts) == name.endswith(".js")

    def test_serves_its_translations(self, client: Client, pack: zipfile.ZipFile):
        known = client.get_json("/i18n")
        for name in below(pack, "locales/"):
            language, _, kind = name.removesuffix(".json").partition("/")
            for key, value in json.loads(pack.read(f"locales/{name}")).items():
                found = known[language] if kind == "main" else known[language][kind]
                assert found[key] == value

    def test_offers_the_example_workflows(self, client: Client, pack: zipfile.ZipFile):
        names = {name.removesuffix(".json") for name in below(pack, "example_workflows/")}
        offered = set(client.get_json("/api/workflow_templates")[NAME])
        assert offered == {name for name in names if not name.endswith(".jpg")} != set()

    def test_from_nothing_to_fp8(self, packed_server: ComfyUIServer, client: Client):
        """Generate, and generate again: installing and opening the template come before."""
        first = client.run(small_sampling(hswq_loader()))
        assert first.text("loader").startswith("16 bit for now")
        second = client.run(text_to_latent(hswq_loader(), seed=1))
        assert layers_told(second.text("loader")) in QUARTER_KEPT
        assert ", 32 images, FP8; " in second.text("loader")
