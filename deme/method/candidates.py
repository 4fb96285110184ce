"""Candidates of a search: merged networks, formed in place again and again from weights that are read once."""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from deme.method.merging.task_arithmetic import TaskArithmetic
from deme.method.task_vectors import Tensors, check_compatible, check_finite


class Candidates:
    """The networks that merging gives with any coefficients w_gk: pretrained + Σ_k w_gk (finetuned_k − pretrained).

    A GPU gets a copy of all weights. Mapped tensors stay mapped on a CPU, so that the processes of a host share them.
    `group_of` has the number g of each tensor's group.
    """

    def __init__(
        self,
        pretrained: Tensors,
        finetuned: Mapping[str, Tensors],
        group_of: Mapping[str, int],
        device: torch.device | str,
    ):
        for name, tensors in finetuned.items():
            check_compatible(pretrained, tensors, name)
        for name, tensors in {"the pretrained model": pretrained, **finetuned}.items():
            for key, tensor in tensors.items():
                check_finite(name, key, tensor)
        self.pretrained = {name: tensor.to(device) for name, tensor in pretrained.items()}
        self.finetuned = [{name: tensors[name].to(device) for name in pretrained} for tensors in finetuned.values()]
        self.group_of = group_of
        self.shape = (max(group_of.values()) + 1, len(self.finetuned))

    def ungrouped(self) -> "Candidates":
        """The same weights with one coefficient per range for all tensors."""
        whole = copy.copy(self)
        whole.group_of = dict.fromkeys(self.group_of, 0)
        whole.shape = (1, self.shape[1])
        return whole

    @torch.no_grad()
    def form(self, network: nn.Module, coefficients: Sequence[Sequence[float]] | np.ndarray | torch.Tensor) -> None:
        """Make a network the candidate of coefficients of shape (groups, ranges), in place, in its floating-point type.

        In float32 on a CPU its weights are, bit for bit, those that merge.py writes.
        """
        rows = np.asarray(coefficients, dtype=np.float64).reshape(self.shape).tolist()
        for name, target in network.state_dict().items():
            experts = [tensors[name] for tensors in self.finetuned]
            target.copy_(TaskArithmetic().merge_tensor(self.pretrained[name], experts, rows[self.group_of[name]]))

    def form_expert(self, network: nn.Module, number: int) -> None:
        """Make a network the copy that was finetuned on a range, up to rounding."""
        one_hot = torch.zeros(self.shape)
        one_hot[:, number] = 1
        self.form(network, one_hot)

    def task_vector(self, group: int, number: int) -> dict[str, torch.Tensor]:
        """finetuned − pretrained of one range, for the tensors of one group: float32, by name."""
        return {
            name: self.finetuned[number][name].float() - base.float()
            for name, base in self.pretrained.items()
            if self.group_of[name] == group
        }

    def gradient(self, network: nn.Module) -> torch.Tensor:
        """The gradient by the coefficients, from that of a network's parameters: float64, shape (groups, ranges).

        ∂L/∂w_gk = Σ over the tensors θ of group g of ⟨∂L/∂θ, finetuned_k − pretrained⟩.
        """
        gradient = torch.zeros(self.shape, dtype=torch.float64, device=next(network.parameters()).device)
        for name, parameter in network.named_parameters():
            base = self.pretrained[name].float()
            for k, tensors in enumerate(self.finetuned):
                gradient[self.group_of[name], k] += (parameter.grad.float() * (tensors[name].float() - base)).sum()
        return gradient
