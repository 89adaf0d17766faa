"""Running a network again from one layer on: the parts before the layer are not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


class Replay:
    """The parts of a network that a forward called once, and the tensors that they returned.

    A part is the outermost module that returned one tensor; what is inside of it is not kept. Parts
    that were called several times, as when conditionings run one by one, are computed again.
    """

    def __init__(self) -> None:
        """Start without parts."""
        self._calls: dict[str, list[object]] = {}
        self._parts: dict[str, torch.nn.Module] = {}

    @contextmanager
    def watching(self, network: torch.nn.Module) -> Iterator[None]:
        """Remember the parts that run in the block."""
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
        """Return the tensor of each part, in the order of the calls."""
        once = {name: its[0] for name, its in self._calls.items() if len(its) == 1}
        return {name: its for name, its in once.items() if isinstance(its, torch.Tensor)}

    @contextmanager
    def until(self, layer: str) -> Iterator[None]:
        """In the block, let the parts before a layer's own return what they returned before."""
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
    # A copy each time, because the network may change it in place.
    return lambda *_, **__: output.clone()
