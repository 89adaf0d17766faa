"""Checking requests, and answering in JSON."""

from __future__ import annotations

import functools
import json
import urllib.parse
from collections.abc import Awaitable, Callable

from aiohttp import web
from comfy.cli_args import args

from .catalogue import UnknownModelError

JSON, BYTES = "application/json", "application/octet-stream"
MAX_JSON_BYTES = 1 << 16


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


def check_change(request: web.Request, content_type: str) -> None:
    """Refuse what a page of another site could send.

    Raises:
        RefusedError: the content type is a different one, or the request is from another site.
    """
    if "Content-Type" not in request.headers or request.content_type != content_type:
        raise RefusedError(415, f"the content type must be {content_type}")
    origin = request.headers.get("Origin")
    if origin is None or args.enable_cors_header in ("*", origin):
        return
    try:
        host = urllib.parse.urlsplit(origin).netloc.lower()
    except ValueError:
        host = ""
    if not host or host != request.headers.get("Host", "").lower():
        raise RefusedError(403, "the request is from another site")


async def body_of(request: web.Request, most: int) -> bytes:
    """Read a body, and no more of it than allowed.

    Raises:
        RefusedError: it is larger.
    """
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
