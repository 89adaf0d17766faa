"""A GPU that is almost full, and samplings whose steps are measured one by one."""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from collections.abc import Callable
from pathlib import Path

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management as memory
import comfy.ops
import comfy.sample
import torch
from comfy.weight_adapter.lora import LoRAAdapter
from common import synchronize
from harness.hostmemory import PeakMemory

RANK = 16


class Ballast:
    """Memory that another program might have."""

    def __init__(self, free: float) -> None:
        """Leave so many GiB free, counting what torch has reserved and does not use."""
        self._held = None
        if torch.cuda.is_available():
            torch._C._cuda_clearCublasWorkspaces()  # they would keep GiB from being given back
            memory.soft_empty_cache(True)
            left = memory.get_free_memory() - int(free * 2**30)
            self._held = torch.empty(max(0, left), dtype=torch.uint8, device="cuda")

    def drop(self) -> None:
        """Give it back to the driver."""
        self._held = None
        memory.soft_empty_cache(True)


class Steps:
    """Samplings of one MODEL, by the stock sampler.

    Attributes:
        patcher: the MODEL's clone that is sampled.
        calls: how often the last sampling called the network.
    """

    def __init__(self, patcher, size: int, batch: int, *, controlnet: bool = False) -> None:
        """Take the model, the picture's pixels each way, and how many latents a step has."""
        generator = torch.Generator().manual_seed(1)
        context = patcher.model.model_config.unet_config["context_dim"]
        hidden = torch.randn(1, 77, context, generator=generator)
        extra = {"pooled_output": torch.randn(1, 1280, generator=generator)}
        if controlnet:
            hint = torch.rand(1, 3, size, size, generator=generator)
            extra["control"] = _controlnet(patcher).set_cond_hint(hint)
            extra["control_apply_to_uncond"] = True
        self._conditioning = [[hidden, extra]], [[-hidden, extra]]
        self._noise = torch.randn(1, 4, size // 8, size // 8, generator=generator)
        self._cfg = 7.0 if batch == 2 else 1.0
        self._around: dict[int, Callable] = {}
        self.calls = 0
        self.patcher = patcher.clone()
        self.patcher.set_model_unet_function_wrapper(self._call)

    def run(self, steps: int, around: dict[int, Callable] | None = None) -> list[float]:
        """Sample; return each step's seconds, the first one's with what comes before it.

        Args:
            steps: to take.
            around: functions by number of the network's call, that are given the call to make.
        """
        self._around, self.calls, found = around or {}, 0, []
        last = time.perf_counter()

        def done(*_: object) -> None:
            nonlocal last
            synchronize()
            now = time.perf_counter()
            found.append(now - last)
            last = now

        comfy.sample.sample(
            self.patcher, self._noise, steps, self._cfg, "euler", "normal", *self._conditioning,
            torch.zeros_like(self._noise), disable_pbar=True, callback=done,
        )  # fmt: skip
        return found

    def _call(self, network: Callable, how: dict) -> torch.Tensor:
        made = []

        def call() -> None:
            made.append(network(how["input"], how["timestep"], **how["c"]))

        self._around.get(self.calls, lambda call: call())(call)
        self.calls += 1
        return made[0]


def measured_load(
    load: Callable[[], Steps], profile: Path | None = None
) -> tuple[dict[str, float], Steps]:
    """Load a MODEL and take a step; return the seconds and what it took of the host's memory.

    `profile` is where to write what Python does in that time, which then takes longer.
    """
    made, times = [], []

    def load_and_step() -> None:
        made.append(load())
        synchronize()
        times.append(time.perf_counter())
        made[0].run(1)
        synchronize()

    synchronize()
    with PeakMemory() as host:
        start = time.perf_counter()
        profiled(load_and_step, profile) if profile else load_and_step()
        ended = time.perf_counter()
    (loaded,), (steps,) = times, made
    return {
        "load s": round(loaded - start, 2),
        "to step 1 s": round(ended - start, 2),
        "host peak GiB": round(host.bytes / 2**30, 2),
        "weights GiB": round(steps.patcher.model_size() / 2**30, 2),
    }, steps


def profiled(call: Callable[[], object], path: Path) -> None:
    """Call it under Python's profiler, and write where the time went."""
    profiler, text = cProfile.Profile(), io.StringIO()
    profiler.runcall(call)
    synchronize()
    for order in ("tottime", "cumulative"):
        pstats.Stats(profiler, stream=text).sort_stats(order).print_stats(40)
    path.write_text(text.getvalue())


def with_lora(patcher):
    """Return a clone with a LoRA on every Linear of its network, as weak as zeros."""
    generator, patches = torch.Generator().manual_seed(2), {}
    for name, layer in patcher.model.diffusion_model.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        outputs, inputs = layer.out_features, layer.in_features
        up = torch.randn(outputs, RANK, generator=generator).half() * 1e-3
        down = torch.randn(RANK, inputs, generator=generator).half()
        weights = (up, down, float(RANK), None, None, None)
        key = f"diffusion_model.{name}.weight"
        patches[key] = LoRAAdapter({key}, weights)
    changed = patcher.clone()
    changed.add_patches(patches, 1.0)
    return changed


def _controlnet(patcher) -> comfy.controlnet.ControlNet:
    """Return one of the model's size that changes nothing: its weights are 0."""
    config = dict(patcher.model.model_config.unet_config)
    config.pop("out_channels", None)
    network = comfy.cldm.cldm.ControlNet(
        **{**config, "dtype": torch.float16, "device": torch.device("cpu")},
        hint_channels=3, operations=comfy.ops.manual_cast,
    ).eval()  # fmt: skip
    for parameter in network.parameters():
        parameter.data.zero_()
    return comfy.controlnet.ControlNet(
        network, load_device=memory.get_torch_device(), manual_cast_dtype=None
    )
