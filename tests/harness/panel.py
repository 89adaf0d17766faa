"""What the panel asks, and a model that was recorded for it.

A room's conftest imports the fixtures.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hswq.calibration import load_statistics

from harness.client import Client
from harness.fixtures import small_sampling
from harness.http import BYTES, JSON, Answer, Connection
from harness.prompts import stock_loader
from harness.server import ComfyUIServer

SESSION = "recorded"
PREVIEW = "plan?mode=scaled&keep_ratio="


class Panel:
    """What the panel asks."""

    def __init__(self, url: str) -> None:
        """Take the server's address."""
        self._connection = Connection(url)
        self.ask = self._connection.ask

    def status(self) -> dict:
        """Return what is known of all models."""
        return self.ask("GET", "/hswq/status").json()

    def model(self) -> dict:
        """Return the only model that has a file."""
        (model,) = [one for one in self.status()["models"] if one["id"]]
        return model

    def get(self, rest: str = "", its_id: str | None = None) -> Answer:
        """Ask for something of a model, by default of the only one."""
        return self.ask(
            "GET", f"/hswq/statistics/{its_id or self.model()['id']}/{rest}".rstrip("/")
        )

    def reset(self, its_id: str, session: str | None = None) -> Answer:
        """Begin a session anew, or all of them."""
        body = json.dumps({"session": session}).encode()
        return self.ask("POST", f"/hswq/statistics/{its_id}/reset", body, JSON)

    def delete(self, its_id: str) -> Answer:
        """Delete a model."""
        return self.ask("DELETE", f"/hswq/statistics/{its_id}", headers=JSON)

    def upload(self, content: bytes, name: str = "theirs.pt") -> Answer:
        """Send a statistics file."""
        return self.ask("POST", f"/hswq/statistics/upload?name={name}", content, BYTES)


def sampled(client: Client, samples: int = 4, **how) -> None:
    """Sample with the toy so that it is recorded."""
    client.run(small_sampling(stock_loader(), samples, **how))


@pytest.fixture
def panel(server: ComfyUIServer, client: Client) -> Panel:
    """Of a server that has recorded nothing, and remembers no sampling either."""
    return Panel(server.url)


@pytest.fixture(scope="session")
def content(enough: Path) -> bytes:
    """A statistics file of the toy, with enough samples to load it in FP8."""
    (path,) = enough.glob("*.pt")
    return path.read_bytes()


@pytest.fixture
def ready(server: ComfyUIServer, content: bytes, panel: Panel) -> str:
    """The id of a model that was recorded; a plan of it was kept."""
    folder = server.models / "hswq"
    folder.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        its_id = load_statistics(file.name).fingerprint[:16]
    (folder / f"toy.{its_id}.{SESSION}.pt").write_bytes(content)
    (folder / "plans").mkdir(exist_ok=True)
    (folder / "plans" / f"{its_id}.0123.json").write_text("{}")
    return its_id
