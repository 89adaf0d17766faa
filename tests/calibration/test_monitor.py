"""The Dual Monitor, against one that follows the formulas in float64."""

import gc
import itertools
import weakref

import pytest
import reference
import torch
from helpers import DTYPES, assert_same_layers, generator
from hswq.calibration import DualMonitor, monitored_layers

SHAPES = [(2, 6, 9, 7), (3, 11, 6), (5, 6), (6,), (2, 3, 4, 5, 6)]


def activation(shape, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """An activation with heavy tails and a mean of its own in every channel."""
    numbers = generator(seed)
    values = torch.randn(shape, generator=numbers) / torch.rand(shape, generator=numbers).sqrt()
    return (values + torch.randn(shape[-1], generator=numbers)).to(dtype)


class Echo(torch.nn.Linear):
    """A layer whose output is a given function of its input: any rank, any layout."""

    def __init__(self, function=lambda values: values * 0.5 + 0.25) -> None:
        super().__init__(6, 6)
        self.function = function

    def forward(self, input):
        return self.function(input)


class QuantizedLinear(torch.nn.Module):
    """What ComfyUI's quantized Linear looks like: no torch.nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 4
        self.weight = torch.nn.Parameter(torch.randn(4, 6))

    def forward(self, input):
        return torch.nn.functional.linear(input, self.weight)


def measured(layer: torch.nn.Module, inputs: list[torch.Tensor]):
    """A layer's statistics over some calls, and its outputs."""
    model = torch.nn.ModuleDict({"layer": layer})
    with DualMonitor(model) as monitor:
        outputs = [layer(values) for values in inputs]
    return monitor.statistics()["layer"], outputs


def assert_is_the_reference(layer, inputs, outputs, rel: float = 1e-6) -> None:
    sums = reference.moments(outputs)
    # A mean may cancel out; what it is right to is the size of the values.
    size = (sums.mean_square * len(outputs)) ** 0.5
    assert layer.output_sum == pytest.approx(sums.mean, rel=rel, abs=rel * size)
    assert layer.output_square_sum == pytest.approx(sums.mean_square, rel=rel)
    assert layer.importance.tolist() == pytest.approx(reference.importance(inputs), rel=rel)
    assert layer.input_amax == max(values.double().abs().max().item() for values in inputs)
    assert layer.output_calls == layer.input_calls == layer.calls == len(inputs)


def hooks(model: torch.nn.Module) -> int:
    """How many hooks are on a model's modules."""
    return sum(len(module._forward_hooks) for module in model.modules())


class TestExactness:
    @pytest.mark.parametrize("shape", SHAPES, ids=[f"{len(shape)}-D" for shape in SHAPES])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_any_rank_and_dtype(self, shape, dtype, device):
        inputs = [activation(shape, dtype, seed).to(device) for seed in range(4)]
        layer, outputs = measured(Echo(), inputs)
        assert_is_the_reference(layer, inputs, outputs)
        assert layer.importance_sum.dtype == torch.float64
        assert layer.importance_sum.device.type == "cpu"

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_batches_of_any_size(self, dtype, device):
        inputs = [activation((batch, 5, 6), dtype, batch).to(device) for batch in (1, 2, 7, 1)]
        assert_is_the_reference(*self.echoed(inputs))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_large_activations(self, dtype, device):
        inputs = [activation((2, 6, 128, 96), dtype, seed).to(device) for seed in range(2)]
        assert_is_the_reference(*self.echoed(inputs))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "lay_out",
        [
            lambda values: values.to(memory_format=torch.channels_last),
            lambda values: values.transpose(2, 3),
            lambda values: values[::2, :, 1:],
            lambda values: values[:, :1].expand(-1, 6, -1, -1),
            lambda values: values.flatten(2).transpose(1, 2),
        ],
        ids=["channels last", "transposed", "strided", "expanded", "tokens of an image"],
    )
    def test_any_layout(self, lay_out, dtype, device):
        inputs = [lay_out(activation((4, 6, 8, 10), dtype, seed).to(device)) for seed in range(3)]
        assert_is_the_reference(*self.echoed(inputs))

    def test_fp16_squares_beyond_fp16(self, device):
        """300 squared overflows FP16; FP32 has room."""
        inputs = [torch.full((4, 6), 600.0, dtype=torch.float16, device=device)]
        layer, outputs = measured(Echo(lambda values: values), inputs)
        assert layer.output_square_sum == 360000
        assert layer.sensitivity == 0
        assert_is_the_reference(layer, inputs, outputs)

    def test_a_conv_and_a_linear(self, device):
        conv = torch.nn.Conv2d(3, 6, 3, padding=1).to(device)
        linear = torch.nn.Linear(6, 4).to(device)
        images = [activation((2, 3, 8, 8), seed=seed).to(device) for seed in range(3)]
        tokens = [activation((2, 9, 6), seed=seed).to(device) for seed in range(3)]
        for layer, inputs in ((conv, images), (linear, tokens)):
            assert_is_the_reference(*self.called(layer, inputs))

    def test_a_constant_output_has_no_sensitivity(self):
        layer, _ = measured(Echo(torch.ones_like), [activation((4, 6))])
        assert layer.sensitivity == 0

    @pytest.mark.parametrize("value", [torch.inf, torch.nan])
    @pytest.mark.parametrize("shape", SHAPES[:3], ids=[f"{len(s)}-D" for s in SHAPES[:3]])
    def test_what_is_not_finite_stays_so(self, shape, value, device):
        values = activation(shape).to(device)
        values[1] = value
        for order in ([values, activation(shape)], [activation(shape), values]):
            layer, _ = measured(Echo(), [values.to(device) for values in order])
            assert not layer.finite
            assert str(layer.input_amax) == str(float(value))

    def test_the_largest_input_is_of_all_calls(self, device):
        """And of both signs; what the output is has nothing to do with it."""
        sizes = [2.0, -7.0, 3.0]
        inputs = [torch.tensor([[size, 1.0, 0, 0, 0, 0]], device=device) for size in sizes]
        layer, _ = measured(Echo(lambda values: values * 100), inputs)
        assert layer.input_amax == 7

    def test_a_call_of_nothing_is_none(self):
        inputs = [activation((4, 6)), torch.empty(0, 6), activation((4, 6), seed=1)]
        layer, outputs = measured(Echo(), inputs)
        assert_is_the_reference(layer, [inputs[0], inputs[2]], [outputs[0], outputs[2]])

    def echoed(self, inputs):
        return self.called(Echo(), inputs)

    def called(self, module, inputs):
        layer, outputs = measured(module, inputs)
        return layer, inputs, outputs


class TestMonitoredLayers:
    def test_linear_conv_and_comfyuis_quantized_linear_in_order(self):
        model = torch.nn.ModuleDict(
            {
                "out": torch.nn.Linear(6, 4),
                "block": torch.nn.Sequential(
                    torch.nn.Conv2d(3, 6, 3),
                    torch.nn.GroupNorm(2, 6),
                    torch.nn.SiLU(),
                    QuantizedLinear(),
                ),
                "time": torch.nn.Embedding(3, 6),
                "wide": torch.nn.Conv3d(3, 6, 3),
            }
        )
        assert list(monitored_layers(model)) == ["out", "block.0", "block.3"]

    def test_comfyuis_quantized_linear_is_measured(self):
        inputs = [activation((2, 5, 6))]
        layer, outputs = measured(QuantizedLinear(), inputs)
        assert_is_the_reference(layer, inputs, outputs)

    def test_a_layer_by_two_names_is_one(self):
        layer = torch.nn.Linear(6, 6)
        model = torch.nn.ModuleDict({"first": layer, "second": layer})
        inputs = [activation((4, 6), seed=seed) for seed in range(3)]
        with DualMonitor(model) as monitor:
            outputs = [model["first"](inputs[0]), model["second"](inputs[1]), layer(inputs[2])]
        statistics = monitor.statistics()
        assert list(statistics) == ["first"]
        assert_is_the_reference(statistics["first"], inputs, outputs)


class TestDualMonitor:
    @pytest.fixture
    def model(self) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.SiLU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)
        )

    def test_returns_itself_and_the_layers_in_order(self, model):
        monitor = DualMonitor(model)
        with monitor as entered:
            assert entered is monitor
            model(activation((5, 6)))
        statistics = monitor.statistics()
        assert list(statistics) == ["0", "2", "3"]
        assert [len(layer.importance) for layer in statistics.values()] == [6, 8, 8]
        assert statistics.meta == {"total_steps": 1, "layers": 3}

    def test_changes_no_output(self, model):
        values = activation((5, 6))
        expected = model(values)
        with DualMonitor(model):
            assert torch.equal(model(values), expected)

    def test_a_layer_that_was_never_called_is_left_out(self, model):
        model.append(torch.nn.Linear(4, 4))
        with DualMonitor(model) as monitor:
            model[:4](activation((5, 6)))
        assert list(monitor.statistics()) == ["0", "2", "3"]

    def test_nothing_called(self, model):
        with DualMonitor(model) as monitor:
            pass
        assert len(monitor.statistics()) == 0
        assert monitor.statistics().meta == {"total_steps": 0, "layers": 3}

    def test_a_layer_called_several_times_in_one_forward(self):
        layer = torch.nn.Linear(6, 6)
        with DualMonitor(torch.nn.Sequential(layer)) as monitor:
            once = layer(activation((4, 6)))
            twice = layer(once)
        measured = monitor.statistics()["0"]
        assert_is_the_reference(measured, [activation((4, 6)), once], [once, twice])

    @pytest.mark.parametrize("layer", [torch.nn.Linear(6, 6), torch.nn.Conv2d(6, 6, 1)])
    def test_the_input_as_a_keyword(self, layer):
        values = activation((2, 6, 4, 6))
        with DualMonitor(torch.nn.Sequential(layer)) as monitor:
            output = layer(input=values)
        assert_is_the_reference(monitor.statistics()["0"], [values], [output])

    def test_other_arguments_beside_the_input(self):
        class Scaled(torch.nn.Linear):
            def forward(self, x, scale=1.0):
                return super().forward(x) * scale

        layer, values = Scaled(6, 4), activation((4, 6))
        with DualMonitor(torch.nn.Sequential(layer)) as monitor:
            outputs = [layer(values, 2.0), layer(values, scale=3.0), layer(x=values, scale=4.0)]
        assert_is_the_reference(monitor.statistics()["0"], [values] * 3, outputs)

    def test_sums_go_on_in_a_second_block(self, model):
        monitor = DualMonitor(model)
        inputs = [activation((5, 6), seed=seed) for seed in range(4)]
        with monitor:
            outputs = [model[0](values) for values in inputs[:2]]
        model[0](inputs[0])
        with monitor:
            outputs += [model[0](values) for values in inputs[2:]]
        assert_is_the_reference(monitor.statistics()["0"], inputs, outputs)

    def test_statistics_hold_no_more_memory_than_their_layers_need(self, model):
        with DualMonitor(model) as monitor:
            model[0](activation((5, 6)))
        (layer,) = monitor.statistics().values()
        importance = layer.importance_sum
        assert importance.untyped_storage().nbytes() == importance.nbytes

    def test_statistics_so_far_do_not_change_later(self, model):
        with DualMonitor(model) as monitor:
            model(activation((5, 6)))
            early = monitor.statistics()
            before = early["0"].importance_sum.clone()
            model(activation((5, 6)))
        assert early["0"].calls == 1
        assert torch.equal(early["0"].importance_sum, before)
        assert monitor.statistics()["0"].calls == 2

    @pytest.mark.parametrize(
        "order",
        [*itertools.permutations((torch.inference_mode, torch.no_grad, torch.enable_grad))],
        ids=lambda order: "-".join(mode.__name__ for mode in order),
    )
    def test_any_mix_of_autograd_modes(self, model, order):
        inputs = [activation((5, 6), seed=seed) for seed in range(3)]
        outputs = []
        with DualMonitor(model) as monitor:
            for mode, values in zip(order, inputs, strict=True):
                with mode():
                    outputs.append(model[0](values))
        layer = monitor.statistics()["0"]
        assert_is_the_reference(layer, inputs, outputs)
        assert not layer.importance_sum.requires_grad
        assert not layer.importance_sum.is_inference()

    def test_other_models_are_left_alone(self, model):
        other = torch.nn.Sequential(torch.nn.Linear(6, 6))
        with DualMonitor(model):
            assert hooks(other) == 0
        assert hooks(model) == 0

    def test_two_at_once(self, model):
        values = activation((5, 6))
        with DualMonitor(model) as outer, DualMonitor(model) as inner:
            model(values)
        assert_same_layers(outer.statistics(), inner.statistics())

    def test_other_hooks_stay(self, model):
        seen = []
        handle = model[0].register_forward_hook(lambda *_: seen.append(True))
        with DualMonitor(model):
            pass
        model(activation((5, 6)))
        assert (seen, hooks(model)) == ([True], 1)
        handle.remove()

    def test_hooks_are_gone_after_success(self, model):
        with DualMonitor(model):
            model(activation((5, 6)))
            assert hooks(model) == 3
        assert hooks(model) == 0

    @pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError, KeyboardInterrupt])
    def test_hooks_are_gone_after_an_error(self, model, error):
        def fail(values):
            raise error("from the model")

        model.append(Echo(fail))
        with pytest.raises(error, match="from the model"), DualMonitor(model) as monitor:
            model(activation((5, 6)))
        assert hooks(model) == 0
        assert monitor.error is None
        assert list(monitor.statistics()) == ["0", "2", "3"]


class TestErrors:
    """What goes wrong in measuring is the monitor's, never the model's."""

    def failing(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        """A model, and its layer that returns what cannot be measured."""
        odd = Echo(lambda values: (values, "not a tensor"))
        return torch.nn.ModuleDict({"fine": torch.nn.Linear(6, 6), "odd": odd}), odd

    def test_the_forward_goes_on(self):
        model, odd = self.failing()
        values = activation((4, 6))
        with DualMonitor(model) as monitor:
            model["fine"](values)
            output, text = odd(values)
            assert torch.equal(output, values)
            assert text == "not a tensor"
            assert isinstance(monitor.error, AttributeError)

    def test_measuring_stops_at_once(self):
        model, odd = self.failing()
        with DualMonitor(model) as monitor:
            odd(activation((4, 6)))
            assert hooks(model) == 0
            first = monitor.error
            odd(activation((4, 6)))
        assert monitor.error is first

    def test_statistics_name_the_layer_and_the_reason(self):
        model, odd = self.failing()
        with DualMonitor(model) as monitor:
            model["fine"](activation((4, 6)))
            odd(activation((4, 6)))
        with pytest.raises(RuntimeError, match=r"cannot measure odd: .*tuple") as raised:
            monitor.statistics()
        assert raised.value.__cause__ is monitor.error

    def test_no_error_is_none(self):
        with DualMonitor(torch.nn.Sequential(torch.nn.Linear(6, 6))) as monitor:
            pass
        assert monitor.error is None

    def test_a_layer_called_without_arguments(self):
        class Constant(torch.nn.Linear):
            def forward(self):
                return self.weight

        model = torch.nn.Sequential(Constant(6, 6))
        with DualMonitor(model) as monitor:
            assert model[0]() is model[0].weight
        with pytest.raises(RuntimeError, match="cannot measure 0"):
            monitor.statistics()

    @pytest.mark.parametrize("later", [(4, 5), (6,), (2, 3, 4, 5, 6)])
    def test_a_layer_whose_input_channels_change(self, later):
        layer = Echo()
        with DualMonitor(torch.nn.Sequential(layer)) as monitor:
            layer(activation((4, 6)))
            layer(activation(later))
        channels = later[-1] if len(later) == 2 else 1
        with pytest.raises(RuntimeError, match=f"it had 6 input channels, now {channels}"):
            monitor.statistics()

    def test_the_models_own_error_passes(self):
        """An interrupt inside of measuring is not swallowed either."""

        class Interrupting(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, kinds, args=(), kwargs=None):
                raise KeyboardInterrupt

        output = activation((4, 6)).as_subclass(Interrupting)
        model = torch.nn.Sequential(Echo(lambda values: output))
        with pytest.raises(KeyboardInterrupt), DualMonitor(model):
            model(activation((4, 6)))
        assert hooks(model) == 0

    def test_the_error_keeps_no_activation_alive(self):
        class Activation(torch.Tensor):
            """One that measuring cannot read, to be watched from outside."""

            def detach(self):
                raise ValueError("unreadable")

        alive = []

        def produce(values):
            output = values.clone().as_subclass(Activation)
            alive.append(weakref.ref(output))
            return output

        model = torch.nn.Sequential(Echo(produce))
        with DualMonitor(model) as monitor:
            model(activation((4, 6)))
        gc.collect()
        assert str(monitor.error) == "unreadable"
        assert alive[0]() is None
