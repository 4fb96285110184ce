"""How every script ends, whatever goes wrong: one line, a status, and no noise of Python's own."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, environment

from deme.job.command import SIGNALS

FAULTY = """
import sys
sys.path.insert(0, {repository!r})
from deme.job.command import run_script

def main(config):
    config.paths.run_folder.mkdir(parents=True)
    {fault}

run_script("", lambda config: "", main)
"""


def faulty(folder: Path, fault: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a script whose main does this."""
    (folder / "script.py").write_text(FAULTY.format(repository=str(REPOSITORY), fault=fault))
    command = [sys.executable, "script.py", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


def test_what_nobody_foresaw_is_a_fault_of_ours(tmp_path):
    """One line, status 1, and the traceback in a file beside the run."""
    result = faulty(tmp_path, "{}['a']")
    assert result.returncode == 1
    line = "script.py: this is a fault of ours: KeyError: 'a'; the traceback is in runs/digits/traceback-"
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1
    [file] = (tmp_path / "runs" / "digits").glob("traceback-*.txt")
    assert "in main" in file.read_text()


def test_too_little_memory_says_what_takes_less(tmp_path):
    result = faulty(tmp_path, "raise MemoryError('no memory')")
    assert result.returncode == 1
    assert result.stderr == (
        "script.py: out of memory, a smaller batch_size or micro_batch_size takes less: MemoryError: no memory\n"
    )


def test_values_with_line_breaks_are_shown_in_one_line(tmp_path):
    result = faulty(tmp_path, "pass", "finetune.range='a\n\nb'")
    assert result.returncode == 2
    rule = "must be one of null, 0 … 3, continued, "
    assert result.stderr.startswith(rf"script.py: error: finetune.range='a\nb': {rule}")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("closed", [">&-", ">/dev/full", "2>&-", "2>/dev/full", ">&- 2>&-"])
def test_closed_or_full_outputs_make_no_noise(tmp_path, closed):
    """Status 1 where what was asked for could not be said; at most one line, never Python's own complaint and 120."""
    command = f"{sys.executable} {REPOSITORY / 'finetune.py'} --dry-run {closed}"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == (1 if closed == ">/dev/full" else 0), result.stderr
    assert result.stderr.count("\n") <= 1
    assert "Exception ignored" not in result.stderr


def test_an_ascii_terminal_gets_every_line(tmp_path):
    """± and … are not in its alphabet."""
    command = [sys.executable, REPOSITORY / "finetune.py", "finetune.range=9"]
    ascii_only = environment() | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    result = subprocess.run(command, cwd=tmp_path, env=ascii_only, capture_output=True, text=True)
    assert result.returncode == 2
    assert "finetune.range=9: must be one of null, 0 " in result.stderr
    assert "Traceback" not in result.stderr


def test_the_environment_gets_into_no_record(tmp_path):
    """A secret named in a configuration would end up in what is uploaded."""
    (tmp_path / "a.yaml").write_text("name: ${oc.env:TOKEN}\n")
    command = [sys.executable, REPOSITORY / "finetune.py", "--config", "a.yaml", "--dry-run"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment() | {"TOKEN": "hunter2"}, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "name=${oc.env:TOKEN}: " in result.stderr
    assert "hunter2" not in result.stdout + result.stderr
    (tmp_path / "a.yaml").write_text("name: x\noutput_dir: ${name}s\n")
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert "output_dir: xs" in result.stdout


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_libraries_are_imported_ends_the_script_in_one_line(tmp_path, number):
    """Before its command line is read."""
    (tmp_path / "yaml.py").write_text("import os\nos.write(1, b'importing')\nimport time\ntime.sleep(60)\n")
    import_path = {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, REPOSITORY / "merge.py"],
        env=environment() | import_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would ignore it
    )
    assert process.stdout.read(9) == "importing"
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == f"merge.py: stopped by {number.name}\n"
    assert process.returncode == 128 + number
