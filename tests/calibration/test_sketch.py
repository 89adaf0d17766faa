"""Sketches against the second moments that they estimate."""

import random

import pytest
import torch
from helpers import DTYPES, generator
from hswq.calibration import DualMonitor, Sketch, merge_sketches, noise, sketch_sums
from hswq.calibration.sketch import SIZE
from hswq.calibration.sketch_sums import PICKED, DeviceSketches, add_rows_with_torch

CPU = torch.device("cpu")


def correlated(count: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Rows whose channels have a mean, and much in common."""
    numbers = generator(seed)
    mixing = torch.randn(channels, channels, generator=numbers) / channels**0.5
    return torch.randn(count, channels, generator=numbers) @ mixing + 0.5


def sketch_of(rows: torch.Tensor, seed: int) -> Sketch:
    sums = DeviceSketches(CPU, seed=seed)
    for part in rows.split(PICKED):
        sums.add("layer", part, rows.shape[1])
    return sums.read()["layer"]


class TestNoise:
    def test_signs_are_even_and_independent(self):
        """Each mean of n products of fair signs is off by 1 / sqrt(n); the worst of m by less
        than sqrt(2 ln 2m) + 1 of those."""
        signs = torch.cat([noise.signs(seed, 256, SIZE, CPU) for seed in range(16)], 1)
        assert signs.unique().tolist() == [-1, 1]
        for one in (signs, signs.T):
            products = one @ one.T / one.shape[1]
            products.fill_diagonal_(0)
            assert products.abs().max() < 7 / one.shape[1] ** 0.5
        assert abs(signs.mean()) < 4 / signs.numel() ** 0.5

    @pytest.mark.parametrize("positions", [256, 257, 300, 1000, 16384])
    def test_every_position_is_picked_as_often(self, positions):
        rounds = 40 * positions // 256
        picked = torch.cat([noise.picks(seed, positions, 256, CPU) for seed in range(rounds)])
        times = torch.bincount(picked, minlength=positions).double()
        assert len(times) == positions
        expected = rounds * 256 / positions
        # Of independent picks, chi^2 has a mean of 1 a position; of stretches, less.
        assert (times - expected).square().mean() / expected < 1.1
        assert times.min() > 0

    def test_all_are_picked_where_there_are_few(self):
        for count in (1, 7, 256):
            assert torch.equal(noise.picks(5, count, count, CPU), torch.arange(count))


class TestEstimate:
    def test_is_unbiased(self):
        """The mean of n sketches is within 5 standard errors of the Gram matrix, in every place."""
        rows = correlated(200, 12)
        grams = torch.stack([(s := sketch_of(rows, n).matrix).T @ s / SIZE for n in range(100)])
        exact = rows.T @ rows
        error = (grams.mean(0) - exact) / (grams.std(0) / len(grams) ** 0.5)
        assert error.abs().max() < 5

    def test_is_as_near_as_its_size_lets_it_be(self):
        """Its error is |G|_F^2 + tr(G)^2 over SIZE, but for what a row has to itself."""
        rows = correlated(500, 12)
        exact = rows.T @ rows
        errors = torch.stack(
            [
                ((s := sketch_of(rows, n).matrix).T @ s / SIZE - exact).square().sum()
                for n in range(99)
            ]
        )
        predicted = (exact.square().sum() + exact.trace() ** 2) / SIZE
        assert errors.mean().item() == pytest.approx(predicted.item(), rel=0.2)

    @pytest.mark.parametrize("shape", [(5, 6), (3, 11, 6), (2, 6, 9, 7), (2, 6, 40, 50)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_adds_rows_of_any_layout(self, shape, dtype):
        """One row times its signs has the row's magnitudes, whatever the signs."""
        row = torch.tensor([1.0, -2, 3, 0, 0.5, -0.25])
        inputs = (row[:, None, None] if len(shape) == 4 else row).expand(shape).to(dtype)
        sums = DeviceSketches(CPU)
        sums.add("layer", inputs, 6)
        sketch = sums.read()["layer"]
        positions = inputs.numel() // 6
        assert sketch.rows == min(positions, PICKED)
        sums_of_signs = sketch.matrix / row
        expected = sums_of_signs[:, :1].expand(-1, 6)
        finite = row != 0
        assert torch.equal(sums_of_signs[:, finite], expected[:, finite])
        assert not sketch.matrix[:, ~finite].any()
        assert sketch.matrix.square().mean(0)[0].item() == pytest.approx(sketch.rows, rel=0.7)

    @pytest.mark.parametrize(
        ("shape", "channels"), [((6,), 6), ((2, 3, 4, 5, 6), 6), ((4, 7), 6), ((2, 6, 4, 4), 4)]
    )
    def test_leaves_out_what_has_other_channels(self, shape, channels):
        sums = DeviceSketches(CPU)
        sums.add("layer", torch.ones(shape), channels)
        assert sums.read() == {}

    def test_bf16_is_near_enough(self):
        rows = correlated(200, 24)
        exact, rounded = torch.zeros(SIZE, 24), torch.zeros(SIZE, 24, dtype=torch.bfloat16)
        for seed in range(20):
            for matrix in (exact, rounded):
                add_rows_with_torch(matrix, rows, 200, 200, seed)
        error = (rounded.float() - exact).norm() / exact.norm()
        assert error < 0.1 / SIZE**0.5

    def test_has_a_constant_size(self):
        sums = DeviceSketches(CPU)
        for _ in range(3):
            sums.add("layer", correlated(1000, 12), 12)
        sketch = sums.read()["layer"]
        assert sketch.matrix.shape == (SIZE, 12)
        assert sketch.matrix.dtype == torch.float32
        assert sketch.rows == 3 * PICKED


class TestMerge:
    def test_two_machines_are_one(self):
        """In the sums that they estimate: the second machine's rows are as if the first's."""
        first, second = correlated(200, 12), correlated(200, 12, seed=1)
        merged = [
            sketch_of(first, 2 * n).merge(sketch_of(second, 2 * n + 1)).matrix for n in range(100)
        ]
        together = torch.cat((first, second))
        ours = [sketch_of(together, n).matrix for n in range(100)]
        exact = together.T @ together
        for sketches in (merged, ours):
            grams = torch.stack([sketch.T @ sketch / SIZE for sketch in sketches])
            error = (grams.mean(0) - exact) / (grams.std(0) / 10)
            assert error.abs().max() < 5

    def test_rows_add_up(self):
        merged = Sketch(torch.ones(SIZE, 3), 4).merge(Sketch(torch.ones(SIZE, 3), 5))
        assert merged.rows == 9
        assert torch.equal(merged.matrix, torch.full((SIZE, 3), 2.0))

    def test_of_other_channels_is_refused(self):
        with pytest.raises(ValueError, match=r"\(128, 4\) to one of shape \(128, 3\)"):
            Sketch(torch.ones(SIZE, 3), 4).merge(Sketch(torch.ones(SIZE, 4), 5))

    def test_who_shares_in_both_shares(self):
        shared, other, k, v = (Sketch(torch.full((SIZE, 2), float(n)), n) for n in range(1, 5))
        merged = merge_sketches(
            {"q": shared, "k": shared, "v": shared}, {"q": k, "k": k, "v": v, "x": other}
        )
        assert merged["q"] is merged["k"] is not merged["v"]
        assert [merged[name].rows for name in "qkvx"] == [4, 4, 5, 2]

    def test_a_wrong_layer_is_named(self):
        one, other = Sketch(torch.ones(SIZE, 3), 4), Sketch(torch.ones(SIZE, 4), 5)
        with pytest.raises(ValueError, match="layer 'q'"):
            merge_sketches({"q": one}, {"q": other})


class Attention(torch.nn.Module):
    """As ComfyUI's: to_k and to_v read the context, or what to_q reads."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(channels, channels) for _ in range(3))

    def forward(self, x, context=None):
        context = x if context is None else context
        return self.to_q(x) + (self.to_k(context) * self.to_v(context)).sum(1, keepdim=True)


class Transformer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.first, self.second = (Attention(8) for _ in range(3))
        self.proj = torch.nn.Conv2d(8, 8, 1)

    def forward(self, x, context):
        x = x + self.attn1(x)
        x = self.second(self.first(x, context), context)
        return self.proj(x.transpose(1, 2)[..., None])


def inputs(seed: int = 0):
    return torch.randn(2, 9, 8, generator=generator(seed)), torch.randn(
        2, 5, 8, generator=generator(seed + 1)
    )


GROUPS = [
    {"attn1.to_q", "attn1.to_k", "attn1.to_v"},
    {"first.to_q"},
    {"first.to_k", "first.to_v", "second.to_k", "second.to_v"},
    {"second.to_q"},
    {"proj"},
]


def groups(sketches: dict[str, Sketch]) -> list[set[str]]:
    found = {}
    for name, sketch in sketches.items():
        found.setdefault(id(sketch), set()).add(name)
    return list(found.values())


def sampled(model, share: float = 1.0, forwards: int = 1) -> dict[str, Sketch]:
    with DualMonitor(model, share, sketched=1) as monitor:
        for seed in range(forwards):
            model(*inputs(seed))
    return monitor.sketches()


@pytest.mark.parametrize("inference", [True, False])
class TestSharing:
    @pytest.mark.parametrize("share", [1.0, 0.3])
    def test_one_input_has_one_sketch(self, share, inference):
        with torch.inference_mode(inference):
            found = sampled(Transformer(), share, forwards=4)
        assert sorted(map(sorted, groups(found))) == sorted(map(sorted, GROUPS))

    def test_it_has_the_owners_calls_alone(self, inference):
        with torch.inference_mode(inference):
            found = sampled(Transformer(), forwards=3)
        assert found["attn1.to_v"].rows == 3 * 18
        assert found["second.to_v"].rows == 3 * 10

    def test_memory_that_is_used_again_is_no_input_shared(self, inference):
        layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(20))
        with torch.inference_mode(inference), DualMonitor(layers) as monitor:
            addresses = set()
            for layer in layers:
                values = torch.randn(4, 64)
                addresses.add(values.data_ptr())
                layer(values)
                del values
        assert len(addresses) < 20, "the allocator gave no memory twice: this shows nothing"
        assert len(groups(monitor.sketches())) == 20

    def test_what_is_changed_in_place_is_another_input(self, inference):
        layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
        with torch.inference_mode(inference), torch.no_grad():
            values = torch.randn(4, 8)
            with DualMonitor(layers) as monitor:
                layers[0](values)
                values += 1
                layers[1](values)
            assert list(monitor.sketches()) == ["0"]
            with DualMonitor(layers) as monitor:
                layers[0](values)
                values += 1
                layers[1](values)
            assert len(groups(monitor.sketches())) == 2

    def test_learns_once(self, inference):
        model = Transformer()
        with torch.inference_mode(inference):
            sampled(model, 0.3)
            seen = []
            model.proj.register_forward_pre_hook(
                lambda *_: seen.append(sum(len(one._forward_hooks) for one in model.modules()))
            )
            sampled(model, 0.3)
        assert seen[0] <= 4


class TestMonitor:
    def test_nobodys_random_numbers_change(self):
        model = Transformer()
        torch.manual_seed(5)
        random.seed(5)
        expected = torch.get_rng_state(), random.getstate()
        sampled(model, 0.3, 4)
        assert torch.equal(torch.get_rng_state(), expected[0])
        assert random.getstate() == expected[1]

    def test_two_samplings_have_different_signs(self):
        model = Transformer()
        first, second = (sampled(model)["proj"].matrix for _ in range(2))
        assert not torch.equal(first, second)

    def test_can_do_without(self):
        model = Transformer()
        with DualMonitor(model, sketched=0) as monitor:
            model(*inputs())
        assert monitor.sketches() == {}
        assert len(monitor.statistics()) == 10

    def test_may_keep_some_of_the_calls(self):
        """Fair coins: 5 standard deviations are 0.125."""
        model = Transformer()
        with DualMonitor(model, sketched=0.5) as monitor:
            for _ in range(400):
                model.proj(torch.ones(1, 8, 1, 1))
        assert monitor.sketches()["proj"].rows == pytest.approx(200, rel=0.25)
        assert monitor.statistics()["proj"].calls == 400

    def test_under_autocast(self):
        model = Transformer()
        with torch.autocast("cpu", torch.bfloat16), DualMonitor(model) as monitor:
            model(*inputs())
        found = monitor.sketches()["attn1.to_q"]
        assert found.matrix.dtype == torch.float32
        assert found.matrix.square().mean().item() == pytest.approx(18, rel=0.5)

    def test_is_that_of_the_layers_inputs(self):
        """The owner's input, whatever its channels' sizes."""
        model = torch.nn.ModuleList([torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(3, 4)])
        sizes = torch.tensor([1.0, 10, 100])
        with DualMonitor(model) as monitor:
            for seed in range(8):
                values = torch.randn(2, 40, 30, 3, generator=generator(seed)) * sizes
                model[0](values.movedim(-1, 1))
                model[1](values.flatten(1, 2))
        for sketch in monitor.sketches().values():
            assert sketch.rows == 8 * PICKED
            moments = sketch.matrix.square().mean(0) / sketch.rows
            assert (moments / sizes.square()).tolist() == pytest.approx([1, 1, 1], rel=0.5)

    def test_a_linears_images_are_left_out(self):
        """Their channels are on the last axis; HSWQ's importance takes axis 1 all the same."""
        model = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
        with DualMonitor(model) as monitor:
            model[0](torch.randn(2, 4, 4, 4))
        assert monitor.sketches() == {}
        assert len(monitor.statistics()) == 1

    def test_fails_as_statistics_do(self, monkeypatch):
        def fail(*_):
            raise torch.OutOfMemoryError("no memory")

        model = Transformer()
        monkeypatch.setattr(sketch_sums, "add_rows", fail)
        with DualMonitor(model) as monitor:
            model(*inputs())
        for read in (monitor.sketches, monitor.statistics):
            with pytest.raises(RuntimeError, match=r"attn1.to_q: no memory"):
                read()
