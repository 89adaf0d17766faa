"""The settings, in ComfyUI's own file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from bench.common import ROOT
from hswq.loader.host.settings import (
    BUDGET,
    COMPENSATE_LORAS,
    NAMES,
    RECORD,
    REFINED,
    TARGET,
    Settings,
    SettingsFile,
    parse,
)


class TestParse:
    def test_nothing_chosen(self):
        assert parse({"Comfy.Other": 1}) == Settings(True, 256, 2.0, 20.0)

    def test_chosen(self):
        chosen = {RECORD: False, TARGET: 64, BUDGET: 0.5, REFINED: 0}
        assert parse(chosen) == Settings(False, 64, 0.5, 0)

    @pytest.mark.parametrize("key", [RECORD, TARGET, BUDGET, REFINED])
    @pytest.mark.parametrize("value", ["yes", [], {}, -1, 1e9, float("nan")])
    def test_the_default_for_what_is_none(self, key, value, caplog):
        assert parse({key: value}) == Settings()
        assert key in caplog.text

    @pytest.mark.parametrize("value", [None, "", " , ", 3, ["a"], {}])
    def test_no_other_names(self, value):
        assert parse({NAMES: value}) == Settings()

    def test_other_names(self):
        names = {"a.example", "b"}
        assert parse({NAMES: " A.example,b;a.example "}).names == names

    @pytest.mark.parametrize("values", [[], None, 3, "text"])
    def test_refuses_another_file(self, values):
        with pytest.raises(ValueError, match="not a JSON object"):
            parse(values)


class TestSettingsFile:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "comfy.settings.json"

    def test_follows_the_file(self, path):
        file = SettingsFile(path)
        assert file.current() == Settings()
        path.write_text(json.dumps({RECORD: False}))
        assert file.current() == Settings(record=False)
        path.unlink()
        assert file.current() == Settings()

    def test_keeps_the_last_ones_while_it_is_written(self, path):
        file = SettingsFile(path)
        path.write_text(json.dumps({TARGET: 100}))
        assert file.current().target == 100
        path.write_text('{"HSWQ.Tar')
        assert file.current().target == 100
        path.write_text("[" * 200_000)
        assert file.current().target == 100
        path.write_text(json.dumps({TARGET: 101}))
        assert file.current().target == 101


def test_the_dialog_has_the_same():
    script = (ROOT / "web" / "settings.mjs").read_text("utf-8")
    entries = re.findall(r'setting\(\s*"(\w+)",\s*"[^"]*",\s*"\w+",\s*(.*?),', script)
    defaults = {f"HSWQ.{key}": json.loads(value) for key, value in entries}
    assert parse(defaults) == Settings()
    assert set(defaults) == {RECORD, TARGET, BUDGET, REFINED, NAMES, COMPENSATE_LORAS}
