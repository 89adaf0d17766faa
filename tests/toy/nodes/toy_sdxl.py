"""SDXL as ComfyUI knows it, with smaller numbers."""

from comfy import sdxl_clip, supported_models
from comfy.supported_models_base import ClipTarget

CLIP_L = "conditioner.embedders.0.transformer.text_model."
CLIP_G = "conditioner.embedders.1.model."
POOLED = 1280  # SDXL's, so that its vector conditioning of 2816 stays


class ToySDXLClipModel(sdxl_clip.SDXLClipModel):
    """SDXL's two text encoders, made smaller by the option that ComfyUI has for that.

    What no option covers: a small vocabulary, and a projection that is wider than the encoder.
    """

    def __init__(self, config_l, config_g, device="cpu", dtype=None, model_options=None):
        options = {"clip_l_model_config": config_l, "clip_g_model_config": config_g}
        options = {**(model_options or {}), **options}
        super().__init__(device=device, dtype=dtype, model_options=options)
        factory = {"device": device, "dtype": dtype}
        for clip, config in ((self.clip_l, config_l), (self.clip_g, config_g)):
            embedding = _folded(clip.operations.Embedding)
            clip.transformer.set_input_embeddings(
                embedding(config["vocab_size"], config["hidden_size"], **factory)
            )
        self.clip_g.transformer.text_projection = self.clip_g.operations.Linear(
            config_g["hidden_size"], POOLED, bias=False, **factory
        )


def _folded(embedding):
    """An Embedding class that takes token numbers modulo its size."""

    class FoldedEmbedding(embedding):
        def forward(self, tokens, **kwargs):
            return super().forward(tokens % self.num_embeddings, **kwargs)

    return FoldedEmbedding


def _clip_config(token_embedding, layers):
    vocabulary, hidden_size = token_embedding.shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_attention_heads": hidden_size // 8,
        "num_hidden_layers": layers,
    }


class ToySDXL(supported_models.SDXL):
    """What `checkpoint.py` writes: 8.3 million parameters, 264 Linear and Conv2d layers."""

    unet_config = {  # noqa: RUF012 (ComfyUI's own way)
        **supported_models.SDXL.unet_config,
        "model_channels": 32,
        "transformer_depth": [0, 0, 1, 1, 2, 2],
        "context_dim": 64,
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": 32}  # noqa: RUF012

    def clip_target(self, state_dict):
        """The encoders' sizes are read from the checkpoint, which still has its own names here."""
        names = {
            "config_l": f"{CLIP_L}embeddings.token_embedding.weight",
            "config_g": f"{CLIP_G}token_embedding.weight",
        }
        if not all(name in state_dict for name in names.values()):
            return None  # a diffusion model alone
        layers = sum(key.startswith(CLIP_G) and key.endswith("ln_1.weight") for key in state_dict)
        target = ClipTarget(sdxl_clip.SDXLTokenizer, ToySDXLClipModel)
        target.params = {key: _clip_config(state_dict[name], layers) for key, name in names.items()}
        return target


class TrainedToySDXL(ToySDXL):
    """What `train.py` trains: 1.8 million parameters, on the same text encoders."""

    unet_config = {**ToySDXL.unet_config, "transformer_depth": [0, 0, 1]}  # noqa: RUF012


def register():
    """Makes ComfyUI recognise the toys; again, and under another module's name, does nothing."""
    known = {model.__name__ for model in supported_models.models}
    toys = (ToySDXL, TrainedToySDXL)
    supported_models.models.extend(toy for toy in toys if toy.__name__ not in known)
