"""A short soak; `python dev.py bench soak` is the long one."""

import pytest
from harness.client import Client
from harness.server import ComfyUIServer
from harness.soak import MODELS, Soak

pytestmark = pytest.mark.server

WARM_UP, MORE = 12, 6  # the first is each action with each model
# Memory goes up and down by 50 MiB from one look to the next; a model of the toy that is left by
# each thing done would make 400. Objects vary little, and a model has thousands.
GROWTH, OBJECTS = 128 << 10, 5000


def test_stays_as_it_was(server: ComfyUIServer, client: Client):
    soak = Soak(server, client, models=MODELS[:2])
    soak.run(WARM_UP)
    before, objects = soak.memory(), soak.objects()
    soak.run(MORE)
    assert soak.hooks() == 0
    assert soak.memory() - before < GROWTH
    assert soak.objects() - objects < OBJECTS
    soak.assert_files_are_right()
    assert len(soak.done) == len(soak.actions)
    assert soak.exported
