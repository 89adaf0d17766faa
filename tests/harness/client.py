"""Talks to ComfyUI as its page does: prompts by HTTP, what becomes of them by websocket."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator

import safetensors.torch
import torch
import websocket

PROMPT_SECONDS = 240


class RejectedError(Exception):
    """ComfyUI did not queue a prompt. Attributes: `details`, its answer."""

    def __init__(self, details: dict) -> None:
        """Take ComfyUI's answer."""
        errors = [
            f"node {node}: {error['message']}: {error['details']}"
            for node, found in (details.get("node_errors") or {}).items()
            for error in found["errors"]
        ]
        super().__init__("; ".join(errors) or str(details))
        self.details = details


class ExecutionError(Exception):
    """A node raised; the message is its exception's. Attributes: `node`, its id, and `kind`."""

    def __init__(self, data: dict) -> None:
        """Take the data of ComfyUI's event."""
        super().__init__(data["exception_message"].strip())
        self.node = data["node_id"]
        self.kind = data["exception_type"]


class InterruptedPromptError(Exception):
    """The prompt was interrupted."""


@dataclasses.dataclass
class Run:
    """What a prompt did.

    Attributes:
        outputs: what output nodes showed, by node id.
        texts: lines that nodes showed, by node id.
        executed: ids of the nodes that ran, in order.
        cached: ids of the nodes whose earlier result was used.
    """

    outputs: dict[str, dict] = dataclasses.field(default_factory=dict)
    texts: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    executed: list[str] = dataclasses.field(default_factory=list)
    cached: list[str] = dataclasses.field(default_factory=list)

    def text(self, node: str) -> str:
        """Return the last line that a node showed, "" for none."""
        return self.texts.get(node, [""])[-1]


class Client:
    """One user of a server.

    Attributes:
        url: of the server.
    """

    def __init__(self, url: str) -> None:
        """Take the server's address."""
        self.url = url

    def run(self, prompt: dict, on_event: Callable[[dict], None] | None = None) -> Run:
        """Queue a prompt in API format and wait for its end.

        Args:
            prompt: node id to {"class_type": ..., "inputs": {...}}.
            on_event: is called with every JSON event of the prompt, while it runs.

        Raises:
            RejectedError: it was not queued.
            ExecutionError: a node raised.
            InterruptedPromptError: it was interrupted.
            TimeoutError: it does not end.
        """
        client_id, prompt_id = uuid.uuid4().hex, str(uuid.uuid4())
        with self.events(client_id) as events:
            body = {"prompt": prompt, "client_id": client_id, "prompt_id": prompt_id}
            self.post("/prompt", body)
            return _follow(events, prompt_id, on_event or (lambda _: None))

    @contextlib.contextmanager
    def events(self, client_id: str) -> Iterator[Iterator[dict]]:
        """Open a websocket; give its events as they come, until PROMPT_SECONDS have passed."""
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={client_id}"
        connection = websocket.create_connection(address, timeout=PROMPT_SECONDS)
        try:
            yield _events(connection)
        finally:
            connection.close()

    def get(self, path: str) -> bytes:
        """Return the body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return response.read()

    def get_json(self, path: str) -> object:
        """Return the JSON body of a GET."""
        return json.loads(self.get(path))

    def post(self, path: str, body: dict) -> bytes:
        """POST JSON and return the answer's body.

        Raises:
            RejectedError: the server says that the request is wrong.
        """
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise RejectedError(json.loads(error.read())) from None

    def interrupt(self) -> None:
        """Interrupt what runs, as the Cancel button does."""
        self.post("/interrupt", {})

    def free(self, *, unload_models: bool = True, free_memory: bool = True) -> None:
        """Ask to unload models and forget results; done soon after, see the probe's models."""
        self.post("/free", {"unload_models": unload_models, "free_memory": free_memory})

    def saved_file(self, saved: dict) -> bytes:
        """Return a file that an output node has shown: {"filename", "subfolder", "type"}."""
        return self.get(f"/view?{urllib.parse.urlencode(saved)}")

    def latent(self, run: Run, node: str = "save") -> torch.Tensor:
        """Return what a stock SaveLatent node has saved."""
        data = self.saved_file(run.outputs[node]["latents"][0])
        return safetensors.torch.load(data)["latent_tensor"]


def _events(connection: websocket.WebSocket) -> Iterator[dict]:
    """Give JSON events; pictures of a sampling are passed over."""
    end = time.monotonic() + PROMPT_SECONDS
    while time.monotonic() < end:
        message = connection.recv()
        if isinstance(message, str):
            yield json.loads(message)
    raise TimeoutError(f"the prompt has not ended after {PROMPT_SECONDS} s")


def _follow(events: Iterator[dict], prompt_id: str, on_event: Callable[[dict], None]) -> Run:
    """Collect a prompt's events until it has ended."""
    run = Run()
    for event in events:
        kind, data = event["type"], event.get("data", {})
        if data.get("prompt_id") != prompt_id:
            continue
        on_event(event)
        if kind == "execution_success":
            return run
        _take(run, kind, data)
    raise AssertionError("the websocket's events never end")


def _take(run: Run, kind: str, data: dict) -> None:
    if kind == "executing" and data["node"] is not None:
        run.executed.append(data["node"])
    elif kind == "execution_cached":
        run.cached.extend(data["nodes"])
    elif kind == "executed":
        run.outputs[data["node"]] = data["output"]
        run.texts.setdefault(data["node"], []).extend((data["output"] or {}).get("text", []))
    elif kind == "execution_error":
        raise ExecutionError(data)
    elif kind == "execution_interrupted":
        raise InterruptedPromptError(data.get("node_id"))
