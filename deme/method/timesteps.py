"""Drawing timesteps for one micro-batch: the paper's probabilistic sampling strategy, and antithetic pairs."""

import torch


def sample_timesteps(
    batch_size: int, low: int, high: int, device: torch.device | str, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Antithetic timesteps in [low, high): int64, shape (batch_size,).

    The first ⌈batch_size/2⌉ are uniform; the other ⌊batch_size/2⌋ are mirror images of the first of them in the
    interval, t' = low + high − 1 − t, so that each pair's mean is the interval's.
    """
    uniform = torch.randint(low, high, (batch_size - batch_size // 2,), device=device, generator=generator)
    return torch.cat([uniform, low + high - 1 - uniform[: batch_size // 2]])


def choose_interval(
    timestep_range: tuple[int, int], num_train_timesteps: int, global_probability: float, uniform: float
) -> tuple[int, int]:
    """The interval of one micro-batch: all of [0, T) with probability p, else the range.

    Args:
        uniform: one draw from [0, 1), which decides for the whole micro-batch.
    """
    return (0, num_train_timesteps) if uniform < global_probability else timestep_range
