"""Feed-forwards that gate in one launch give what ComfyUI's give, also before FP8 products."""

from __future__ import annotations

import comfy.model_management
import comfy.ops
import pytest
import torch
from comfy.ldm.modules import attention
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter.bypass import BypassForwardHook
from comfy.weight_adapter.lora import LoRAAdapter
from harness.inprocess import distance
from hswq.loader.engine import matmul, operations
from hswq.loader.engine.converter import convert
from hswq.loader.engine.feedforward import FeedForward, gate_at_once
from hswq.loader.engine.operations import hswq_operations
from hswq.quant import quantize

DEVICE = comfy.model_management.get_torch_device()
DTYPES = [torch.float16, torch.bfloat16]
WIDTH, INNER = 48, 192
AMAX = 4.0


def decide(name: str, weight: torch.Tensor, _: torch.device):
    """Keep the first layer in 16 bit."""
    return quantize(weight, weight.abs().max(), scaled=True) if name == "net.2" else weight


def feed_forward(dtype: torch.dtype = torch.float16, amax: float | None = None) -> FeedForward:
    """Return one whose last layer is quantized, and multiplies in FP8 where an amax is given."""
    made = attention.FeedForward(
        WIDTH, glu=True, device=DEVICE, dtype=dtype,
        operations=hswq_operations(decide, manual_cast=False),
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    shapes = {"net.0.proj": (2 * INNER, WIDTH), "net.2": (WIDTH, INNER)}
    state = {
        key: torch.randn(size, generator=generator).to(DEVICE, dtype) * 0.1
        for name, shape in shapes.items()
        for key, size in ((f"{name}.weight", shape), (f"{name}.bias", shape[:1]))
    }
    made.load_state_dict(state)
    matmul.scale_input(made.net[2].weight, amax)
    gate_at_once(torch.nn.Sequential(made))
    assert type(made) is FeedForward
    return made


def inputs(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    values = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1))
    return values.to(DEVICE, dtype)


def ordinary(module: FeedForward, values: torch.Tensor) -> torch.Tensor:
    return attention.FeedForward.forward(module, values)


@pytest.fixture
def last_inputs(monkeypatch) -> list[torch.Tensor]:
    """What last layers get, without a hook, which would change it."""
    got = []

    def product(values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if weight.shape[1] == INNER:
            got.append(values)
        return matmul.multiplied_in_fp8(values, weight, bias)

    monkeypatch.setattr(operations, "multiplied", product)
    return got


@pytest.fixture(params=[None, AMAX], ids=["16 bit", "FP8"])
def amax(request, monkeypatch) -> float | None:
    """Of the last layer's input: it multiplies in 16 bit or in FP8."""
    monkeypatch.setattr(comfy.model_management, "SUPPORT_FP8_OPS", True)
    if request.param and not matmul.usable(DEVICE):
        pytest.skip(f"{DEVICE} has no FP8 matrix products")
    return request.param


class TestForward:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(9,), (2, 7), (2, 3, 5)])
    def test_gives_what_comfyuis_does(self, amax, dtype, shape, last_inputs):
        module, values = feed_forward(dtype, amax), inputs(*shape, dtype=dtype)
        found = module(values)
        expected = ordinary(module, values)
        assert (found.dtype, found.shape) == (dtype, expected.shape)
        # A GPU's gelu is not the same to the last digit, which another FP8 value may come from.
        assert found.equal(expected) or (DEVICE.type == "cuda" and distance(found, expected) < 5e-3)
        gated, plain = last_inputs
        assert (gated.dtype, gated.shape) == (dtype, (*shape, INNER))
        assert isinstance(gated, QuantizedTensor) == bool(amax)
        assert distance(gated.float(), plain) < (0.05 if amax else 1e-3)

    def test_of_no_inputs(self, amax):
        assert feed_forward(amax=amax)(inputs(0)).shape == (0, WIDTH)

    def test_compiled_is_one_graph_and_the_same(self, amax):
        torch.compiler.reset()
        module, values = feed_forward(amax=amax), inputs(2, 7)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert distance(compiled(values), module(values)) < 5e-3

    def test_has_ordinary_gradients(self, amax):
        """For who trains a LoRA: neither a kernel nor rounding has any."""
        with torch.inference_mode(False), torch.enable_grad():
            module, values = feed_forward(amax=amax), inputs(2, 7)
            found = values.clone().requires_grad_()
            expected = values.clone().requires_grad_()
            module(found).float().square().sum().backward()
            ordinary(feed_forward(), expected).float().square().sum().backward()
            assert distance(found.grad, expected.grad) < 1e-3


class TestPlainInput:
    """The last layer's where its product in FP8 is not possible, or others look at it."""

    def test_with_a_function_on_the_weight(self, last_inputs):
        module = feed_forward(amax=AMAX)
        module.net[2].weight_function = [lambda weight: weight * 1.01]
        assert distance(module(inputs(9)), ordinary(module, inputs(9))) < 1e-3
        assert not isinstance(last_inputs[0], QuantizedTensor)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_with_a_weight_that_is_cast(self, dtype, last_inputs):
        module, values = feed_forward(amax=AMAX), inputs(9, dtype=dtype)
        for layer in (module.net[0].proj, module.net[2]):
            layer.comfy_cast_weights = True
        assert distance(module(values), ordinary(module, values)) < 1e-2
        assert not isinstance(last_inputs[0], QuantizedTensor)

    @pytest.mark.skipif(DEVICE.type == "cpu", reason="this machine has no NVIDIA GPU")
    def test_with_a_weight_on_the_host(self, last_inputs):
        module = feed_forward(amax=AMAX)
        module.net[2].cpu()
        module.net[2].comfy_cast_weights = True
        assert distance(module(inputs(9)), ordinary(module, inputs(9))) < 1e-3
        assert not isinstance(last_inputs[0], QuantizedTensor)

    def test_with_a_bypass_lora(self, last_inputs):
        """ComfyUI's own, which computes from the layer's input beside it."""
        module, values = feed_forward(amax=0.2 * AMAX), inputs(9)
        up, down = (torch.randn(shape, device=DEVICE) for shape in ((WIDTH, 4), (4, INNER)))
        lora = LoRAAdapter(set(), (up, down, 4.0, None, None, None))
        hook = BypassForwardHook(module.net[2], lora)
        without = module(values)
        hook.inject()
        effect = module(values) - without
        hook.eject()
        module(values)
        assert [isinstance(each, QuantizedTensor) for each in last_inputs] == [True, False, True]
        gated = module.net[0](values).float()
        assert distance(effect, gated @ down.T @ up.T) < 5e-3


def hook_before(part: torch.nn.Module) -> None:
    part.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))


def hook_after(part: torch.nn.Module) -> None:
    part.register_forward_hook(lambda _, __, output: output * 0.5)


def replace_forward(part: torch.nn.Module) -> None:
    forward = part.forward
    part.forward = lambda inputs: forward(inputs * 0.5)


class Wrapped(torch.nn.Module):
    """As others put into a module's place."""

    def __init__(self, wrapped: torch.nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 0.5 * self.wrapped(inputs)


class TestOthersChanges:
    """What other extensions do to the parts has its effect."""

    @pytest.mark.parametrize("part", ["net", "net.0", "net.0.proj", "net.1", "net.2"])
    @pytest.mark.parametrize("change", [hook_before, hook_after, replace_forward])
    def test_in_place(self, amax, part, change):
        module, values = feed_forward(amax=amax), inputs(9)
        before = module(values)
        change(module.get_submodule(part))
        found = module(values)
        assert distance(found, before) > 0.1
        assert distance(found, ordinary(module, values)) < 5e-3

    @pytest.mark.parametrize("part", ["net", "net.0", "net.0.proj", "net.1", "net.2"])
    def test_in_their_place(self, amax, part):
        module, values = feed_forward(amax=amax), inputs(9)
        before = module(values)
        module.set_submodule(part, Wrapped(module.get_submodule(part)))
        found = module(values)
        assert distance(found, before) > 0.1
        assert distance(found, ordinary(module, values)) < 5e-3

    def test_a_projection_that_is_transposed(self, amax):
        module, values = feed_forward(amax=amax), inputs(9)
        before = module(values)
        module.net[0].proj.register_forward_hook(lambda _, __, output: output.T.contiguous().T)
        assert distance(module(values), before) < 5e-3


class TestModels:
    def test_of_ours_have_them_and_others_do_not(self, models, planner):
        converted = convert(models.sixteen_bit, planner(0.25))
        for patcher, kind in (
            (models.quantized, FeedForward),
            (converted, FeedForward),
            (models.sixteen_bit, attention.FeedForward),
        ):
            modules = patcher.model.diffusion_model.modules()
            found = [type(one) for one in modules if isinstance(one, attention.FeedForward)]
            assert set(found) == {kind}
            assert len(found) == 17

    def test_their_parameters_are_the_same(self, models):
        ours, stock = (set(each.model.state_dict()) for each in models)
        assert ours == stock

    def test_are_left_alone_where_geglu_is_another(self, models, planner, monkeypatch):
        """A later ComfyUI's, or an extension's."""
        monkeypatch.setattr(
            attention.GEGLU, "forward", lambda self, x: self.proj(x).chunk(2, -1)[0]
        )
        modules = convert(models.sixteen_bit, planner(0.25)).model.diffusion_model.modules()
        assert not any(isinstance(one, FeedForward) for one in modules)

    def test_without_gates_are_left_alone(self):
        plain = attention.FeedForward(8, glu=False, operations=comfy.ops.disable_weight_init)
        gate_at_once(plain)
        assert type(plain) is attention.FeedForward
