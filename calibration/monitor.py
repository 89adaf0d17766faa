"""The Dual Monitor: output variance and input channel importance of a model's layers."""

from __future__ import annotations

import functools

import torch

from .statistics import LayerStatistics, Statistics


def monitored_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return every Linear and Conv2d of a model by name, in the model's order.

    ComfyUI's quantized Linear is no torch.nn.Linear; its features and weight show what it is.
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

    Sums stay on the layers' device and are read back by `statistics`; nothing waits for the
    device before. The hooks are gone when the block ends, however it ends. The model's forward
    goes on whatever happens to the measuring: its first error ends it.

        with DualMonitor(unet) as monitor:
            unet(latents, timesteps, context)
        statistics = monitor.statistics()

    Attributes:
        error: what ended the measuring, None while all is well.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """Take the model whose Linear and Conv2d layers to measure."""
        self.error: Exception | None = None
        self._failed: str | None = None
        self._model = model
        self._sums = {name: _LayerSums() for name in monitored_layers(model)}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> DualMonitor:
        for name, module in monitored_layers(self._model).items():
            hook = functools.partial(self._measure, name)
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        self._remove_hooks()

    def statistics(self) -> Statistics:
        """Return the sums so far of every layer that was called, in the model's order.

        Raises:
            RuntimeError: measuring failed; the sums would lack some calls.
        """
        if self.error is not None:
            raise RuntimeError(f"cannot measure {self._failed}: {self.error}") from self.error
        called = {name: sums for name, sums in self._sums.items() if sums.calls}
        return Statistics(
            {name: sums.statistics() for name, sums in called.items()},
            {"total_steps": max((sums.calls for sums in called.values()), default=0)},
        )

    def _measure(
        self, name: str, module: torch.nn.Module, args: tuple, kwargs: dict, output: torch.Tensor
    ) -> None:
        try:
            self._sums[name].add(args[0] if args else next(iter(kwargs.values())), output)
        except Exception as error:
            if self.error is None:
                # Without its traceback, whose frames keep the activations alive.
                self.error, self._failed = error.with_traceback(None), name
            self._remove_hooks()

    def _remove_hooks(self) -> None:
        while self._handles:
            self._handles.pop().remove()


class _LayerSums:
    """Running sums of one layer, on the device where it runs."""

    def __init__(self) -> None:
        self.calls = 0
        self._output: torch.Tensor | None = None  # (2,) float64: sums of mean(Y), mean(Y^2)
        self._importance: torch.Tensor | None = None  # (channels,) float64

    def add(self, inputs: torch.Tensor, output: torch.Tensor) -> None:
        """Add one call; one of an empty batch has no mean and is none."""
        if not output.numel():
            return
        moments, importance = output_moments(output), input_importance(inputs)
        if self._output is None:
            self._output, self._importance = moments, importance
        elif importance.shape != self._importance.shape:
            raise ValueError(
                f"it had {self._importance.numel()} input channels, now {importance.numel()}"
            )
        else:
            # Not in place: sums begun in torch.inference_mode could not go on outside of it.
            self._output = self._output + moments
            self._importance = self._importance + importance
        self.calls += 1

    def statistics(self) -> LayerStatistics:
        """Read the sums back."""
        output_sum, output_square_sum = self._output.tolist()
        importance = self._importance.to("cpu", copy=True)
        return LayerStatistics(output_sum, output_square_sum, self.calls, importance, self.calls)


def output_moments(output: torch.Tensor) -> torch.Tensor:
    """Return (2,) float64: mean(Y) and mean(Y^2) over all elements, each computed in FP32."""
    values = output.detach().to(torch.float32)
    return torch.stack((values.mean(), values.square().mean())).to(torch.float64)


def input_importance(inputs: torch.Tensor) -> torch.Tensor:
    """Return (channels,) float64: mean |x| over every axis but the channel, computed in FP32.

    The channel is axis 1 of a 4-D input and the last axis of a 3-D or 2-D one; any other input
    gives the single value 1.
    """
    axes = {4: (0, 2, 3), 3: (0, 1), 2: (0,)}.get(inputs.ndim)
    if axes is None:
        return torch.ones(1, dtype=torch.float64, device=inputs.device)
    return inputs.detach().abs().mean(axes, dtype=torch.float32).to(torch.float64)
