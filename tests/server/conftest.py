from harness.fixtures import client, lora, pytest_runtest_makereport, recorded, server
from harness.panel import content, panel, ready

__all__ = [
    "client",
    "content",
    "lora",
    "panel",
    "pytest_runtest_makereport",
    "ready",
    "recorded",
    "server",
]
