"""The Dual Monitor: output variance and input channel importance of a model's layers."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch

from .rotation import Rotation
from .sharing import sharing_of
from .sketch import Sketch, merge_sketches
from .sketch_sums import DeviceSketches
from .statistics import LayerStatistics, Statistics
from .sums import DeviceSums

SKETCHED_IN_TURNS = 0.4
"""Share of an input's measured calls that go into its sketch if layers are measured in turns.

Each call in a sketch costs one launch. With this share, recording SDXL stays below 60 launches a
step. Taking half of the calls and not all makes rounding 2% worse.
"""


def monitored_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return every Linear and Conv2d of a model by name, in the model's order.

    ComfyUI's quantized Linear is not a torch.nn.Linear. It is known by its attributes.
    """
    return {name: module for name, module in model.named_modules() if _is_monitored(module)}


def _is_monitored(module: torch.nn.Module) -> bool:
    if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
        return True
    return all(hasattr(module, name) for name in ("in_features", "out_features", "weight")) and (
        not hasattr(module, "num_experts")
    )


class DualMonitor:
    """Measures a model's layers while the `with` block runs (HSWQ.md, "Dual Monitor").

    Sums stay on the layers' device until `statistics` reads them back; nothing waits for the
    device before that. When the block ends, with or without an error, the hooks are removed. An
    error in measuring ends the measuring, but not the model's forward.

        with DualMonitor(unet) as monitor:
            unet(latents, timesteps, context)
        statistics = monitor.statistics()

    It also keeps a sketch of each input (docs/sketches.md). Layers with the same input share one.

    Attributes:
        error: the error that ended the measuring; None if there was none.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        share: float = 1.0,
        rotation: Rotation | None = None,
        layers: Mapping[str, torch.nn.Module] | None = None,
        *,
        sketched: float | None = None,
    ) -> None:
        """Take what to measure.

        Args:
            model: its Linear and Conv2d layers are measured.
            share: share of the layers to measure in each forward of the model. Below 1 they are
                measured in turns. A call of the model itself begins a forward.
            rotation: continues the turns of an earlier monitor; then `share` is ignored.
            layers: layers to measure, by name; None for all of the model's.
            sketched: share of an input's measured calls that go into its sketch; 0 keeps no
                sketches. None takes SKETCHED_IN_TURNS if layers are measured in turns, else all.
        """
        self.error: Exception | None = None
        self._failed: str | None = None
        self._model = model
        self._layers = monitored_layers(model) if layers is None else dict(layers)
        if rotation is None and share != 1:
            rotation = Rotation(list(self._layers), share)
        self._rotation = rotation if rotation is not None and len(rotation) > 1 else None
        self._forwards = 0
        self._channels = {name: _channels(layer) for name, layer in self._layers.items()}
        self._sums: dict[torch.device, DeviceSums] = {}
        in_turns = 1.0 if self._rotation is None else SKETCHED_IN_TURNS
        self._sketched = in_turns if sketched is None else sketched
        self._sharing = sharing_of(model) if self._sketched else None
        self._sketches: dict[torch.device, DeviceSketches] = {}
        self._begin: torch.utils.hooks.RemovableHandle | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> DualMonitor:
        try:
            if self._rotation is None:
                self._hook(self._layers)
            else:
                self._begin = self._model.register_forward_pre_hook(self._next_group)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def statistics(self) -> Statistics:
        """Return the sums so far of every layer that was called, in the model's order.

        The meta has `layers`, the number of the model's layers, and `total_steps`.

        Raises:
            RuntimeError: measuring failed, so that some calls are missing from the sums.
        """
        self._check()
        total: dict[str, LayerStatistics] = {}
        for sums in self._sums.values():
            for name, layer in sums.read().items():
                total[name] = total[name].merge(layer) if name in total else layer
        steps = max((layer.calls for layer in total.values()), default=0)
        return Statistics(
            {name: total[name] for name in self._layers if name in total},
            {"total_steps": self._forwards or steps, "layers": len(self._layers)},
        )

    def sketches(self) -> dict[str, Sketch]:
        """Return the sketches so far, by layer. Layers that share an input have the same object.

        Raises:
            RuntimeError: as `statistics`.
        """
        self._check()
        if self._sharing is None:
            return {}
        self._sharing.settle()
        total: dict[str, Sketch] = {}
        for sums in self._sketches.values():
            found = sums.read()
            owners = {name: self._sharing.owner(name) for name in self._layers}
            mine = {name: found[owner] for name, owner in owners.items() if owner in found}
            total = merge_sketches(total, mine)
        return total

    def _check(self) -> None:
        if self.error is not None:
            raise RuntimeError(f"cannot measure {self._failed}: {self.error}") from self.error

    def _hook(self, names: Iterable[str]) -> None:
        for name in names:
            hook = functools.partial(self._measure, name)
            handle = self._layers[name].register_forward_hook(hook, with_kwargs=True)
            self._handles.append(handle)

    def _next_group(self, *_: object) -> None:
        self._unhook()
        try:
            self._hook_learning()
            self._hook(self._rotation.next())
        except Exception as error:
            self._fail("the model", error)
        self._forwards += 1

    def _hook_learning(self) -> None:
        """Hook layers that were not called before, to learn which of them share an input."""
        for name, layer in self._layers.items():
            if self._sharing is not None and name not in self._sharing:
                hook = functools.partial(self._learn, name)
                self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))

    def _learn(
        self, name: str, _: torch.nn.Module, args: tuple, kwargs: dict, output: object
    ) -> None:
        try:
            inputs = _input(args, kwargs)
            if inputs.numel():
                self._sharing.learn(name, inputs)
        except Exception as error:
            self._fail(name, error)

    def _measure(
        self, name: str, module: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor
    ) -> None:
        try:
            self._add(name, _input(args, kwargs), output)
        except Exception as error:
            self._fail(name, error)

    def _add(self, name: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """Add one call. A call with an empty batch has no mean, and does not count."""
        if not output.numel():
            return
        sums = self._sums.get(output.device)
        if sums is None:
            sums = self._sums[output.device] = DeviceSums(self._channels, output.device)
        sums.add(name, inputs, output)
        if self._sharing is not None and inputs.numel():
            self._sketch(name, inputs)

    def _sketch(self, name: str, inputs: torch.Tensor) -> None:
        self._sharing.learn(name, inputs)
        is_image = hasattr(self._layers[name], "in_channels")
        # Another layer with the same input may keep the sketch. Of a Conv2d's input without a batch
        # axis, and of a Linear's 4-D input, the channels are on another axis than sketches expect.
        if self._sharing.owner(name) != name or is_image != (inputs.ndim == 4):
            return
        sketches = self._sketches.get(inputs.device)
        if sketches is None:
            sketches = self._sketches[inputs.device] = DeviceSketches(inputs.device, self._sketched)
        sketches.add(name, inputs, self._channels[name])

    def _fail(self, name: str, error: Exception) -> None:
        if self.error is None:
            # The traceback is dropped because its frames would keep the activations in memory.
            self.error, self._failed = error.with_traceback(None), name
        self._stop()

    def _stop(self) -> None:
        if self._begin is not None:
            self._begin.remove()
            self._begin = None
        self._unhook()

    def _unhook(self) -> None:
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()


def _input(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _channels(layer: torch.nn.Module) -> int:
    """Return the input channels that a layer says it has."""
    return layer.in_channels if hasattr(layer, "in_channels") else layer.in_features
