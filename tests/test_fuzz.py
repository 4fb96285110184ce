"""Damaged files of every format that is read from outside are read or refused in one line."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY, environment
from robustness.damaged_formats import FORMATS

pytestmark = pytest.mark.long

EXAMPLES = 60


def test_damaged_files_lead_to_no_fault():
    """`python tests/robustness/fuzz.py` tries more."""
    command = [sys.executable, REPOSITORY / "tests" / "robustness" / "fuzz.py", "--examples", str(EXAMPLES)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines() == [f"{name}: {EXAMPLES} examples, 0 faults" for name in FORMATS]
