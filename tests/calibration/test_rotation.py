"""Measuring a part of the layers in each forward, every layer equally often."""

import collections
import itertools
import random

import pytest
import reference
import torch
from helpers import generator
from hswq.calibration import DualMonitor, Rotation, monitored_layers

NAMES = [f"layer {number}" for number in range(26)]


class TestRotation:
    @pytest.mark.parametrize("share", [1.0, 0.5, 0.3, 0.1, 0.07, 1 / 26, 0.001])
    def test_every_layer_once_a_round(self, share):
        rotation = Rotation(NAMES, share)
        for _ in range(3):
            groups = [rotation.next() for _ in range(len(rotation))]
            assert sorted(itertools.chain(*groups)) == sorted(NAMES)
            sizes = {len(group) for group in groups}
            assert max(sizes) - min(sizes) <= 1

    @pytest.mark.parametrize(("share", "groups"), [(1.0, 1), (0.5, 2), (0.1, 10), (1 / 3, 3)])
    def test_a_group_is_no_more_than_the_share(self, share, groups):
        assert len(Rotation(NAMES, share)) == groups

    def test_no_layer_keeps_its_place(self):
        """Else it would be measured in the same step of every sampling."""
        rotation = Rotation(NAMES, 0.1, seed=0)
        places = collections.defaultdict(set)
        for _ in range(300):
            for place in range(len(rotation)):
                for name in rotation.next():
                    places[name].add(place)
        assert all(len(found) == len(rotation) for found in places.values())

    def test_changes_nobody_elses_random_numbers(self):
        random.seed(5)
        expected = random.random()
        random.seed(5)
        Rotation(NAMES, 0.1).next()
        assert random.random() == expected

    @pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
    def test_refuses_other_shares(self, share):
        with pytest.raises(ValueError, match="share must be above 0 and at most 1"):
            Rotation(NAMES, share)

    def test_of_no_layers(self):
        assert Rotation([], 0.1).next() == []


class TestMonitor:
    LAYERS = 12

    @pytest.fixture
    def model(self, device) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(self.LAYERS))).to(device)

    @pytest.fixture
    def inputs(self, device) -> list[torch.Tensor]:
        return [torch.randn(5, 6, generator=generator(seed)).to(device) for seed in range(20)]

    def test_equals_the_average_over_the_calls_that_it_measured(self, model, inputs):
        measured = {name: [] for name in monitored_layers(model)}

        def note(name):
            return lambda _, args, output: calls.append((name, args[0], output))

        for name, layer in monitored_layers(model).items():
            layer.register_forward_hook(note(name))
        with DualMonitor(model, 0.25) as monitor:
            before = collections.Counter()
            for values in inputs:
                calls = []
                model(values)
                after = collections.Counter(
                    {name: layer.calls for name, layer in monitor.statistics().items()}
                )
                group = after - before
                assert len(group) == 3
                for name, *call in calls:
                    measured[name] += [call] * group[name]
                before = after
        statistics = monitor.statistics()
        assert list(statistics) == list(measured)
        for name, layer in statistics.items():
            passed, outputs = zip(*measured[name], strict=True)
            assert layer.calls == 5
            assert layer.importance.tolist() == pytest.approx(
                reference.importance(passed), rel=1e-6
            )
            assert layer.input_amax == max(values.abs().max().item() for values in passed)
            sums = reference.moments(outputs)
            assert layer.output_square_sum == pytest.approx(sums.mean_square, rel=1e-6)
            assert layer.output_sum == pytest.approx(sums.mean, abs=1e-6 * sums.mean_square**0.5)

    def test_meta_says_how_much_was_measured_of_what(self, model, inputs):
        with DualMonitor(model, 0.25) as monitor:
            model(inputs[0])
        statistics = monitor.statistics()
        assert len(statistics) == 3
        assert statistics.meta == {"total_steps": 1, "layers": self.LAYERS}

    def test_goes_on_with_the_turns_of_an_earlier_one(self, model, inputs):
        rotation = Rotation(list(monitored_layers(model)), 0.25)
        total = None
        for values in inputs[:4]:
            with DualMonitor(model, rotation=rotation) as monitor:
                model(values)
            found = monitor.statistics()
            total = found if total is None else total.merge(found)
        assert [layer.calls for layer in total.values()] == [1] * self.LAYERS

    def test_hooks_only_the_group(self, model, inputs):
        seen = []
        with DualMonitor(model, 0.25):
            model[0].register_forward_pre_hook(lambda *_: seen.append(hooks(model)))
            for one in inputs[:3]:
                model(one)
        learning = len(model)  # who shares an input, in the first forward
        assert seen == [learning + 3, 3, 3]
        assert hooks(model) == 0

    @pytest.mark.parametrize("error", [ValueError, torch.OutOfMemoryError, KeyboardInterrupt])
    def test_hooks_are_gone_after_an_error(self, model, inputs, error):
        def fail(*_):
            raise error("from the model")

        handle = model[5].register_forward_pre_hook(fail)
        with pytest.raises(error, match="from the model"), DualMonitor(model, 0.25):
            model(inputs[0])
        handle.remove()
        assert hooks(model) == 0
        assert not model._forward_pre_hooks

    def test_changes_no_output(self, model, inputs):
        expected = model(inputs[0])
        with DualMonitor(model, 0.25):
            assert torch.equal(model(inputs[0]), expected)

    def test_its_own_errors_end_it(self, model, inputs):
        class Broken(Rotation):
            def next(self):
                raise RuntimeError("no group")

        broken = Broken(list(monitored_layers(model)), 0.25)
        with DualMonitor(model, rotation=broken) as monitor:
            model(inputs[0])
            assert not model._forward_pre_hooks
        with pytest.raises(RuntimeError, match="no group"):
            monitor.statistics()


def hooks(model: torch.nn.Module) -> int:
    """How many forward hooks are on a model's modules."""
    return sum(len(module._forward_hooks) for module in model.modules())
