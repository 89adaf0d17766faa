"""Starts and stops ComfyUI with this extension and the toy's nodes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from environment.host import DEV
from environment.install import ROOT, TESTS, make_base

COMFYUI = Path(os.environ.get("COMFYUI_PATH") or DEV / "ComfyUI")
START_SECONDS = 180  # ten on an idle machine
STOP_SECONDS = 30
# The toy's tensors are too small to share out among threads; where something else is running, two
# threads that wait for each other make each of thousands of operations take a time slice.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
PACKS = {"hswq": ROOT, "hswq_toy": TESTS / "toy" / "nodes"}


class ServerError(Exception):
    """ComfyUI did not start; the message ends with its log."""


class ComfyUIServer:
    """ComfyUI as a user starts it, on the CPU, in a base directory of its own.

    with ComfyUIServer(folder) as server:
        urllib.request.urlopen(f"{server.url}/system_stats")

    Attributes:
        base: the base directory: models/, output/, custom_nodes/ ...
        log: all that the server has printed, over restarts too.
        url: http://127.0.0.1:PORT, the same after a restart.
    """

    def __init__(
        self, base: Path, packs: dict[str, Path] | None = None, options: tuple[str, ...] = ()
    ) -> None:
        """Make the base directory.

        Args:
            base: made if it is not there.
            packs: node packs beside the extension and the toy.
            options: of ComfyUI's command line, beside those that every server here gets.
        """
        make_base(base, {**PACKS, **(packs or {})})
        self.base = base
        self.log = base / "server.log"
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._options = options
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> ComfyUIServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the running server."""
        return self._process.pid

    @property
    def models(self) -> Path:
        """The models folder."""
        return self.base / "models"

    def start(self) -> None:
        """Start ComfyUI and wait until it answers.

        Raises:
            ServerError: it does not.
        """
        command = [sys.executable, str(COMFYUI / "main.py"), "--cpu", "--disable-auto-launch"]
        command += ["--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += self._options
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **ENVIRONMENT},
        )
        threading.Thread(target=self._write_log, args=[self._process.stdout], daemon=True).start()
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop ComfyUI as Ctrl+C does; kill it if that does not help."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @contextmanager
    def killed(self) -> Iterator[None]:
        """End ComfyUI at once, as a power cut does; start it anew at the end of the block."""
        process, self._process = self._process, None
        process.kill()
        process.wait()
        try:
            yield
        finally:
            self.start()

    def restart(self) -> None:
        """Stop and start: what is in memory is gone, what is on disk stays."""
        self.stop()
        self.start()

    def log_tail(self, lines: int = 60) -> str:
        """Return the end of the log."""
        with suppress(FileNotFoundError):
            return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])
        return ""

    def _write_log(self, output: IO[bytes]) -> None:
        """Until the server ends. It does not write itself, so that a test may limit its files."""
        with output, self.log.open("ab", buffering=0) as log:
            for line in output:
                log.write(line)

    def _wait_until_up(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < START_SECONDS:
            if self._process.poll() is not None:
                raise ServerError(f"ComfyUI ended while it started:\n{self.log_tail()}")
            with suppress(OSError), urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                return
            time.sleep(0.2)
        raise ServerError(f"ComfyUI did not start in {START_SECONDS} s:\n{self.log_tail()}")


def snapshot(folder: Path) -> dict[Path, bytes]:
    """Return what is in a folder, to compare it with what was; but for locks and caches.

    A cache may just be written by a thread of the server's: its temporary file is none of it.
    """
    passing = re.compile(r".+\.(lock|cache)|\..+\.cache\.[0-9a-f]+\.tmp")
    files = (path for path in folder.rglob("*") if not passing.fullmatch(path.name))
    return {path: path.read_bytes() for path in files if path.is_file()}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
