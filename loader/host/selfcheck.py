"""All names that HSWQ uses of ComfyUI outside of its public API, and a check that they exist.

ComfyUI promises none of these names. If a release lacks one, the part of HSWQ that needs it stays
off and says so, and the rest works. tests/loader/test_selfcheck.py fails for a name that is used
but not listed here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import NamedTuple


class Part(NamedTuple):
    """A part of HSWQ that can be off while the others work.

    Attributes:
        does: what the part does for a user, for messages.
        names: names that it needs, by module, separated by spaces: attributes of the module, and
            of its classes.
    """

    does: str
    names: dict[str, str]


BASE = Part(
    "all of HSWQ",
    {
        "comfy.model_base": "BaseModel BaseModel.diffusion_model",
        "comfy.model_detection": "unet_prefix_from_state_dict",
        "comfy.model_patcher": "ModelPatcher ModelPatcher.model",
        "comfy.patcher_extension": "WrappersMP",
        "comfy.quant_ops": "QuantizedLayout QuantizedTensor TensorCoreFP8E4M3Layout "
        "TensorCoreFP8E4M3Layout.Params register_layout_class",
        "comfy.utils": "load_torch_file",
        "comfy.weight_adapter": "WeightAdapterBase",
        "comfy_execution.utils": "get_executing_context",
        "folder_paths": "add_model_folder_path folder_names_and_paths get_filename_list "
        "get_folder_paths get_full_path_or_raise get_user_directory models_dir",
        "server": "PromptServer PromptServer.instance",
    },
)
"""Names that are needed whichever parts are on."""

QUANTIZING = Part(
    "loading, converting and exporting in FP8",
    {
        "comfy.float": "stochastic_rounding",
        "comfy.hooks": "EnumHookMode EnumHookMode.MinVram",
        "comfy.ldm.modules.attention": "FeedForward GEGLU",
        "comfy.lora": "calculate_shape calculate_weight",
        "comfy.model_base": "BaseModel.get_dtype BaseModel.manual_cast_dtype "
        "BaseModel.model_config BaseModel.model_sampling BaseModel.model_type "
        "BaseModel.state_dict_for_saving",
        "comfy.model_detection": "convert_diffusers_mmdit model_config_from_diffusers_unet "
        "model_config_from_unet",
        "comfy.model_management": "LoadedModel LoadedModel.model_load MAX_PINNED_MEMORY "
        "OOM_EXCEPTION VRAMState VRAMState.LOW_VRAM VRAMState.NO_VRAM cast_to "
        "current_loaded_models current_stream device_supports_non_blocking "
        "extra_reserved_memory free_memory get_free_memory get_offload_stream "
        "get_torch_device get_total_memory lora_compute_dtype minimum_inference_memory module_size "
        "supports_cast supports_fp8_compute sync_stream synchronize "
        "throw_exception_if_processing_interrupted "
        "unet_dtype unet_manual_cast unet_offload_device vram_state",
        "comfy.model_patcher": "LowVramPatch ModelPatcher._load_list "
        "ModelPatcher.add_callback_with_key ModelPatcher.backup "
        "ModelPatcher.cached_hook_patches ModelPatcher.cached_patcher_init ModelPatcher.clone "
        "ModelPatcher.current_hooks ModelPatcher.force_cast_weights ModelPatcher.get_attachment "
        "ModelPatcher.get_clone_model_override ModelPatcher.get_key_patches "
        "ModelPatcher.hook_backup ModelPatcher.is_dynamic ModelPatcher.load "
        "ModelPatcher.load_device ModelPatcher.model_size ModelPatcher.offload_device "
        "ModelPatcher.parent ModelPatcher.partially_load ModelPatcher.patch_hooks "
        "ModelPatcher.patch_weight_to_device "
        "ModelPatcher.patches ModelPatcher.set_attachments ModelPatcher.set_hook_mode "
        "ModelPatcher.size ModelPatcher.unpatch_hooks ModelPatcher.unpatch_model "
        "get_key_weight",
        "comfy.ops": "CastWeightBiasOp.bias_function CastWeightBiasOp.comfy_cast_weights "
        "CastWeightBiasOp.weight_function cast_bias_weight disable_weight_init "
        "disable_weight_init.Conv2d disable_weight_init.Linear manual_cast manual_cast.Conv2d "
        "manual_cast.Linear run_every_op uncast_bias_weight",
        "comfy.patcher_extension": "CallbacksMP CallbacksMP.ON_CLONE WrappersMP.APPLY_MODEL",
        "comfy.quant_ops": "QuantizedTensor._copy_with QuantizedTensor._layout_cls "
        "QuantizedTensor._params QuantizedTensor._qdata QuantizedTensor.params",
        "comfy.sd": "CLIP CLIP.patcher VAE VAE.patcher load_checkpoint_clip_patcher "
        "load_checkpoint_guess_config load_checkpoint_vae_patcher load_diffusion_model "
        "load_diffusion_model_state_dict load_state_dict_guess_config",
        "comfy.supported_models_base": "BASE BASE.custom_operations BASE.get_model "
        "BASE.model_type BASE.quant_config BASE.set_inference_dtype "
        "BASE.supported_inference_dtypes BASE.unet_config",
        "comfy.utils": "ProgressBar ProgressBar.update set_attr set_attr_param "
        "string_to_seed weight_dtype",
        "folder_paths": "get_output_directory is_within_directory",
    },
)

RECORDING = Part(
    "recording",
    {
        "comfy.model_management": "is_oom",
        "comfy.model_patcher": "ModelPatcher.add_wrapper_with_key ModelPatcher.cached_patcher_init "
        "ModelPatcher.clone ModelPatcher.get_additional_models_with_key ModelPatcher.get_wrappers "
        "ModelPatcher.hook_patches ModelPatcher.load_device ModelPatcher.patches "
        "ModelPatcher.wrappers",
        "comfy.ops": "CastWeightBiasOp",
        "comfy.patcher_extension": "WrappersMP.APPLY_MODEL WrappersMP.OUTER_SAMPLE",
        "comfy.samplers": "CFGGuider CFGGuider.model_patcher CFGGuider.outer_sample",
        "comfy_execution.progress": "ProgressHandler ProgressHandler.update_handler "
        "get_progress_state",
        "execution": "PromptQueue PromptQueue.get_tasks_remaining",
        "server": "PromptServer.add_on_prompt_handler PromptServer.client_id "
        "PromptServer.prompt_queue PromptServer.send_sync",
    },
)

MEASURING = Part(
    "measuring effects and verifying",
    {
        "comfy.model_management": "throw_exception_if_processing_interrupted",
        "comfy.model_patcher": "ModelPatcher.add_wrapper_with_key ModelPatcher.clone",
        "comfy.ops": "CastWeightBiasOp.weight_function",
        "comfy.patcher_extension": "WrappersMP.PREDICT_NOISE",
        "comfy.sample": "fix_empty_latent_channels prepare_noise sample",
        "comfy.samplers": "KSampler KSampler.SAMPLERS KSampler.SCHEDULERS",
        "comfy.sd": "VAE VAE.decode",
        "comfy.utils": "ProgressBar ProgressBar.update ProgressBar.update_absolute",
        "server": "PromptServer.send_progress_text",
    },
)
"""Needs QUANTIZING and RECORDING too."""

COMPARING = Part(
    "comparing images",
    {
        "comfy.model_management": "get_torch_device intermediate_device intermediate_dtype",
        "kornia.metrics": "psnr ssim",
    },
)

PANEL = Part(
    "the panel",
    {
        "comfy.cli_args": "args args.enable_cors_header args.listen",
        "comfy.model_management": "get_torch_device unet_dtype",
        "server": "PromptServer.loop PromptServer.routes PromptServer.send_sync "
        "PromptServer.sockets",
    },
)

PARTS = (QUANTIZING, RECORDING, MEASURING, COMPARING, PANEL)


def lacking(part: Part) -> list[str]:
    """Return the names that a part needs and this ComfyUI lacks.

    If a class is missing, its attributes are not returned too.
    """
    lacks: list[str] = []
    for module, names in part.names.items():
        for name in names.split():
            whole = f"{module}.{name}"
            if whole.rpartition(".")[0] not in lacks and not _has(module, name):
                lacks.append(whole)
    return lacks


def working() -> tuple[list[Part], str | None]:
    """Return the parts that lack nothing, and a sentence about the others; None without others."""
    found = [(part, lacking(part)) for part in PARTS]
    off = [part.does for part, names in found if names]
    if not off:
        return list(PARTS), None
    names = dict.fromkeys(name for _, its_names in found for name in its_names)
    told = f"works here without {listed(off)}: this ComfyUI has no {listed(names)}"
    return [part for part, its_names in found if not its_names], told


def listed(words: Iterable[str]) -> str:
    """Return words as a list in a sentence: "a, b and c"."""
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def _has(module: str, name: str) -> bool:
    """Whether a module has a name, which may be an attribute of a class or of its instances."""
    try:
        owner = importlib.import_module(module)
    except ImportError:
        return False
    *way, last = name.split(".")
    for step in way:
        if not hasattr(owner, step):
            return False
        owner = getattr(owner, step)
    return hasattr(owner, last) or (inspect.isclass(owner) and _sets(owner, last))


def _sets(owner: type, name: str) -> bool:
    """Whether a class's `__init__` sets an attribute."""
    makers = (vars(base).get("__init__") for base in owner.__mro__)
    return any(
        name in inspect.unwrap(maker).__code__.co_names
        for maker in makers
        if inspect.isfunction(maker)
    )
