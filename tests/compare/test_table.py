import numpy as np
import pytest

from deme.compare.table import Row, comparison_table, difference


def row(name, to_pretrained, to_continued=None) -> Row:
    return Row(name, list(range(len(to_pretrained))), 1.0, to_pretrained, to_continued, 1_000, 0.5)


def test_one_training_has_the_error_of_its_blocks():
    """Standard deviation over the blocks by the root of their number; a single block has none."""
    assert difference([[1.0, 3.0, 2.0]]) == pytest.approx((2.0, 1 / 3**0.5))
    assert difference([[1.5]]) == (1.5, None)


def test_the_spread_of_the_trainings_is_added_to_that_of_the_images():
    blocks = np.array([[0.0, 2.0], [4.0, 6.0]])  # means 1 and 5; blocks' means over the trainings 2 and 4
    mean, error = difference(blocks)
    assert mean == 3.0
    assert error == pytest.approx((np.var([2, 4], ddof=1) / 2 + np.var([1, 5], ddof=1) / 2) ** 0.5)


def test_columns_that_say_nothing_are_left_out():
    alone = comparison_table([row("pretrained", [[0.0, 0.0]]), row("merged", [[-1.0, -2.0]])], "classifier")
    assert "between trainings" not in alone
    assert "to continued" not in alone
    assert "| merged | 1.0000 | -1.5000 ± 0.5000 | 1,000 | 0.50 |" in alone
    several = [row("pretrained", [[0.0, 0.0]]), row("merged", [[-1.0, -2.0], [-3.0, -4.0]], [[0.0, 1.0], [0.0, 1.0]])]
    assert "| merged | 2 | 1.0000 | -2.5000 ± 1.1180 | 1.4142 | +0.5000 ± 0.5000 |" in comparison_table(
        several, "inception"
    )
