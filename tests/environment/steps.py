"""Steps: each is made, then stamped. Without its stamp, or with parts gone, it is made again."""

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

# What to do about a failure, by what its output says. The first match counts.
ADVICE = {
    "ensurepip|No module named venv": "Install the venv module (Debian: apt install python3-venv).",
    "No space left on device": "Free some disk space: .dev/ needs 8 GB.",
    "DO NOT MATCH THE HASHES": "The package registry's file is not the one that is pinned here.",
    "No matching distribution|[Cc]onnection|timed out|Max retries": "Does this machine reach the "
    "package registry (pip config list), and does that have a build for this system and Python?",
    "": "Run it again. If that does not help, delete the folder .dev/ and begin anew.",
}


def ensure(title: str, stamp: Path, inputs: str, make: Callable[[], Iterable[Path]]) -> None:
    """Run `make` unless its stamp is of these inputs and every path that it returned exists."""
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
    """Run one command of a step, its output in the log."""
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
    """What failed, the end of its output, and what to do."""
    lines = [line for line in output.splitlines() if line and not line.startswith("WARNING:")]
    advice = next(text for pattern, text in ADVICE.items() if re.search(pattern, output))
    failure = f"this command failed (all its output: {LOG}):\n  {shlex.join(words)}"
    return "\n  | ".join((failure, *lines[-12:])) + f"\n{advice}"


def wait_for(process: subprocess.Popen) -> int:
    """Its exit status. If we are stopped before it ends, it is stopped too."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        with suppress(subprocess.TimeoutExpired):  # The terminal told it too: let it clean up.
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
    """One setup at a time. The lock belongs to the processes: however they end, it is free."""
    DEV.mkdir(exist_ok=True)
    with (DEV / "lock").open("a") as lock:
        if not take(lock):
            print("Another dev.py is setting up; waiting for it.", file=sys.stderr)
            while not take(lock):
                time.sleep(0.5)
        os.set_inheritable(lock.fileno(), True)
        for scrap in DEV.glob(f"{SCRAP}*"):
            print("Deleting what an earlier setup left.", file=sys.stderr)
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
    """Out of the way at once, then deleted: no half-deleted thing is left in its place."""
    if path.exists():
        scrap = Path(tempfile.mkdtemp(prefix=SCRAP, dir=DEV))
        path.rename(scrap / path.name)
        shutil.rmtree(scrap, ignore_errors=True)
