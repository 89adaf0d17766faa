"""Hostile requests to a live server: what is answered, how long it takes, what it changes."""

import argparse
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
package = types.ModuleType("hswq")
package.__path__ = [str(ROOT)]
sys.modules["hswq"] = package

from harness import hostile, hostile_random  # noqa: E402
from harness.client import Client  # noqa: E402
from harness.fixtures import free, toy_server  # noqa: E402
from harness.http import Connection  # noqa: E402
from harness.panel import SESSION, Panel, sampled  # noqa: E402
from harness.server import snapshot  # noqa: E402

TABLES = ("ids", "sessions", "settings", "elsewhere", "hosts", "bodies", "methods")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--count", type=int, default=1000, help="random ones, beside the table's")
chosen = parser.parse_args()


def main() -> None:
    with tempfile.TemporaryDirectory() as base, toy_server(Path(base)) as server:
        client, panel = Client(server.url), Panel(server.url)
        sampled(client, 32, seed=5)
        free(client)
        its_id = panel.model()["id"]
        content = panel.get(f"file?session={SESSION}").body
        requests = [request for name in TABLES for request in getattr(hostile, name)()]
        requests += [*hostile.uploads(content), *hostile_random.requests(chosen.seed, chosen.count)]
        status, before = panel.status(), snapshot(server.base / "models")
        answers, slowest, connection = Counter(), [], Connection(server.url)
        for request in requests:
            real = real_one(request, its_id, server.port)
            began = time.monotonic()
            answer = connection.ask(real.method, real.target, real.body, dict(real.headers))
            slowest.append((time.monotonic() - began, f"{real.method} {real.target[:80]}"))
            answers[answer.status] += 1
        assert snapshot(server.base / "models") == before, "something on disk has changed"
        assert panel.status() == status
    slowest.sort(reverse=True)
    print(f"seed {chosen.seed}, {len(requests)} requests, {dict(sorted(answers.items()))}")
    print(*(f"{1000 * seconds:.0f} ms {what}" for seconds, what in slowest[:5]), sep="\n")


def real_one(request: hostile.Request, its_id: str, port: int) -> hostile.Request:
    """Return a request with the real id and host in it."""

    def real(text: str | tuple | None) -> str | tuple | None:
        if isinstance(text, tuple):
            return tuple(map(real, text))
        return text and text.replace("ID", its_id).replace("HOST", f"127.0.0.1:{port}")

    headers = tuple((key, real(value)) for key, value in request.headers)
    return request._replace(target=real(request.target), headers=headers)


main()
