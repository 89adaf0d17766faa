"""Takes names of ComfyUI's away that the self-check knows, and starts the extension.

Names that the same parts need are taken together, and an owner not together with what it owns.
Prints a JSON list: for each start the names that were taken, what the log says and what is there.
The first is with nothing taken. In a process of its own, since nobody else could use this ComfyUI
in the meantime.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import importlib
import inspect
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from bench import common  # noqa: E402

common.start_comfyui("cpu")

import types  # noqa: E402

package = types.ModuleType("hswq")
package.__path__ = [str(common.ROOT)]
sys.modules["hswq"] = package

import comfy.samplers  # noqa: E402
import nodes  # noqa: E402
from aiohttp import web  # noqa: E402
from hswq.loader.host import selfcheck  # noqa: E402
from server import PromptServer  # noqa: E402

OUTER_SAMPLE = comfy.samplers.CFGGuider.outer_sample


def rounds() -> list[list[tuple[str, str]]]:
    """Return the names to take together, as modules and names in them."""
    parts = (selfcheck.BASE, *selfcheck.PARTS)
    wanted = [(module, name, part.does) for part in parts
              for module, names in part.names.items() for name in names.split()]  # fmt: skip
    found: dict[tuple, list[tuple[str, str]]] = {}
    for module, name in dict.fromkeys((module, name) for module, name, _ in wanted):
        needed_by = frozenset(
            does for its, one, does in wanted if its == module and f"{one}.".startswith(f"{name}.")
        )
        found.setdefault((needed_by, name.count(".")), []).append((module, name))
    return list(found.values())


@contextlib.contextmanager
def without(names: list[tuple[str, str]]) -> Iterator[None]:
    """Take names away, of a class also from what its instances get when they are made."""
    with contextlib.ExitStack() as undo:
        for module, name in names:
            owner = importlib.import_module(module)
            *way, last = name.split(".")
            for step in way:
                owner = getattr(owner, step)
            take_from(owner, last, undo)
        yield


def take_from(owner: object, name: str, undo: contextlib.ExitStack) -> None:
    """Take a name from a module or an object, or from a class and those that it inherits from."""
    if not inspect.isclass(owner):
        undo.callback(setattr, owner, name, getattr(owner, name))
        delattr(owner, name)
        return
    for base in owner.__mro__:
        maker = inspect.unwrap(vars(base).get("__init__", without))
        if inspect.isfunction(maker):
            undo.callback(setattr, maker, "__code__", maker.__code__)
            names = tuple(f"not_{n}" if n == name else n for n in maker.__code__.co_names)
            maker.__code__ = maker.__code__.replace(co_names=names)
        if name in vars(base):
            take(base, name, undo)


def take(owner: type, name: str, undo: contextlib.ExitStack) -> None:
    """Take an attribute from a class, a member of an enumeration too."""
    undo.callback(type.__setattr__, owner, name, vars(owner)[name])
    type.__delattr__(owner, name)
    if issubclass(owner, enum.Enum):
        undo.callback(owner._member_map_.__setitem__, name, owner._member_map_.pop(name))


class Messages(logging.Handler):
    """Collects what the log says of the extension."""

    def __init__(self) -> None:
        """Start with nothing."""
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take what is logged."""
        self.texts.append(record.getMessage())


def start(place: Path, server: PromptServer) -> dict:
    """Let ComfyUI load the extension; return the log and what there is then."""
    nodes.NODE_CLASS_MAPPINGS, nodes.EXTENSION_WEB_DIRS = {}, {}
    server.routes, server.on_prompt_handlers = web.RouteTableDef(), []
    messages = Messages()
    logging.getLogger().addHandler(messages)
    try:
        server.loop.run_until_complete(nodes.load_custom_node(str(place)))
    finally:
        logging.getLogger().removeHandler(messages)
    now = getattr(getattr(comfy.samplers, "CFGGuider", None), "outer_sample", None)
    found = {
        "messages": messages.texts,
        "nodes": sorted(nodes.NODE_CLASS_MAPPINGS),
        "recording": now not in (OUTER_SAMPLE, None),
        "panel": any(route.path == "/hswq/status" for route in server.routes),
    }
    if now is not None:
        comfy.samplers.CFGGuider.outer_sample = OUTER_SAMPLE
    for module in [module for module in sys.modules if module.startswith(str(place))]:
        del sys.modules[module]
    return found


def main() -> None:
    """Start without none, and without each round's names."""
    server = PromptServer(asyncio.new_event_loop())
    found = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "hswq_here"
        place.symlink_to(common.ROOT, target_is_directory=True)
        for names in ([], *rounds()):
            with without(names):
                found.append({"taken": [".".join(name) for name in names], **start(place, server)})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
