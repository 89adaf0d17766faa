"""The Dual Monitor once more: slow, obvious, in float64, for the real one to be compared with."""

import os

import folder_paths
import torch
from comfy.patcher_extension import WrappersMP


class ProbeDualMonitor:
    """Measures every sampling of a MODEL; after each writes all calls so far to output/probe/."""

    CATEGORY = "test"
    FUNCTION = "attach"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 (ComfyUI's own name)
        return {"required": {"model": ("MODEL",), "name": ("STRING",)}}

    def attach(self, model, name):
        measured = {}  # of this node, so it goes on as long as ComfyUI caches the node's result
        probed = model.clone()

        def sample(executor, *args, **kwargs):
            network = executor.class_obj.model_patcher.model.diffusion_model
            hooks = [
                layer.register_forward_hook(record(measured.setdefault(layer_name, [])))
                for layer_name, layer in network.named_modules()
                if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
            ]
            try:
                return executor(*args, **kwargs)
            finally:
                for hook in hooks:
                    hook.remove()
                save(measured, name)

        probed.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "probe", sample)
        return (probed,)


def record(calls):
    def hook(layer, inputs, output):
        calls.append(
            {
                "mean": output.double().mean().item(),
                "mean_square": (output.double() ** 2).mean().item(),
                "importance": importance(inputs[0].double()).clone(),
            }
        )

    return hook


def importance(x):
    """Mean |x| of one channel after the other."""
    if x.ndim == 4:
        channels = [x[:, channel, :, :] for channel in range(x.shape[1])]
    elif x.ndim == 3:
        channels = [x[:, :, channel] for channel in range(x.shape[2])]
    elif x.ndim == 2:
        channels = [x[:, channel] for channel in range(x.shape[1])]
    else:
        return torch.ones(1, dtype=torch.float64)
    return torch.stack([channel.abs().mean() for channel in channels])


def save(measured, name):
    folder = os.path.join(folder_paths.get_output_directory(), "probe")
    os.makedirs(folder, exist_ok=True)
    torch.save(measured, os.path.join(folder, f"{name}.pt"))
