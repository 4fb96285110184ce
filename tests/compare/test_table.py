import json

import numpy as np
import pytest
import yaml

from deme.compare.comparison import load_comparison
from deme.compare.table import Row, compared_rows, comparison_table, difference, points_of_rows
from deme.job.records import SAMPLES, Record
from deme.measure.scores import Difference


def row(name, to_pretrained, to_continued=None) -> Row:
    return Row(name, list(range(len(to_pretrained))), 1.0, to_pretrained, to_continued, 1_000, 0.5, [None])


def test_one_training_has_the_error_of_its_blocks():
    """Standard deviation over the blocks by the root of their number; a single block has none."""
    found = difference([[1.0, 3.0, 2.0]])
    assert (found.mean, found.standard_error, found.degrees_of_freedom) == pytest.approx((2.0, 1 / 3**0.5, 2))
    assert difference([[1.5]]) == Difference(1.5, None)
    assert difference([[1.5, 1.5]]) == Difference(1.5, 0.0, 1)


def test_the_spread_of_the_trainings_is_added_to_that_of_the_images():
    blocks = np.array([[0.0, 2.0], [4.0, 6.0]])  # means 1 and 5; blocks' means over the trainings 2 and 4
    found = difference(blocks)
    assert found.mean == 3.0
    assert found.standard_error == pytest.approx((np.var([2, 4], ddof=1) / 2 + np.var([1, 5], ddof=1) / 2) ** 0.5)


def test_degrees_of_freedom_are_those_of_welch_and_satterthwaite():
    """Of two equal variances, from 6 blocks and 3 trainings: (1 + 1)² / (1 / 5 + 1 / 2). One alone keeps its own."""
    of_blocks = np.array([-2.0, -1.0, 0.0, 0.0, 1.0, 2.0])  # variance 2, of its mean 1/3
    of_trainings = np.array([-1.0, 0.0, 1.0])  # variance 1, of its mean 1/3
    found = difference(of_trainings[:, None] + of_blocks)
    assert found.standard_error == pytest.approx((2 / 3) ** 0.5)
    assert found.degrees_of_freedom == pytest.approx(4 / (1 / 5 + 1 / 2))
    assert difference(0 * of_trainings[:, None] + of_blocks).degrees_of_freedom == pytest.approx(5)
    assert difference(of_trainings[:, None] + 0 * of_blocks).degrees_of_freedom == pytest.approx(2)


def test_a_star_marks_intervals_without_0():
    """Three trainings need 4.303 standard errors where the images agree."""
    sure, unsure = ([[x + shift] * 2 for x in (-1.0, 0.0, 1.0)] for shift in (2.6, 2.3))  # standard error 1/√3
    table = comparison_table([row("pretrained", [[0.0, 0.0]]), row("a", sure), row("b", unsure)], "classifier")
    assert "| a | 3 | 1.0000 | +2.6000 ± 0.5774 * |" in table
    assert "| b | 3 | 1.0000 | +2.3000 ± 0.5774 |" in table
    assert table.endswith("\n\n*: the 95 % confidence interval, by Student's t, does not hold 0.")


def test_columns_that_say_nothing_are_left_out():
    alone = comparison_table([row("pretrained", [[0.0, 0.0]]), row("merged", [[-1.0, -2.0]])], "classifier")
    assert "between trainings" not in alone
    assert "to continued" not in alone
    assert "| merged | 1.0000 | -1.5000 ± 0.5000 | 1,000 | 0.50 |" in alone
    several = [row("pretrained", [[0.0, 0.0]]), row("merged", [[-1.0, -2.0], [-3.0, -4.0]], [[0.0, 1.0], [0.0, 1.0]])]
    assert "| merged | 2 | 1.0000 | -2.5000 ± 1.1180 | 1.4142 | +0.5000 ± 0.5000 |" in comparison_table(
        several, "inception"
    )


def test_the_rows_of_a_schedule_stand_together_and_are_compared_with_each_other(tmp_path):
    """What a model's folder with one schedule lacks, its row with the other does not; the picture's points agree."""
    file = tmp_path / "comparison.yaml"
    runs = {"models": {"models": ["pretrained", "neon"]}}
    file.write_text(yaml.safe_dump({"base": "configs/digits.yaml", "runs": runs}))
    schedules = "sample.schedules=[{steps: 20}, {steps: 10, scheduler: unipc}, {steps: 50}]"
    given = [f"output_dir={tmp_path}", "sample.scheduler=ddim", schedules]
    _, runs = load_comparison(file, given)
    results = runs[0].config.paths.results
    results.parent.mkdir()
    values = {"pretrained@ddim-20": 3.0, "neon@ddim-20": 2.0, "pretrained@unipc-10": 2.5, "neon@unipc-10": 1.0}
    values |= {"pretrained@ddim-50": 1.5, "neon": 9.0}
    rows = [
        {"samples": f"a/{name}", "weights": None, "images": 4, "pooled": value, "blocks": [value, value + i]}
        | {"mean": value, "standard_deviation": None}
        for i, (name, value) in enumerate(values.items())
    ]
    results.write_text(json.dumps({"features": "classifier", "rows": rows}))
    for name in runs[0].config.self_trained_names:
        log = runs[0].config.paths.finetuning(name) / "log.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text('{"step": 1, "loss": 1, "images_per_second": 1}\n')
    unknown = compared_rows(runs, "classifier")[1]
    assert (unknown.passes, unknown.hours) == (None, None)  # drawing own samples took no notes
    runs[0].config.paths.own_seconds.write_text("30.0\n6.5\n")
    runs[0].config.paths.own_samples.mkdir()
    Record(SAMPLES, {}, {"num_images": 7, "passes": 19}).write(runs[0].config.paths.own_samples)
    found = compared_rows(runs, "classifier")
    trained = len(runs[0].config.self_trained_names) * 3 * runs[0].config.finetune.batch_size
    assert found[1].passes == trained + 7 * 19
    assert found[1].hours == pytest.approx((runs[0].config.finetune.batch_size + 36.5) / 3600)
    assert compared_rows(runs, "inception") == []
    assert [(row.schedule, row.name, row.pooled) for row in found] == [
        ("ddim-20", "pretrained", 3.0),
        ("ddim-20", "neon", 2.0),
        ("unipc-10", "pretrained", 2.5),
        ("unipc-10", "neon", 1.0),
        ("ddim-50", "pretrained", 1.5),
    ]
    assert found[3].to_pretrained == [[-1.5, -0.5]]
    table = comparison_table(found, "classifier")
    assert "| model | schedule | classifier FD, all images |" in table
    assert "| neon | unipc-10 | 1.0000 | -1.0000 ± 0.5000 |" in table
    points = points_of_rows(found, "classifier")
    assert (points[3].sampler, points[3].steps, points[3].value) == ("unipc", 10, 1.0)
    assert points[3].half_width == pytest.approx(0.5 * 12.7062, abs=1e-3)
