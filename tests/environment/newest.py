"""The newest ComfyUI: tests run with it now and then, to notice a change before users do."""

import datetime
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .host import NEWEST, Host, SetupError
from .steps import DEV, SCRAP, discard, execute

REPOSITORY = "https://github.com/Comfy-Org/ComfyUI"
# Packages of ComfyUI's makers. Each has releases of its own.
PACKAGES = ("comfy-kitchen", "comfy-aimdo", "comfyui-frontend-package")


def state(host: Host) -> tuple[str, ...]:
    """Return a key of the newest packages. It changes with the day, to look for newer ones."""
    return (*PACKAGES, datetime.date.today().isoformat()) if host.release == NEWEST else ()


def tag(repository: str) -> str:
    """Return the tag of a git repository's newest release, by its number."""
    command = ["git", "ls-remote", "--tags", "--refs", "--sort=-version:refname", repository, "v*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        found = done.stdout.split("\n", 1)[0].rpartition("refs/tags/")[2]
        reason = done.stderr.strip().rpartition("\n")[2] or "it has no releases"
    except (OSError, subprocess.TimeoutExpired) as error:  # there is no git, or no network
        found, reason = "", str(error)
    if not found:
        raise SetupError(
            f"{repository} cannot be asked for ComfyUI's newest release ({reason}); "
            "fetch it yourself and give its folder: --comfyui FOLDER."
        )
    return found


def fetch(host: Host, repository: str, release: str) -> Iterable[Path]:
    """Fetch one release of a git repository, without its history."""
    with tempfile.TemporaryDirectory(prefix=SCRAP, dir=DEV) as scrap:
        tree = Path(scrap, "ComfyUI")
        options = ("--quiet", "--depth", "1", "--branch", release)
        execute(("git", "clone", *options, repository, tree), host.environment)
        discard(tree / ".git")
        discard(host.comfyui)
        host.comfyui.parent.mkdir(parents=True, exist_ok=True)
        tree.rename(host.comfyui)
    return [path for path in host.comfyui.rglob("*") if path.is_file()]
