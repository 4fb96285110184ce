import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deme.config.trainings import Finetune
from deme.data.crops import CroppedImages
from deme.data.decoding import Images, ahead, flat_images
from deme.data.examples import MicroBatch, micro_batches
from deme.data.opening import batch_indices

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 9, 12, 3), dtype=np.uint8)


@given(num_images=st.integers(1, 30), batches=st.integers(1, 8), size=st.integers(1, 40))
def test_every_pass_over_the_data_is_a_permutation(num_images, batches, size):
    """Consecutive batches read one endless stream; each of its epochs holds every image once."""
    stream = np.concatenate([batch_indices((0, 1), num_images, size * b, size) for b in range(batches)])
    assert len(stream) == batches * size
    for epoch in range(len(stream) // num_images):
        assert sorted(stream[epoch * num_images : (epoch + 1) * num_images]) == list(range(num_images))


def test_batches_do_not_depend_on_how_they_are_cut():
    whole = batch_indices((3, 2), 7, 0, 24)
    assert np.array_equal(whole, np.concatenate([batch_indices((3, 2), 7, start, 4) for start in range(0, 24, 4)]))
    assert not np.array_equal(whole, batch_indices((3, 1), 7, 0, 24))
    assert not np.array_equal(whole, batch_indices((4, 2), 7, 0, 24))


def streamed(threads: int, decode=PIXELS.__getitem__) -> CroppedImages:
    images = Images(decode, np.arange(len(PIXELS)), threads)
    return CroppedImages(images, 9, center_crop=False, random_flip=True)


def decoded() -> CroppedImages:
    images = flat_images(PIXELS.reshape(-1), np.full((len(PIXELS), 2), PIXELS.shape[1:3]), np.arange(len(PIXELS)), 3)
    return CroppedImages(images, 9, center_crop=False, random_flip=True)


def batches_of(images: CroppedImages, numbers: range, first: int, count: int) -> list[MicroBatch]:
    """The micro-batches of `count` steps of four; these `numbers` of each are one process's."""
    training = Finetune(batch_size=8, micro_batch_size=2)
    batches = micro_batches(images, (0, 2), training, numbers, lambda: first)
    loaded = list(islice(batches, count * len(numbers)))
    batches.close()
    return loaded


@settings(max_examples=20)
@given(threads=st.integers(0, 4), start=st.integers(0, 5), shares=st.sampled_from([1, 2, 4]))
def test_images_decoded_ahead_are_those_of_the_cache(threads, start, shares):
    """The same pixels, crops, flips and draws in the same order, from any step on and in any share of the work."""
    whole = batches_of(decoded(), range(4), 0, start + 3)
    for rank in range(shares):
        numbers = range(rank, 4, shares)
        batches = batches_of(streamed(threads), numbers, start, 3)
        expected = [one for one in whole[4 * start :] if one.number in numbers]
        for one, other in zip(batches, expected, strict=True):
            assert one.number == other.number
            assert torch.equal(one.examples, other.examples)
            assert (one.uniform, one.seed) == (other.uniform, other.seed)


def test_images_are_decoded_while_a_step_is_computed():
    """The batch after next is decoded before it is asked for, and no more than are kept in store."""
    seen = []
    images = streamed(2, lambda row: seen.append(row) or PIXELS[row])
    batches = micro_batches(images, (0, 2), Finetune(batch_size=2), range(1), lambda: 0)
    next(batches)
    end = time.monotonic() + 30
    while len(seen) < 4:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert len(seen) <= 2 * 6
    batches.close()


def test_an_error_of_a_thread_comes_where_its_result_would():
    def fail_at_3(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    results = ahead(fail_at_3, range(9), threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


@given(count=st.integers(0, 30), threads=st.integers(0, 4))
def test_results_keep_the_order_of_their_items(count, threads):
    assert list(ahead(lambda item: item * item, range(count), threads)) == [i * i for i in range(count)]
