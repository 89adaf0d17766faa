"""A table of requests to the panel's routes that must not change anything."""

from __future__ import annotations

import itertools
import json
import os
import pickle
from collections.abc import Iterator
from typing import NamedTuple

from harness.http import BYTES, JSON

RESET = b'{"session": null}'
LONG = "a" * 5000

TRAVERSALS = (
    "..", ".", "%2e%2e", "%2E%2e", ".%2e", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%2f..%2f..%2f",
    "..%2fcheckpoints%2fsd_xl_base_1.0.safetensors", "..%5c..%5cwindows", "%2e%2e%5c", "..\\..",
    "%252e%252e%252f", "....%2f%2f", "..%c0%af..%c0%af", "%c0%ae%c0%ae%c0%af", "%u002e%u002e",
    "%uff0e%uff0e%u2215", "%ef%bc%8e%ef%bc%8e%ef%bc%8f", "%2fetc%2fpasswd", "%2f%2fserver%2fshare",
    "file:%2f%2f%2fetc%2fpasswd", "C:%5cboot.ini", "%00", "x%00.pt", "..%00%2f", "%0a", "%0d%0aX:1",
)  # fmt: skip
STRANGE_NAMES = (
    "*", "%2a", "?", "%3f", "[0-9]", "%5b0-9a-f%5d", "{a,b}", "~", "~root", "$HOME",
    "%24%7bHOME%7d", "con", "nul", "aux", "-", "--help", "%20", "%09", "%7f", "%ff%fe", "%e2%80%ae",
    "'", "%22", "';drop%20table", "<script>", "%3cscript%3e", "{{7*7}}", "null", "undefined",
    "NaN", "true", "0", "-1", "1e999", "%f0%9f%92%a9", "%25s%25n", "a.b", ".hidden", "recorded.pt",
    "Recorded%20", LONG, "a" * 65, "upload%2f", "constructor", "__proto__",
)  # fmt: skip
SPELLINGS = (*TRAVERSALS, *STRANGE_NAMES)

NUMBERS = (
    "", "nan", "NaN", "-nan", "inf", "-inf", "Infinity", "1e999", "-1e999", "1e-9999", "-0.1",
    "1.1", "2", "1.0000001", "true", "True", "null", "none", "[]", "[0.5]", "{}", '"0.5"', "0,5",
    "0x1p-2", "0b1", "1_0", "+1", "%2b1", "%200.5", "0.5%00", "0.5%0a", "%D9%A1", "0.5;", "1/2",
    "--1", "1e", ".", "e1", "9" * 5000, "0." + "1" * 5000,
)  # fmt: skip
MODES = (
    "", "Scaled", "SCALED", "scaled%00", "scaled%20", "V1", "v2", "original", "..", "0", "1",
    "true", "[]", "compatible,scaled", LONG,
)  # fmt: skip

BODIES = (
    b"", b" ", b"null", b"true", b"0", b"-1", b"1e999", b"NaN", b"Infinity", b'"session"', b"[]",
    b'["session"]', b'[{"session": null}]', b"{}", b"{", b'{"session"}', b'{"session": }',
    b'{"Session": null}', b'{"sessions": null}', b'{"session": null, "id": 1}',
    b'{"session": null, "session2": null}', b'{"session": NaN}', b'{"session": Infinity}',
    b'{"session": -Infinity}', b'{"session": 1e999}', b'{"session": true}', b'{"session": false}',
    b'{"session": 0}', b'{"session": 1.5}', b'{"session": ""}', b'{"session": []}',
    b'{"session": [null]}', b'{"session": ["recorded"]}', b'{"session": {}}',
    b'{"session": {"$ne": null}}', b'{"session": "recorded\\u0000"}', b'{"session": "\\ud800"}',
    b'{"session": "../recorded"}', b'{"session": "*"}', b'{"session": "recorded.pt"}',
    b'{"session": "\xff"}', b"\xff\xfe", b"\xef\xbb\xbf{}", b"\x00", b"session=recorded",
    b"<session/>", b"[" * 60000, b'{"session":' * 5000, b"9" * 60000,
    b'{"session": "%s"}' % (b"a" * 60000),
    b" " * (1 << 16) + RESET, b'{"x": "' + b"a" * (1 << 20) + b'", "session": null}',
)  # fmt: skip

CONTENT_TYPES = (
    None, "", "text/plain", "text/plain;charset=UTF-8", "text/plain; application/json", "text/json",
    "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonx",
    "application/json-patch+json", "application/xml", "application", "json", "*/*", "/",
    "application/json, text/plain", "application/x-octet-stream", "image/png",
)  # fmt: skip
ELSEWHERE = (
    {"Origin": "null"}, {"Origin": "http://evil.example"}, {"Origin": "https://evil.example"},
    {"Origin": "http://127.0.0.1"}, {"Origin": "http://127.0.0.1:1"}, {"Origin": "file://"},
    {"Origin": "http://127.0.0.1.evil.example"}, {"Origin": "http://evil@127.0.0.1:1"},
    {"Origin": ""}, {"Origin": "HOST"}, {"Origin": "//HOST"[2:]}, {"Origin": "http://localhost:1"},
    {"Origin": "http://evil.example", "Referer": "http://HOST/"},
    {"Origin": "http://evil.example", "X-Forwarded-Host": "evil.example"},
    {"Origin": "http://evil.example", "Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "cross-site", "Origin": "http://HOST"},
)  # fmt: skip
TWICE = (
    {"Origin": ("http://HOST", "http://evil.example")},
    {"Origin": ("http://evil.example", "http://HOST")}, {"Origin": ("http://HOST", "")},
    {"Origin": ("http://HOST", "null")}, {"Origin": ("http://HOST", "http://HOST.evil.example")},
)  # fmt: skip
HOSTS = (
    "evil.example", "evil.example:8188", "EVIL.example.", "localhost.evil.example",
    "1.2.3.4.nip.io", "127.0.0.1.evil.example", "xn--localhost-9za",
)  # fmt: skip
STRANGE_HOSTS = (
    "localhost@evil.example", "evil.example:x", "[::1", "[::1].evil.example", "localhost%00", ".",
    "0x7f.1", "localhost evil.example", "evil.example#@localhost", "evil.example/localhost",
    "a" * 300,
)  # fmt: skip
METHODS = (
    "PUT", "PATCH", "TRACE", "PROPFIND", "MKCOL", "MOVE", "COPY", "LOCK", "PURGE", "SEARCH",
    "OPTIONS", "HEAD", "get", "GETT", "X", "DELETED",
)  # fmt: skip
OVERRIDES = (
    {"X-HTTP-Method-Override": "DELETE"}, {"X-Method-Override": "DELETE"},
    {"X-HTTP-Method": "POST"}, {"Range": "bytes=0-"}, {"Range": "bytes=-1,0-0,999999-"},
    {"Expect": "200-ok"},
    {"If-Range": "x"}, {"If-Modified-Since": "never"}, {"Accept": "x" * 4000},
    {"Content-Encoding": "gzip"}, {"Cookie": "a=b;" * 500},
    {"X-Forwarded-For": "127.0.0.1"}, {"Upgrade": "websocket", "Connection": "Upgrade"},
)  # fmt: skip


class Request(NamedTuple):
    """What is sent. ID and HOST in it stand for those of a real model and server."""

    method: str
    target: str
    body: bytes = b""
    headers: tuple[tuple[str, str | tuple[str, ...] | None], ...] = ()


def _request(method: str, target: str, body: bytes = b"", *headers: dict) -> Request:
    merged = {key: value for header in headers for key, value in header.items()}
    return Request(method, target, body, tuple(merged.items()))


def ids() -> Iterator[Request]:
    """Models that are none."""
    wrong = (
        "0" * 16,
        "ID0",
        "0ID",
        "ID%00",
        "ID%2f",
        "ID%2f..",
        "ID%20",
        "ID*",
        "IDID",
        "id",
        "ID.",
    )
    for name in (*SPELLINGS, *wrong):
        path = f"/hswq/statistics/{name}"
        yield _request("GET", f"{path}/plan?mode=scaled&keep_ratio=0.5")
        yield _request("GET", f"{path}/file?session=recorded")
        yield _request("POST", f"{path}/reset", RESET, JSON)
        yield _request("DELETE", path, b"", JSON)


def sessions() -> Iterator[Request]:
    """Sessions of a model that are none."""
    for name in SPELLINGS:
        yield _request("GET", f"/hswq/statistics/ID/file?session={name}")
        body = json.dumps({"session": f"x{name}"}).encode()
        yield _request("POST", "/hswq/statistics/ID/reset", body, JSON)


def settings() -> Iterator[Request]:
    """Plans of settings that are none."""
    for number in NUMBERS:
        yield _request("GET", f"/hswq/statistics/ID/plan?mode=scaled&keep_ratio={number}")
        yield _request("GET", f"/api/hswq/statistics/ID/plan?mode=compatible&keep_ratio={number}")
    for mode in MODES:
        yield _request("GET", f"/hswq/statistics/ID/plan?mode={mode}&keep_ratio=0.5")
    for query in ("", "?", "?mode", "?keep_ratio=0.5", "?mode=scaled&mode=scaled&keep_ratio=1"):
        yield _request("GET", f"/hswq/statistics/ID/plan{query}")


def changes() -> Iterator[tuple[str, str, bytes, dict]]:
    """What would change something, were it sent as it should be."""
    yield "POST", "/hswq/statistics/ID/reset", RESET, JSON
    yield "POST", "/api/hswq/statistics/ID/reset", b'{"session": "recorded"}', JSON
    yield "DELETE", "/hswq/statistics/ID", b"", JSON
    yield "POST", "/hswq/statistics/upload?name=x.pt", b"PK", BYTES


def elsewhere() -> Iterator[Request]:
    """What pages of other sites can send."""
    for (method, path, body, right), kind in itertools.product(changes(), CONTENT_TYPES):
        yield _request(method, path, body, {"Content-Type": kind})
        yield _request(method, path, body, {"Content-Type": kind, "Origin": "http://HOST"})
        if right != BYTES:
            yield _request(method, path, body, BYTES, {"X": str(kind)})
    from_elsewhere = (*ELSEWHERE, *TWICE)
    for (method, path, body, right), headers in itertools.product(changes(), from_elsewhere):
        yield _request(method, path, body, right, headers)


def hosts() -> Iterator[Request]:
    """Requests of pages of other sites, whose names lead to this machine."""
    theirs = [{"Host": name, "Origin": f"http://{name}"} for name in HOSTS]
    strange = [{"Host": name} for name in STRANGE_HOSTS]  # whose Origins ComfyUI cannot read
    for itself in (*theirs, *strange):
        for method, path, body, right in changes():
            yield _request(method, path, body, right, itself)
        for rest in ("status", "statistics", "statistics/ID", "statistics/ID/file?session=x"):
            yield _request("GET", f"/hswq/{rest}", b"", itself)


def bodies() -> Iterator[Request]:
    """Bodies that are none."""
    for body in BODIES:
        yield _request("POST", "/hswq/statistics/ID/reset", body, JSON)
        if body:
            yield _request("DELETE", "/hswq/statistics/ID", body, JSON)
    for size in (1 << 17, 1 << 40, (1 << 63) - 1):
        for method, path, _, right in changes():
            if right == JSON:
                yield _request(method, path, b"", JSON, {"Content-Length": str(size)})


def methods() -> Iterator[Request]:
    """Methods and headers that routes do not have, on routes that are there and that are not."""
    paths = (
        "/hswq/status", "/hswq/statistics", "/hswq/statistics/upload?name=x.pt",
        "/hswq/statistics/ID", "/hswq/statistics/ID/plan?mode=scaled&keep_ratio=0.5",
        "/hswq/statistics/ID/file?session=recorded", "/hswq/statistics/ID/reset",
    )  # fmt: skip
    for method, path in itertools.product(METHODS, paths):
        yield _request(method, path, RESET, JSON)
    for path in ("/hswq/status", "/hswq/statistics", "/hswq/statistics/ID/plan", "/hswq/x"):
        yield _request("POST", path, RESET, JSON)
        yield _request("DELETE", path, b"", JSON)
    for path in ("//", "/%2e%2e/", "/.", "/..%2f", "/status/", "/statistics/ID/", "/statistics//"):
        yield _request("GET", f"/hswq{path}")
        yield _request("POST", f"/hswq{path}", RESET, JSON)
    for path, headers in itertools.product(paths, OVERRIDES):
        yield _request("GET", path, b"", headers)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("malicious code was run",)


def uploads(content: bytes) -> Iterator[Request]:
    """Files that are none, and a real one under names that are none."""
    path = "/hswq/statistics/upload"
    wrong = (
        b"", b"x", b"PK\x03\x04", bytes(1000), content[:-1], content[: len(content) // 2],
        content[100:], content[:4] + bytes(1000), content.replace(b"hswq_dual", b"hswq_duel"),
        pickle.dumps(Malicious()), pickle.dumps({"meta": {}, "layers": {}}), b'{"layers": {}}',
    )  # fmt: skip
    for body in wrong:
        yield _request("POST", f"{path}?name=x.pt", body, BYTES)
    for name in (*TRAVERSALS, "", LONG, ".hidden", "-x", "a%2fb", "*", "%22", "x%0a"):
        yield _request("POST", f"{path}?name={name}", content, BYTES)
    for query in ("", "?", "?name", "?name=x&name=y", "?file=x"):
        yield _request("POST", path + query, content, BYTES)
    for size in ((64 << 20) + 1, 1 << 40):
        yield _request("POST", f"{path}?name=x", b"", BYTES, {"Content-Length": str(size)})
