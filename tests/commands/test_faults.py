"""Runs that are stopped, killed, doubled or cut short: nothing is lost, and nothing is left to clean up."""

import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import command, environment, run
from robustness import faults
from robustness.forked import Run
from safetensors.torch import load_file

from deme.job.files import lock_file, locked
from deme.models.weights import WEIGHTS

pytestmark = pytest.mark.long

MODEL = "sample.model=pretrained"
FOLDERS = {"finetune.py": "finetuned/0000-0500", "pretrain.py": "pretraining"}
RESULTS = {"finetune.py": "finetuned/0000-0500/unet", "pretrain.py": "pretrained/unet"}
STEPS = ["finetune.range=0", *(f"{part}.max_steps=100" for part in ("finetune", "pretrain"))]
STEPS += [f"{part}.{key}" for part in ("finetune", "pretrain") for key in ("checkpoint_every=20", "log_every=10")]


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def log(folder: Path) -> dict[int, dict]:
    """Step → what is logged of it; a step that was logged twice fails."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    return {line["step"]: {k: v for k, v in line.items() if k not in faults.TIMED} for line in lines}


def has_logged(folder: Path, step: int):
    return lambda: (folder / "log.jsonl").exists() and f'"step": {step},' in (folder / "log.jsonl").read_text()


def tensors(root: Path, script: str) -> dict:
    """Of the newest checkpoint, and of the network that the script wrote."""
    newest = sorted((root / FOLDERS[script] / "checkpoints").glob("step-*"))[-1]
    files = [*newest.glob("*.safetensors"), root / RESULTS[script] / WEIGHTS]
    return {(file.name, name): tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("script", ["finetune.py", "pretrain.py"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(config_file, script, number, status):
    """Student, EMA, optimizer state, result; no step is logged twice. Two signals save a checkpoint."""
    root = config_file.parent
    run(script, config_file, *STEPS)
    arguments = ["--config", str(config_file), "name=stopped", *STEPS]
    stopped = Run(script, arguments, root)
    wait_for(has_logged(root / "stopped" / FOLDERS[script], 30))
    stopped.send(number)
    assert stopped.wait() == status, stopped.stderr
    if number != signal.SIGKILL:
        [line] = [line for line in stopped.stderr.splitlines() if line.startswith(script)]
        found = re.fullmatch(rf"{script}: stopped by {number.name}; checkpoint of step (\d+) saved, .* resumes", line)
        assert (root / "stopped" / FOLDERS[script] / "checkpoints" / f"step-{int(found[1]):08d}").exists()
        assert "Traceback" not in stopped.stderr
    assert not (root / "stopped" / RESULTS[script]).exists()
    assert "resuming from" in run(script, config_file, "name=stopped", *STEPS).stdout
    whole, parts = tensors(root / "tiny", script), tensors(root / "stopped", script)
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not whole[name].equal(parts[name])] == []
    logged, expected = (log(root / name / FOLDERS[script]) for name in ("stopped", "tiny"))
    assert logged.keys() >= expected.keys()
    assert logged[100]["learning_rate"] == expected[100]["learning_rate"]


def test_a_signal_while_a_script_starts_or_draws_ends_it_in_one_line(config_file):
    """Outside of training nothing needs saving."""
    folder = config_file.parent / "tiny" / "samples" / "pretrained"
    options = ["--config", str(config_file), "sample.model=pretrained", "sample.num_images=500"]
    drawing = Run("sample_ddp.py", options, config_file.parent)
    wait_for(lambda: len(list(folder.glob("*.png"))) > 10)
    drawing.send(signal.SIGTERM)
    assert drawing.wait() == 143
    assert drawing.stderr.splitlines()[-1] == "sample_ddp.py: stopped by SIGTERM"
    assert "Traceback" not in drawing.stderr


def test_a_signal_in_the_last_step_stops_the_script_before_the_next_range(config_file):
    """It comes while the last preview is drawn, after the run's checkpoint."""
    steps = ["finetune.max_steps=20", "finetune.preview_every=20"]
    last = Run("finetune.py", ["--config", str(config_file), *steps], config_file.parent)
    folder = config_file.parent / "tiny" / "finetuned"
    wait_for(lambda: (folder / "0000-0500" / "checkpoints" / "step-00000020").exists())
    last.send(signal.SIGTERM)
    assert last.wait() == 143, last.stderr
    assert last.stderr.splitlines()[-1].startswith("finetune.py: stopped by SIGTERM")
    assert not (folder / "0500-1000").exists()


@pytest.mark.parametrize("seed", range(6))
def test_a_signal_at_any_moment_gives_the_status(config_file, seed):
    """Also where a library translates or swallows what the handler raises."""
    run = Run("sample_ddp.py", ["--config", str(config_file), MODEL, "sample.num_images=500"], config_file.parent)
    run.wait(random.Random(seed).uniform(0.15, 0.5))  # from when the handlers stand
    run.send(signal.SIGTERM)
    assert run.wait() in (143, -signal.SIGTERM), run.stderr
    assert "Traceback" not in run.stderr


def test_processes_agree_where_to_stop_and_another_number_of_them_resumes(config_file):
    """The launcher passes SIGTERM on to two processes; one goes on, and its losses are those of a single process."""
    root = config_file.parent
    steps = ["finetune.range=0", "finetune.max_steps=100"]
    run("finetune.py", config_file, *steps, "name=alone")
    launched = command("finetune.py", config_file, *steps, processes=2)
    with subprocess.Popen(launched, env=environment(), cwd=root, stdout=-1, stderr=-1, text=True) as job:
        wait_for(has_logged(root / "tiny" / FOLDERS["finetune.py"], 10))
        job.send_signal(signal.SIGTERM)
        _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    saved = re.findall(r"finetune\.py: stopped by SIGTERM; checkpoint of step (\d+) saved", errors)
    assert len(set(saved)) == 1
    resumed = run("finetune.py", config_file, *steps)
    assert f"resuming from {root}/tiny/finetuned/0000-0500/checkpoints/step-{int(saved[0]):08d}" in resumed.stdout
    alone, both = (log(root / name / FOLDERS["finetune.py"]) for name in ("alone", "tiny"))
    assert alone.keys() == both.keys()
    for step in range(1, int(saved[0]) + 20):
        assert both[step]["loss"] == pytest.approx(alone[step]["loss"], rel=1e-4)


def test_a_worker_that_dies_takes_the_job_down(config_file):
    """The second of two processes is killed while it draws: no hang, a status, nothing that is called complete."""
    root = config_file.parent
    folder = root / "tiny" / "samples" / "pretrained"
    options = ["sample.model=pretrained", "sample.num_images=3000", "sample.num_inference_steps=10"]
    launched = command("sample_ddp.py", config_file, *options, processes=2)
    with subprocess.Popen(launched, env=environment(), cwd=root, stdout=-1, stderr=-1, text=True) as job:
        wait_for(lambda: len(list(folder.glob("*.png"))) > 10)
        workers = psutil.Process(job.pid).children(recursive=True)
        [victim] = [worker for worker in workers if worker.environ().get("RANK") == "1"]
        victim.kill()
        output, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "SIGKILL" in "".join(errors.splitlines(keepends=True)[-20:])
    assert "3,000 images; " not in output
    assert not any(worker.is_running() for worker in workers)
    assert len(list(folder.glob("*.png"))) < 3000
    scored = run("evaluate.py", config_file, status=2)
    assert re.search(r"holds \d+ of 3000 images; finish sample_ddp\.py", scored.stderr)


def test_workers_whose_launcher_is_killed_save_a_checkpoint_and_end(config_file):
    """They would train on unseen, and the same command would be refused."""
    root = config_file.parent
    steps = ["finetune.range=0", "finetune.max_steps=2000"]
    launched = command("finetune.py", config_file, *steps, processes=2)
    with subprocess.Popen(launched, env=environment(), cwd=root, stdout=-1, stderr=-1) as job:
        wait_for(has_logged(root / "tiny" / FOLDERS["finetune.py"], 10))
        workers = psutil.Process(job.pid).children(recursive=True)
        assert len(workers) >= 2
        job.kill()
        psutil.wait_procs(workers, timeout=60)
    assert not any(worker.is_running() for worker in workers)
    [saved] = (root / "tiny" / FOLDERS["finetune.py"] / "checkpoints").glob("step-*")
    resumed = run("finetune.py", config_file, *steps, "finetune.max_minutes=0.0001")
    assert f"resuming from {saved}" in resumed.stdout


def test_an_error_of_the_main_process_ends_all(config_file):
    """Only the first of two processes sees the folder that stands there: its line, and no hang."""
    folder = config_file.parent / "tiny" / "samples" / "pretrained"
    folder.mkdir(parents=True)
    (folder / "a.txt").touch()
    launched = command("sample_ddp.py", config_file, "sample.model=pretrained", processes=2)
    result = subprocess.run(launched, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    line = f"sample_ddp.py: error: sample.output={folder}: holds files but no samples.yaml; choose another folder"
    assert line in result.stderr.splitlines()  # as it happens, and again where the launcher sums up
    assert line in "".join(result.stderr.splitlines(keepends=True)[-3:])
    assert result.stderr.count(line) == 2
    assert 'File "' + str(faults.REPOSITORY / "sample_ddp.py") not in result.stderr


def test_a_second_job_on_the_same_folder_is_refused(config_file):
    """By the owner's host and process; once that is killed, its lock is taken over."""
    root = config_file.parent
    arguments = ["--config", str(config_file), "finetune.range=0", "finetune.max_steps=300"]
    first = Run("finetune.py", arguments, root)
    wait_for(has_logged(root / "tiny" / FOLDERS["finetune.py"], 1))
    second = run("finetune.py", config_file, "finetune.range=0", "finetune.max_steps=300", status=2)
    owner = f"process {first.process.pid} on {os.uname().nodename}"
    assert f"output_dir={root}/tiny/finetuned/0000-0500: in use by {owner}" in second.stderr
    first.send(signal.SIGKILL)
    first.wait()
    lock = lock_file(root / "tiny" / "finetuned" / "0000-0500")
    assert f"pid={first.process.pid}\n" in lock.read_text()
    run("finetune.py", config_file, "finetune.range=0", "finetune.max_steps=300")
    assert not lock.exists()


@pytest.mark.parametrize("target", faults.TARGETS, ids=[target.name for target in faults.TARGETS])
def test_faults_lose_nothing(target, tmp_path):
    """Two kills at random moments, one before a call, a full disk, damaged checkpoints: as robustness/faults.py."""
    found = faults.disturb(target, tmp_path, 2, 1, 1, 1, random.Random(target.name))
    assert found["kills"] >= 2


def test_what_a_killed_writer_left_goes_with_the_next_lock(tmp_path):
    """It may have been killed after its output got the final name, so that nobody writes there again."""
    leftover = tmp_path / ".writing-merged-abcd1234"
    leftover.mkdir()
    with locked(tmp_path / "merged", "merge.output"):
        assert not leftover.exists()
