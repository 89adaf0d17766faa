"""Texts: every node has help, and every language has every text that it must have."""

import json
import re
from pathlib import Path

import pytest
from environment.install import ROOT
from harness.client import Client
from hswq.quant import Reason

pytestmark = pytest.mark.server

LANGUAGES = sorted(path.name for path in (ROOT / "locales").iterdir())
OTHERS = [language for language in LANGUAGES if language != "en"]
WEB = ROOT / "web"
SETTINGS = (
    "HSWQ_Budget", "HSWQ_CompensateLoras", "HSWQ_Names", "HSWQ_Record", "HSWQ_RefinedGB",
    "HSWQ_Target",
)  # fmt: skip


@pytest.fixture(scope="module")
def texts(server) -> dict[str, dict]:
    """What ComfyUI gives to its page, by language."""
    return Client(server.url).get_json("/i18n")


@pytest.fixture(scope="module")
def nodes(server) -> dict[str, dict]:
    """This extension's nodes, as ComfyUI describes them."""
    known = Client(server.url).get_json("/object_info")
    return {name: node for name, node in known.items() if name.startswith("HSWQ")}


def placeholders(text: str) -> set[str]:
    return set(re.findall(r"{\w+}", text))


class TestPanel:
    def test_has_all_its_words(self, texts: dict):
        code = "\n".join(path.read_text("utf-8") for path in WEB.rglob("*.*js"))
        used = set(re.findall(r'\bt\("([^"]+)"', code))
        assert len(used) > 30
        assert used <= texts["en"]["hswq"].keys()

    def test_names_and_explains_what_the_export_takes(self, texts: dict, nodes: dict):
        inputs = nodes["HSWQExport"]["input"]["required"]
        words = texts["en"]["hswq"].keys()
        assert set(inputs["what"][1]["options"]) <= words
        # Nothing that runs on today's ComfyUI reads it but our loaders; the node writes it.
        formats = set(inputs["format"][1]["options"]) - {"original V2"}
        assert formats | {f"about {name}" for name in formats} <= words
        modes = nodes["HSWQCheckpointLoader"]["input"]["required"]["mode"][1]["options"]
        assert {*modes, *(f"about mode {name}" for name in modes)} <= words

    def test_counts_in_the_forms_of_its_language(self, texts: dict):
        code = "\n".join(path.read_text("utf-8") for path in WEB.rglob("*.*js"))
        counted = set(re.findall(r'\bcounted\("([^"]+)"', code))
        assert counted == {"images", "others"}
        for words in texts.values():
            if "hswq" in words:
                assert {f"{key} other" for key in counted} <= words["hswq"].keys()

    @pytest.mark.parametrize("language", OTHERS)
    def test_says_the_same_in_every_language(self, texts: dict, language: str):
        english, other = texts["en"]["hswq"], texts[language]["hswq"]
        assert english.keys() <= other.keys()
        assert all(placeholders(english[key]) == placeholders(other[key]) for key in english)

    def test_explains_reasons_as_recording_has_them(self, texts: dict):
        reasons = [key for key in texts["en"]["hswq"] if key.startswith(("it ", "its ", "the "))]
        files = (ROOT / "loader" / "recording").glob("*.py")
        code = "".join(path.read_text("utf-8") for path in files)
        assert len(reasons) == 13
        assert all(f'"{reason}"' in code for reason in reasons)

    @pytest.mark.parametrize("language", ["en", *OTHERS])
    def test_says_why_a_layer_is_kept(self, texts: dict, language: str):
        reasons = {f"reason {reason.value}" for reason in Reason}
        assert reasons == {key for key in texts[language]["hswq"] if key.startswith("reason ")}


class TestNodes:
    def test_have_help(self, nodes: dict):
        assert {path.stem for path in (WEB / "docs").glob("*.md")} == nodes.keys()

    def test_help_names_what_is_there(self, nodes: dict, server):
        for name, node in nodes.items():
            text = Client(server.url).get(f"/extensions/hswq/docs/{name}.md").decode()
            assert text.startswith(f"# {node['display_name']}\n")
            inputs = {name for group in node["input"].values() for name in group}
            told = set(re.findall(r"^- `(\w+)`", text, re.MULTILINE))
            assert told <= inputs

    @pytest.mark.parametrize("language", OTHERS)
    def test_are_translated(self, texts: dict, nodes: dict, language: str):
        translated = texts[language]["nodeDefs"]
        assert {name for name in translated if name.startswith("HSWQ")} == nodes.keys()
        for name, node in nodes.items():
            visible = {*node["input"].get("required", {}), *node["input"].get("optional", {})}
            assert translated[name].get("inputs", {}).keys() == visible
            outputs = {str(number) for number in range(len(node["output"]))}
            assert translated[name].get("outputs", {}).keys() == outputs

    @pytest.mark.parametrize("language", OTHERS)
    def test_settings_are_translated(self, texts: dict, language: str):
        assert all(texts[language]["settings"][name]["tooltip"] for name in SETTINGS)
        assert texts[language]["commands"]["HSWQ_TogglePanel"]["label"]


def test_files_are_json_objects():
    for path in (ROOT / "locales").glob("*/*.json"):
        assert isinstance(json.loads(Path(path).read_text("utf-8")), dict)
