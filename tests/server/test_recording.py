"""Statistics grow while stock nodes sample, and are what a Dual Monitor measures."""

from collections.abc import Sequence
from itertools import combinations

import pytest
import torch
from harness.client import Client, InterruptedPromptError
from harness.fixtures import change_settings, free
from harness.prompts import Prompt, node, stock_loader, text_to_latent, through
from harness.server import ComfyUIServer

pytestmark = pytest.mark.server

PASSIVE, BY_HAND = "recorded", "by-hand"


def sampling(session: str, **settings: int) -> Prompt:
    """Return a prompt that is recorded into a session."""
    prompt = text_to_latent(stock_loader(), **settings)
    if session == PASSIVE:
        return prompt
    calibrate = node("HSWQCalibration", model=["loader", 0], session=session)
    return through(prompt, "calibrate", calibrate)


def probed(prompt: Prompt, name: str) -> Prompt:
    """Measure with the independent monitor too."""
    model = prompt["sampler"]["inputs"]["model"]
    return through(prompt, "probe", node("ProbeDualMonitor", model=model, name=name))


def recorded(server: ComfyUIServer, session: str) -> dict:
    """Read the one file of a session."""
    (path,) = (server.models / "hswq").glob(f"*.{session}.pt")
    return torch.load(path, weights_only=True)


def measured(server: ComfyUIServer, *names: str) -> dict[str, list[dict]]:
    """Read each layer's calls, as the independent monitor has measured them under some names."""
    files = [server.base / "output" / "probe" / f"{name}.pt" for name in names]
    parts = [torch.load(file, weights_only=True) for file in files]
    return {layer: [call for part in parts for call in part[layer]] for layer in parts[0]}


def is_sum_of(calls: Sequence[dict], found: dict) -> bool:
    """Compare sums of FP32 means with the float64 means of some calls."""
    square = sum(call["mean_square"] for call in calls)
    if found["output_sq_sum"] != pytest.approx(square, rel=1e-5):
        return False
    # A mean may be near zero; the size of the values tells what rounding does to it.
    mean, size = sum(call["mean"] for call in calls), (square * len(calls)) ** 0.5
    importance = sum(call["importance"] for call in calls)
    return found["output_sum"] == pytest.approx(mean, abs=1e-5 * size) and torch.allclose(
        found["input_imp_sum"], importance, rtol=1e-5, atol=0
    )


def assert_measured(found: dict, calls: dict[str, list[dict]]) -> None:
    """Check that each layer has the sums of as many of its calls as it says."""
    assert set(found) <= set(calls)
    for name, layer in found.items():
        assert layer["out_count"] == layer["in_count"] > 0, name
        chosen = combinations(calls[name], layer["out_count"])
        assert any(is_sum_of(some, layer) for some in chosen), name


def assert_all_measured(found: dict, calls: dict[str, list[dict]]) -> None:
    """Check that each layer has the sums of all its calls."""
    counts = {name: len(each) for name, each in calls.items()}
    assert {name: layer["out_count"] for name, layer in found.items()} == counts
    assert_measured(found, calls)


def hooks(client: Client) -> list[int]:
    """Return how many hooks are left on each diffusion model in memory."""
    return [model["hooks"] for model in client.get_json("/probe/models")["loaded"]]


def is_patched(client: Client) -> bool:
    """Whether ComfyUI's own sampling function is wrapped."""
    return client.get_json("/probe/models")["patched"]


class TestStatistics:
    @pytest.mark.parametrize("session", [PASSIVE, BY_HAND])
    def test_two_runs_equal_an_independent_monitor(
        self, server: ComfyUIServer, client: Client, session: str
    ):
        for seed, batch in ((1, 1), (2, 3)):
            client.run(probed(sampling(session, batch=batch, steps=3, seed=seed), session))
        saved = recorded(server, session)
        assert saved["meta"]["samples"] == 4
        assert saved["meta"]["total_steps"] == 6
        assert_all_measured(saved["layers"], measured(server, session))
        assert hooks(client) == [0]

    def test_goes_on_after_a_restart(self, server: ComfyUIServer, client: Client):
        runs = [("before", 1), ("after", 2)]
        for name, seed in runs:
            for session in (PASSIVE, BY_HAND):
                client.run(probed(sampling(session, seed=seed), f"{session}-{name}"))
            if name == "before":
                server.restart()
        for session in (PASSIVE, BY_HAND):
            saved = recorded(server, session)
            calls = measured(server, *(f"{session}-{name}" for name, _ in runs))
            assert saved["meta"]["samples"] == 2
            assert_all_measured(saved["layers"], calls)

    def test_by_the_default_budget_each_layer_has_its_turn(
        self, server: ComfyUIServer, client: Client
    ):
        """A twentieth of the layers in each step on a CPU, so all of them once in 20 steps."""
        change_settings(server, {"HSWQ.Budget": 2.0})
        for seed, steps in ((1, 13), (2, 7)):
            client.run(probed(sampling(PASSIVE, steps=steps, seed=seed), "turns"))
        found, calls = recorded(server, PASSIVE)["layers"], measured(server, "turns")
        assert_measured(found, calls)
        times = [found[name]["out_count"] if name in found else 0 for name in calls]
        assert max(times) - min(times) <= 1
        assert 0 < sum(times) < sum(map(len, calls.values())) / 2

    def test_the_node_says_how_far_it_is(self, client: Client):
        for seed, samples in ((1, 2), (2, 4)):
            run = client.run(sampling("a_session", batch=2, seed=seed))
            assert run.text("calibrate") == f"{samples} of 256 images in 'a_session'"

    def test_an_interrupted_sampling_is_not_recorded(self, server: ComfyUIServer, client: Client):
        client.run(sampling(PASSIVE, seed=1))
        before = recorded(server, PASSIVE)["meta"]

        def interrupt(event: dict) -> None:
            if event["type"] == "progress":
                client.interrupt()

        with pytest.raises(InterruptedPromptError, match="sampler"):
            client.run(sampling(PASSIVE, steps=200, seed=2), interrupt)
        assert hooks(client) == [0]
        assert recorded(server, PASSIVE)["meta"] == before

    def test_at_the_target_it_ends_and_the_picture_stays_the_same(
        self, server: ComfyUIServer, client: Client
    ):
        (while_recording, by_hand) = (
            client.latent(client.run(sampling(session, seed=5))) for session in (PASSIVE, BY_HAND)
        )
        free(client)
        (path,) = (server.models / "hswq").glob(f"*.{PASSIVE}.pt")
        saved = torch.load(path, weights_only=True)
        torch.save({**saved, "meta": {**saved["meta"], "samples": 512}}, path)
        complete = path.read_bytes()
        without = client.latent(client.run(sampling(PASSIVE, seed=5)))
        assert path.read_bytes() == complete
        assert without.equal(while_recording)
        assert without.equal(by_hand)


class TestSettings:
    """As ComfyUI's dialog changes them, while it runs."""

    def test_off_is_off_at_once(self, server: ComfyUIServer, client: Client):
        assert is_patched(client)
        client.post("/settings/HSWQ.Record", False)
        client.run(sampling(PASSIVE))
        assert not list((server.models / "hswq").glob("*.pt"))
        assert not is_patched(client)
        client.post("/settings/HSWQ.Record", True)
        client.run(sampling(PASSIVE, seed=1))
        assert recorded(server, PASSIVE)["meta"]["samples"] == 1
        assert is_patched(client)

    def test_the_page_gets_the_dialogs_entries(self, client: Client):
        (script,) = [path for path in client.get_json("/extensions") if path.endswith("hswq.js")]
        assert b"settings: SETTINGS" in client.get(script)
        entries = client.get(script.replace("hswq.js", "settings.mjs"))
        assert b'"Record",' in entries
