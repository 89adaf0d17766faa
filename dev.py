"""Set up what development needs under .dev/, then run it.

commands:
  demo [ARG ...]         the whole story on a toy model: record, load quantized, compare
  test [ARG ...]         the tests; arguments go to pytest
  serve [ARG ...]        ComfyUI with this extension and the toy model; arguments go to ComfyUI
  bench NAME [ARG ...]   one benchmark of tests/bench

With --comfyui RELEASE, a command uses that release of ComfyUI, in its own folder under .dev/.
"newest" is the newest release on GitHub, with the newest packages of ComfyUI's makers. With
--comfyui FOLDER, it uses the ComfyUI in that folder, as with COMFYUI_PATH.

The first run installs torch and ComfyUI (8 GB, some minutes). Later runs only check that everything
is still there. A setup that was stopped continues where it was. You may delete .dev/.
"""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - older Pythons can run this file up to here
    sys.exit("dev.py needs Python 3.10 or newer; this is {}.{}.".format(*sys.version_info))

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tests"))

from environment.host import (  # noqa: E402
    DEFAULT_RELEASE,
    NEWEST,
    RELEASES,
    Host,
    SetupError,
    choose_host,
)
from environment.install import set_up, set_up_frontend, set_up_toy  # noqa: E402
from environment.steps import wait_for  # noqa: E402

ENVIRONMENT_HELP = """\
environment variables:
  COMFYUI_PATH     a ComfyUI tree to use in place of the pinned one
  COMFYUI_PYTHON   the Python that runs that tree; if not given, the one in its .venv or venv.
                   Nothing is installed into it: a virtual environment under .dev/ borrows its
                   packages, torch among them, and adds the test tools. A tree without a Python
                   of its own runs in .dev/venv, which gets its requirements.
"""

# A worker starts its own ComfyUI, which takes 1.5 GB. It takes whole files: their tests share one.
CORES = os.cpu_count() or 1
COUNT = min(4, CORES)
WORKERS = ("-n", str(COUNT), "--dist", "loadfile", "--no-loadscope-reorder")


def demo(host: Host, arguments: list[str]) -> int:
    set_up(host)
    return run(host, "tests/demo.py", *arguments)


def test(host: Host, arguments: list[str]) -> int:
    """Run all tests in parallel; run chosen ones one after the other, which starts faster."""
    set_up(host)
    set_up_frontend(host)
    chosen = any(not argument.startswith("-") for argument in arguments)
    if not chosen:  # threads of one worker would only wait for those of another
        os.environ.setdefault("OMP_NUM_THREADS", str(CORES // COUNT))
    return run(host, "-m", "pytest", "--confcutdir=tests", *(() if chosen else WORKERS), *arguments)


def serve(host: Host, arguments: list[str]) -> int:
    """Start ComfyUI. If the user gives an option again, ComfyUI takes the last one, the user's."""
    set_up(host)
    set_up_toy(host)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--port", default="8188")
    port = parser.parse_known_args(arguments)[0].port
    print(f"ComfyUI starts at http://127.0.0.1:{port}; Ctrl+C stops it.", flush=True)
    options = ["--listen", "127.0.0.1", "--port", port, "--base-directory", str(host.base)]
    options += ["--database-url", "sqlite:///:memory:", "--disable-auto-launch"]
    options += [] if has_cuda(host) else ["--cpu"]
    return run(host, str(host.comfyui / "main.py"), *options, *arguments)


def bench(host: Host, arguments: list[str]) -> int:
    names = sorted(path.stem for path in (ROOT / "tests" / "bench").glob("[!_]*.py"))
    if not arguments or arguments[0] not in names:
        raise SetupError(f"name a benchmark, one of: {', '.join(names) or '(there are none)'}.")
    set_up(host)
    return run(host, f"tests/bench/{arguments[0]}.py", *arguments[1:])


COMMANDS = {"demo": demo, "test": test, "serve": serve, "bench": bench}


def run(host: Host, *arguments: str) -> int:
    """Run the venv's Python in the root folder; return its exit status as a shell does."""
    command = [str(host.python), *arguments]
    status = wait_for(subprocess.Popen(command, cwd=ROOT, env=host.environment))
    return status if status >= 0 else 128 - status


def has_cuda(host: Host) -> bool:
    query = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return run(host, "-c", query) == 0


def release_first(words: list[str]) -> list[str]:
    """Move --comfyui before the command, because all arguments after it are the command's own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--comfyui")
    found, others = parser.parse_known_args(words)
    return [*(["--comfyui", found.comfyui] if found.comfyui else []), *others]


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=ENVIRONMENT_HELP, formatter_class=raw, allow_abbrev=False
    )
    releases = ", ".join((*RELEASES, NEWEST))
    words = f"one of {releases}, or a folder; default: {DEFAULT_RELEASE}"
    parser.add_argument("--comfyui", metavar="RELEASE", help=words)
    parser.add_argument("command", choices=COMMANDS, help="see above")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(release_first(sys.argv[1:]))
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return COMMANDS[options.command](choose_host(options.comfyui), options.arguments)
    except (SetupError, OSError) as error:
        print(f"dev.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dev.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
