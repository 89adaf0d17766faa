"""Steps of the setup. A finished step has a stamp. Without it, the step runs again."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .host import DEV, SetupError

LOG = DEV / "setup.log"
SCRAP = "scrap-"
GRACE = 10  # seconds for a process to end by itself

# What to do about a failure, by a pattern of its output. The first match counts.
ADVICE = {
    "ensurepip|No module named venv": "Install the venv module (Debian: apt install python3-venv).",
    "No space left on device": "Free some disk space: .dev/ needs 8 GB.",
    "DO NOT MATCH THE HASHES": "The package registry has another file than the one pinned here.",
    "No matching distribution|[Cc]onnection|timed out|Max retries": "Check that this machine "
    "reaches the package registry (pip config list), and that it has builds for this system.",
    "": "Run it again. If that does not help, delete the folder .dev/ and run it once more.",
}


def ensure(title: str, stamp: Path, inputs: str, make: Callable[[], Iterable[Path]]) -> None:
    """Run `make` unless its stamp has these inputs and all paths that it returned exist."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        made = json.loads(stamp.read_text("utf-8"))
        if made["inputs"] == inputs and all(map(os.path.lexists, made["paths"])):
            return
    stamp.unlink(missing_ok=True)
    began = time.monotonic()
    print(f"{title} ...", end=" ", file=sys.stderr, flush=True)
    try:
        paths = sorted(map(str, make()))
    finally:
        print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    stamp.write_text(json.dumps({"inputs": inputs, "paths": paths}), "utf-8")


def execute(command: Iterable[object], environment: dict[str, str]) -> None:
    """Run one command of a step. Its output goes to the log."""
    words = [str(word) for word in command]
    with LOG.open("a+b") as log:
        log.write(f"\n$ {shlex.join(words)}\n".encode())
        log.flush()
        began = log.tell()
        # close_fds: the child inherits the lock, so if it outlives us, others still wait for it.
        process = subprocess.Popen(
            words,
            cwd=DEV,
            env=environment,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        status = wait_for(process)
        log.seek(began)
        output = log.read().decode(errors="replace")
    if status:
        raise SetupError(explain(words, output))


def explain(words: list[str], output: str) -> str:
    """Return what failed, the end of its output, and what to do."""
    lines = [line for line in output.splitlines() if line and not line.startswith("WARNING:")]
    advice = next(text for pattern, text in ADVICE.items() if re.search(pattern, output))
    failure = f"this command failed (all its output: {LOG}):\n  {shlex.join(words)}"
    return "\n  | ".join((failure, *lines[-12:])) + f"\n{advice}"


def wait_for(process: subprocess.Popen) -> int:
    """Return a process's exit status. If this process is stopped, that one is stopped too."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        with suppress(
            subprocess.TimeoutExpired
        ):  # The terminal has stopped it too: let it clean up.
            process.wait(GRACE)
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()


@contextmanager
def only_one() -> Iterator[None]:
    """Let one setup run at a time. The lock is free when its processes end, in whatever way."""
    DEV.mkdir(exist_ok=True)
    with (DEV / "lock").open("a") as lock:
        if not take(lock):
            print("Waiting for another dev.py, which is setting up.", file=sys.stderr)
            while not take(lock):
                time.sleep(0.5)
        os.set_inheritable(lock.fileno(), True)
        for scrap in DEV.glob(f"{SCRAP}*"):
            print("Deleting leftovers of an earlier setup.", file=sys.stderr)
            shutil.rmtree(scrap, ignore_errors=True)
        yield


def take(lock: IO[str]) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def discard(path: Path) -> None:
    """Rename a file or folder, then delete it, so that no half-deleted one stays in its place."""
    if path.exists():
        scrap = Path(tempfile.mkdtemp(prefix=SCRAP, dir=DEV))
        path.rename(scrap / path.name)
        shutil.rmtree(scrap, ignore_errors=True)
