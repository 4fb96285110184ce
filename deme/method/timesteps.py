"""Timesteps of one micro-batch: the paper's probabilistic sampling strategy, with antithetic pairs."""

from collections.abc import Sequence

import torch

Range = tuple[int, int]  # [low, high)


def sample_timesteps(
    batch_size: int,
    low: int,
    high: int,
    device: torch.device | str,
    generator: torch.Generator | None = None,
    antithetic: bool = True,
) -> torch.Tensor:
    """Antithetic timesteps in [low, high): int64, shape (batch_size,).

    The first ⌈batch_size/2⌉ are uniform; the others mirror them, t' = low + high − 1 − t, so that each pair's mean is
    the interval's. With antithetic=False all are uniform and independent.
    """
    if not antithetic:
        return torch.randint(low, high, (batch_size,), device=device, generator=generator)
    uniform = torch.randint(low, high, (batch_size - batch_size // 2,), device=device, generator=generator)
    return torch.cat([uniform, low + high - 1 - uniform[: batch_size // 2]])


def choose_ranges(
    ranges: Sequence[Range], num_train_timesteps: int, global_probability: float, uniform: float
) -> Sequence[Range]:
    """The ranges of one micro-batch: all of [0, T) if one draw from [0, 1) is below p, else `ranges`."""
    return [(0, num_train_timesteps)] if uniform < global_probability else ranges


def even_sizes(total: int, parts: int) -> list[int]:
    """The sizes of consecutive parts that differ by at most 1, larger ones first, as in torch.tensor_split."""
    return [(total + parts - 1 - part) // parts for part in range(parts)]


def spread_timesteps(
    batch_size: int,
    ranges: Sequence[Range],
    device: torch.device | str,
    generator: torch.Generator | None = None,
    antithetic: bool = True,
) -> torch.Tensor:
    """Timesteps of a batch whose consecutive, even parts each have their own range: int64, shape (batch_size,)."""
    sizes = even_sizes(batch_size, len(ranges))
    parts = [
        sample_timesteps(size, low, high, device, generator, antithetic)
        for size, (low, high) in zip(sizes, ranges, strict=True)
    ]
    return torch.cat(parts)
