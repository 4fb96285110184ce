"""Which images a step sees, and the random draws of its micro-batches: functions of the experiment's seed alone.

Every generator is seeded with the stream of its run (the experiment's seed first), what it is for, and where in the run
it is used, whichever process draws; so neither the number of processes nor an interruption changes what is trained on.
"""

from functools import lru_cache

import numpy as np

Stream = tuple[int, ...]  # the experiment's seed, then what keeps its runs apart
PERMUTATION = 0
MICRO_BATCH = 1
HELD_OUT_CHOICE = 2  # what a generator is for


def batch_indices(stream: Stream, num_images: int, start: int, size: int) -> np.ndarray:
    """Which images stand at positions start … start + size − 1 of the endless shuffled stream: int64, shape (size,).

    Each pass over the data is a permutation seeded with its number.
    """
    epochs, offsets = np.divmod(np.arange(start, start + size), num_images)
    indices = np.empty(size, dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        indices[chosen] = _permutation(stream, epoch, num_images)[offsets[chosen]]
    return indices


@lru_cache(maxsize=4)
def _permutation(stream: Stream, epoch: int, num_images: int) -> np.ndarray:
    return np.random.default_rng((*stream, PERMUTATION, epoch)).permutation(num_images)


def micro_batch_generator(stream: Stream, step: int, micro_batch: int) -> np.random.Generator:
    """The generator of all random draws of a micro-batch.

    Args:
        step: optimizer steps done before.
        micro_batch: its number within the step, over all processes.
    """
    return np.random.default_rng((*stream, MICRO_BATCH, step, micro_batch))


def held_out_order(num_images: int) -> np.ndarray:
    """A permutation whose first entries are the held-out images: the same for every seed and script."""
    return np.random.default_rng(HELD_OUT_CHOICE).permutation(num_images)


def torch_seed(generator: np.random.Generator) -> int:
    """The seed of torch's generator for what follows."""
    return int(generator.integers(2**63))
