"""Whole experiments on a Slurm cluster that the tests start; without its packages they are skipped."""

import hashlib
import json
import re
import shlex
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import REPOSITORY, environment, run
from slurm import cluster, command_of, wait_for  # noqa: F401  a fixture

pytestmark = pytest.mark.long

MODELS = ("pretrained", "continued", "merged")
BLOCKS = 2


@pytest.fixture
def experiment(config_file) -> Path:
    """The tests' tiny experiment, its trainings long enough to be disturbed."""
    config = yaml.safe_load(config_file.read_text())
    config["finetune"] |= {"max_steps": 80, "checkpoint_every": 20}
    config["evaluate"] |= {"blocks": 2}
    config_file.write_text(yaml.safe_dump(config))
    return config_file


@pytest.fixture
def comparison(experiment) -> Path:
    """Its models that the tests draw from."""
    file = experiment.with_name("rows.yaml")
    file.write_text(yaml.safe_dump({"base": str(experiment), "runs": {"models": {"models": list(MODELS)}}}))
    return file


def script(name: str, config: Path, *overrides: str, status: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """A script of scripts/slurm/, where there is no Slurm."""
    settings = environment() | {"CONDA_DEFAULT_ENV": "deme"} | variables
    command = ["bash", REPOSITORY / "scripts" / "slurm" / name, config, *overrides]
    result = subprocess.run(command, env=settings, capture_output=True, text=True, cwd=config.parent)
    assert result.returncode == status, result.stdout + result.stderr
    return result


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of a run's weights and images."""
    found = [*folder.glob("finetuned/*/unet/*.safetensors"), *folder.glob("merged/unet/*.safetensors")]
    found += folder.glob("samples/*/*.png")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def freeze(cluster, job: str, training: Path) -> psutil.Process:  # noqa: F811
    """Stop the training of a task of an array behind its first checkpoint."""
    number, task = job.split("_")

    def python() -> list[psutil.Process]:
        found = cluster.processes_of({"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": task})
        return [process for process in found if command_of(process)[1:2] == ["finetune.py"]]

    wait_for(python, 120)
    [process] = python()
    wait_for(lambda: any((training / "checkpoints").glob("step-*")), 120)
    process.send_signal(signal.SIGSTOP)
    return process


def said(log: Path) -> str:
    """A job's log: Slurm forwards blocks of bytes, so that a progress bar's character may be torn."""
    return log.read_text(encoding="utf-8", errors="replace")


def submitted(output: str) -> dict[str, str]:
    """Stage and override → Slurm's job, as submit.sh says."""
    lines = [line.split() for line in output.splitlines() if line.startswith("tiny ")]
    return {" ".join(words[1:-2]): words[-1] for words in lines}


def wait_for_jobs(cluster, jobs: list[str], seconds: float = 240) -> None:  # noqa: F811
    wait_for(lambda: not cluster.queue().keys() & set(jobs), seconds)


def test_an_experiment_survives_a_dead_node_a_failed_job_and_its_time_limit(cluster, experiment, comparison):  # noqa: F811
    """Weights and images are those of a plain local run, bit for bit; what failed holds nothing up but what needs it.

    The control fails at first. A node dies while it trains a range, which goes on elsewhere. Submitted again, only the
    control and what it is needed for run; its time is up in the middle, and it queues itself again.
    """
    root = experiment.parent / "tiny"
    training = root / "finetuned"
    training.mkdir(parents=True)
    (training / "continued").touch()  # where its folder should be
    settings = {"BLOCKS": str(BLOCKS)}
    submit = ["bash", "scripts/slurm/submit.sh", str(comparison)]
    jobs = submitted(cluster.run(*submit, **settings).stdout)
    samples = [f"sample-{model} sample.block={block}" for model in MODELS for block in range(BLOCKS)]
    trainings = [f"train finetune.range={name}" for name in ("continued", 0, 1)]
    expected = [
        "cache",
        "statistics",
        *samples[:2],
        *trainings,
        *samples[2:4],
        "merge",
        *samples[4:],
        "evaluate",
        "table-rows",
    ]
    assert list(jobs) == expected
    assert cluster.run(*submit, **settings).stdout.startswith("0 job(s) submitted")

    freeze(cluster, jobs[trainings[1]], training / "0000-0500")
    [_, node] = cluster.queue()[jobs[trainings[1]]]
    cluster.kill_node(node)
    local = experiment.with_name("local.yaml")
    local.write_text(experiment.read_text().replace("name: tiny", "name: local"))
    for options in ([], ["finetune.range=continued"]):
        run("finetune.py", local, *options)
    run("merge.py", local)
    for model in MODELS:
        run("sample_ddp.py", local, f"sample.model={model}")
    wait_for_jobs(cluster, list(jobs.values()))
    status = cluster.run("bash", "scripts/slurm/status.sh", str(comparison), **settings).stdout
    incomplete = [" ".join(line.split()[1:-4]) for line in status.splitlines() if line.endswith(" ended")]
    assert incomplete == [trainings[0], *samples[2:4], "evaluate", "table-rows"], status
    logs = root / "jobs" / "logs"
    [log] = logs.glob(f"*-{jobs[trainings[1]]}.log")
    assert "resuming from" in said(log)

    cluster.start_node(node)
    (training / "continued").unlink()
    again = submitted(cluster.run(*submit, **settings, NOTICE="29").stdout)
    assert list(again) == [trainings[0], *samples[2:4], "evaluate", "table-rows"]
    control = freeze(cluster, again[trainings[0]], training / "continued")  # until its time is up
    limit = ["scontrol", "update", f"jobid={again[trainings[0]]}"]
    cluster.run(*limit, "timelimit=1")
    wait_for(lambda: is_pending(control, signal.SIGTERM), 90)
    control.send_signal(signal.SIGCONT)
    [log] = logs.glob(f"*-{again[trainings[0]]}.log")
    wait_for(lambda: "queued again" in said(log), 60)
    cluster.run(*limit, "timelimit=10")
    wait_for_jobs(cluster, list(again.values()))
    for part in ("stopped by SIGTERM; checkpoint of step", "queued again, to go on where it was", "resuming from"):
        assert part in said(log)

    assert files(root) == files(experiment.parent / "local")
    assert (root / "report.html").exists()
    rows = json.loads((root / "results.json").read_text())["rows"]
    assert [Path(row["samples"]).name for row in rows] == list(MODELS)
    table = (root / "comparison" / "rows" / "table.md").read_text()
    assert re.findall(r"^\| (\w+) \| \d", table, re.MULTILINE) == list(MODELS)
    assert cluster.run(*submit, **settings).stdout.startswith("0 job(s) submitted")
    changed = cluster.run(*submit, "merge.coefficients=[0.1,0.2]", **settings, DRY_RUN="1").stdout
    assert "--job-name=tiny-merge" in changed


def is_pending(process: psutil.Process, number: int) -> bool:
    """Whether a stopped process has this signal before it."""
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith(("SigPnd", "ShdPnd")) and int(line.split()[1], 16) >> (number - 1) & 1:
                return True
    return False


def test_two_nodes_work_as_two_processes_and_jobs_on_one_host_do_not_meet(cluster, config_file):  # noqa: F811
    """Two tasks of an array at once, with ports of their own: training and sampling as two local processes do them."""
    options = ["finetune.range=0", "sample.model=pretrained", "finetune.log_every=1"]
    log = config_file.parent / "%a.log"
    settings = [
        "--parsable",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--array=0-1",
        f"--output={log}",
        "--open-mode=append",
    ]
    tasks = [part for name in "ab" for part in (name, f"key of {name}", f"name={name}")]
    after = []
    for name in ("finetune.py", "sample_ddp.py"):
        job = ["scripts/slurm/job.sh", str(config_file.parent / name), "2", "", name]
        arguments = ["--config", str(config_file), *options, "--", *tasks]
        number = cluster.run("sbatch", *settings, *after, *job, *arguments).stdout.strip()
        after = [f"--dependency=aftercorr:{number}"]
    for name in ("finetune.py", "sample_ddp.py"):
        run(name, config_file, *options, "name=local", processes=2)
    wait_for_jobs(cluster, [f"{number}_0", f"{number}_1"])
    assert (config_file.parent / "sample_ddp.py" / "b").read_text().startswith("key of b\n")  # it has been done
    expected = files(config_file.parent / "local")
    assert len(expected) == 1 + 6
    for name, text in (("a", "0.log"), ("b", "1.log")):
        assert files(config_file.parent / name) == expected, (config_file.parent / text).read_text()
    assert "2 process(es) on cpu" in (config_file.parent / "0.log").read_text()


STOPPED_ONCE = """
import signal, sys, time
from pathlib import Path

saved = Path(sys.argv[1])

def save(number, frame):
    saved.touch()
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, save)
if not saved.exists():
    print("waits", flush=True)
    time.sleep(600)
"""


def test_a_job_that_gives_way_to_another_one_goes_on_and_what_needs_it_stays(cluster, tmp_path):  # noqa: F811
    """It ends within the grace time that Slurm grants it, for which Slurm alone would count it as failed."""
    script = tmp_path / "script.py"
    script.write_text(STOPPED_ONCE)
    log = tmp_path / "log"
    node = ["sbatch", "--parsable", "--nodelist=n1"]
    options = ["--requeue", f"--output={log}", "--open-mode=append"]
    job = ["scripts/slurm/job.sh", str(tmp_path / "done"), "1", "", str(script), str(tmp_path / "saved")]
    first = cluster.run(*node, *options, *job, "--", "a", "key of a", "").stdout.strip()
    needs = [f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes", "--output=/dev/null"]
    cluster.run("sbatch", *needs, "--wrap", f"touch {tmp_path / 'after'}")
    wait_for(lambda: log.exists() and "waits" in said(log), 60)
    second = cluster.run(*node, "--partition=urgent", "--output=/dev/null", "--wrap", "true").stdout.strip()
    wait_for_jobs(cluster, [first, second])
    assert "queued again" in said(log)
    assert (tmp_path / "done" / "a").read_text().startswith("key of a\n"), said(log)
    wait_for((tmp_path / "after").exists, 60)


def test_a_dry_run_prints_every_job_with_what_it_waits_for(experiment):
    """A search goes before the merge, the control beside the ranges, each model's images behind it alone."""
    cluster_file = experiment.with_name("mine.env")
    cluster_file.write_text(
        "PARTITION=gpu\nGPUS=4 # of each node\nNODES=2\nTIME=4:00:00\nBLOCKS=3\nOPTIONS='--qos=low'\n"
    )
    settings = {"CLUSTER": str(cluster_file), "BLOCKS": "2", "DRY_RUN": "1"}
    options = ["merge.coefficients=search", "finetune.batch_size=16", "finetune.micro_batch_size=2"]
    lines = script("submit.sh", experiment, *options, **settings).stdout.splitlines()
    jobs = {line.split("--job-name=tiny-")[1].split()[0]: line for line in lines if line.startswith("sbatch")}
    stages = ["cache", "statistics", "sample-pretrained", "train", "sample-continued", "sample-ensemble", "search"]
    stages += ["merge", "sample-merged", "distill", "sample-distilled"]
    stages += ["merge-neon", "sample-neon", "evaluate", "table-models"]
    assert list(jobs) == stages
    for line in jobs.values():
        for part in (
            "--partition=gpu",
            "--gpus-per-node=4",
            "--nodes=1" if "merge.py" in line or "compare.py" in line else "--nodes=2",
            "--qos=low",
            "--signal=B:USR1@120",
            "--requeue",
        ):
            assert part in line
    waits = {
        name: line.split("--dependency=")[1].split()[0] if "dependency" in line else "" for name, line in jobs.items()
    }
    trained = "afterok:TINY-TRAIN_1:TINY-TRAIN_2"  # the ranges; the control is the first of the array
    assert waits["cache"] == waits["sample-pretrained"] == ""
    assert waits["train"] == waits["statistics"] == "afterok:TINY-CACHE"
    assert waits["search"] == f"{trained}:TINY-STATISTICS,afterany:TINY-TRAIN_0"
    assert waits["merge"] == "afterok:TINY-SEARCH"
    assert waits["distill"] == waits["sample-merged"] == "afterok:TINY-MERGE"
    assert waits["sample-ensemble"] == trained
    assert waits["sample-continued"] == "afterok:TINY-TRAIN_0"
    assert waits["merge-neon"] == "afterok:TINY-TRAIN_3"
    assert waits["sample-distilled"] == "afterok:TINY-DISTILL_0"
    assert waits["evaluate"].startswith("afterok:TINY-STATISTICS:TINY-SAMPLE-PRETRAINED_0:TINY-SAMPLE-PRETRAINED_1:")
    assert waits["table-models"] == "afterany:TINY-EVALUATE"
    tasks = shlex.split(jobs["train"].split(" -- ")[1])
    assert tasks[2::3] == [f"finetune.range={name}" for name in ("continued", 0, 1, "self")]
    assert "sample.model=merged sample.blocks=2 -- 'tiny sample-merged sample.block=0'" in jobs["sample-merged"]
    assert not (experiment.parent / "tiny").exists()


def test_a_comparison_s_runs_are_all_submitted(experiment):
    """Each with a name of its own; the table waits for the scores of all."""
    rows = {
        "models": {"models": ["pretrained"]},
        "longer": {"models": ["merged"], "overrides": ["finetune.max_steps=9"]},
    }
    file = experiment.with_name("rows.yaml")
    file.write_text(yaml.safe_dump({"base": str(experiment), "runs": rows}))
    lines = script("submit.sh", file, "seeds=[0,1]", DRY_RUN="1").stdout.splitlines()
    names = [line.split("--job-name=")[1].split()[0] for line in lines]
    assert [name for name in names if name.endswith("-train")] == ["tiny-longer-train", "tiny-longer-seed1-train"]
    assert lines[-1].split("--dependency=")[1].split()[0].count("EVALUATE") == 3  # the base and two
    assert f"compare.py --config {file} 'seeds=[0,1]' --table -- 'tiny table-rows'" in lines[-1]


def test_status_is_told_from_the_files_where_there_is_no_slurm(experiment):
    """One range is there, the other one's training has been stopped; nothing was submitted."""
    run("finetune.py", experiment, "finetune.range=0")
    run("finetune.py", experiment, "finetune.range=1")
    shutil.rmtree(experiment.parent / "tiny" / "finetuned" / "0500-1000" / "unet")
    run("sample_ddp.py", experiment, "sample.model=pretrained")
    lines = script("status.sh", experiment, BLOCKS="2").stdout.splitlines()
    states = dict(line.removeprefix("tiny ").split("  ", 1) for line in lines[:-1])
    states = {name: state.strip() for name, state in states.items()}
    assert states["cache"] == states["train finetune.range=0"] == "not checked"
    assert states["train finetune.range=1"] == "step 80"
    assert states["train finetune.range=continued"] == states["merge"] == states["evaluate"] == "missing"
    assert states["sample-pretrained sample.block=1"] == "6 images"
    assert lines[-1] == f"0 of {len(states)} complete"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CLUSTER": "missing.env"}, "CLUSTER=missing.env: no such file"),
        ({"GPUS": "many"}, "GPUS=many: must be a whole number"),
        ({"BLOCKS": "0"}, "BLOCKS=0: must be a whole number above 0"),
        ({"SETUP": "false"}, "SETUP=false: failed"),
        ({"OPTIONS": "--comment='a"}, "jobs.py: error: OPTIONS=--comment='a: No closing quotation"),
        (
            {"NODES": "2", "NUM_PROCESSES": "2"},
            "jobs.py: error: finetune.micro_batch_size=4: finetune.batch_size=8 makes 2 micro-batches of 4, which 4 "
            "processes can't share equally: set micro_batch_size=2 or a divisor",
        ),
        ({"BLOCKS": "100"}, "jobs.py: error: sample.blocks=100: more than sample.num_images=6"),
    ],
)
def test_mistakes_are_answered_in_one_line(experiment, variables, message):
    """Before anything is submitted."""
    result = script("submit.sh", experiment, status=2, **variables, DRY_RUN="1")
    assert (result.stdout, result.stderr) == ("", f"{message}\n")


def test_a_time_limit_of_its_own_is_refused(experiment):
    """Its status would be that of a complete training, which others wait for."""
    refused = script("submit.sh", experiment, "finetune.max_minutes=5", status=2, DRY_RUN="1")
    rule = "TIME limits a job, which then goes on by itself"
    assert refused.stderr == f"jobs.py: error: finetune.max_minutes=5.0: {rule}\n"


def test_a_name_that_is_no_setting_is_named(experiment):
    file = experiment.with_name("mine.env")
    file.write_text("PARTITON=gpu\n")
    refused = script("submit.sh", experiment, status=2, CLUSTER=str(file), DRY_RUN="1")
    assert refused.stderr.startswith(f"{file}: PARTITON: must be one of CLUSTER PARTITION ")
