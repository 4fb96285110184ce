import os
import signal

import pytest

from deme.errors import UserError
from deme.job import slurm
from deme.job.graph import Job, Ledger
from deme.job.signals import Interrupted
from deme.job.slurm import Queue, missing_jobs


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
        ledger.note(job)


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
    sample.settings = "others"
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
    jobs[0].settings = "others"
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
