"""Hostile requests to a live server: what is answered, how long it takes, what it changes.

Of each request's time, the handler's own part is told apart. The rest is ComfyUI's: where a
request has a Host and an Origin, its middleware looks up the Host's name (is_loopback in server.py,
by socket.getaddrinfo) before any handler, while all other requests wait. A resolver that does not
answer takes five seconds.
"""

import argparse
import operator
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path
from typing import NamedTuple

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

SECONDS = "probe-seconds"  # header of harness/probe_nodes/handlers.py
TABLES = ("ids", "sessions", "settings", "elsewhere", "hosts", "bodies", "methods")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--count", type=int, default=1000, help="random ones, beside the table's")
chosen = parser.parse_args()


class Took(NamedTuple):
    """What a request took: seconds in all, seconds in the route's handler; and what it was."""

    seconds: float
    handler: float
    what: str


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
        answers, took, connection = Counter(), [], Connection(server.url)
        for request in requests:
            real = real_one(request, its_id, server.port)
            began = time.monotonic()
            answer = connection.ask(real.method, real.target, real.body, dict(real.headers))
            seconds, ours = time.monotonic() - began, float(answer.headers.get(SECONDS, 0))
            headers = {key: str(value)[:80] for key, value in real.headers}
            took.append(Took(seconds, ours, f"{real.method} {real.target[:80]} {headers}"))
            answers[answer.status] += 1
        assert snapshot(server.base / "models") == before, "something on disk has changed"
        assert panel.status() == status
    print(f"seed {chosen.seed}, {len(requests)} requests, {dict(sorted(answers.items()))}")
    for key in ("seconds", "handler"):
        print(f"slowest by {key}:")
        for one in sorted(took, key=operator.attrgetter(key), reverse=True)[:5]:
            print(f"{1000 * one.seconds:.0f} ms, handler {1000 * one.handler:.0f} ms: {one.what}")


def real_one(request: hostile.Request, its_id: str, port: int) -> hostile.Request:
    """Return a request with the real id and host in it."""

    def real(text: str | tuple | None) -> str | tuple | None:
        if isinstance(text, tuple):
            return tuple(map(real, text))
        return text and text.replace("ID", its_id).replace("HOST", f"127.0.0.1:{port}")

    headers = tuple((key, real(value)) for key, value in request.headers)
    return request._replace(target=real(request.target), headers=headers)


main()
