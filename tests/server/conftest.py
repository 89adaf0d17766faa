from harness.fixtures import client, pytest_runtest_makereport, recorded, server

__all__ = ["client", "pytest_runtest_makereport", "recorded", "server"]
