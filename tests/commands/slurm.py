"""A Slurm of four nodes on this host, from Debian's packages: a controller, four slurmd and munge, in a folder."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, environment, free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
NODES = ("n1", "n2", "n3", "n4")
SETTINGS = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# the least that counts: a job that is queued again waits as long
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
SlurmdTimeout=5
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


class Cluster:
    """Started when it is made."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short, as paths of sockets must be
        self.folder.chmod(0o755)
        self.processes: list[int] = []  # to end with it
        ports = free_ports(1 + len(NODES))
        settings = SETTINGS.format(host=socket.gethostname(), port=ports[0], folder=self.folder)
        for name, port in zip(NODES, ports[1:], strict=True):
            settings += f"NodeName={name} NodeHostName={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=1\n"
        (self.folder / "slurm.conf").write_text(settings)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # 22.05 knows no `disabled`
        (self.folder / "state").mkdir()
        self.environment = environment() | {"SLURM_CONF": str(self.folder / "slurm.conf"), "CONDA_DEFAULT_ENV": "deme"}
        self.environment["PATH"] += ":/usr/sbin"
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file")]
        self.run("munged", "--force", f"--key-file={key}", f"--seed-file={self.folder}/munge.seed", *files)
        self.processes.append(pid_in(self.folder / "munge.pid"))
        self.run("slurmctld")
        self.processes.append(pid_in(self.folder / "slurmctld.pid"))
        for name in NODES:
            self.start_node(name)
        wait_for(lambda: self.run("sinfo", "--noheader", "--format=%T").stdout.split() == ["idle"], 60)

    def run(self, *command: str, status: int = 0, **variables: str) -> subprocess.CompletedProcess:
        """A command of the cluster's user, in the repository."""
        settings = self.environment | variables
        result = subprocess.run(command, env=settings, capture_output=True, text=True, cwd=REPOSITORY)
        assert result.returncode == status, f"{command}: {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result

    def queue(self) -> dict[str, list[str]]:
        """Job → state and nodes."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T %N").stdout.splitlines()
        return {line.split()[0]: line.split()[1:] for line in lines}

    def processes_of(self, variables: dict[str, str]) -> list[psutil.Process]:
        """What runs in this cluster's jobs with these environment variables."""
        wanted = {("SLURM_CONF", self.environment["SLURM_CONF"]), *variables.items()}
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if wanted <= set(process.environ().items()):
                    found.append(process)
        return found

    def start_node(self, name: str) -> None:
        self.run("slurmd", "-N", name)

    def kill_node(self, name: str) -> None:
        """As a node that loses its power: its slurmd and all that it runs."""
        os.kill(pid_in(self.folder / f"{name}.pid"), signal.SIGKILL)
        tasks = self.processes_of({"SLURMD_NODENAME": name})
        daemons = [parent for task in tasks for parent in parents(task) if parent.name().startswith("slurmstepd")]
        for process in [*daemons, *tasks]:
            with suppress(psutil.Error):
                process.kill()

    def close(self) -> None:
        """End all of it."""
        self.run("scancel", "--user=root")
        with suppress(AssertionError):
            wait_for(lambda: not self.queue(), 30)
        ended = []
        for pid in [*(pid_in(file) for file in self.folder.glob("n?.pid")), *reversed(self.processes)]:
            with suppress(psutil.Error):
                ended.append(psutil.Process(pid))
                ended[-1].terminate()
        psutil.wait_procs(ended, 30)
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster():
    missing = [program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Slurm (apt-get install slurm-wlm); missing: {', '.join(missing) or 'root'}")
    started = Cluster()
    yield started
    started.close()


def parents(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return process.parents()
    return []


def command_of(process: psutil.Process) -> list[str]:
    """The command line; empty once the process has ended."""
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def pid_in(file: Path) -> int:
    wait_for(lambda: file.exists() and file.read_text().strip(), 10)
    return int(file.read_text())


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
