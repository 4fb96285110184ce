import pytest
from conftest import tiny_unet

from deme.errors import UserError
from deme.method.task_vectors import coefficients_of, pattern_of, patterns_of

NAMES = list(tiny_unet().state_dict())


def test_the_first_pattern_that_fits_a_tensor_counts():
    groups = {"down_blocks.*": [0.5], "*": [0.25], "mid_block.*": [9]}
    names = ("down_blocks.0.w", "mid_block.w", "conv_in.w")
    assert [pattern_of(name, groups) for name in names] == ["down_blocks.*", "*", "*"]
    with pytest.raises(UserError, match=r"no pattern fits the tensor mid_block\.w"):
        pattern_of("mid_block.w", {"down_blocks.*": [0.5]})


def test_groups_are_all_tensors_the_blocks_of_the_network_each_tensor_or_given_patterns():
    blocks = [f"{block}.*" for block in ("down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1", "mid_block")]
    assert patterns_of("range", NAMES) == ["*"]
    assert sorted(patterns_of("block", NAMES)) == sorted([*blocks, "*"])
    assert patterns_of("block", NAMES)[-1] == "*"
    assert patterns_of("tensor", NAMES) == NAMES
    assert patterns_of(["conv_*", "*"], NAMES) == ["conv_*", "*"]


@pytest.mark.parametrize("groups", ["range", "block", "tensor", ["*.bias", "*"]], ids=str)
def test_every_tensor_lies_in_a_group_and_none_is_empty(groups):
    patterns = patterns_of(groups, NAMES)
    assert {pattern_of(name, patterns) for name in NAMES} == set(patterns)


def test_the_tenth_block_is_not_the_first():
    """`up_blocks.1.*` does not take what is in `up_blocks.10`."""
    names = ["up_blocks.1.w", "up_blocks.10.w", "conv_in.w"]
    patterns = patterns_of("block", names)
    assert [pattern_of(name, patterns) for name in names] == ["up_blocks.1.*", "up_blocks.10.*", "*"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["conv_in.*"], r"no pattern fits the tensor \S+; add one for '\*'"),
        (["*", "conv_in.*"], r"no tensor is left for the pattern conv_in\.\*"),
        (["conv_inn.*", "*"], r"no tensor is left for the pattern conv_inn\.\*"),
        (["conv_in.*", "conv_in.*", "*"], r"no tensor is left for the pattern conv_in\.\*"),
    ],
)
def test_patterns_that_fit_no_tensor_or_leave_some_are_refused(groups, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        patterns_of(groups, NAMES)


def test_coefficients_of_a_part_of_a_network_have_patterns_that_fit_the_whole():
    """A LoRA changes some tensors; a search's groups are those of all. What fits none of the network is a mistake."""
    part, groups = ["conv_in.weight"], {"up_blocks.*": [1.0], "*": [0.5]}
    assert coefficients_of(part, groups, NAMES) == {"conv_in.weight": [0.5]}
    assert coefficients_of(part, {"conv_in.*": [2.0]}, NAMES) == {"conv_in.weight": [2.0]}
    for groups, unused in (({"up_blocks": [1.0], "*": [0.5]}, "up_blocks"), ({"*": [0.5], "up_*": [1.0]}, r"up_\*")):
        with pytest.raises(UserError, match=f"^no tensor is left for the pattern {unused}$"):
            coefficients_of(part, groups, NAMES)
