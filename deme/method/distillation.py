"""Distilling the experts into one network: what its teacher is. Ours, not the paper's.

The paper stops at the merged network. Each expert is the better network in its own range of timesteps, and holding the
merged one to all of them there, range by range, goes a step beyond.
"""

from collections.abc import Sequence

import torch
from torch import nn

from deme.method.timesteps import even_sizes


class Experts(nn.Module):
    """Experts that predict as one network: the k-th of the consecutive, even parts of a batch is the k-th expert's.

    So each of them is called once, and the device is never asked which timesteps it drew; `spread_timesteps` draws
    those that belong to the parts.

    Args:
        experts: one UNet per timestep range, lowest first.
    """

    def __init__(self, experts: Sequence[nn.Module]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, return_dict: bool = False, **condition: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """The predictions, shape (B, C, H, W), in a tuple as UNets give them.

        Args:
            noisy: shape (B, C, H, W), B at least the number of experts.
            timesteps: int64, shape (B,).
            condition: tensors whose first dimension is B, by the name of the UNets' argument.
        """
        sizes = even_sizes(len(noisy), len(self.experts))
        conditions = {name: tensor.split(sizes) for name, tensor in condition.items()}
        predictions = []
        for k, (part, times) in enumerate(zip(noisy.split(sizes), timesteps.split(sizes), strict=True)):
            mine = {name: parts[k] for name, parts in conditions.items()}
            predictions.append(self.experts[k](part, times, **mine, return_dict=False)[0])
        return (torch.cat(predictions),)
