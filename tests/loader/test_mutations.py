"""Files changed at random, by one seed; `dev.py bench hostile` does more of them by others."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from harness.mutated_caches import KINDS
from hswq.loader.host.folders import FOLDER

COUNT = 100


@pytest.fixture(autouse=True)
def kept(folders: Path) -> Path:
    return folders / "models" / FOLDER


@pytest.mark.filterwarnings("ignore::DeprecationWarning:pickletools")
@pytest.mark.parametrize("kind", KINDS)
def test_are_refused_in_a_sentence_or_read(tmp_path, kind: str):
    attack = KINDS[kind](tmp_path, random.Random(0))
    refused = 0
    for _ in range(COUNT):
        content = attack.write()
        refused += attack.is_refused()
        assert attack.path.read_bytes() == content
    assert refused > COUNT / 10
