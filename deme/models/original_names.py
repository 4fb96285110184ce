"""The names that Stability AI's own code gives to the layers of a UNet, which files of Stable Diffusion XL use."""

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
