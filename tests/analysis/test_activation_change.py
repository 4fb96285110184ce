import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_unet
from noisy_images import probes

from deme.analysis.activation_change import changes, projection_distance, split_squares, squared_change
from deme.method.projection import blocks_of
from deme.models.denoisers import with_projections

BLOCKS = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]


def test_squares_are_split_in_closed_form():
    """A number, a profile of each kind and their product, of which each image's part is known; they sum to all."""
    channel, position = torch.tensor([1.0, -1]), torch.tensor([2.0, 0, 0, -2])
    image = 3 + channel[:, None, None] + position.reshape(2, 2) + 5 * channel[:, None, None] * position.reshape(2, 2)
    batch = torch.stack([image, 2 * image])
    expected = [9 * 8, 1 * 8, 2 * 8, 25 * 2 * 8]
    assert split_squares(batch).tolist() == pytest.approx([5 * value for value in expected])
    assert float(split_squares(batch).sum()) == pytest.approx(float(batch.square().sum()))
    random = torch.randn(3, 5, 4, 4)
    assert float(split_squares(random).sum()) == pytest.approx(float(random.square().sum()), rel=1e-6)


def test_a_projection_scales_what_is_behind_it():
    """By 1.5 behind the last block: all parts change by half of themselves there, and nothing before it."""
    before, after = with_projections(tiny_unet()), with_projections(tiny_unet())
    with torch.no_grad():
        after.up_blocks[1].projection.weight.mul_(1.5)
    batches = probes(Accelerator(cpu=True))
    squares, shapes = squared_change(before, after, batches, Accelerator(cpu=True))
    assert list(blocks_of(before)) == BLOCKS
    assert shapes.tolist() == [[8, 16], [16, 16], [16, 16], [16, 64], [8, 64]]
    assert (squares[:4, 1] == 0).all()
    assert (squares[:, 0] > 0).all()
    relative, shares = changes(squares)
    for part in relative.T:
        assert part == pytest.approx(np.array([0, 0, 0, 0, 0.5]), abs=1e-5)
    assert np.isnan(shares[:4]).all()
    assert shares[4].sum() == pytest.approx(1)
    assert all(len(block._forward_hooks) == 1 for block in blocks_of(before).values())  # that of the projection


def test_more_than_ten_blocks_are_in_the_order_of_their_numbers():
    names = [f"down_blocks.{number}" for number in range(12)]
    network = torch.nn.ModuleDict({"down_blocks": torch.nn.ModuleList(torch.nn.ReLU() for _ in names)})
    assert list(blocks_of(network)) == names


def test_a_shift_of_channels_is_a_change_across_channels_alone():
    shift = torch.tensor([1.0, -1])[None, :, None, None].expand(2, 2, 3, 3)
    squares = torch.stack([split_squares(torch.randn(2, 2, 3, 3)), split_squares(shift)])
    assert changes(squares.numpy())[1].tolist() == pytest.approx([0, 1, 0, 0])


def test_the_distance_of_a_projection_from_the_identity_is_relative():
    network = with_projections(tiny_unet())
    assert [projection_distance(network.state_dict(), block) for block in BLOCKS] == [0] * len(BLOCKS)
    with torch.no_grad():
        network.mid_block.projection.weight.mul_(1.25)
    assert projection_distance(network.state_dict(), "mid_block") == pytest.approx(0.25)
    assert np.isnan(projection_distance(tiny_unet().state_dict(), "mid_block"))
