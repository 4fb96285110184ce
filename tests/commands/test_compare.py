import re
import subprocess
import sys

import pytest
import yaml
from conftest import REPOSITORY, environment

RUNS = {
    "models": {"models": ["pretrained", "continued", "merged"]},
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
    """Status 1 and its name; all others are in the table, the second time without a job of their own."""
    file = write(config_file.parent, config_file, RUNS)
    settings = ["evaluate.blocks=2", "sample.num_images=8"]
    first = compare(file, *settings, status=1)
    assert re.search(r"^compare.py: tiny-broken finetune .*continued: .* not finite", first.stderr, re.MULTILINE)
    assert "not tried without it: tiny-broken sample_ddp sample.model=continued" in first.stderr
    table = first.stdout.split("| model | classifier FD, all images | difference")[1]
    names = re.findall(r"^\| ([a-z ,]+) \| \d", table, re.MULTILINE)
    assert names == ["pretrained", "continued", "merged", "one range, ensemble"]
    cost = {line.split(" | ")[0].strip("| "): line.split(" | ")[-2] for line in table.splitlines() if " | " in line}
    images = 2 * 6 * 8  # of all ranges together
    assert cost["continued"] == f"{3 * images:,}"
    assert cost["merged"] == cost["one range, ensemble"] == f"{4 * images:,}"  # with the teacher's
    second = compare(file, *settings, status=1)
    assert re.findall(r"^(.*): started$", second.stdout, re.MULTILINE) == [
        "tiny-broken finetune finetune.range=continued"
    ]
    assert second.stdout.split("| model |")[-1] == first.stdout.split("| model |")[-1]


def test_several_trainings_differ_and_are_compared_with_the_same_pretrained_network(config_file):
    file = write(config_file.parent, config_file, {"models": {"models": ["pretrained", "continued"]}})
    found = compare(file, "seeds=[0, 3]", "evaluate.blocks=2", "sample.num_images=8")
    assert re.search(r"^\| continued \| 2 \| [\d.]+ \| \S+ ± [\d.]+ \| 0\.\d+ \|", found.stdout, re.MULTILINE)
    root = config_file.parent
    assert sorted(path.name for path in (root / "tiny" / "samples").glob("[a-z]*[a-z]")) == ["continued", "pretrained"]
    assert [path.name for path in (root / "tiny-seed3" / "samples").glob("[a-z]*[a-z]")] == ["continued"]
    assert not (root / "tiny-seed3" / "stats").exists()  # scored in the same features


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
