import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from deme.method.merging.ties import Ties, magnitude_threshold
from deme.method.task_vectors import merge_tensors


def ties_in_numpy(base, finetuned, coefficients, fraction, combine):
    """TIES-Merging after the paper's algorithm 1, on flat float64 vectors, element by element."""
    vectors = []
    for expert, coefficient in zip(finetuned, coefficients, strict=True):
        vector = expert - base
        keep = int(np.ceil(fraction * len(vector)))
        smallest_kept = np.sort(np.abs(vector))[::-1][keep - 1]
        vectors.append(coefficient * np.where(np.abs(vector) >= smallest_kept, vector, 0))
    merged = base.copy()
    for i in range(len(base)):
        values = [vector[i] for vector in vectors]
        elected = np.sign(sum(values))
        agreeing = [value for value in values if value != 0 and np.sign(value) == elected]
        if agreeing:
            merged[i] += np.mean(agreeing) if combine == "mean" else np.sum(agreeing)
    return merged


@given(
    seed=st.integers(0, 10_000),
    experts=st.integers(1, 5),
    fraction=st.floats(0.01, 1),
    combine=st.sampled_from(["mean", "sum"]),
)
def test_ties_equals_the_papers_algorithm(seed, experts, fraction, combine):
    """Two tensors, trimmed by one threshold per whole task vector; half of the coefficients negative."""
    random = np.random.default_rng(seed)
    base, *finetuned = random.normal(size=(experts + 1, 30)).astype(np.float32)
    coefficients = random.uniform(-1, 1, size=experts).tolist()
    expected = ties_in_numpy(*(np.float32(base), np.float32(finetuned)), coefficients, fraction, combine)

    def split(vector):
        vector = torch.from_numpy(vector)
        return {"a": vector[:10].reshape(2, 5), "b": vector[10:]}

    named = {str(k): split(vector) for k, vector in enumerate(finetuned)}
    of_tensor = {"a": coefficients, "b": coefficients}
    merged = dict(merge_tensors(split(base), named, of_tensor, Ties(fraction, combine)))
    found = torch.cat([merged["a"].flatten(), merged["b"]])
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-5, atol=1e-6)


@given(
    values=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=60),
    cut=st.integers(0, 60),
    fraction=st.floats(0.001, 1),
)
def test_the_threshold_is_exact(values, cut, fraction):
    """The ⌈fraction · n⌉-th largest magnitude, whatever way the vector is cut into tensors, ties and zeros included."""
    vector = torch.tensor(values)
    keep = int(np.ceil(fraction * len(values)))
    expected = float(vector.abs().sort(descending=True).values[keep - 1])
    base, moved = ({"a": part[:cut], "b": part[cut:]} for part in (torch.zeros_like(vector), vector))
    assert magnitude_threshold(base, moved, fraction) == expected
