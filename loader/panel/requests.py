"""Checking requests, and answering in JSON."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import json
import re
import urllib.parse
from collections.abc import Awaitable, Callable, Collection

from aiohttp import web
from comfy.cli_args import args

from ..host import settings
from ..jobs.keeping import BY_EFFECT, Keeping
from .catalogue import UnknownModelError

JSON, BYTES = "application/json", "application/octet-stream"
MAX_JSON_BYTES = 1 << 16
_NUMBER = re.compile(r"[0-9]{1,7}(\.[0-9]{1,20})?(e-[0-9]{1,3})?")
BODY_SECONDS = 120
"""For 64 MiB at 5 Mbit/s. One who sends nothing keeps nobody waiting for longer."""

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^\[\]:@/#?\s]*)(:[0-9]*)?")


class RefusedError(Exception):
    """A request that is refused, with the HTTP `status` to answer."""

    def __init__(self, status: int, reason: str) -> None:
        """Take the status and a sentence."""
        super().__init__(reason)
        self.status = status


Handler = Callable[[web.Request], Awaitable[object]]


def answered(handler: Handler) -> Handler:
    """Answer in JSON: what a handler returns, or a sentence about what is wrong."""

    @functools.wraps(handler)
    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            _check_host(request)
            found = await handler(request)
        except RefusedError as error:
            return _error(error.status, error)
        except UnknownModelError as error:
            return _error(404, error)
        except ValueError as error:
            return _error(400, error)
        except OSError as error:  # a full disk, or another process that keeps a lock
            return _error(409, error.strerror or error)
        if isinstance(found, web.StreamResponse):
            return found
        return web.json_response(found, dumps=_dumps)

    return answer


_dumps = functools.partial(json.dumps, allow_nan=False)


def _error(status: int, reason: object) -> web.Response:
    answer = web.json_response({"error": str(reason)}, status=status, dumps=_dumps)
    if status == 413:  # else the unread rest of the body would be taken for the next request
        answer.force_close()
    return answer


def _check_host(request: web.Request) -> None:
    """Refuse a request to a server of this machine only that was made under a foreign name.

    A page of another site could let its own name lead to this machine, and then read all answers.
    An IP address cannot be misled so. A server that listens to the network takes any name, because
    its user has opened it to others.

    Raises:
        RefusedError: the Host is not one of this server's.
    """
    if args.enable_cors_header == "*" or not all(map(_is_own, args.listen.split(","))):
        return
    for host in map(_host_name, request.headers.getall("Host", [])):
        if not (_is_own(host) or _is_address(host) or host in settings.current().names):
            raise RefusedError(
                403,
                f"HSWQ does not know this server as {host[:100]!r}: add the name to ComfyUI's "
                "settings, HSWQ, Other names of this server, or start ComfyUI with --listen",
            )


def _host_name(host: str) -> str:
    """Return a Host header without its port, in lower case; one of another form as it is.

    Not by urllib, of which some versions take "[::1].evil.example" for "::1".
    """
    found = _HOST.fullmatch(host.lower())
    return found["name"].strip("[]").rstrip(".") if found else host.lower()


def _is_own(host: str) -> bool:
    """Whether a name or address is that of the machine itself, such as "localhost"."""
    host = host.strip()
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def check_change(request: web.Request, content_type: str) -> None:
    """Refuse what a page of another site could send.

    Raises:
        RefusedError: the content type is a different one, or the request is from another site.
    """
    if "Content-Type" not in request.headers or request.content_type != content_type:
        raise RefusedError(415, f"the content type must be {content_type}")
    own = request.headers.get("Host", "").lower()
    for origin in request.headers.getall("Origin", []):
        if args.enable_cors_header in ("*", origin):
            continue
        try:
            host = urllib.parse.urlsplit(origin).netloc.lower()
        except ValueError:
            host = ""
        if not host or host != own:
            raise RefusedError(403, "the request is from another site")


async def body_of(request: web.Request, most: int) -> bytes:
    """Read a body, and no more of it than allowed.

    Raises:
        RefusedError: it is larger, or takes longer than BODY_SECONDS.
    """
    try:
        return await asyncio.wait_for(_read(request, most), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise RefusedError(408, f"the body must come within {BODY_SECONDS} seconds") from None


async def _read(request: web.Request, most: int) -> bytes:
    content = bytearray()
    if (request.content_length or 0) <= most:
        async for chunk in request.content.iter_any():
            content += chunk
            if len(content) > most:
                break
        else:
            return bytes(content)
    raise RefusedError(413, f"the body must have at most {most} bytes")


async def json_of(request: web.Request) -> dict:
    """Read a body that is a JSON object.

    Raises:
        RefusedError: it is not one.
    """
    try:
        body = json.loads(await body_of(request, MAX_JSON_BYTES))
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise RefusedError(400, "the body must be a JSON object")
    return body


def only(request: web.Request, key: str) -> str:
    """Return the value of a key that the query must have exactly once.

    Raises:
        RefusedError: the key is missing, or there more than once.
    """
    values = request.query.getall(key, [])
    if len(values) != 1:
        raise RefusedError(400, f"there must be one {key}, got {len(values)}")
    return values[0]


def one_of(request: web.Request, key: str, allowed: Collection[str]) -> str:
    """Return a value of the query that must be one of some.

    Raises:
        RefusedError: it is none of them.
    """
    value = only(request, key)
    if value not in allowed:
        raise RefusedError(400, f"the {key} must be one of {list(allowed)}, got {value!r}")
    return value


def keeping_of(request: web.Request) -> Keeping:
    """Return what the query keeps in 16 bit: `keep_mb` by effect, or else `keep_ratio`.

    Raises:
        RefusedError: it is no plain number.
    """
    if "keep_mb" in request.query:
        return Keeping(selection=BY_EFFECT, keep_mb=_number(request, "keep_mb"))
    return Keeping(_number(request, "keep_ratio"))


def _number(request: web.Request, key: str) -> float:
    value = only(request, key)
    if not _NUMBER.fullmatch(value):
        raise RefusedError(400, f"{key} must be a plain number, got {value!r}")
    return float(value)
