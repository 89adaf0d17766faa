from harness.fixtures import client, lora, pytest_runtest_makereport, recorded, server
from harness.packing import clone, pack, packed_server

__all__ = [
    "client",
    "clone",
    "lora",
    "pack",
    "packed_server",
    "pytest_runtest_makereport",
    "recorded",
    "server",
]
