"""How long a route's own handler takes, without ComfyUI's middlewares around it."""

import time

from aiohttp import web
from server import PromptServer

SECONDS = "Probe-Seconds"
"""Header of every answer that a handler has made."""


def add_clock():
    """Add a middleware inside of all others."""
    PromptServer.instance.app.middlewares.append(clock)


@web.middleware
async def clock(request, handler):
    began = time.perf_counter()
    try:
        answer = await handler(request)
    except web.HTTPException as error:
        error.headers[SECONDS] = str(time.perf_counter() - began)
        raise
    if not answer.prepared:
        answer.headers[SECONDS] = str(time.perf_counter() - began)
    return answer
