"""Task arithmetic (Ilharco et al. 2023): the weighted sum of task vectors, as the paper merges."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deme.method.task_vectors import PART, MergeMethod


@dataclass
class TaskArithmetic(MergeMethod):
    """pretrained + Σ_k w_k (finetuned_k − pretrained)."""

    def merge_tensor(
        self, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], coefficients: Sequence[float]
    ) -> torch.Tensor:
        """The sum, in float32."""
        merged = torch.empty_like(pretrained, dtype=torch.float32, memory_format=torch.contiguous_format)
        size = PART if merged.device.type == "cpu" else max(1, merged.numel())  # a GPU takes all at once
        parts = [tensor.reshape(-1).split(size) for tensor in (merged, pretrained, *finetuned)]
        for total, base, *experts in zip(*parts, strict=True):
            base = base.float()
            total.copy_(base)
            for expert, coefficient in zip(experts, coefficients, strict=True):
                if coefficient != 0:
                    total.add_(expert.float() - base, alpha=float(coefficient))
        return merged
