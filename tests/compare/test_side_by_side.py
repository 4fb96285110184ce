import os
import signal
import subprocess
import threading
import time

import pytest
import torch

from deme.compare.jobs import Job, Jobs, Ledger, longest_chain_first, places
from deme.job.command import Interrupted

CPU = [{}, {}]


def job(path, code, before=(), settings="settings") -> Job:
    """A job that runs Python code, and makes a file."""
    script = path.with_suffix(".py")
    script.write_text(code)
    return Job("run", path.name, str(script), [], path, settings, list(before))


def writes(path, text="made", before=()) -> Job:
    """It takes a tenth of a second."""
    return job(path, f"import time; time.sleep(0.1); open({str(path)!r}, 'a').write({text!r})", before)


def fails(path, before=()) -> Job:
    return job(path, "import sys; print('first'); sys.exit('the reason\\n')", before)


def go(folder, jobs, places=CPU) -> list[str]:
    Jobs(jobs, Ledger(folder / "done"), folder / "logs", places).run()
    return [one.state for one in jobs]


def test_each_job_waits_for_those_before_it_and_two_run_at_once(tmp_path):
    log = tmp_path / "log"
    code = "import time; f = open(%r, 'a', buffering=1); f.write('+%s\\n'); time.sleep(1); f.write('-%s\\n')"
    code += "; open(%r, 'w')"

    def logs(name, before=()) -> Job:
        return job(tmp_path / name, code % (str(log), name, name, str(tmp_path / name)), before)

    first, second = logs("a"), logs("b")
    last = logs("c", [first, second])
    assert go(tmp_path, [last, first, second]) == ["done"] * 3
    lines = log.read_text().split()
    assert sorted(lines[:2]) == ["+a", "+b"]
    assert lines[-2:] == ["+c", "-c"]


def test_jobs_that_the_longest_chain_waits_for_start_first(tmp_path):
    """A short branch that comes first in the table fills the places that the long one leaves free."""
    short = writes(tmp_path / "short")
    start = writes(tmp_path / "start")
    middle = writes(tmp_path / "middle", before=[start])
    beside = writes(tmp_path / "beside", before=[start])
    end = writes(tmp_path / "end", before=[middle, short])
    assert longest_chain_first([short, start, beside, middle, end]) == [start, short, middle, beside, end]
    assert longest_chain_first([end, beside, middle, start, short]) == [start, middle, short, end, beside]


def test_a_job_without_its_output_is_not_done(tmp_path):
    """A training whose own time is up ends with status 0."""
    first = job(tmp_path / "first", "print('saved')")
    assert go(tmp_path, [first, writes(tmp_path / "second", before=[first])]) == ["failed", "dropped"]
    assert first.error == "its time is up; the same command goes on"


def test_what_is_done_is_not_done_again_until_something_before_it_changes(tmp_path):
    def again(settings="settings"):
        first = writes(tmp_path / "first")
        first.key = settings
        return go(tmp_path, [first, writes(tmp_path / "second", before=[first])])

    assert again() == ["done", "done"]
    assert again() == ["unchanged", "unchanged"]
    (tmp_path / "second").unlink()
    assert again() == ["unchanged", "done"]
    assert again("other settings") == ["done", "done"]
    (tmp_path / "first").write_text("by somebody else")
    assert again("other settings") == ["done", "done"]


def test_what_is_made_of_something_new_is_made_anew_though_the_first_attempt_failed(tmp_path):
    """Also in a later call, by which what is new has been there before."""

    def again(second) -> list[str]:
        first = writes(tmp_path / "first")
        second.after = [first]
        return go(tmp_path, [first, second])

    assert again(writes(tmp_path / "second")) == ["done", "done"]
    (tmp_path / "first").unlink()
    assert again(fails(tmp_path / "second")) == ["done", "failed"]
    assert again(writes(tmp_path / "second")) == ["unchanged", "done"]


def rewrite_in_place(file, text):
    """By a program that keeps the time of modification."""
    times = file.stat()
    file.write_text(text)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_by_older(file, text):
    other = file.with_name("older")
    other.write_text(text)
    os.utime(other, (1, 1))
    other.rename(file)


@pytest.mark.parametrize("change", [rewrite_in_place, replace_by_older])
@pytest.mark.parametrize("name", ["folder/weights", "second"])
def test_an_output_that_somebody_replaces_is_noticed_whatever_its_times(tmp_path, change, name):
    def again():
        folder = tmp_path / "folder"
        first = job(
            folder, f"import os; os.makedirs({str(folder)!r}, exist_ok=True); open({str(folder / 'weights')!r}, 'w')"
        )
        return go(tmp_path, [first, writes(tmp_path / "second", before=[first])])

    assert again() == ["done", "done"]
    assert again() == ["unchanged", "unchanged"]
    change(tmp_path / name, "MADE")
    assert again() == (["done", "done"] if name != "second" else ["unchanged", "done"])


def test_what_is_done_again_without_a_change_does_not_concern_others(tmp_path):
    """As a script that finds its output complete."""
    first = job(tmp_path / "first", f"open({str(tmp_path / 'first')!r}, 'a')")
    second = writes(tmp_path / "second", before=[first])
    assert go(tmp_path, [first, second]) == ["done", "done"]
    (tmp_path / "done" / first.name).write_text("damaged")
    first.state = second.state = "waiting"
    assert go(tmp_path, [first, second]) == ["done", "unchanged"]


def test_a_failure_drops_what_needs_it_and_nothing_else(tmp_path):
    broken = fails(tmp_path / "broken")
    dropped = writes(tmp_path / "dropped", before=[broken])
    other = writes(tmp_path / "other")
    regardless = writes(tmp_path / "regardless")
    regardless.after_all = [broken, dropped, other]
    jobs = [broken, dropped, other, regardless]
    assert go(tmp_path, jobs, CPU[:1]) == ["failed", "dropped", "done", "done"]
    assert broken.error == "the reason"
    assert not (tmp_path / "dropped").exists()


def test_what_fails_at_last_is_no_longer_scored_though_it_was_made_before(tmp_path):
    """Else a table would go on showing what the old files gave."""
    first, other = writes(tmp_path / "first"), writes(tmp_path / "other")
    scores = job(tmp_path / "scores", f"import sys; open({str(tmp_path / 'scores')!r}, 'w').write(' '.join(sys.argv))")
    scores.arguments = lambda there: [one.output.name for one in there] or None
    scores.after_all = [first, other]
    assert go(tmp_path, [first, other, scores]) == ["done"] * 3
    again = fails(tmp_path / "first")
    again.key = "others"
    scores.after_all, scores.state, other.state = [again, other], "waiting", "waiting"
    assert go(tmp_path, [again, other, scores]) == ["failed", "unchanged", "done"]
    assert (tmp_path / "scores").read_text().endswith("scores.py other")


def test_arguments_that_are_known_when_its_turn_comes(tmp_path):
    """They name what was made of what it waited for; where that is nothing, there is nothing to do."""
    first, broken = writes(tmp_path / "first"), fails(tmp_path / "broken")
    late, nothing = (job(tmp_path / name, "import shutil, sys; shutil.copy(*sys.argv[1:])") for name in ("a", "b"))
    for one, before in ((late, [first, broken]), (nothing, [broken])):
        one.after_all = before
        one.arguments = lambda there, to=one.output: [str(made.output) for made in there] + [str(to)] if there else None
    assert go(tmp_path, [first, broken, late, nothing]) == ["done", "failed", "done", "dropped"]
    assert (tmp_path / "a").read_text() == "made"


@pytest.fixture
def sigterm_interrupts():
    def interrupt(number, frame):
        raise Interrupted(number)

    before = signal.signal(signal.SIGTERM, interrupt)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_signal_while_a_command_starts_ends_it_too(tmp_path, monkeypatch, sigterm_interrupts):
    """It would run on behind the back of the same command's next call."""
    started = []

    def popen(*arguments, **settings):
        started.append(real(*arguments, **settings))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(Interrupted):
        go(tmp_path, [job(tmp_path / "first", "import time; time.sleep(60)")])
    assert started[0].poll() == -signal.SIGTERM


def test_a_signal_ends_the_commands_which_may_clean_up(tmp_path, sigterm_interrupts):
    """It is handed on; the error of the signal ends the rest."""
    code = "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit('saved')); "
    long = job(tmp_path / "long", f"{code} os.mkdir({str(tmp_path / 'started')!r}); time.sleep(60)")

    def stop() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(Interrupted):
        go(tmp_path, [long])
    assert (long.state, long.error) == ("stopped", "saved")


def test_places_are_gpus_or_else_cores(monkeypatch):
    """Those that CUDA_VISIBLE_DEVICES leaves, shared out; what is left over is not used."""
    cpu = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(5)))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert places(2) == [cpu, cpu]
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places(1) == [{"CUDA_VISIBLE_DEVICES": str(k)} for k in range(4)]
    assert places(2, jobs_per_gpu=2) == [{"CUDA_VISIBLE_DEVICES": pair} for pair in ("0,1", "2,3", "0,1", "2,3")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,5,7")
    assert places(2) == [{"CUDA_VISIBLE_DEVICES": "1,5"}]
    assert places(4) == []
