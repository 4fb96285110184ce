import json
from dataclasses import replace

import numpy as np
import pytest

from deme.config.experiment import Config
from deme.errors import UserError
from deme.measure.scores import (
    Difference,
    FeatureSpace,
    Reference,
    Score,
    compared,
    frechet_distance,
    half_width,
    load_scores,
    load_spaces,
    save_scores,
    save_spaces,
    score,
    statistics,
)
from deme.report.figures import score_bars
from deme.report.model_card import score_line
from deme.report.run import verdict
from deme.report.tables import difference_table, score_table
from deme.search import ways


@pytest.fixture(scope="module")
def reference() -> Reference:
    features = np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32)
    return Reference.of([features], len(features))


def scored(reference, shift=0.0, blocks=4, count=400, name="merged", clip=None):
    features = np.random.default_rng(1).normal(shift, 1, size=(count, 4)).astype(np.float32)
    space = FeatureSpace("classifier", None, reference, None)
    return score(name, ["abc"], features, space, blocks, clip), features


def test_blocks_are_scored_in_order_and_together(reference):
    found, features = scored(reference)
    assert found.images == 400
    assert found.pooled == frechet_distance(*statistics(features), reference.mu, reference.sigma)
    first = frechet_distance(*statistics(features[:100]), reference.mu, reference.sigma)
    assert found.blocks[0] == first
    assert found.mean == pytest.approx(np.mean(found.blocks))
    assert found.standard_deviation == pytest.approx(np.std(found.blocks, ddof=1))
    assert found.kid_standard_error == pytest.approx(np.std(found.kid_blocks, ddof=1) / 2)


def test_differences_are_paired_by_block(reference):
    found, baseline = scored(reference, 0.2)[0], scored(reference, name="pretrained")[0]
    result = compared(found, [found, baseline])
    differences = np.subtract(found.blocks, baseline.blocks)
    assert result.to_pretrained.mean == pytest.approx(differences.mean())
    assert result.to_pretrained.standard_error == pytest.approx(differences.std(ddof=1) / 2)
    assert replace(result, differences=None) == found


def test_folders_of_several_schedules_are_compared_with_those_of_the_same(reference):
    """By the part of the name behind the @; one of another schedule, or of none, is no baseline."""
    names = ["pretrained", "pretrained@ddim-20", "merged@ddim-20", "merged@ddim-50", "merged@home", "merged"]
    scores = [scored(reference, shift, name=f"a/{name}")[0] for name, shift in zip(names, range(6), strict=True)]
    rows = [compared(row, scores) for row in scores]
    assert [list(row.differences) for row in rows] == [[], [], ["pretrained"], [], ["pretrained"], ["pretrained"]]
    expected = np.subtract(scores[2].blocks, scores[1].blocks).mean()
    assert rows[2].to_pretrained.mean == pytest.approx(expected)


def test_folders_of_several_runs_are_compared_with_those_of_their_own(reference):
    """Which lie beside them. That of a third run, without a baseline, is compared with none: it could be either."""
    names = ["a/pretrained", "a/merged", "b/pretrained", "b/merged", "c/merged"]
    scores = [scored(reference, shift, name=name)[0] for name, shift in zip(names, range(5), strict=True)]
    clips = [replace(row, clip_blocks=row.blocks[::-1]) for row in scores]
    rows = [compared(row, scores, clips) for row in clips]
    assert [list(row.differences) for row in rows] == [[], ["pretrained"], [], ["pretrained"], []]
    for row, baseline in ((1, 0), (3, 2)):
        expected = np.subtract(scores[row].blocks, scores[baseline].blocks).mean()
        assert rows[row].to_pretrained.mean == pytest.approx(expected)
        assert rows[row].clip_difference == pytest.approx(expected)
    assert list(compared(scores[4], [scores[0], scores[4]]).differences) == ["pretrained"]


def test_rows_are_compared_with_pretrained_control_and_ensemble(reference, tmp_path):
    """Block by block, but not with themselves nor with others; they are read back, and shown in a table."""
    names = ["samples/pretrained", "samples/ensemble", "samples/merged", "samples/other"]
    scores = [scored(reference, shift, name=name)[0] for name, shift in zip(names, (0.3, 0.1, 0, 0.2), strict=True)]
    rows = [compared(row, scores) for row in scores]
    assert [list(row.differences) for row in rows] == [["ensemble"], ["pretrained"], *[["pretrained", "ensemble"]] * 2]
    differences = np.subtract(scores[2].blocks, scores[1].blocks)
    found = rows[2].differences["ensemble"]
    assert found.mean == pytest.approx(differences.mean())
    assert found.standard_error == pytest.approx(differences.std(ddof=1) / 2)
    save_scores(tmp_path / "results.json", "classifier", rows, {})
    assert load_scores(tmp_path / "results.json") == ("classifier", rows)
    lines = str(difference_table(rows, "classifier")).splitlines()
    assert lines[0] == "| paired difference of the classifier FD ± s.e. | to pretrained | to ensemble |"
    assert lines[4].endswith(f" | {found.mean:+.4f} ± {found.standard_error:.4f} |")
    assert lines[2].startswith("| pretrained | - | ")
    assert difference_table(scores, "classifier") is difference_table(rows[3:3], "classifier") is None


def test_intervals_are_those_of_students_t():
    """Quantiles as in any table; many degrees of freedom give the normal distribution's."""
    known = {1: 12.706, 2: 4.303, 5: 2.571, 4.5: 2.659, 30: 2.042, 1e9: 1.960}
    assert [float(half_width(1.0, degrees)) for degrees in known] == pytest.approx(list(known.values()), abs=5e-4)
    assert half_width(np.array([1.0, 2.0]), 5) == pytest.approx([2.571, 5.141], abs=5e-4)
    assert Difference(-2.58, 1.0, 5).is_clear
    assert not Difference(-2.56, 1.0, 5).is_clear
    assert not Difference(5.0, None, 0).is_clear
    assert Difference(5.0, None, 0).half_width is None


@pytest.mark.parametrize(("mean", "word"), [(-2.7, "better"), (2.7, "worse"), (2.5, ""), (-2.5, "")])
def test_a_result_of_six_blocks_is_clear_from_2_571_standard_errors_on(mean, word):
    """In the page, in the search's last line, and in the width of the bars."""
    blocks = np.array([-2.0, -1.0, 0.0, 0.0, 1.0, 2.0])  # of standard deviation √2, so of standard error 1/√3
    baseline = Score("pretrained", None, 6, 10.0, [10.0] * 6, 10.0, 0.0)
    row = replace(baseline, samples="merged", blocks=(10 + blocks + mean / 3**0.5).tolist())
    scores = [compared(one, [baseline, row]) for one in (baseline, row)]
    width = 2.5706 / 3**0.5
    text = f"clearly {word}, with a" if word else "nothing clear, its"
    assert f"{text} 95 % confidence interval of ± {width:.4f}" in verdict(scores, "classifier")
    result = ways.Result(np.ones(1), "match", 0.5, 1.0, [], {"a": (0.0, 2.0)})
    line = ways.verdict(Config(), result, [*scores, replace(scores[-1], samples="best")], None)[-1]
    said = {"worse": "WORSE", "": "NOT clearly better"}.get(word, word)
    assert line.startswith(f"the best is {said} than the pretrained model: {mean / 3**0.5:+.4f}, ")
    assert line.endswith(f"95 % confidence interval ± {width:.4f}")
    [axes] = score_bars(scores, "classifier", "merged").axes
    [((start, _), (end, _))] = axes.containers[0].lines[2][0].get_segments()
    assert (end - start) / 2 == pytest.approx(width, abs=1e-4)


def test_files_without_degrees_of_freedom_are_read(reference, tmp_path):
    """As earlier versions wrote them: those of the blocks, and of a single block's two or more KIDs at least one."""
    for blocks, expected in ((4, (3, 3)), (1, (0, 1))):
        rows = [scored(reference, name="pretrained", blocks=blocks)[0]]
        rows.append(compared(scored(reference, 0.2, blocks=blocks)[0], rows))
        save_scores(tmp_path / "results.json", "classifier", rows, {})
        content = json.loads((tmp_path / "results.json").read_text())
        for row in content["rows"]:
            del row["kid_degrees_of_freedom"]
            for difference in (row["differences"] or {}).values():
                del difference["degrees_of_freedom"]
        (tmp_path / "results.json").write_text(json.dumps(content))
        found = load_scores(tmp_path / "results.json")[1][1]
        assert (found.to_pretrained.degrees_of_freedom, found.kid_degrees_of_freedom) == expected


def test_a_single_block_has_no_spread(reference):
    found, _ = scored(reference, blocks=1)
    assert found.blocks == [found.pooled]
    assert found.standard_deviation is None
    assert found.kid_standard_error > 0  # of two halves
    assert compared(found, [replace(found, samples="pretrained")]).to_pretrained.standard_error is None


def test_a_kid_is_shown_only_where_it_tells_something(reference):
    """Of the same distribution it is left out, with a line that says so; of another one it is in the table."""
    same, other = scored(reference)[0], scored(reference, 0.5, name="other")[0]
    assert not same.has_telling_kid
    assert other.has_telling_kid
    table = str(score_table([same], "classifier"))
    assert table.splitlines()[-1] == "classifier KID is left out: in every row its 95 % confidence interval holds 0."
    assert "KID ×" not in table
    table = str(score_table([same, other], "classifier"))
    assert "classifier KID × 10³ ± s.e." in table
    assert f"{1e3 * other.kid:.3f} ± {1e3 * other.kid_standard_error:.3f}" in table
    assert table.splitlines()[-1].startswith("| other | 400 | ")


def test_clip_scores_are_means_of_blocks_and_paired_by_block(reference):
    """In closed form: blocks of 1, 2, 3, 4 and of 1.5, 2, 3, 4.5; the other scores stay as they are."""
    clip = np.repeat([1.5, 2, 3, 4.5], 100) + np.tile([-0.25, 0.25], 200)
    found, _ = scored(reference, clip=clip)
    baseline, _ = scored(reference, name="pretrained", clip=np.repeat([1.0, 2, 3, 4], 100))
    assert found.clip_blocks == [1.5, 2, 3, 4.5]
    assert found.clip == 2.75
    assert found.clip_standard_deviation == pytest.approx((5.25 / 3) ** 0.5)
    result = compared(found, [], [found, baseline])
    assert result.clip_difference == 0.25
    assert result.clip_difference_standard_error == pytest.approx((0.25 / 3) ** 0.5 / 2)
    assert replace(result, differences=None, clip_difference=None, clip_difference_standard_error=None) == found
    assert replace(found, clip=None, clip_blocks=None, clip_standard_deviation=None) == scored(reference)[0]
    single, _ = scored(reference, blocks=1, clip=np.arange(400))
    assert (single.clip, single.clip_blocks, single.clip_standard_deviation) == (199.5, [199.5], None)


def test_the_clip_score_is_shown_where_a_row_has_one(reference):
    """In the table and in the model card's line; a row without prompts has a dash."""
    plain = scored(reference)[0]
    baseline, _ = scored(reference, name="pretrained", clip=np.ones(400))
    found = compared(scored(reference, clip=np.repeat([1, 2, 3, 4], 100))[0], [], [baseline])
    assert "CLIP" not in str(score_table([plain], "inception"))
    assert "CLIP" not in score_line("inception", plain)
    lines = [line.strip("| ").split(" | ") for line in str(score_table([found, plain], "inception")).splitlines()[:4]]
    assert lines[0][-2:] == ["CLIP score ± s.d.", "its paired difference ± s.e."]
    assert lines[2][-2:] == ["2.500 ± 1.291", "+1.500 ± 0.645"]
    assert lines[3][-2:] == ["-", "-"]
    assert score_line("inception", found).endswith(", CLIP score 2.500")


def test_without_reference_features_there_is_the_distance_alone(reference):
    """As with a file that pytorch_fid made."""
    found, _ = scored(replace(reference, features=None))
    assert (found.kid, found.precision, found.recall) == (None, None, None)
    assert "left out" not in str(score_table([found], "inception"))
    assert "| merged | 400 |" in str(score_table([found], "inception"))


def test_scores_survive_saving(tmp_path, reference):
    rows = [scored(reference, name="pretrained")[0]]
    rows.append(compared(scored(reference, 0.2)[0], rows))
    rows.append(scored(reference, clip=np.arange(400))[0])
    save_scores(tmp_path / "results.json", "classifier", rows, {"held_out_accuracy": 0.9})
    assert load_scores(tmp_path / "results.json") == ("classifier", rows)
    assert json.loads((tmp_path / "results.json").read_text())["held_out_accuracy"] == 0.9


def test_further_spaces_stand_behind_the_first(tmp_path, reference):
    """Readers of one space see that of the first judge, and a file with one is as it always was."""
    first, second = ([scored(reference, shift)[0]] for shift in (0.0, 0.2))
    file, name = tmp_path / "results.json", "torchvision-resnet50.IMAGENET1K_V2-0123abcd"
    save_spaces(file, {"classifier": first, name: second}, {"processor": "x"})
    assert load_scores(file) == ("classifier", first)
    assert list(load_spaces(file).items()) == [("classifier", first), (name, second)]
    assert str(score_table(second, name)).startswith(f"| model | images | {name} FD, all images | ")
    assert score_line(name, second[0]).startswith(f"400 images: {name} FD ")
    save_scores(file, "classifier", first, {"processor": "x"})
    assert list(json.loads(file.read_text())) == ["features", "rows", "processor"]
    save_spaces(file, {"classifier": first, "other": second}, {})
    with pytest.raises(UserError, match=r"results\.json: .*: 1 rows of other features"):
        load_spaces(file)
    save_spaces(file, {"classifier": first, name: [replace(second[0], images=0)]}, {})
    with pytest.raises(UserError, match=rf"further\.{name}\[0\]\.images is 0"):
        load_scores(file)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rows": [1]}', '{"features": "inception", "rows": [{"pooled": 1}]}', "{}"]
)
def test_damaged_results_are_named(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=r"results\.json: "):
        load_scores(tmp_path / "results.json")
