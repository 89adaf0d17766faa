"""The panel's routes and event, over HTTP and websocket."""

from __future__ import annotations

import datetime
import time
import uuid

import pytest
from harness.client import Client, ExecutionError, InterruptedPromptError, RejectedError
from harness.fixtures import ENOUGH_STEPS, change_settings, free
from harness.panel import PREVIEW, SESSION, Panel, sampled
from harness.prompts import (
    CHECKPOINT,
    Prompt,
    hswq_loader,
    node,
    stock_loader,
    text_to_latent,
    through,
)

pytestmark = pytest.mark.server

PLAN = "hswq:plan"


def plan(**inputs: object) -> Prompt:
    """Return the one-node prompt that the panel queues."""
    defaults = {"source": f"checkpoints/{CHECKPOINT}", "statistics": "auto", "mode": "scaled"}
    return {PLAN: node("HSWQPlan", **{**defaults, **inputs})}


class TestStatus:
    def test_of_nothing(self, panel: Panel):
        status = panel.status()
        ids = [model["id"] for model in status.pop("models")]
        assert ids == [None] * len(ids)  # merges of other tests
        assert len(status.pop("server")) == 16
        assert status == {
            "recording": True, "target": 256, "usable": 32, "usable_calls": 8, "usable_levels": 4,
            "reading": 0, "live": [],
        }  # fmt: skip

    def test_of_a_model_that_is_sampled_with(self, panel: Panel, client: Client):
        sampled(client)
        model = panel.model()
        last_run, (session,) = model.pop("last_run"), model.pop("sessions")
        assert model == {
            "id": model["id"], "name": CHECKPOINT, "source": f"checkpoints/{CHECKPOINT}",
            "state": "recording", "reason": None, "sampling": False, "loaded": None,
            "samples": 4, "layers": 264, "total_layers": 264, "missing": None, "effects": {},
            "usable": False, "calls": 8, "levels": 8,
        }  # fmt: skip
        assert (session["session"], session["samples"]) == (SESSION, 4)
        assert session["file"].endswith(f".{model['id']}.{SESSION}.pt")
        assert session["last_run"] <= last_run  # noted just after
        assert time.time() - _seconds(last_run) < 60

    def test_complete_at_the_target_and_off(self, server, panel: Panel, ready: str):
        assert panel.model()["state"] == "ready"
        change_settings(server, {"HSWQ.Target": 32, "HSWQ.Record": False})
        status = panel.status()
        assert (status["recording"], status["target"]) == (False, 32)
        assert panel.model()["state"] == "complete"

    def test_of_a_merge(self, panel: Panel, client: Client):
        merged = node("ModelMergeSimple", model1=["loader", 0], model2=["loader", 0], ratio=0.5)
        began = int(time.time())
        client.run(through(text_to_latent(stock_loader(), steps=1), "merge", merged))
        unknown = [one for one in panel.status()["models"] if one["id"] is None]
        (model,) = [one for one in unknown if _seconds(one["last_run"]) >= began]
        assert model["state"] == "not recorded"
        assert "merge" in model["reason"]

    def test_of_a_file_that_is_renamed_or_gone(self, server, panel: Panel, ready: str):
        path = server.models / "checkpoints" / CHECKPOINT
        renamed, elsewhere = path.with_name("renamed.safetensors"), server.base / "elsewhere"
        try:
            path.rename(renamed)
            model = panel.model()
            assert model["name"] == "renamed.safetensors"
            assert model["source"] == "checkpoints/renamed.safetensors"
            renamed.rename(elsewhere)
            model = panel.model()
            assert (model["name"], model["source"]) == (CHECKPOINT, None)
            rows = panel.get().json()["rows"]
            assert len(rows) == 264
            assert {row["shape"] for row in rows} == {None}
        finally:
            (elsewhere if elsewhere.exists() else renamed).rename(path)
        assert panel.model()["source"] == f"checkpoints/{CHECKPOINT}"

    def test_a_damaged_file_is_left_out(self, server, panel: Panel, ready: str):
        (server.models / "hswq" / f"x.{ready}.damaged.pt").write_bytes(b"damaged")
        assert panel.model()["samples"] == 32


class TestLoaded:
    def test_is_told_freed_is_told_and_a_restart_changes_nothing(
        self, server, panel: Panel, ready: str, client: Client
    ):
        with client.events(uuid.uuid4().hex) as events:
            loading = text_to_latent(hswq_loader(keep_ratio=0.5), steps=1)
            client.run(loading)
            alive = panel.model()
            assert (alive["state"], alive["reason"]) == ("ready", None)
            told = {key: alive["loaded"][key] for key in ("mode", "keep_ratio")}
            assert told == {"mode": "scaled", "keep_ratio": 0.5}
            assert alive["loaded"]["outcome"]["samples"] == 32
            free(client)
            told = []
            while not (told and told[0] and told[-1] is None):
                event = next(events)
                if event["type"] == "hswq.status":
                    told = [one["loaded"] for one in event["data"]["models"] if one["id"]] + told
                    told.sort(key=lambda one: one is None)
        preview = panel.get(f"{PREVIEW}0.5").json()
        assert preview["searched"] == 132
        before = panel.model()
        server.restart()
        assert panel.model() == {**before, "last_run": before["sessions"][0]["last_run"]}
        assert panel.get(f"{PREVIEW}0.5").json() == preview


class TestEvents:
    def test_a_sampling_begins_and_ends(self, server, panel: Panel, client: Client):
        prompt_id, client_id = str(uuid.uuid4()), uuid.uuid4().hex
        prompt = text_to_latent(stock_loader(), batch=4, steps=8, size=128)
        told = []
        with client.events(client_id) as events:
            client.post("/prompt", {"prompt": prompt, "prompt_id": prompt_id})
            for event in events:
                if event["type"] == "hswq.status":
                    told.append(event["data"])
                    if any(one["samples"] for one in event["data"]["models"]):
                        break
        models = [one for status in told for one in status["models"] if one["id"]]
        assert any(one["sampling"] for one in models)
        assert not models[-1]["sampling"]
        assert told[-1] == panel.status()

    def test_many_changes_are_told_four_times_a_second(
        self, panel: Panel, ready: str, client: Client
    ):
        with client.events(uuid.uuid4().hex) as events:
            began, told = time.monotonic(), []
            while time.monotonic() - began < 1.5:
                panel.reset(ready)
            panel.delete(ready)
            for event in events:
                if event["type"] == "hswq.status":
                    told.append(any(one["id"] for one in event["data"]["models"]))
                    if told[-1] is False and any(told):
                        break
            assert 2 <= len(told) <= 4 * (time.monotonic() - began) + 2

    def test_a_change_is_told(self, panel: Panel, ready: str, client: Client):
        with client.events(uuid.uuid4().hex) as events:
            panel.reset(ready)
            for event in events:
                if event["type"] == "hswq.status":
                    models = [one for one in event["data"]["models"] if one["id"]]
                    if [one["samples"] for one in models] == [0]:
                        break


class TestStatistics:
    def test_rows(self, panel: Panel, ready: str):
        model = panel.get().json()
        rows = model.pop("rows")
        assert model == panel.model()
        assert panel.ask("GET", "/hswq/statistics").json() == {"models": [model]}
        first = rows[0]
        assert (first["layer"], first["kind"], first["shape"]) == (
            "time_embed.0", "Linear", [128, 32],
        )  # fmt: skip
        assert (first["parameters"], first["calls"]) == (128 * 32, ENOUGH_STEPS)
        assert first["sensitivity"] > 0
        assert {row["kind"] for row in rows} == {"Linear", "Conv2d"}

    def test_the_file(self, server, panel: Panel, ready: str):
        answer = panel.get(f"file?session={SESSION}")
        (path,) = (server.models / "hswq").glob("*.pt")
        assert answer.body == path.read_bytes()
        assert answer.headers["content-disposition"] == f'attachment; filename="{path.name}"'
        assert panel.get("file?session=other").status == 404

    def test_a_plan_of_bad_settings_is_refused(self, panel: Panel, ready: str):
        for query in (
            "mode=scaled", "keep_ratio=0.25", "mode=scaled&keep_ratio=nan",
            "mode=scaled&keep_ratio=inf", "mode=scaled&keep_ratio=1e999",
            "mode=scaled&keep_ratio=1.01", "mode=scaled&keep_ratio=-0.1",
            "mode=scaled&keep_ratio=true", "mode=scaled&keep_ratio=[0.5]",
            "mode=scaled&keep_ratio=0.5&keep_ratio=0.6", "mode=V2&keep_ratio=0.5",
            "mode=scaled&keep_ratio=1_0", "mode=scaled&keep_ratio=%D9%A1", "mode=&keep_ratio=",
        ):  # fmt: skip
            answer = panel.get(f"plan?{query}", ready)
            assert answer.status == 400
            assert answer.json()["error"].startswith(("there must be", "the mode", "keep_ratio"))


class TestPlanNode:
    def test_makes_every_keep_ratio_known(self, panel: Panel, ready: str, client: Client):
        before = panel.get(f"{PREVIEW}0.25").json()
        assert (before["searched"], before["expected_error"]) == (0, None)
        events = []
        run = client.run(plan(), events.append)
        text = run.text(PLAN)
        assert text.startswith("264 layers searched of 264 that can be FP8; 32 images")
        assert run.outputs[PLAN]["text"] == [text]
        progress = [event["data"] for event in events if event["type"] == "progress"]
        assert len(progress) > 3
        assert progress[-1]["value"] == progress[-1]["max"] == 264
        for ratio in (0, 0.25, 0.8):
            found = panel.get(f"{PREVIEW}{ratio}").json()
            assert 0 <= found["kept"] - int(264 * ratio) <= 2  # the first and the last too
            assert found["searched"] == found["quantized"] == 264 - found["kept"]
            assert 0 < found["expected_error"] < 0.1
            assert all(layer["amax"] > 0 for layer in found["layers"].values())
        assert found["bytes_after"] < found["bytes_before"]
        # An identical prompt runs again, and has nothing to do.
        run = client.run(plan())
        assert run.text(PLAN).startswith(f"all layers of {CHECKPOINT} were searched before")

    def test_can_be_cancelled(self, panel: Panel, ready: str, client: Client):
        def cancel(event: dict) -> None:
            if event["type"] == "progress":
                client.post(f"/api/jobs/{event['data']['prompt_id']}/cancel", {})

        with pytest.raises(InterruptedPromptError):
            client.run(plan(), cancel)
        assert panel.get(f"{PREVIEW}0.25").json()["searched"] == 0

    def test_refuses_in_a_sentence(self, panel: Panel, client: Client):
        sentence = f"{CHECKPOINT} has 0 of 32 images that HSWQ needs: sample with it first"
        with pytest.raises(ExecutionError, match=sentence):
            client.run(plan())
        for source in ("/etc/passwd", "checkpoints/../../x.safetensors", "vae/x", "checkpoints/"):
            with pytest.raises(RejectedError, match="source"):
                client.run(plan(source=source))


def _seconds(iso: str) -> float:
    return datetime.datetime.fromisoformat(iso).timestamp()
