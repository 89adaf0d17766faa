"""A short soak; `python dev.py bench soak` is the long one."""

import pytest
from harness.client import Client
from harness.fixtures import change_settings, record_every_layer
from harness.server import ComfyUIServer
from harness.soak import Soak

pytestmark = pytest.mark.server

WARM_UP, MORE = 18, 12
GROWTH = 48 << 10  # KiB; ComfyUI's caches and the allocator take their part


@pytest.fixture
def soak(server: ComfyUIServer, client: Client):
    yield Soak(server, client)
    change_settings(server, {"HSWQ.Target": 256})
    record_every_layer(server)


def test_stays_as_it_was(soak: Soak):
    soak.run(WARM_UP)
    before = soak.memory()
    soak.run(MORE)
    assert soak.hooks() == 0
    assert soak.memory() - before < GROWTH
    soak.assert_files_are_right()
    assert len(soak.done) == len(soak.actions)
    assert soak.exported
