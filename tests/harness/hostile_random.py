"""Requests that are changed at random, by a seed; each still has something that must be refused."""

from __future__ import annotations

import random
import urllib.parse
from collections.abc import Iterator

from harness.hostile import RESET, Request
from harness.http import BYTES, JSON

_ID = "/hswq/statistics/ID"
_READS = (
    "/hswq/status", "/hswq/statistics", _ID, f"{_ID}/plan?mode=scaled&keep_ratio=0.5",
    f"{_ID}/file?session=recorded", f"{_ID}/curves", f"{_ID}/reset",
    "/hswq/statistics/upload?name=x.pt",
    f"{_ID}/export?format=scaled&what=full%20checkpoint&keep_ratio=0.25",
)  # fmt: skip
_CHANGES = (
    ("POST", f"{_ID}/reset", RESET, JSON), ("DELETE", _ID, b"", JSON),
    ("POST", f"/api{_ID}/reset", b'{"session": "recorded"}', JSON),
    ("POST", "/hswq/statistics/upload?name=x.pt", b"PK\x03\x04 no file", BYTES),
)  # fmt: skip
_WRONG = (
    {"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Content-Type": "text/plain"},
    {"Content-Type": None}, {"Origin": ("http://HOST", "http://evil.example")}, {"Origin": "null"},
)  # fmt: skip
_PIECES = (
    "..", "/", "//", "%00", "%2f", "%", "?", "&", "=", ";", "#", "\\", "*", "'", '"', "<", "nan",
    "1e999", "-1", "[]", "{}", "null", "%ff", "%e2%80%ae", "ID", "recorded", "mode=scaled",
    "keep_ratio=1", "session=", "a" * 3000, "0" * 3000, ".", "%2e%2e%2f",
)  # fmt: skip


def requests(seed: int, count: int) -> Iterator[Request]:
    """Return so many requests after none of which anything may be different."""
    numbers = random.Random(seed)
    for _ in range(count):
        if numbers.random() < 0.5:
            target = _changed(numbers.choice(_READS), numbers)
            yield Request(
                numbers.choice(("GET", "GET", "GET", "HEAD")), target, b"", _more(numbers)
            )
            continue
        method, target, body, kind = numbers.choice(_CHANGES)
        if numbers.random() < 0.5:
            target = _changed(target, numbers)
        body = _changed_bytes(body, numbers)
        headers = {**kind, **dict(_more(numbers)), **numbers.choice(_WRONG)}
        yield Request(method, target, body, tuple(headers.items()))


def _changed(text: str, numbers: random.Random) -> str:
    """Insert, remove, repeat or encode parts of a target; it stays one line of ASCII."""
    for _ in range(numbers.choice((1, 1, 2, 5))):
        at = numbers.randrange(6, len(text) + 1)
        length = numbers.choice((0, 0, 1, 3, 8))
        part = text[at : at + length]
        piece = numbers.choice((*_PIECES, part * 2, urllib.parse.quote(part or "x", safe="")))
        text = text[:at] + piece + text[at + length :]
    return text


def _changed_bytes(body: bytes, numbers: random.Random) -> bytes:
    at, length = numbers.randrange(len(body) + 1), numbers.choice((0, 1, 4))
    piece = numbers.choice(
        (b"", b"\x00", b"[" * 500, b"\xff", b"1e999", body, numbers.randbytes(9))
    )
    return body[:at] + piece + body[at + length :]


def _more(numbers: random.Random) -> tuple[tuple[str, str], ...]:
    """Return headers that a browser or a proxy might add."""
    some = (
        ("Accept", "*/*"), ("Cookie", "a=" + "b" * 500), ("X-Forwarded-Host", "evil.example"),
        ("Range", "bytes=0-10"), ("X-HTTP-Method-Override", "DELETE"), ("Referer", "http://x"),
        ("Sec-Fetch-Site", "cross-site"), ("If-None-Match", "*"), ("Accept-Encoding", "gzip"),
    )  # fmt: skip
    return tuple(numbers.sample(some, numbers.choice((0, 1, 2))))
