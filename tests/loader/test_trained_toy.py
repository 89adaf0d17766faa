"""The trained toy draws what prompts say, through stock ComfyUI."""

from pathlib import Path

import comfy.sample
import comfy.sd
import pytest
import torch
from hswq.calibration import monitored_layers
from toy.checkpoint import TRAINED, make_trained_checkpoint
from toy.drawing import (
    COLOURS,
    EDGE,
    SUBJECTS,
    Subject,
    draw,
    to_latent,
    to_picture,
)

MIB = 4
LAYERS = 98
STEPS = 10
SHAPES = (("white", "triangle"), ("blue", "square"), ("black", "square"), ("red", "triangle"))
PIXELS = 20  # of the 576, that differ most from the picture's usual colour


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """MODEL, CLIP and VAE of the trained toy."""
    path: Path = make_trained_checkpoint(tmp_path_factory.mktemp("trained") / "t.safetensors")
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(path))[:3]


def colour_of_shape(picture: torch.Tensor) -> str:
    """Return the name of the colour that a picture (3, H, W) has where it is not background."""
    colours = picture.flatten(1)
    usual = colours.median(1, keepdim=True).values
    shape = colours[:, (colours - usual).norm(dim=0).topk(PIXELS).indices].mean(1)
    return min(COLOURS, key=lambda name: (shape - torch.tensor(COLOURS[name])).norm().item())


def test_the_committed_file_is_small():
    assert TRAINED.stat().st_size <= MIB << 20


def test_is_recognised_by_its_own_size(loaded: tuple):
    assert type(loaded[0].model.model_config).__name__ == "TrainedToySDXL"
    assert len(monitored_layers(loaded[0].model.diffusion_model)) == LAYERS


def test_the_vae_shows_the_pictures_that_were_drawn(loaded: tuple):
    pictures = draw(SUBJECTS[:4], torch.Generator().manual_seed(0))
    latents = to_latent(pictures)
    torch.testing.assert_close(to_picture(latents), pictures, atol=1e-5, rtol=0)
    model, _, vae = loaded
    decoded = vae.decode(model.model.process_latent_out(latents))
    shown = decoded.movedim(-1, 1)[:, :, ::8, ::8]
    torch.testing.assert_close(shown, pictures, atol=0.01, rtol=0)


def test_draws_shapes_in_the_colour_that_the_prompt_says(loaded: tuple):
    model, clip, vae = loaded
    found = []
    for seed, (colour, shape) in enumerate(SHAPES):
        texts = (Subject(shape, colour, "top left", "grey").prompt, "")
        prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in texts]
        empty = torch.zeros(1, 4, EDGE, EDGE)
        latent = comfy.sample.sample(
            model, comfy.sample.prepare_noise(empty, seed), STEPS, 5.0, "euler", "normal",
            *prompts, empty, disable_pbar=True,
        )  # fmt: skip
        found.append(colour_of_shape(vae.decode(latent)[0].movedim(-1, 0)[:, ::8, ::8]))
    assert found == [colour for colour, _ in SHAPES]
