import pytest

from deme.errors import UserError
from deme.method.coefficients import coefficients_of


def test_the_first_pattern_that_fits_a_tensor_counts():
    groups = {"down_blocks.*": [0.5], "*": [0.25], "mid_block.*": [9]}
    names = ("down_blocks.0.w", "mid_block.w", "conv_in.w")
    assert [coefficients_of(name, groups) for name in names] == [[0.5], [0.25], [0.25]]
    with pytest.raises(UserError, match=r"no pattern fits the tensor mid_block\.w"):
        coefficients_of("mid_block.w", {"down_blocks.*": [0.5]})
