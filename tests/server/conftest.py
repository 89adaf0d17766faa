from harness.fixtures import client, enough, lora, pytest_runtest_makereport, recorded, server
from harness.packing import clone, pack, packed_server
from harness.panel import content, panel, ready

__all__ = [
    "client",
    "clone",
    "content",
    "enough",
    "lora",
    "pack",
    "packed_server",
    "panel",
    "pytest_runtest_makereport",
    "ready",
    "recorded",
    "server",
]
