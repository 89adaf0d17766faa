"""Everything that users do, in any order and again and again, and what must be true at the end."""

from __future__ import annotations

import random
from pathlib import Path

from hswq.calibration import load_statistics
from safetensors import safe_open
from safetensors.torch import save_file
from toy.checkpoint import make_checkpoint

from harness.client import Client, ExecutionError, InterruptedPromptError
from harness.fixtures import LORA, change_settings, free, small_sampling
from harness.hostmemory import anonymous
from harness.patches import patch_file
from harness.prompts import (
    CHECKPOINT,
    Prompt,
    hswq_loader,
    node,
    stock_loader,
    through,
)
from harness.server import ComfyUIServer

MODELS = (CHECKPOINT, "soak_1.safetensors", "soak_2.safetensors")
TARGET, USABLE = 64, 32
SESSION = "by-hand"
FORMATS = ("scaled", "scaled, convs too", "compatible", "original V2")


class Soak:
    """A user who does one thing after the other, and knows what must have been recorded.

    Attributes:
        actions: what a user may do, and how often each is done, relative to the others.
        done: how often each was done.
        samples: recorded of each model, in the background and by the calibration node.
    """

    def __init__(
        self,
        server: ComfyUIServer,
        client: Client,
        seed: int = 0,
        models: tuple[str, ...] = MODELS,
    ) -> None:
        """Make the models and a LoRA, and forget all statistics (the client's fixture does)."""
        self._models = models
        for number, name in enumerate(models):
            path = server.models / "checkpoints" / name
            if not path.exists():
                make_checkpoint(path, seed=number)
        (server.models / "loras").mkdir(exist_ok=True)
        save_file(patch_file("LoRA"), server.models / "loras" / LORA)
        change_settings(server, {"HSWQ.Budget": 100, "HSWQ.Target": TARGET})
        self.actions = {
            self.sample: 6, self.sample_quantized: 6, self.calibrate: 2, self.export: 2,
            self.cancel: 2, self.unload: 1,
        }  # fmt: skip
        self._server, self._client = server, client
        self._random, self._seed = random.Random(seed), 0
        self.done: dict[str, int] = {}
        self.samples = dict.fromkeys(models, 0)
        self.exported: set[Path] = set()

    def run(self, times: int) -> None:
        """Do each thing with each model first of all, then anything with any, so many in all."""
        in_order = [(action, model) for model in self._models for action in self.actions]
        for number in range(sum(self.done.values()), sum(self.done.values()) + times):
            if number < len(in_order):
                action, model = in_order[number]
            else:
                (action,) = self._random.choices(list(self.actions), list(self.actions.values()))
                model = self._random.choice(self._models)
            action(model)
            self.done[action.__name__] = self.done.get(action.__name__, 0) + 1

    def sample(self, model: str) -> None:
        """Sample with the stock loader, maybe with a LoRA: recorded until the target."""
        first = not self.samples[model] and model != self._models[-1]
        batch = USABLE if first else self._random.choice((1, 2, 8))
        self._client.run(self._maybe_with_lora(self._prompt(stock_loader(model), batch)))
        self._recorded(model, batch)

    def sample_quantized(self, model: str) -> None:
        """Sample with our loader: recorded while it loads in 16 bit, quantized afterwards."""
        loader = hswq_loader(model, mode=self._random.choice(("scaled", "compatible")),
                             keep_ratio=self._random.choice((0.1, 0.25, 0.5)))  # fmt: skip
        run = self._client.run(self._maybe_with_lora(self._prompt(loader, 1)))
        if "loader" not in run.cached:
            assert ("layers FP8" in run.text("loader")) == (self.samples[model] >= USABLE)
        if self.samples[model] < USABLE:
            self._recorded(model, 1)

    def calibrate(self, model: str) -> None:
        """Sample with the calibration node: recorded in any case."""
        made = node("HSWQCalibration", model=["loader", 0], session=SESSION)
        self._client.run(through(self._prompt(stock_loader(model), 2), "calibrate", made))
        self.samples[model] += 2

    def export(self, model: str) -> None:
        """Write an FP8 file, which is refused before enough was recorded."""
        kind, name = self._random.choice(FORMATS), f"soak/{self._random.randrange(3)}"
        wanted = node(
            "HSWQExport", source=f"checkpoints/{model}", statistics="auto", format=kind,
            keep_ratio=0.25, what="diffusion model only", filename=name, overwrite=True,
            without_statistics="fail",
        )  # fmt: skip
        try:
            self._client.run({"export": wanted})
        except ExecutionError as error:
            assert self.samples[model] < USABLE, error
        else:
            assert self.samples[model] >= USABLE
            folder = self._server.base / "output" / "diffusion_models"
            self.exported.add(folder / f"{name}.safetensors")

    def cancel(self, model: str) -> None:
        """Interrupt a sampling, which is not recorded then."""

        def interrupt(event: dict) -> None:
            if event["type"] == "progress":
                self._client.interrupt()

        loader = self._random.choice((stock_loader, hswq_loader))(model)
        prompt = self._prompt(loader, 1)
        prompt["sampler"]["inputs"]["steps"] = 200
        try:
            self._client.run(prompt, interrupt)
        except InterruptedPromptError:
            return
        raise AssertionError("an interrupted sampling came to its end")

    def unload(self, _: str) -> None:
        """Free all memory, as ComfyUI's button does."""
        free(self._client)

    def memory(self) -> int:
        """Return the server's anonymous memory in KiB, nothing being loaded.

        Without ComfyUI's history, which grows by every prompt.
        """
        self._client.post("/history", {"clear": True})
        free(self._client)
        return anonymous(self._server.pid) >> 10

    def objects(self) -> int:
        """Return how many objects the server's Python knows."""
        return self._client.get_json("/probe/models")["objects"]

    def hooks(self) -> int:
        """Return how many hooks are on the models in memory."""
        loaded = self._client.get_json("/probe/models")["loaded"]
        return sum(model["hooks"] for model in loaded)

    def assert_files_are_right(self) -> None:
        """Check what is on disk: all that was recorded, whole files, and nothing half-made."""
        folder = self._server.models / "hswq"
        found = [load_statistics(path) for path in folder.glob("*.pt")]
        for model, samples in self.samples.items():
            its = [one.samples for one in found if one.meta["model"] == model]
            assert sum(its) == samples, f"{model}: {its}"
        for path in self.exported:
            with safe_open(path, "pt") as file:
                assert len(file.keys()) > 264
        left = [path for place in (folder, self._server.base / "output")
                for path in place.rglob("*") if path.suffix in (".tmp", ".damaged")]  # fmt: skip
        assert left == []

    def _prompt(self, loader: dict, batch: int) -> Prompt:
        """Return a prompt that ComfyUI has no result of yet."""
        self._seed += 1
        return small_sampling(loader, batch, self._seed)

    def _maybe_with_lora(self, prompt: Prompt) -> Prompt:
        strength = self._random.choice((None, None, 0.5, 1.0))
        if strength is None:
            return prompt
        made = node("LoraLoaderModelOnly", model=["loader", 0], lora_name=LORA,
                    strength_model=strength)  # fmt: skip
        return through(prompt, "lora", made)

    def _recorded(self, model: str, batch: int) -> None:
        """Take what the background recording must have added."""
        if self.samples[model] < TARGET:
            self.samples[model] += batch
