"""One job at a time: on one host, and on hosts that share a folder but do not see each other's locks."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

from deme.data.samples import check_apart_from_other_jobs
from deme.errors import UserError
from deme.job import locks
from deme.job.locks import _boot_id, claims, clear_lock, locked

SEPARATE = ["unshare", "--uts", "--mount"]
HOST = 'hostname "$1" && mount --bind "$2" /proc/sys/kernel/random/boot_id && shift 2 && exec "$@"'
WITHOUT_LOCKS = """
import fcntl, os, sys, time
from pathlib import Path
fcntl.flock = lambda *_: None  # takes every lock, as on a disk whose hosts lock for themselves
from deme.job import locks
locks.RENEWED_EVERY, locks.LEASE, locks.POLLED_EVERY = 0.1, 2.0, 0.02
output = Path(sys.argv[1])
"""
HOLD = """
with locks.locked(output, "key"):
    print("holds", flush=True)
    time.sleep(60)
"""
WRITE = """
with locks.locked(output, "key"):
    output.write_text("second")
"""
COUNT = """
while not (output.parent / "go").exists():
    time.sleep(0.001)
for number in range(int(sys.argv[2])):
    with locks.locked(output, "key", wait=True):
        count = int(output.read_text())
        time.sleep(0.001)
        output.write_text(str(count + 1))
        dead = output.with_name("dead")
        dead.write_text("process 1 on a fourth host")
        os.utime(dead, (0, 0))
        dead.rename(output.with_name(f".{output.name}.lock-{sys.argv[3]}{number}"))
"""


@pytest.fixture(scope="module")
def hosts():
    """Hosts of their own name and boot on this machine."""
    if subprocess.run([*SEPARATE, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to make namespaces: root")


def on_host(name: str, program: str, output: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    """Run a program on a host that sees no other one's locks."""
    boot = output.parent / f"boot-{name}"
    boot.write_text(f"{name}\n")
    command = [*SEPARATE, "bash", "-c", HOST, "bash", name, boot]
    command += [sys.executable, "-c", WITHOUT_LOCKS + program, output, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | variables, **pipes)


def test_one_of_two_hosts_holds_an_output_and_a_dead_one_s_lock_is_taken_over(hosts, tmp_path):
    """While it gives signs of life the other one is refused, longer than the lease; a restarted job waits for it."""
    output = tmp_path / "merged"
    first = on_host("one", HOLD, output)
    assert first.stdout.readline() == "holds\n"
    time.sleep(2.2)
    refused = on_host("two", WRITE, output)
    message = f"in use by process {first.pid} on one; if that has ended, `rm {claims(output)[0]}`, or wait"
    assert message in refused.communicate()[1]
    assert not output.exists()
    first.kill()
    first.wait()
    killed = time.monotonic()
    waiting = on_host("two", WRITE, output, SLURM_RESTART_COUNT="1")
    said = waiting.communicate(timeout=60)[0]
    assert message in said
    assert said.endswith("; waiting for it\n")
    assert time.monotonic() - killed > 1.5
    assert output.read_text() == "second"
    assert claims(output) == []


def test_hosts_that_take_over_a_dead_lock_at_once_lose_no_update(hosts, tmp_path):
    """Each update leaves another dead job's lock, for which all of them reach."""
    output = tmp_path / "count"
    output.write_text("0")
    running = [on_host(name, COUNT, output, "25", name) for name in ("one", "two", "three")]
    time.sleep(1)
    (tmp_path / "go").touch()
    assert [(job.communicate()[1], job.returncode) for job in running] == [("", 0)] * 3
    assert output.read_text() == "75"


def test_a_job_whose_lock_was_taken_over_ends_before_it_writes(hosts, tmp_path):
    """It was suspended for longer than the lease, as with its host."""
    output = tmp_path / "merged"
    first = on_host("one", HOLD, output)
    assert first.stdout.readline() == "holds\n"
    first.send_signal(signal.SIGSTOP)
    second = on_host("two", WRITE, output, SLURM_RESTART_COUNT="1")
    assert (second.communicate()[1], second.returncode) == ("", 0)
    first.send_signal(signal.SIGCONT)
    assert "deleted or taken over by another job; this one stops" in first.communicate(timeout=30)[1]
    assert first.returncode == 1
    assert output.read_text() == "second"


def test_locks_of_other_hosts_are_not_taken_over(tmp_path):
    """Their disk may be shared, but not their locks: the message says what to do."""
    output = tmp_path / "merged"
    with locked(output, "merge.output"), pytest.raises(UserError, match=r"merge\.output=.*merged: in use by process"):
        locked(output, "merge.output").__enter__()
    assert claims(output) == []
    lock = tmp_path / ".merged.lock-1"
    lock.write_text("process 1 on elsewhere")
    with pytest.raises(
        UserError, match=r"in use by process 1 on elsewhere; if that has ended, `rm .*\.merged\.lock-1`, or wait 10 min"
    ):
        locked(output, "merge.output").__enter__()
    clear_lock(output)
    assert claims(output) == [lock]


def test_dead_owners_are_told_from_the_living(tmp_path):
    """One of another container under this kernel, of this host, or of a host without a sign of life for ten minutes."""
    output = tmp_path / "merged"
    dead = tmp_path / ".merged.lock-1"
    for owner in (f"process 1 on elsewhere\n{_boot_id()}", f"process 1 on {os.uname().nodename}", "\0garbage\n\n", ""):
        dead.write_text(owner)
        if owner.startswith("\0"):
            os.utime(dead, (0, 0))
        with locked(output, "merge.output"):
            [lock] = claims(output)
            assert lock.read_text() == f"process {os.getpid()} on {os.uname().nodename}\n{_boot_id()}"
        assert claims(output) == []
    dead.write_text(owner)
    clear_lock(output)
    assert claims(output) == []


def test_a_living_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "RENEWED_EVERY", 0.05)
    with locked(tmp_path / "merged", "merge.output"):
        [lock] = claims(tmp_path / "merged")
        os.utime(lock, (0, 0))
        end = time.monotonic() + 60
        while lock.stat().st_mtime == 0:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_a_disk_without_locks_has_leases(tmp_path, monkeypatch):
    """The owner's claim counts, on this host too."""

    def flock(*_) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    output = tmp_path / "merged"
    with locked(output, "key"), pytest.raises(UserError, match="if that has ended, `rm "):
        locked(output, "key").__enter__()
    dead = tmp_path / ".merged.lock-1"
    dead.write_text(f"process 1 on {os.uname().nodename}\n{_boot_id()}")
    os.utime(dead, (0, 0))
    with locked(output, "key"):
        assert not dead.exists()


@pytest.mark.parametrize("count", ["0", "1"])
def test_a_job_that_slurm_started_again_waits_for_its_earlier_self(tmp_path, monkeypatch, count):
    """Others are refused."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    ended = []
    with locked(tmp_path / "merged", "key"):
        if count == "0":
            with pytest.raises(UserError, match="in use by"):
                locked(tmp_path / "merged", "key").__enter__()
            return

        def second() -> None:
            with locked(tmp_path / "merged", "key"):
                ended.append("second")

        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        ended.append("first")
    thread.join()
    assert ended == ["first", "second"]


def test_names_that_only_look_like_locks_are_left_alone(tmp_path):
    """Folders, links to nothing and other people's names; also among those of blocks of seeds."""
    output = tmp_path / "out"
    for name in (".out.lock-abcd1234", ".out.seeds-1-2.lock-1"):
        (tmp_path / name).mkdir()
    (tmp_path / ".out.lock-link").symlink_to("nowhere")
    for name in ("x-y", "1-2-3-", "\uff11-\uff12", f"1-{'9' * 30}"):
        (tmp_path / f".out.seeds-{name}.lock-1").touch()
    with locked(output, "key"):
        check_apart_from_other_jobs(output, range(5))
    assert (tmp_path / ".out.lock-abcd1234").is_dir()
