import re
import subprocess

import pytest
import yaml
from conftest import REPOSITORY, environment

RUNS = {
    "models": {"models": ["pretrained", "continued"]},
    "broken": {"models": ["continued"], "overrides": ["finetune.learning_rate=1e38"]},
}


def write(folder, base, runs, **others) -> str:
    file = folder / "comparison.yaml"
    file.write_text(yaml.safe_dump({"base": str(base), "runs": runs, **others}, sort_keys=False))
    return str(file)


@pytest.fixture
def compare(forked_python):
    """compare.py, and all that it starts."""

    def run(file: str, *overrides: str, status: int = 0) -> subprocess.CompletedProcess:
        command = ["python", REPOSITORY / "compare.py", "--config", file, *overrides]
        settings = environment() | {"PATH": forked_python}
        result = subprocess.run(command, env=settings, capture_output=True, text=True)
        assert result.returncode == status, result.stdout + result.stderr
        return result

    return run


def test_rows_are_made_but_for_the_one_that_fails_and_not_again(config_file, compare):
    """Two trainings each. Status 1, and its name; the others are in the table, the second time without a job."""
    root = config_file.parent
    file = write(root, config_file, RUNS)
    settings = ["seeds=[0, 3]", "evaluate.blocks=2", "sample.num_images=8"]
    first = compare(file, *settings, status=1)
    for name in ("tiny-broken", "tiny-broken-seed3"):
        assert re.search(rf"{name} train finetune.range=continued: .* not finite", first.stderr.splitlines()[-1])
        assert f"{name} sample-continued" in first.stderr.split("not made: ")[1]
    table = first.stdout.split("| model | trainings |")[1]
    rows = re.findall(r"^\| ([a-z ,]+) \| ([-2]) \| [\d.]+ \| (.+?) \| .* \| ([-\d,]+) \| ", table, re.MULTILINE)
    assert [row[:2] for row in rows] == [("pretrained", "-"), ("continued", "2")]
    assert re.fullmatch(r"[+-][\d.]+ ± [\d.]+( \*)?", rows[1][2])
    assert [row[3] for row in rows] == ["-", f"{3 * 2 * 6 * 8:,}"]  # a gradient's, of all ranges' steps and images
    names = sorted(path.relative_to(root).as_posix() for path in root.glob("tiny*/samples/*[a-z]/"))
    assert names == ["tiny-seed3/samples/continued", "tiny/samples/continued", "tiny/samples/pretrained"]
    assert not (root / "tiny-seed3" / "stats").exists()  # scored in the same features
    assert (root / "tiny" / "report.html").exists()
    again = compare(file, *settings, "--table", status=1).stdout
    assert again.split("| model |")[-1] == first.stdout.split("| model |")[-1]
    other = compare(file, *settings, "--table", "evaluate.blocks=4", status=1)  # other settings have no scores yet
    assert "| model |" not in other.stdout
    assert "not made: " in other.stderr
    second = compare(file, *settings, status=1)
    again = re.findall(r"^(.*): started$", second.stdout, re.MULTILINE)
    assert sorted(again) == [f"tiny-broken{seed} train finetune.range=continued" for seed in ("", "-seed3")]
    assert second.stdout.split("| model |")[-1] == first.stdout.split("| model |")[-1]


@pytest.mark.long
def test_rivals_of_the_experts_are_made_from_shared_trainings(config_file, compare):
    """A soup, random directions and snapshots: one job for each kind, and the cost of each row from its log."""
    root = config_file.parent
    uniform = "merge.coefficients=null"
    rows = {"models": {"models": ["pretrained", "merged"]}} | {
        word: {"models": ["merged"], "overrides": [f"merge.experts=[{word}]", uniform]}
        for word in ("soup", "random", "trajectory")
    }
    file = write(root, config_file, rows, overrides=["finetune.snapshot_every=6", "sample.num_images=4"])
    first = compare(file)
    started = re.findall(r"^(.*): started$", first.stdout, re.MULTILINE)
    trained = {f"tiny train finetune.range={word}" for word in (0, 1, "continued", "soup")} | {"tiny random"}
    assert {name for name in started if " train " in name or "random" in name.split()} == trained
    assert [path.name for path in root.glob("tiny*/finetuned")] == ["finetuned"]
    table = first.stdout.split("| model |")[-1]
    cost = dict(re.findall(r"^\| (.*?) \| .* \| ([-\d,]+) \| [^|]* \|$", table, re.MULTILINE))
    of_ranges, plain = 2 * 6 * 8 * 4, 2 * 6 * 8 * 3  # with a teacher; without
    merged = {"merged": of_ranges, "soup, merged": plain, "random, merged": of_ranges, "trajectory, merged": plain}
    assert cost == {"pretrained": "-"} | {name: f"{passes:,}" for name, passes in merged.items()}
    record = yaml.safe_load((root / "tiny-trajectory" / "merged" / "merge.yaml").read_text())
    folder = root / "tiny" / "finetuned" / "continued" / "snapshots"
    assert [part["path"] for part in record["finetuned"]] == [str(folder / f"{s:08d}" / "unet") for s in (6, 12)]
    assert re.findall(": started$", compare(file).stdout, re.MULTILINE) == []
    changed = compare(file, "merge.method=ties", "sample.overwrite=true").stdout
    again = {name.split()[1] for name in re.findall(r"^(.*): started$", changed, re.MULTILINE)}
    assert again >= {"merge", "sample-merged", "evaluate"}
    assert again.isdisjoint({"train", "random"})


def test_a_mistake_is_told_in_one_line_before_anything_starts(config_file, compare):
    """Here one of a job's, which distributes what it is too small for, and one of the last of the jobs."""
    runs = {"models": {"models": ["pretrained", "ant_uw"]}}
    for mistake, rule in (
        ("finetune.micro_batch_size=1", "finetune.range=ant_uw spreads it over 2 timestep ranges"),
        ("merge.settings.fraction=1", "Key 'fraction' not in 'TaskArithmetic'"),
    ):
        found = compare(write(config_file.parent, config_file, runs), mistake, status=2)
        assert (found.stdout, found.stderr) == ("", f"compare.py: error: {mistake}: {rule}\n")
    assert not (config_file.parent / "tiny").exists()
