import re
import subprocess
import sys

import pytest
import yaml
from conftest import REPOSITORY, environment

RUNS = {
    "models": {"models": ["pretrained", "continued"]},
    "one range": {"models": ["ensemble"], "overrides": ["timesteps.num_ranges=1", "merge.coefficients=null"]},
    "broken": {"models": ["continued"], "overrides": ["finetune.learning_rate=1e38"]},
}


def write(folder, base, runs, **others) -> str:
    file = folder / "comparison.yaml"
    file.write_text(yaml.safe_dump({"base": str(base), "runs": runs, **others}, sort_keys=False))
    return str(file)


def compare(file: str, *overrides: str, status: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, REPOSITORY / "compare.py", "--config", file, *overrides]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == status, result.stdout + result.stderr
    return result


def test_rows_are_made_but_for_the_one_that_fails_and_not_again(config_file):
    """Two trainings each. Status 1, and its name; the others are in the table, the second time without a job."""
    root = config_file.parent
    file = write(root, config_file, RUNS)
    settings = ["seeds=[0, 3]", "evaluate.blocks=2", "sample.num_images=8"]
    first = compare(file, *settings, status=1)
    for name in ("tiny-broken", "tiny-broken-seed3"):
        assert re.search(rf"{name} finetune finetune.range=continued: .* not finite", first.stderr.splitlines()[-1])
        assert f"{name} sample_ddp sample.model=continued" in first.stderr.split("not tried without it: ")[1]
    table = first.stdout.split("| model | trainings |")[1]
    rows = re.findall(r"^\| ([a-z ,]+) \| ([-2]) \| [\d.]+ \| (.+?) \| .* \| ([-\d,]+) \| ", table, re.MULTILINE)
    assert [row[:2] for row in rows] == [("pretrained", "-"), ("continued", "2"), ("one range, ensemble", "2")]
    assert all(re.fullmatch(r"[+-][\d.]+ ± [\d.]+", row[2]) for row in rows[1:])
    images = 2 * 6 * 8  # of all ranges together
    assert [row[3] for row in rows] == ["-", f"{3 * images:,}", f"{4 * images:,}"]  # the latter with the teacher's
    names = sorted(path.relative_to(root).as_posix() for path in root.glob("tiny*/samples/*[a-z]/"))
    of_range = [f"tiny-one_range{seed}/samples/ensemble" for seed in ("", "-seed3")]
    expected = ["tiny-seed3/samples/continued", "tiny/samples/continued", "tiny/samples/pretrained"]
    assert [name for name in names if not name.endswith(".png")] == sorted([*of_range, *expected])
    assert not (root / "tiny-seed3" / "stats").exists()  # scored in the same features
    second = compare(file, *settings, status=1)
    again = re.findall(r"^(.*): started$", second.stdout, re.MULTILINE)
    assert sorted(again) == [f"tiny-broken{seed} finetune finetune.range=continued" for seed in ("", "-seed3")]
    assert second.stdout.split("| model |")[-1] == first.stdout.split("| model |")[-1]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({}, "runs={}: must be a mapping"),
        ({"a": {"models": ["continued"]}}, "must have the model pretrained"),
        (
            {"a": {"models": ["pretrained", "min_snrr"]}},
            "runs.a.models=min_snrr: must be one of .*; did you mean min_snr?",
        ),
        ({"a": {"models": []}}, "runs.a.models=.*: must be a list of models"),
        ({"a": {"model": ["pretrained"]}}, "Key 'model' not in 'Variation'"),
        (
            {"a": {"models": ["pretrained"]}, "b": {"models": ["merged"], "overrides": ["finetune.steps=3"]}},
            "runs.b: finetune.steps",
        ),
        (
            {"a": {"models": ["pretrained", "ant_uw"]}},
            "finetune.micro_batch_size=1: finetune.range=ant_uw spreads it over 2 timestep ranges",
        ),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_starts(runs, message, config_file):
    found = compare(write(config_file.parent, config_file, runs), "finetune.micro_batch_size=1", status=2)
    assert re.search(message.replace("{}", "{}"), found.stderr), found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert found.stdout == ""


def test_seeds_must_differ_and_the_base_must_be_there(config_file):
    file = write(config_file.parent, config_file, {"a": {"models": ["pretrained"]}})
    assert "seeds=[1, 1]: must be a list of different seeds" in compare(file, "seeds=[1, 1]", status=2).stderr
    assert "--config nowhere.yaml: No such file" in compare(file, "base=nowhere.yaml", status=2).stderr
