import os
import shlex
import signal
import subprocess

import pytest
from conftest import REPOSITORY

from deme.compare import slurm
from deme.compare.jobs import Job, Ledger
from deme.compare.slurm import Queue, missing_jobs
from deme.errors import UserError
from deme.job.command import Interrupted


def chain(tmp_path) -> list[Job]:
    """A training, its images, their scores, and a table that waits for them, but does without."""
    train = Job("run", "train", "a.py", [], tmp_path / "weights", "settings")
    sample = Job("run", "sample", "b.py", [], tmp_path / "images", "settings", [train])
    scores = Job("run", "evaluate", "c.py", lambda there: [], tmp_path / "scores", "settings", [], [sample])
    return [train, sample, scores, Job("run", "table", "d.py", [], None, "settings", [], [scores])]


def make(ledger: Ledger, *jobs: Job) -> None:
    for job in jobs:
        if job.output is not None:
            job.output.touch()
        ledger.note(job, ledger.made_of(job))


def missing(jobs, ledger, queue) -> list[str]:
    return [job.stage for job in missing_jobs(jobs, ledger, queue)]


def test_what_needs_something_that_is_made_anew_is_made_anew(tmp_path):
    jobs, ledger, queue = chain(tmp_path), Ledger(tmp_path / "done"), Queue(tmp_path / "jobs.tsv")
    assert missing(jobs, ledger, queue) == ["train", "sample", "evaluate", "table"]
    make(ledger, *jobs)
    assert missing(jobs, ledger, queue) == []
    (tmp_path / "images").unlink()
    assert missing(jobs, ledger, queue) == ["sample", "evaluate", "table"]


def test_jobs_under_way_are_left_alone_unless_they_would_make_something_else(tmp_path):
    """With other settings, or of inputs that are to be made anew: ended by a person, whom it tells how."""
    jobs, ledger, queue = chain(tmp_path), Ledger(tmp_path / "done"), Queue(tmp_path / "jobs.tsv")
    train, sample, scores, table = jobs
    make(ledger, train)
    for number, job in enumerate((sample, scores, table)):
        queue.note([job], f"1{number}")
    assert missing(jobs, ledger, queue) == []
    (tmp_path / "weights").unlink()
    with pytest.raises(UserError, match=r"^run sample: under way with other settings or inputs: .* scancel 10$"):
        missing(jobs, ledger, queue)
    make(ledger, train)
    sample.key = "others"
    with pytest.raises(UserError, match=r"scancel 10$"):
        missing(jobs, ledger, queue)


def test_a_table_that_waits_takes_the_scores_that_there_are(tmp_path):
    """It is not held up by one more attempt, and is made anew behind that, as it has not succeeded."""
    jobs, ledger, queue = chain(tmp_path), Ledger(tmp_path / "done"), Queue(tmp_path / "jobs.tsv")
    queue.note([jobs[3]], "7")
    assert missing(jobs, ledger, queue) == ["train", "sample", "evaluate"]


def test_done_is_what_was_made_of_what_is_done(tmp_path):
    jobs, ledger = chain(tmp_path), Ledger(tmp_path / "done")
    make(ledger, *jobs)
    assert ledger.done(jobs) == set(jobs)
    jobs[0].key = "others"
    assert ledger.done(jobs) == set()


def test_a_signal_while_slurm_takes_a_job_ends_the_rest_behind_its_note(tmp_path, monkeypatch):
    """So that the next call knows of the job."""
    jobs, ledger, queue = chain(tmp_path), Ledger(tmp_path / "done"), Queue(tmp_path / "jobs.tsv")

    def interrupted(command: list[str]) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return "12\n"

    monkeypatch.setattr(slurm, "answer_of", interrupted)
    monkeypatch.setattr(slurm, "sbatch_line", lambda *_: ["sbatch"])
    with pytest.raises(Interrupted):
        slurm.submit(jobs, ledger, queue, tmp_path)
    assert Queue(tmp_path / "jobs.tsv").numbers == {"run train": "12"}


def test_a_damaged_list_of_jobs_is_named(tmp_path):
    file = tmp_path / "jobs.tsv"
    file.write_text("run train\tkey\t12\nrun sam")
    with pytest.raises(UserError, match=f"{file}: not a line of a job: 'run sam'"):
        Queue(file)


def test_names_that_would_spoil_the_list_of_jobs_do_not(tmp_path):
    """Line breaks of other alphabets, and what an older version wrote: a tab in a name, bytes that are no text."""
    file = tmp_path / "jobs.tsv"
    file.write_bytes("a\u2028b train\tkey\t12\na\tb train\tkey\t13\n".encode() + b"\xff train\tkey\t14\n")
    assert list(Queue(file).numbers.items()) == [("a\u2028b train", "12"), ("a\tb train", "13"), ("\ufffd train", "14")]


@pytest.fixture
def job_sh(tmp_path, monkeypatch):
    """scripts/slurm/job.sh without a Slurm: srun only runs what it is given, and the script writes a file."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": f'cd {shlex.quote(str(tmp_path))} && eval "$MAKE"', "scontrol": "true"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    settings = {"AS_IT_IS": "1", "SLURM_JOB_ID": "7", "PATH": f"{programs}:{os.environ['PATH']}"}

    def run(line: list[str], make: str, task: int = 0) -> int:
        place = line.index("scripts/slurm/job.sh")
        of_task = {"MAKE": make, "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_JOB_ID": "7"}
        command = ["bash", str(REPOSITORY / line[place]), *line[place + 1 :]]
        environment = os.environ | settings | of_task
        return subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True).returncode

    for name in ("NODES", "GPUS", "NUM_PROCESSES", "PARTITION", "ACCOUNT", "TIME", "CPUS", "OPTIONS", "NOTICE"):
        monkeypatch.setenv(name, {"NODES": "1", "GPUS": "0", "NOTICE": "5"}.get(name, ""))
    return run


def test_what_a_job_s_shell_notes_is_what_python_reads(tmp_path, monkeypatch, job_sh):
    """Of files, folders with links in them and names of all kinds; of jobs before it that have an entry, or none."""
    output = tmp_path / "-a b %j 'é'"
    job = Job("-r #1", "train", "a.py", [], output, "settings", own="a=1")
    there, cache = tmp_path / "there", Job("r", "cache", "a.py", [], None, "settings")
    job.after = [Job("r", name, "a.py", [], there, "settings") for name in ("before", "without an entry")] + [cache]
    ledger, queue = Ledger(tmp_path / "jobs" / "done"), Queue(tmp_path / "jobs.tsv")
    ledger.note(job.after[0], "nothing")
    monkeypatch.setattr(slurm, "answer_of", lambda command: "12\n")
    slurm.submit([job], ledger, queue, tmp_path / "%j")
    line = slurm.sbatch_line([job], tmp_path / "%j", ledger, queue)
    assert f"--output={tmp_path}/%%j/%x-%A_%a.log" in line
    quoted = shlex.quote(output.name)
    make = (
        f"mkdir ./{quoted}; echo 1 > ./{quoted}/a; echo 22 > '-'; ln -s ../- ./{quoted}/link; ln -s . ./{quoted}/self"
    )
    assert job_sh(line, "exit 1") != 0
    assert not ledger.is_done(job)
    assert job_sh(line, make) == 0
    assert ledger.is_done(job)
    ledger.note(job.after[0], "something else")
    assert not ledger.is_done(job)
    ledger.note(job.after[0], "nothing")
    ledger.note(cache, "nothing")  # which changes nothing
    assert ledger.is_done(job)
    (output / "a").write_text("2\n")
    assert not ledger.is_done(job)


def test_a_job_that_makes_nothing_of_its_own_is_noted(tmp_path, monkeypatch, job_sh):
    job = Job("run", "cache", "a.py", [], None, "settings")
    ledger, queue = Ledger(tmp_path / "jobs" / "done"), Queue(tmp_path / "jobs.tsv")
    monkeypatch.setattr(slurm, "answer_of", lambda command: "12\n")
    slurm.submit([job], ledger, queue, tmp_path)
    assert job_sh(slurm.sbatch_line([job], tmp_path, ledger, queue), "true") == 0
    assert ledger.is_done(job)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"key\n", b"\0" * 100])
def test_an_entry_that_says_nothing_is_none(tmp_path, content):
    """Damaged, or of a version that noted the key alone: the job is started again, and finds that all is there."""
    job, ledger = Job("run", "train", "a.py", [], None, "settings"), Ledger(tmp_path / "done")
    ledger.note(job, ledger.made_of(job))
    assert ledger.is_done(job)
    (tmp_path / "done" / job.name).write_bytes(content.replace(b"key", job.key.encode()))
    assert not ledger.is_done(job)
    assert ledger.done([job]) == set()


def test_a_name_that_sbatch_would_not_write_a_log_to_is_refused(tmp_path, job_sh):
    job = Job("run", "train", "a.py", [], None, "settings")
    with pytest.raises(UserError, match="backslash"):
        slurm.sbatch_line([job], tmp_path / "a\\b", Ledger(tmp_path), Queue(tmp_path / "jobs.tsv"))
