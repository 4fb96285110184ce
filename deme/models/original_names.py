"""The names of the original code of Stable Diffusion, in kohya's LoRAs for XL and in single files."""

import re
from collections.abc import Iterable

# of the UNet, by what diffusers calls them
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# of the autoencoder, a part of a name each; its levels on the way up are counted from the last one
VAE = {
    "mid_block.attentions.0.": "mid.attn_1.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
    "down_blocks.": "down.",
    "up_blocks.": "up.",
    ".resnets.": ".block.",
    ".conv_shortcut.": ".nin_shortcut.",
    "conv_norm_out.": "norm_out.",
    ".group_norm.": ".norm.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
}
# of OpenCLIP, likewise
OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".self_attn.": ".attn.",
    ".fc1.": ".c_fc.",
    ".fc2.": ".c_proj.",
}
BLOCK = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """The original names of all layers of a UNet, or of its tensors, by those of diffusers."""
    found = {name: BLOCK.fullmatch(name) for name in names}
    per_block = 1 + max((int(match[4]) for match in found.values() if match and match[1] == "down"), default=0)
    attending = {match[2] for match in found.values() if match and match[1] == "up" and match[3] == "attentions"}
    return {
        name: _outside(name) if match is None else _inside(match, per_block, match[2] in attending)
        for name, match in found.items()
    }


def _outside(name: str) -> str:
    """Of a layer outside of all blocks."""
    for ours, original in OUTSIDE.items():
        if name == ours or name.startswith(f"{ours}."):
            return original + name.removeprefix(ours)
    return name


def _inside(match: re.Match, per_block: int, has_attention: bool) -> str:
    """Of a layer in a block of so many resnets on the way down, and one more on the way up."""
    direction, block, kind, place, rest = match.groups()
    place = int(place)
    if kind == "resnets":
        inner, _, end = rest.partition(".")
        rest = f"{RESNET.get(inner, inner)}{end and '.'}{end}"
    if direction == "mid":
        return f"middle_block.{2 * place if kind == 'resnets' else 2 * place + 1}.{rest}"
    first = int(block) * (per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + per_block + 1}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        return f"output_blocks.{first + per_block}.{1 + has_attention}.{rest}"
    number = int(kind == "attentions")
    return (
        f"input_blocks.{1 + first + place}.{number}.{rest}"
        if direction == "down"
        else (f"output_blocks.{first + place}.{number}.{rest}")
    )


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """The original names of all tensors of an autoencoder, by those of diffusers."""
    names = list(names)
    levels = [int(match[1]) for match in (re.match(r"decoder\.up_blocks\.(\d+)", name) for name in names) if match]
    last, found = max(levels, default=0), {}
    for name in names:
        counted = re.sub(r"(?<=up_blocks\.)\d+", lambda match: str(last - int(match[0])), name)
        found[name] = replaced(counted, VAE)
    return found


def open_clip_name(name: str) -> str:
    """The original name of a tensor or layer of XL's second text encoder, whose queries, keys and values are apart."""
    return replaced(name, OPEN_CLIP)


def replaced(name: str, parts: dict[str, str]) -> str:
    """A name with these parts of it replaced."""
    for ours, original in parts.items():
        name = name.replace(ours, original)
    return name
