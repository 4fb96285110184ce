import json
import subprocess
import sys

from conftest import REPOSITORY, environment

from benchmarks import report
from deme.files import markdown_table


def test_a_table_replaces_its_own_part_of_the_readme_only(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks/memory.py", "--quick"])
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
    assert found["command"] == "python benchmarks/memory.py --quick"


def test_gradient_checkpointing_takes_less_memory():
    """CIFAR-10's network at full size, 8 images."""

    def peak(checkpointing: bool) -> float:
        settings = {"mixed_precision": "no", "gradient_checkpointing": checkpointing, "batch_size": 8}
        settings |= {"device": "cpu", "quick": True}
        command = [sys.executable, REPOSITORY / "benchmarks" / "memory.py", "--measure", json.dumps(settings)]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return float(result.stdout.splitlines()[-1])

    assert peak(True) < 0.9 * peak(False)
