"""Damaged files of every format that is read from outside are read or refused in one line."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY, environment

from benchmarks.damaged_formats import FORMATS

SECONDS = 20


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_lead_to_no_fault(name):
    """`python benchmarks/fuzz.py` tries them longer."""
    command = [sys.executable, REPOSITORY / "benchmarks" / "fuzz.py", name, "--seconds", str(SECONDS)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(result.stdout.split()[-4].replace(",", "")) > 20, result.stdout
