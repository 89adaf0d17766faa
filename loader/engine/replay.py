"""Running the rest of a network: what comes before a layer is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


class Replay:
    """The parts of a network that a forward called once, and what they gave.

    A part is the outermost module that gave one tensor, so that all that it has inside is not kept.
    Parts that were called several times, such as where conditionings run apart, are computed.
    """

    def __init__(self) -> None:
        """Know nothing yet."""
        self._calls: dict[str, list[object]] = {}
        self._parts: dict[str, torch.nn.Module] = {}

    @contextmanager
    def watching(self, network: torch.nn.Module) -> Iterator[None]:
        """Remember what runs in the block."""
        self._parts = {name: part for name, part in network.named_modules() if name}
        hooks = [
            part.register_forward_hook(self._noting(name)) for name, part in self._parts.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _noting(self, name: str) -> Callable[[torch.nn.Module, tuple, object], None]:
        def note(_: torch.nn.Module, __: tuple, output: object) -> None:
            if isinstance(output, torch.Tensor):
                for inner in [one for one in self._calls if one.startswith(f"{name}.")]:
                    del self._calls[inner]
            self._calls.setdefault(name, []).append(output)

        return note

    def _outputs(self) -> Mapping[str, torch.Tensor]:
        """Return what each part gave, in the order of the calls."""
        once = {name: its[0] for name, its in self._calls.items() if len(its) == 1}
        return {name: its for name, its in once.items() if isinstance(its, torch.Tensor)}

    @contextmanager
    def until(self, layer: str) -> Iterator[None]:
        """In the block, the parts before the one with a layer give what they gave before."""
        outputs = self._outputs()
        names = list(outputs)
        place = next((i for i, n in enumerate(names) if f"{layer}.".startswith(f"{n}.")), 0)
        parts = {name: self._parts[name] for name in names[:place]}
        try:
            for name, part in parts.items():
                part.forward = _giving(outputs[name])
            yield
        finally:
            for part in parts.values():
                vars(part).pop("forward", None)


def _giving(output: torch.Tensor) -> Callable[..., torch.Tensor]:
    # Of what is given each time anew, the network may overwrite what it likes.
    return lambda *_, **__: output.clone()
