"""What is in the toy checkpoint: names and shapes, in the original SDXL layout."""

from collections.abc import Iterator

Shapes = Iterator[tuple[str, tuple[int, ...]]]

# The UNet, as `ToySDXL` in the node pack expects it.
CHANNELS = 32
CHANNEL_MULT = (1, 2, 4)
RES_BLOCKS = 2
DEPTH = (0, 1, 2)  # transformer blocks at each level
DEPTH_MIDDLE = 2
CONTEXT = 64
TIME = 4 * CHANNELS
POOLED = 1280
VECTOR = POOLED + 6 * 256  # SDXL appends six embedded numbers: sizes and crops

# The text encoders. The node pack folds token numbers into the vocabulary, because the full
# vocabulary of 49408 would make up a quarter of the file.
CLIP_L, CLIP_G = 24, 40  # hidden sizes, side by side the UNet's context
CLIP_LAYERS = 3  # the fewest that have a penultimate layer
VOCABULARY = 4093  # prime, so that frequent tokens do not fall together


def _affine(name: str, *shape: int) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", (shape[0],)


def _res_block(name: str, inputs: int, outputs: int) -> Shapes:
    yield from _affine(f"{name}.in_layers.0", inputs)
    yield from _affine(f"{name}.in_layers.2", outputs, inputs, 3, 3)
    yield from _affine(f"{name}.emb_layers.1", outputs, TIME)
    yield from _affine(f"{name}.out_layers.0", outputs)
    yield from _affine(f"{name}.out_layers.3", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from _affine(f"{name}.skip_connection", outputs, inputs, 1, 1)


def _attention(name: str, channels: int, context: int) -> Shapes:
    yield f"{name}.to_q.weight", (channels, channels)
    yield f"{name}.to_k.weight", (channels, context)
    yield f"{name}.to_v.weight", (channels, context)
    yield from _affine(f"{name}.to_out.0", channels, channels)


def _transformer(name: str, channels: int, depth: int) -> Shapes:
    yield from _affine(f"{name}.norm", channels)
    yield from _affine(f"{name}.proj_in", channels, channels)
    for block in (f"{name}.transformer_blocks.{i}" for i in range(depth)):
        yield from _attention(f"{block}.attn1", channels, channels)
        yield from _affine(f"{block}.ff.net.0.proj", 8 * channels, channels)
        yield from _affine(f"{block}.ff.net.2", channels, 4 * channels)
        yield from _attention(f"{block}.attn2", channels, CONTEXT)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _affine(f"{block}.{norm}", channels)
    yield from _affine(f"{name}.proj_out", channels, channels)


def _input_blocks(skips: list[int]) -> Shapes:
    """The way down; the channels of every block go into `skips`, for the way up."""
    channels = CHANNELS
    yield from _affine("input_blocks.0.0", channels, 4, 3, 3)
    skips.append(channels)
    for level, multiple in enumerate(CHANNEL_MULT):
        if level > 0:
            yield from _affine(f"input_blocks.{len(skips)}.0.op", channels, channels, 3, 3)
            skips.append(channels)
        for _ in range(RES_BLOCKS):
            block, inputs, channels = f"input_blocks.{len(skips)}", channels, multiple * CHANNELS
            yield from _res_block(f"{block}.0", inputs, channels)
            if DEPTH[level]:
                yield from _transformer(f"{block}.1", channels, DEPTH[level])
            skips.append(channels)


def _output_blocks(skips: list[int]) -> Shapes:
    channels, number = skips[-1], 0
    for level, multiple in reversed(list(enumerate(CHANNEL_MULT))):
        for i in range(RES_BLOCKS + 1):
            block, inputs = f"output_blocks.{number}", channels + skips.pop()
            channels, number = multiple * CHANNELS, number + 1
            yield from _res_block(f"{block}.0", inputs, channels)
            if DEPTH[level]:
                yield from _transformer(f"{block}.1", channels, DEPTH[level])
            if level > 0 and i == RES_BLOCKS:
                yield from _affine(f"{block}.2.conv", channels, channels, 3, 3)


def unet_shapes() -> Shapes:
    """Names and shapes of the UNet's tensors, relative to the diffusion model."""
    yield from _affine("time_embed.0", TIME, CHANNELS)
    yield from _affine("time_embed.2", TIME, TIME)
    yield from _affine("label_emb.0.0", TIME, VECTOR)
    yield from _affine("label_emb.0.2", TIME, TIME)
    skips: list[int] = []
    yield from _input_blocks(skips)
    yield from _res_block("middle_block.0", skips[-1], skips[-1])
    yield from _transformer("middle_block.1", skips[-1], DEPTH_MIDDLE)
    yield from _res_block("middle_block.2", skips[-1], skips[-1])
    yield from _output_blocks(skips)
    yield from _affine("out.0", CHANNELS)
    yield from _affine("out.2", 4, CHANNELS, 3, 3)


def clip_l_shapes() -> Shapes:
    """Names and shapes of the first text encoder, in the layout of transformers."""
    yield "embeddings.token_embedding.weight", (VOCABULARY, CLIP_L)
    yield "embeddings.position_embedding.weight", (77, CLIP_L)
    for layer in (f"encoder.layers.{i}" for i in range(CLIP_LAYERS)):
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _affine(f"{layer}.self_attn.{projection}", CLIP_L, CLIP_L)
        yield from _affine(f"{layer}.layer_norm1", CLIP_L)
        yield from _affine(f"{layer}.layer_norm2", CLIP_L)
        yield from _affine(f"{layer}.mlp.fc1", 4 * CLIP_L, CLIP_L)
        yield from _affine(f"{layer}.mlp.fc2", CLIP_L, 4 * CLIP_L)
    yield from _affine("final_layer_norm", CLIP_L)


def clip_g_shapes() -> Shapes:
    """Names and shapes of the second text encoder, in the layout of OpenCLIP."""
    yield "token_embedding.weight", (VOCABULARY, CLIP_G)
    yield "positional_embedding", (77, CLIP_G)
    for layer in (f"transformer.resblocks.{i}" for i in range(CLIP_LAYERS)):
        yield f"{layer}.attn.in_proj_weight", (3 * CLIP_G, CLIP_G)
        yield f"{layer}.attn.in_proj_bias", (3 * CLIP_G,)
        yield from _affine(f"{layer}.attn.out_proj", CLIP_G, CLIP_G)
        yield from _affine(f"{layer}.ln_1", CLIP_G)
        yield from _affine(f"{layer}.ln_2", CLIP_G)
        yield from _affine(f"{layer}.mlp.c_fc", 4 * CLIP_G, CLIP_G)
        yield from _affine(f"{layer}.mlp.c_proj", CLIP_G, 4 * CLIP_G)
    yield from _affine("ln_final", CLIP_G)
    yield "text_projection", (CLIP_G, POOLED)
