from harness.fixtures import client, lora, pytest_runtest_makereport, recorded, server

__all__ = ["client", "lora", "pytest_runtest_makereport", "recorded", "server"]
