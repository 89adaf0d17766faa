"""What tests that talk to a server share. A room's conftest imports it, and gets its own server."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file
from toy.checkpoint import make_checkpoint

from harness.client import Client
from harness.http import JSON, Connection
from harness.patches import patch_file
from harness.prompts import CHECKPOINT, Prompt, stock_loader, text_to_latent
from harness.server import ComfyUIServer

PROBE_NODES = Path(__file__).parent / "probe_nodes"
FREE_SECONDS = 60
# Without the nodes of services on the internet, it starts in eight seconds and not in nine and a
# half, and its page knows fewer nodes. The packed extension's server has them, as users do.
QUICK = ("--disable-api-nodes",)
ENOUGH_STEPS = 8
"""Of one sampling that measures each layer often enough, at enough levels of noise."""

LORA = "toy_lora.safetensors"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUIServer]:
    """ComfyUI with the extension, the toy checkpoint as sd_xl_base_1.0 and the probe's nodes."""
    with toy_server(tmp_path_factory.mktemp("comfyui")) as server:
        yield server


def toy_server(base: Path, options: tuple[str, ...] = ()) -> ComfyUIServer:
    """Return such a server, not started; with options of ComfyUI's command line."""
    server = ComfyUIServer(base, {"hswq_probe": PROBE_NODES}, (*QUICK, *options))
    make_checkpoint(server.models / "checkpoints" / CHECKPOINT)
    reset_settings(server)
    return server


def reset_settings(server: ComfyUIServer) -> None:
    """Record by default. One step is enough here, where users' samplings share the layers out."""
    change_settings(server, {"HSWQ.Record": True, "HSWQ.Target": 256, "HSWQ.Budget": 100})


def change_settings(server: ComfyUIServer, settings: dict) -> None:
    """Write ComfyUI's settings of its user, as its dialog does, and keep the others."""
    path = server.base / "user" / "default" / "comfy.settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    whole = path.with_suffix(".new")  # nobody reads half of it
    whole.write_text(json.dumps({**known, **settings}))
    whole.replace(path)


@pytest.fixture(scope="session")
def enough(server: ComfyUIServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was recorded of the toy, enough to load it in FP8; recorded once for all tests."""
    start_over(server)
    Client(server.url).run(small_sampling(stock_loader()))
    return shutil.copytree(server.models / "hswq", tmp_path_factory.mktemp("recorded") / "hswq")


@pytest.fixture
def recorded(enough: Path, server: ComfyUIServer, client: Client) -> Client:
    """A user of a server that has recorded enough of the toy to load it in FP8.

    As with a panel that was opened, the server keeps on disk what the files hold: whoever asks next
    writes nothing.
    """
    shutil.copytree(enough, server.models / "hswq", dirs_exist_ok=True)
    while client.get_json("/hswq/status")["reading"]:
        pass
    return client


def small_sampling(loader: dict, batch: int = 32, seed: int = 0) -> Prompt:
    """Return a prompt that measures each layer of the toy often enough, in small pictures."""
    return text_to_latent(loader, size=32, batch=batch, steps=ENOUGH_STEPS, seed=seed)


@pytest.fixture
def client(server: ComfyUIServer) -> Client:
    """A user of a server that has no statistics, and no models or results in memory."""
    start_over(server)
    return Client(server.url)


def start_over(server: ComfyUIServer) -> None:
    """Delete all that was recorded, searched and exported; nothing runs by then.

    What an earlier test has chosen in the settings is undone.
    """
    reset_settings(server)
    free(Client(server.url))
    connection = Connection(server.url)
    for model in connection.ask("GET", "/hswq/status").json()["models"]:
        if model["id"]:
            connection.ask("DELETE", f"/hswq/statistics/{model['id']}", headers=JSON)
    connection.close()
    for path in (server.models / "hswq").glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:  # a thread of the server may just remove a temporary file of its own
            path.unlink(missing_ok=True)
    for path in (server.base / "output").rglob("*.safetensors"):
        path.unlink()


@pytest.fixture(scope="session")
def lora(server: ComfyUIServer) -> str:
    """Name of a LoRA on every layer of the toy: Linear and Conv2d, kept and quantized."""
    folder = server.models / "loras"
    folder.mkdir(exist_ok=True)
    save_file(patch_file("LoRA"), folder / LORA)
    return LORA


def free(client: Client, *, results: bool = True) -> None:
    """Unload all models, forget all results if told so, and wait until that is done.

    Asked while it collects garbage after a prompt, ComfyUI notes it, and goes to sleep: so ask on.
    """
    wait_until_gone(
        client,
        "alive" if results else "loaded",
        lambda: client.free(unload_models=True, free_memory=results),
    )


def wait_until_gone(
    client: Client, models: str = "alive", ask: Callable[[], None] = lambda: None
) -> None:
    """Wait until no model is "alive", or "loaded".

    A prompt's last event is sent before its frames are gone, and the models in them.
    """
    began = time.monotonic()
    while True:
        ask()
        time.sleep(0.1)
        if not client.get_json("/probe/models")[models]:
            return
        assert time.monotonic() - began < FREE_SECONDS, "there are still models in memory"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Show what ComfyUI has printed when a test fails."""
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(server, ComfyUIServer):
        report.sections.append(("ComfyUI's log", server.log_tail()))
    return report
