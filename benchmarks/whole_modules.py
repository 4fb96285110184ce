"""The baseline of merging.py: load whole modules by diffusers, add their task vectors, pickle the resulting module.

    python benchmarks/whole_modules.py OUTPUT PRETRAINED EXPERT EXPERT …       # UNet folders

So the published code goes about it, and holds 2N + 5 copies of the model.
"""

import copy
import sys

import torch
from diffusers import UNet2DModel


def main(output: str, pretrained: str, experts: list[str]) -> None:
    """Merge with the coefficients 0.5 / N."""
    base = UNet2DModel.from_pretrained(pretrained)
    finetuned = [UNet2DModel.from_pretrained(folder) for folder in experts]
    weights = base.state_dict()
    vectors = [{name: unet.state_dict()[name] - weights[name] for name in weights} for unet in finetuned]
    scaled = [{name: vector[name] * (0.5 / len(vectors)) for name in vector} for vector in vectors]
    merged = copy.deepcopy(base)
    merged.load_state_dict({name: weights[name] + sum(vector[name] for vector in scaled) for name in weights})
    torch.save(merged, output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
