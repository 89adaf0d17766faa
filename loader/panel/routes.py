"""What the panel asks over HTTP.

GET changes nothing. A request that changes something needs a content type that a page of another
site cannot send by itself. If it names an Origin, that must be this server's.
"""

from __future__ import annotations

import asyncio
import functools
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from aiohttp import web
from server import PromptServer

from ...quant import NUMBER_FORMATS, QuantizeSettings
from .. import store
from ..files.layer_formats import FILE_FORMATS
from ..host.events import changed
from ..jobs.choice import AUTO, FAIL
from ..jobs.export_settings import MODEL_ONLY, WHAT, ExportSettings
from ..jobs.keeping import Keeping
from ..jobs.model_files import source_path
from ..recording.recorder import recorder
from ..recording.status import RECORDING, ModelStatus, samplings
from ..store import search_cache
from ..store.effects import forget_effects
from ..store.heads import ID_DIGITS
from . import preview, uploads
from .catalogue import Catalogue, Model, UnknownModelError
from .curves import curves
from .requests import (
    BYTES,
    JSON,
    MAX_JSON_BYTES,
    RefusedError,
    answered,
    body_of,
    check_change,
    json_of,
    keeping_of,
    one_of,
    only,
)

_ID = re.compile(r"[0-9a-f]{16}")

_SERVER = secrets.token_hex(8)  # another after each start: jobs of before are lost
_catalogue = Catalogue(recorder.status)
_reader = ThreadPoolExecutor(1, "hswq")
"""Calls the catalogue, one call at a time. Its thread starts with the first request."""

_uploading = asyncio.Lock()
"""One upload after the other: each may take 64 MiB, and twice that to be read."""


async def read(question: Callable, *arguments: object) -> object:
    """Ask the catalogue or one of its models, outside of the event loop."""
    return await asyncio.get_running_loop().run_in_executor(
        _reader, functools.partial(question, *arguments)
    )


async def status() -> dict:
    """Return what GET /hswq/status answers."""
    return {**await read(_catalogue.status), "server": _SERVER, **await progress()}


async def progress() -> dict:
    """Return how far the samplings are that are being recorded."""
    return {"live": [one.to_json() for one in samplings()]}


async def model_json(its_id: str) -> dict:
    """Return what the panel shows of a model.

    Raises:
        UnknownModelError: there is none.
    """
    return await read(lambda: _catalogue.model(its_id).to_json())


async def model_of(request: web.Request) -> Model:
    """Return the model that a path names.

    Raises:
        RefusedError, UnknownModelError: there is none.
    """
    its_id = request.match_info["id"]
    if not _ID.fullmatch(its_id):
        raise RefusedError(404, "a model's id is 16 hex digits")
    return await read(_catalogue.model, its_id)


async def recorded_model(request: web.Request) -> Model:
    """Return the model that a path names, which has statistics.

    Raises:
        RefusedError, UnknownModelError: there is none.
    """
    model = await model_of(request)
    if not model.files:
        raise UnknownModelError(f"nothing was recorded of {model.name}")
    return model


def check_session(model: Model, session: object) -> None:
    """Refuse what is not a session of a model.

    Raises:
        ValueError: it cannot be the name of a session.
        UnknownModelError: the model has no session of that name.
    """
    store.check_session(session)
    if all(file.name != session for file in model.files):
        raise UnknownModelError(f"{model.name} has no session {session!r}")


@answered
async def get_status(_: web.Request) -> dict:
    """All models, and what recording does."""
    return await status()


@answered
async def get_statistics(_: web.Request) -> dict:
    """The models that have statistics."""

    def known() -> list[dict]:
        return [model.to_json() for model in _catalogue.models() if model.files]

    return {"models": await read(known)}


@answered
async def get_model(request: web.Request) -> dict:
    """One model with its layers."""
    model = await model_of(request)
    return await read(lambda: {**model.to_json(), "rows": preview.rows(model)})


@answered
async def get_plan(request: web.Request) -> dict:
    """What a Plan would do, for `mode`, and `keep_ratio` or (by effect) `keep_mb`."""
    mode, keeping = one_of(request, "mode", NUMBER_FORMATS), keeping_of(request)
    return await read(_plan, await recorded_model(request), mode, keeping)


@answered
async def get_curves(request: web.Request) -> dict:
    """Bytes against expected error, for every format and selection."""
    return await read(curves, await recorded_model(request))


@answered
async def get_export(request: web.Request) -> dict:
    """What an export would write, to the byte: `format`, `what`, and as get_plan."""
    keeping = keeping_of(request)
    settings = ExportSettings(
        one_of(request, "format", FILE_FORMATS),
        AUTO,
        keeping.keep_ratio,
        FAIL,
        one_of(request, "what", WHAT) == MODEL_ONLY,
        keeping.also_keep,
        compensated=True,
        selection=keeping.selection,
        keep_mb=keeping.keep_mb,
    )
    model = await recorded_model(request)
    if model.source is None:
        raise UnknownModelError(f"the file of {model.name} is not in ComfyUI's folders")
    return await read(_export, model.source, settings)


@answered
async def get_file(request: web.Request) -> web.FileResponse:
    """The statistics file of a `session`."""
    model = await model_of(request)
    session = only(request, "session")
    check_session(model, session)
    path = next(file.path for file in model.files if file.name == session)
    if not path.is_file():
        raise UnknownModelError(f"{model.name} has no session {session!r} any more")
    name = re.sub(r"[^\w.-]", "_", path.name, flags=re.ASCII)
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Content-Type": BYTES}
    return web.FileResponse(path, headers=headers)


@answered
async def reset(request: web.Request) -> dict:
    """Remove one session of a model, or all; answer with the model as it is then."""
    check_change(request, JSON)
    body = await json_of(request)
    if body.keys() != {"session"}:
        raise RefusedError(400, 'the body must be {"session": a name, or null for all}')
    model = await model_of(request)
    session = body["session"]
    if session is not None:
        check_session(model, session)
    try:
        await asyncio.to_thread(_remove, model, session)
    finally:
        recorder.table.note(ModelStatus(model.name, model.fingerprint, RECORDING))
    return await model_json(model.id)


@answered
async def delete(request: web.Request) -> dict:
    """Forget a model: its statistics, and what searches found with them."""
    check_change(request, JSON)
    if await body_of(request, MAX_JSON_BYTES):
        raise RefusedError(400, "the body must be empty")
    model = await model_of(request)
    try:
        deleted = await asyncio.to_thread(_remove, model)
    finally:
        recorder.table.forget(model.fingerprint)
        changed()
    return {"deleted": deleted}


@answered
async def upload(request: web.Request) -> dict:
    """Keep a statistics file that is called `name`; answer with its model as it is then."""
    check_change(request, BYTES)
    name = only(request, "name")
    async with _uploading:
        content = await body_of(request, uploads.MAX_BYTES)
        fingerprint = await asyncio.to_thread(uploads.take_in, content, name)
    return await model_json(fingerprint[:ID_DIGITS])


@answered
async def unknown(_: web.Request) -> None:
    """Any other path below /hswq."""
    raise RefusedError(404, "there is no such route")


def _plan(model: Model, mode: str, keeping: Keeping) -> dict:
    """Return the Plan of a loader whose other inputs are at their defaults."""
    settings = QuantizeSettings(NUMBER_FORMATS[mode], compensated=True)
    basis = preview.Basis.of(preview.Recorded.of(model), settings)
    return preview.preview_of(basis, basis.selection(keeping))


def _export(source: str, settings: ExportSettings) -> dict:
    from ..jobs.export import planned  # it needs more of ComfyUI than the panel does

    found = planned(source_path(source), settings)
    facts = {"quantized": found.quantized, "kept": found.kept, "bytes": found.size}
    return {**facts, "outcome": found.outcome.to_json()}


def _remove(model: Model, session: str | None = None) -> int:
    """Remove one session of a model, or all, and what searches found; return how many files.

    Who calls it tells of the change, once the recorder's table is right too: the panel would close
    a model's details if it saw the model leave and come back.
    """
    try:
        return store.remove_statistics(model.fingerprint, session)
    finally:
        search_cache.forget_findings(model.fingerprint)
        forget_effects(model.fingerprint)


def add_routes(server: PromptServer) -> None:
    """Add the routes to ComfyUI's server, which serves them below / and /api."""
    routes = server.routes
    routes.get("/hswq/status")(get_status)
    routes.get("/hswq/statistics")(get_statistics)
    routes.post("/hswq/statistics/upload")(upload)
    routes.get("/hswq/statistics/{id}")(get_model)
    routes.delete("/hswq/statistics/{id}")(delete)
    routes.get("/hswq/statistics/{id}/plan")(get_plan)
    routes.get("/hswq/statistics/{id}/curves")(get_curves)
    routes.get("/hswq/statistics/{id}/export")(get_export)
    routes.get("/hswq/statistics/{id}/file")(get_file)
    routes.post("/hswq/statistics/{id}/reset")(reset)
    routes.route("*", "/hswq/{rest:.*}")(unknown)
