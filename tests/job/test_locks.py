"""One job at a time: on one host, and on hosts that share a folder but nothing else."""

import os
import re
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
from deme.job import files
from deme.job.files import InUse, lock_file, locked

SEPARATE = ["unshare", "--uts", "--mount"]
HOST = 'hostname "$1" && mount --bind "$2" /proc/sys/kernel/random/boot_id && shift 2 && exec "$@"'
QUICK = """
import os, sys, time
from pathlib import Path
import filelock._soft._exclusive._recovery as recovery
from deme.job import files
files.HEARTBEAT, files.LEASE, files.POLLED_EVERY = 0.1, 1.5, 0.02
output = Path(sys.argv[1])
if "NO_EXCHANGE" in os.environ:  # a disk that can't exchange two names in one step, as NFS
    recovery.exchange_names = lambda *_: False
"""
HOLD = """
with files.locked(output, "key"):
    print("holds", flush=True)
    time.sleep(60)
"""
WRITE = """
with files.locked(output, "key"):
    output.write_text("second")
"""
COUNT = """
while not (output.parent / "go").exists():
    time.sleep(0.001)
for number in range(int(sys.argv[2])):
    with files.locked(output, "key", wait=True):
        count = int(output.read_text())
        time.sleep(0.001)
        output.write_text(str(count + 1))
    lock = files.lock_file(output)
    try:
        os.link(output.with_name("dead"), lock)  # unless another one is faster
    except FileExistsError:
        pass
"""


@pytest.fixture(scope="module")
def hosts():
    """Hosts of their own name and boot on this machine."""
    if subprocess.run([*SEPARATE, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to make namespaces: root")


@pytest.fixture
def quick(monkeypatch):
    """Seconds are tenths of a second."""
    monkeypatch.setattr(files, "HEARTBEAT", 0.1)
    monkeypatch.setattr(files, "LEASE", 1.0)
    monkeypatch.setattr(files, "POLLED_EVERY", 0.05)


def marker(host: str, lease: float = 1.0) -> str:
    """What filelock writes, but for the time when the process began."""
    return f"filelock/2\npid=1\nhost={host}\nmode=lease\ntoken=a\nduration={lease}\n"


def on_host(name: str, program: str, output: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    """Run a program on a host of this name."""
    boot = output.parent / f"boot-{name}"
    boot.write_text(f"{name}\n")
    command = [*SEPARATE, "bash", "-c", HOST, "bash", name, boot] if name else []
    command += [sys.executable, "-c", QUICK + program, output, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | variables, **pipes)


@pytest.mark.parametrize("disk", [{}, {"NO_EXCHANGE": "1"}], ids=["local", "network"])
def test_one_of_two_hosts_holds_an_output_and_a_dead_one_s_lock_is_taken_over(hosts, tmp_path, disk):
    """While it gives signs of life the other one is refused, longer than the lease; a restarted job waits for it."""
    output = tmp_path / "merged"
    first = on_host("one", HOLD, output)
    assert first.stdout.readline() == "holds\n"
    time.sleep(1.7)
    refused = on_host("two", WRITE, output, **disk)
    message = f"key={output}: in use by process {first.pid} on one; if that has ended, `rm {lock_file(output)}`"
    assert message in refused.communicate()[1]
    assert not output.exists()
    first.kill()
    first.wait()
    killed = time.monotonic()
    waiting = on_host("two", WRITE, output, SLURM_RESTART_COUNT="1", **disk)
    assert waiting.communicate(timeout=60)[0].startswith(f"{message}; waiting for it, or for ")
    assert time.monotonic() - killed > 1.2
    assert output.read_text() == "second"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.long
@pytest.mark.parametrize("disk", [{}, {"NO_EXCHANGE": "1"}], ids=["local", "network"])
def test_hosts_that_take_over_a_dead_lock_at_once_lose_no_update(hosts, tmp_path, disk):
    """Each update leaves another dead job's lock, for which all of them reach."""
    output = tmp_path / "count"
    output.write_text("0")
    (tmp_path / "dead").write_text(marker("elsewhere", lease=1.5))
    running = [on_host(name, COUNT, output, "3", **disk) for name in ("one", "two", "three")]
    time.sleep(1)
    (tmp_path / "go").touch()
    assert [(job.communicate()[1], job.returncode) for job in running] == [("", 0)] * 3
    assert output.read_text() == "9"


def test_processes_that_take_over_a_killed_one_s_lock_at_once_lose_no_update(tmp_path):
    """They are of one host, and don't wait for the lease."""
    output = tmp_path / "count"
    output.write_text("0")
    ended = subprocess.Popen(["true"])
    ended.wait()
    with locked(output, "key"):
        text = re.sub("(?m)^(start|token)=.*\n", "token=a\n", lock_file(output).read_text())
    (tmp_path / "dead").write_text(text.replace(f"pid={os.getpid()}", f"pid={ended.pid}"))
    running = [on_host("", COUNT, output, "25") for _ in range(3)]
    time.sleep(1)
    (tmp_path / "go").touch()
    assert [(job.communicate()[1], job.returncode) for job in running] == [("", 0)] * 3
    assert output.read_text() == "75"


def test_a_job_whose_lock_was_taken_over_ends(hosts, tmp_path):
    """It was suspended for longer than the lease, as with its host."""
    output = tmp_path / "merged"
    first = on_host("one", HOLD, output)
    assert first.stdout.readline() == "holds\n"
    first.send_signal(signal.SIGSTOP)
    second = on_host("two", WRITE, output)
    assert (second.communicate()[1], second.returncode) == ("", 0)
    first.send_signal(signal.SIGCONT)
    assert "lost to another job" in first.communicate(timeout=30)[1]
    assert first.returncode == 1
    assert output.read_text() == "second"


def test_a_second_claim_is_refused_by_the_name_of_the_first(tmp_path):
    output = tmp_path / "merged"
    message = (
        rf"merge\.output=.*merged: in use by process {os.getpid()} on {os.uname().nodename}; if that has ended, `rm "
    )
    with locked(output, "merge.output"), pytest.raises(InUse, match=message):
        locked(output, "merge.output").__enter__()
    assert not lock_file(output).exists()
    with pytest.raises(UserError, match=r"^merge\.output=/: must be a file or folder below it"):
        locked(Path("/"), "merge.output").__enter__()


def test_a_killed_owner_of_this_host_is_replaced_at_once(tmp_path):
    output = tmp_path / "merged"
    first = on_host("", HOLD, output)
    assert first.stdout.readline() == "holds\n"
    first.kill()
    first.wait()
    with locked(output, "key"):
        assert f"pid={os.getpid()}\n" in lock_file(output).read_text()


@pytest.mark.parametrize("renewed", [0, 1e10], ids=["long ago", "in the future"])
@pytest.mark.parametrize("content", [marker("elsewhere"), marker("elsewhere", 7.0), "\0garbage\n\n", ""])
def test_a_lock_without_a_sign_of_life_is_taken_over_after_its_lease(tmp_path, quick, capsys, content, renewed):
    """Whatever the clocks say: of another host, from another version, cut short by a crash, or empty."""
    output = tmp_path / "merged"
    lock_file(output).write_text(content)
    os.utime(lock_file(output), (renewed, renewed))
    with locked(output, "merge.output"):
        assert f"pid={os.getpid()}\n" in lock_file(output).read_text()
    assert list(tmp_path.iterdir()) == []
    name = "process 1 on elsewhere" if "elsewhere" in content else "another process"
    [said] = capsys.readouterr().out.splitlines()
    start = f"merge.output={output}: in use by {name}; if that has ended, `rm {lock_file(output)}`; waiting for it, or "
    assert said.startswith(start)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_lock_is_refused_in_one_line(tmp_path, make):
    """A folder, a FIFO (nothing waits for its writer), a link to nothing."""
    output = tmp_path / "merged"
    make(lock_file(output))
    with pytest.raises(UserError, match=r"merged\.lock is no lock, but stands in its place: delete it$"):
        locked(output, "merge.output").__enter__()
    assert os.path.lexists(lock_file(output))


@pytest.mark.parametrize("count", ["0", "1"])
def test_a_job_that_slurm_started_again_waits_for_its_earlier_self(tmp_path, monkeypatch, quick, count):
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
        time.sleep(0.5)
        ended.append("first")
    thread.join()
    assert ended == ["first", "second"]


def test_names_that_only_look_like_locks_of_blocks_are_left_alone(tmp_path, quick):
    """Folders and other people's names; a dead job's lock is taken over, a living one's seeds are refused."""
    output = tmp_path / "out"
    (tmp_path / ".out.seeds-1-2.lock").mkdir()
    for name in ("x-y", "1-2-3-", "\uff11-\uff12", f"1-{'9' * 30}"):
        (tmp_path / f".out.seeds-{name}.lock").touch()
    dead = tmp_path / ".out.seeds-1-3.lock"
    dead.write_text(marker("elsewhere"))
    check_apart_from_other_jobs(output, range(5))
    assert not dead.exists()
    with (
        locked(tmp_path / "out.seeds-1-3", "key"),
        pytest.raises(UserError, match="another job draws the seeds 1 … 2; "),
    ):
        check_apart_from_other_jobs(output, range(5))
