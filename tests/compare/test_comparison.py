import pytest
import yaml

from deme.compare.comparison import load_comparison
from deme.errors import UserError

BASE = "configs/digits.yaml"


def runs_of(folder, runs, *overrides, base=BASE) -> list:
    file = folder / "comparison.yaml"
    file.write_text(yaml.safe_dump({"base": base, "runs": runs}, sort_keys=False))
    return load_comparison(file, list(overrides))[1]


def test_each_variation_and_seed_is_a_run_that_starts_from_the_base(tmp_path):
    runs = {
        "eight, whole": {"models": ["merged"], "overrides": ["timesteps.num_ranges=8"]},
        "models": {"models": ["pretrained", "merged"]},
    }
    found = runs_of(tmp_path, runs, "seeds=[2, 0]", "name=mine", "model.pretrained=null")
    assert [(run.config.name, run.config.seed, run.models) for run in found] == [
        ("mine", 0, ["pretrained", "merged"]),
        ("mine-seed2", 2, ["merged"]),
        ("mine-eight-whole-seed2", 2, ["merged"]),
        ("mine-eight-whole", 0, ["merged"]),
    ]
    assert [run.config.seed for run in found] == [0, 2, 2, 0]
    assert {run.config.paths.pretrained for run in found} == {"runs/mine/pretrained"}


def test_the_pretrained_network_is_drawn_though_its_seed_is_not_compared(tmp_path):
    found = runs_of(tmp_path, {"models": {"models": ["pretrained", "merged"]}}, "seeds=[5]")
    assert [(run.config.name, run.models) for run in found] == [
        ("digits", ["pretrained"]),
        ("digits-seed5", ["merged"]),
    ]


def test_a_seed_without_a_row_has_no_run(tmp_path):
    runs = {
        "models": {"models": ["pretrained"]},
        "two": {"models": ["merged"], "overrides": ["timesteps.num_ranges=2"]},
    }
    found = runs_of(tmp_path, runs, "seeds=[0, 5]")
    assert [run.config.name for run in found] == ["digits", "digits-two", "digits-two-seed5"]


def test_two_runs_of_one_name_are_refused(tmp_path):
    runs = {"models": {"models": ["pretrained"]}}
    for name in ("a b", "a_b"):
        runs[name] = {"models": ["merged"], "overrides": ["finetune.max_steps=5"]}
    with pytest.raises(UserError, match=r"^runs.a_b: its run is called digits-a_b, as another one"):
        runs_of(tmp_path, runs)


def test_all_ranges_together_take_the_base_s_steps(tmp_path):
    """Four of 1,000 in the base; a variation's own number stands."""
    runs = {"models": {"models": ["pretrained"]}}
    for count, more in ((1, []), (8, []), (2, ["finetune.max_steps=7"])):
        runs[str(count)] = {"models": ["merged"], "overrides": [f"timesteps.num_ranges={count}", *more]}
    steps = {run.name: run.config.finetune.max_steps for run in runs_of(tmp_path, runs)}
    assert steps == {"models": 1000, "1": 4000, "8": 500, "2": 7}


@pytest.mark.parametrize(
    ("override", "usual"),
    [
        ("seed=7", "0"),
        ("name=b", "digits"),
        ("model.pretrained=null", "assets/digits"),
        ("sample.num_images=12", "10782"),
        ("sample.seed_offset=5", "0"),
        ("evaluate.blocks=2", "6"),
    ],
)
def test_what_all_runs_share_is_refused_in_a_variation(tmp_path, override, usual):
    """Blocks of other images do not pair, and the rest would be ignored; given to all runs it is right."""
    runs = {"models": {"models": ["pretrained"]}, "b": {"models": ["merged"], "overrides": [override]}}
    key, value = override.split("=")
    with pytest.raises(UserError, match=f"^runs.b: {key}={value}: all runs have the base's, {usual}"):
        runs_of(tmp_path, runs)
    assert len(runs_of(tmp_path, runs, override)) == 2


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({}, "runs={}: must be a mapping"),
        (
            {"a": {"models": ["continued"], "overrides": ["seed=1"]}},
            "a run without overrides must have the model",
        ),
        ({"a": {"models": ["pretrained", "min_snrr"]}}, r"runs.a.models=min_snrr: .*; did you mean min_snr\?"),
        (
            {"a": {"models": ["pretrained"]}, "b": {"models": ["pretrained"], "overrides": ["finetune.max_steps=3"]}},
            "runs.b.models=pretrained: with sample.prediction_scale alone; all runs start from the base's",
        ),
        ({"a": {"models": []}}, "runs.a.models=.*: must be a list of different models"),
        ({"a": {"models": ["pretrained", "pretrained"]}}, "runs.a.models=.*: must be a list of different models"),
        ({"a": {"model": ["pretrained"]}}, "Key 'model' not in 'Variation'"),
        (
            {"a": {"models": ["pretrained"]}, "b": {"models": ["merged"], "overrides": ["finetune.steps=3"]}},
            "runs.b: finetune.steps",
        ),
    ],
)
def test_mistakes_name_the_run(tmp_path, runs, message):
    with pytest.raises(UserError, match=message):
        runs_of(tmp_path, runs)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds=[1, 1]", r"seeds=\[1, 1\]: must be a list of different seeds"),
        ("base=nowhere.yaml", "--config nowhere.yaml: No such file"),
        ("merge.output=elsewhere", "merge.output=elsewhere: each run of a comparison has its own"),
        ("analyze.output=elsewhere", "analyze.output=elsewhere: each run of a comparison has its own"),
    ],
)
def test_mistakes_on_the_command_line_are_named(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        runs_of(tmp_path, {"a": {"models": ["pretrained"]}}, override)
