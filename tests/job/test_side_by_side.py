import os
import signal
import sys
import threading
import time

import pytest
import torch

from deme.job.side_by_side import Job, Jobs, places
from deme.job.signals import Interrupted

CPU = [{}, {}]


def writes(path, text="made", before=()):
    """A job that writes a file, and takes a tenth of a second."""
    code = f"import time; time.sleep(0.1); open({str(path)!r}, 'a').write({text!r})"
    return Job(path.name, [sys.executable, "-c", code], path, "key", list(before))


def fails(path, before=()):
    code = "import sys; print('first'); sys.exit('the reason\\n')"
    return Job(path.name, [sys.executable, "-c", code], path, "key", list(before))


def test_each_job_waits_for_those_before_it_and_two_run_at_once(tmp_path):
    log = tmp_path / "log"
    first, second = (
        Job(name, ["sh", "-c", f"echo +{name} >> {log}; sleep 0.5; echo -{name} >> {log}"], log, "key") for name in "ab"
    )
    last = Job("c", ["sh", "-c", f"echo +c >> {log}"], log, "key", [first, second])
    Jobs([last, first, second], tmp_path / "jobs", CPU).run()
    lines = log.read_text().split()
    assert sorted(lines[:2]) == ["+a", "+b"]
    assert lines[-1] == "+c"
    assert {first.state, second.state, last.state} == {"done"}


def test_what_is_done_is_not_done_again_until_something_before_it_changes(tmp_path):
    def go(key="key"):
        first = writes(tmp_path / "first")
        first.key = key
        second = writes(tmp_path / "second", before=[first])
        Jobs([first, second], tmp_path / "jobs", CPU).run()
        return first.state, second.state

    assert go() == ("done", "done")
    assert go() == ("unchanged", "unchanged")
    (tmp_path / "second").unlink()
    assert go() == ("unchanged", "done")
    assert go("other settings") == ("done", "done")
    (tmp_path / "first").write_text("by somebody else")
    assert go("other settings") == ("done", "done")


def test_a_failure_drops_what_needs_it_and_nothing_else(tmp_path):
    broken = fails(tmp_path / "broken")
    dropped = writes(tmp_path / "dropped", before=[broken])
    other = writes(tmp_path / "other")
    regardless = writes(tmp_path / "regardless")
    regardless.after_all = [broken, dropped, other]
    Jobs([broken, dropped, other, regardless], tmp_path / "jobs", CPU[:1]).run()
    assert [job.state for job in (broken, dropped, other, regardless)] == ["failed", "dropped", "done", "done"]
    assert broken.error == "the reason"
    assert not (tmp_path / "dropped").exists()


def test_a_command_that_is_known_when_its_turn_comes(tmp_path):
    first = writes(tmp_path / "first")
    late = Job("late", lambda: ["cp", tmp_path / "first", tmp_path / "late"], tmp_path / "late", "key", [first])
    nothing = Job("nothing", lambda: None, tmp_path / "nothing", "key")
    Jobs([first, late, nothing], tmp_path / "jobs", CPU).run()
    assert [job.state for job in (first, late, nothing)] == ["done", "done", "dropped"]
    assert (tmp_path / "late").read_text() == "made"


def test_a_signal_ends_the_commands_which_may_clean_up(tmp_path):
    """It is handed on; the error of the signal ends the rest."""
    code = "trap 'echo saved; exit 143' TERM; touch started; while true; do sleep 0.05; done"
    job = Job("long", ["bash", "-c", code.replace("started", str(tmp_path / "started"))], tmp_path / "never", "key")

    def interrupt(number, frame):
        raise Interrupted(number)

    def stop() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        threading.Thread(target=stop).start()
        with pytest.raises(Interrupted):
            Jobs([job], tmp_path / "jobs", CPU).run()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (job.state, job.error) == ("stopped", "saved")


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
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,5,7")
    assert places(2) == [{"CUDA_VISIBLE_DEVICES": "1,5"}]
    assert places(4) == []
