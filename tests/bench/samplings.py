"""Memory and hooks after many recorded samplings, and switches from loader to loader."""

import common

chosen = common.arguments(
    __doc__,
    size={"type": int, "default": 128},
    count={"type": int, "default": 1000, "help": "samplings of one step"},
    every={"type": int, "default": 0, "help": "samplings after which the loader is switched"},
    looks={"type": int, "default": 2, "help": "how often to look, after the first ten samplings"},
)

import gc  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from harness import hostmemory  # noqa: E402
from hswq.loader import store  # noqa: E402
from hswq.loader.engine.adopt import ATTACHMENT  # noqa: E402
from hswq.loader.engine.loading import load_checkpoint  # noqa: E402
from hswq.loader.engine.patchers import quantized_layers  # noqa: E402
from hswq.loader.files.fingerprints import fingerprint  # noqa: E402
from hswq.loader.files.model_file import ModelFile  # noqa: E402
from hswq.loader.host.folders import register_folder  # noqa: E402
from hswq.loader.jobs.choice import AUTO, QUANTIZE_UNIFORMLY, choose  # noqa: E402
from hswq.loader.recording.recorder import recorder  # noqa: E402
from hswq.quant import QuantizeSettings  # noqa: E402

WARM_UP = 10


def measure(network: torch.nn.Module) -> dict:
    """Return what there is now."""
    common.synchronize()
    gc.collect()
    host = hostmemory.anonymous()
    row = {
        "host MB": host / 1e6,
        **hostmemory.allocated(),
        "trimmed MB": hostmemory.trimmed() / 1e6,
        "objects": len(gc.get_objects()),
        "hooks": sum(
            len(part._forward_hooks) + len(part._forward_pre_hooks) for part in network.modules()
        ),
        "recorded": store.statistics_of(fingerprint(chosen.checkpoint)).samples,
    }
    if chosen.device == "cuda":
        row["GPU MB"] = torch.cuda.memory_allocated() / 1e6
        row["GPU reserved MB"] = torch.cuda.memory_reserved() / 1e6
    return row


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.models_dir, folder_paths.user_directory = folder, folder
        settings = Path(folder, "default", "comfy.settings.json")
        settings.parent.mkdir()
        settings.write_text(json.dumps({"HSWQ.Target": 4096}))
        register_folder()
        recorder.install()
        loaders, results = itertools.cycle([load_16_bit, load_quantized]), {}
        patcher = next(loaders)()
        marks = {chosen.count * look // chosen.looks for look in range(1, chosen.looks + 1)}
        for number in range(1, chosen.count + 1):
            if chosen.every and number % chosen.every == 0:
                patcher = None
                patcher = next(loaders)()
            common.Sampling(patcher, chosen.size)(1)
            if number == WARM_UP or number in marks:
                results[f"after {number}"] = measure(patcher.model.diffusion_model)
                print(number, results[f"after {number}"], flush=True)
    common.report("many recorded samplings", chosen, results)


def load_16_bit():
    return comfy.sd.load_checkpoint_guess_config(
        chosen.checkpoint, output_clip=False, output_vae=False
    )[0]


def load_quantized():
    """As the loader node does, and free what was there before, as ComfyUI does for room."""
    comfy.model_management.unload_all_models()
    file = ModelFile(chosen.checkpoint)
    settings = QuantizeSettings(compensated=True)
    its = fingerprint(file), file.name, settings, QUANTIZE_UNIFORMLY
    made = choose(AUTO, *its)
    patcher = load_checkpoint(file, made.decider, only_model=True)[0]
    made.keep(patcher.get_attachment(ATTACHMENT))
    made.keep_rounded(quantized_layers(patcher))
    return patcher


main()
