import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY, environment

from benchmarks import report, scaling, startup
from deme.report.tables import markdown_table


@pytest.mark.long
def test_a_table_replaces_its_own_part_of_the_readme_only(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks/memory.py", "--batch-sizes", "1"])
    (tmp_path / "README.md").write_text("# Benchmarks\n")
    for value in ("1", "2"):
        table = markdown_table(["network", "GiB"], [["small", value]])
        report.save("memory", "cpu", [{"gib": float(value)}], table)
        report.save("speed", "cpu", [], "| other |")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Benchmarks\n")
    assert text.count("| network | GiB |\n| --- | ---: |\n| small | 2 |") == 1
    assert "| small | 1 |" not in text
    assert text.count("| other |") == 1
    found = json.loads((tmp_path / "results" / "memory-cpu.json").read_text())
    assert found["rows"] == [{"gib": 2.0}]
    assert found["command"] == "python benchmarks/memory.py --batch-sizes 1"
    monkeypatch.setattr(sys, "argv", ["benchmarks/memory.py", "--quick"])
    report.save("memory", "cpu", [], "quick")
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.long
def test_gradient_checkpointing_takes_less_memory():
    """A small network, and as many images as outweigh it and the libraries."""

    def peak(checkpointing: bool) -> float:
        settings = {"mixed_precision": "no", "gradient_checkpointing": checkpointing, "batch_size": 64}
        settings |= {"device": "cpu", "quick": True}
        command = [sys.executable, REPOSITORY / "benchmarks" / "memory.py", "--measure", json.dumps(settings)]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return float(result.stdout.splitlines()[-1])

    assert peak(True) < 0.9 * peak(False)


@pytest.mark.parametrize("command", startup.ANSWERS.values(), ids=startup.ANSWERS)
def test_answers_that_need_no_torch_do_not_import_it(command, tmp_path):
    """Nor any other library that takes its time."""
    script, *options = command
    line = ["runpy.py", f"output_dir={tmp_path}", *options]
    program = f"import runpy, sys; sys.argv = {line!r}\ntry:\n    runpy.run_path({script!r}, run_name='__main__')\n"
    program += (
        "except SystemExit as end:\n    print(end.code)\nprint({*sys.modules} & {'torch', 'diffusers', 'datasets'})"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "set()", result.stderr
    if "--dry-run" not in command:
        assert result.stdout.splitlines()[-2] == ("0" if "--help" in command else "2")


@pytest.mark.long
@pytest.mark.parametrize("name", ["checkpoints", "data", "merging", "training"])
def test_a_quick_run_prints_its_table_and_writes_nothing(name):
    """The larger of the benchmarks that no other test runs parts of."""
    folder = REPOSITORY / "benchmarks"
    before = {path: path.read_bytes() for path in (folder / "README.md", *(folder / "results").iterdir())}
    command = [sys.executable, folder / f"{name}.py", "--quick"]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    table = [text.split(" | ") for text in result.stdout.splitlines() if text.startswith("| ")]
    assert len(table) >= 3
    assert len(table[0]) == len(table[1]) == len(table[2])
    assert {path: path.read_bytes() for path in before} == before


def test_gradients_of_a_step_stand_against_its_time():
    """A step of 8 images at 4 images/s takes 2 s, in which each of two processes sends as much as there is."""
    rows = [{"what": "finetuning, images/s", "processes": 2, "threads": 1, "speed": [4.0]}]
    assert "| 2 | 2 | 100 | 50 |" in scaling.exchanged(rows, 8, 100_000_000)
    assert rows[0]["sent_bytes"] == 100_000_000
