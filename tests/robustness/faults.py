"""Kill the scripts, fill their disk, damage their checkpoints, change their inputs: nothing may be lost.

    python tests/robustness/faults.py                # over a thousand kills: more than an hour
    python tests/robustness/faults.py --kills 3 --calls 3 --flips 1 --full-disks 1

They are killed at random moments, and between two calls that change files. After every kill: no unreadable file under
a final name. After the restart that completes the work: the same files with the same content as those of a run that
was left alone, so that nothing is left to delete by hand.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from robustness.forked import REPOSITORY, Run

from deme.job.files import LEASE, TEMPORARY, lock_file
from deme.report.tables import markdown_table

TIMED = ("images_per_second", "peak_memory_gib")  # of log.jsonl


@dataclass(frozen=True)
class Target:
    """A script to disturb, and what must be there before it starts."""

    name: str
    script: str
    arguments: list[str]
    before: list[tuple[str, list[str]]] = field(default_factory=list)  # (script, arguments)


SMALL = ["data.cache_gb=0", "finetune.batch_size=8", "finetune.log_every=3", "sample.num_images=200"]
SMALL += ["sample.batch_size=10", "sample.num_inference_steps=10"]
RANGE = ["finetune.range=0", "finetune.max_steps=40", "finetune.checkpoint_every=5"]
UNIFORM = ["merge.coefficients=null"]  # searching is another's
TARGETS = [
    Target("finetune.py", "finetune.py", RANGE),
    Target(
        "pretrain.py", "pretrain.py", ["pretrain.max_steps=40", "pretrain.batch_size=8", "pretrain.checkpoint_every=5"]
    ),
    Target("merge.py", "merge.py", UNIFORM, [("finetune.py", ["finetune.max_steps=1"])]),
    Target(
        "merge.py, other coefficients",
        "merge.py",
        ["merge.coefficients=[1,0,0,0]"],
        [("finetune.py", ["finetune.max_steps=1"]), ("merge.py", UNIFORM)],
    ),
    Target("sample_ddp.py", "sample_ddp.py", ["sample.model=pretrained"]),
    Target(
        "data cache", "finetune.py", ["data.name=data", "data.resolution=8", "finetune.range=0", "finetune.max_steps=1"]
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=150, help="of each script, at random moments")
    parser.add_argument("--calls", type=int, default=20, help="of each script, before which it is killed")
    parser.add_argument("--flips", type=int, default=10, help="of a bit in the newest checkpoint")
    parser.add_argument("--full-disks", type=int, default=10, help="of each script")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = str(Path(folder, "work", "huggingface"))  # read when datasets is imported
        complete(Run("finetune.py", ["--dry-run"], Path(folder)))  # the first one waits for the libraries
        for target in TARGETS:
            moments = random.Random(f"{arguments.seed} {target.name}")
            counts = (arguments.kills, arguments.calls, arguments.full_disks, arguments.flips)
            rows.append(disturb(target, Path(folder), *counts, moments))
            print(rows[-1], flush=True)
        check_inputs(Path(folder))
        check_hosts(Path(folder))
        rows.append(check_launcher(Path(folder), arguments.kills // 10 + 1, random.Random(arguments.seed)))
    titles = ["", "kills at random moments", "undisturbed run, s", "kills before calls", "calls", "full disks"]
    titles += ["damaged checkpoints"]
    shown = {int: "{:,}".format, float: "{:.3g}".format, str: str}
    lines = [[shown[type(value)](value) for value in row.values()] for row in rows]
    lines = [line + [""] * (len(titles) - len(line)) for line in lines]
    print(markdown_table(titles, lines))


def disturb(
    target: Target, folder: Path, kills: int, calls: int, full_disks: int, flips: int, moments: random.Random
) -> dict:
    """All faults of one script.

    Args:
        folder: to work in.
        kills: at random moments, how many at least.
        calls: before which it is killed, evenly spread over those that it makes.
        full_disks: sizes of a disk that are tried.
        flips: of a bit in the newest checkpoint, beside one that is cut short.
        moments: draws the moments and the sizes.
    """
    prepared = folder / "prepared"
    work = folder / "work"
    shutil.rmtree(prepared, ignore_errors=True)
    start_over(prepared, work)
    for script, arguments in target.before:
        complete(Run(script, [*SMALL, *arguments], work))
    shutil.copytree(work, prepared, symlinks=True)

    started = time.monotonic()
    undisturbed = begin(target, work)
    complete(undisturbed)
    seconds = time.monotonic() - started
    expected = fingerprint(work)

    killed = 0
    while killed < kills:
        start_over(prepared, work)
        longest = seconds
        while True:
            run = begin(target, work)
            if run.wait(moments.uniform(0, longest)) is not None:
                complete(run)
                break
            run.send(signal.SIGKILL)
            run.wait()
            killed = killed + 1
            longest = 1.1 * longest  # so that it comes to its end
            check_readable(work)
        check_same(work, expected)

    total = undisturbed.calls.value
    chosen = sorted({1 + total * i // calls for i in range(calls)})
    for call in chosen:
        start_over(prepared, work)
        run = begin(target, work, killed_at=call)
        if run.wait() == 0:  # threads make their calls sooner or later
            continue
        assert run.wait() == -signal.SIGKILL, run.stdout + run.stderr
        check_readable(work)
        complete(begin(target, work))
        check_same(work, expected)

    sizes = [path.stat().st_size for path in files(work)]
    for _ in range(full_disks):
        start_over(prepared, work)
        check_full_disk(begin(target, work, file_size_limit=int(max(sizes) * moments.random())), work)
        complete(begin(target, work))
        check_same(work, expected)

    damaged = 0
    while target.name in ("finetune.py", "pretrain.py") and damaged <= flips:
        start_over(prepared, work)
        run = begin(target, work)
        while run.wait(0.01) is None and len(list(work.rglob("checkpoints/step-*"))) < 2:
            pass
        run.send(signal.SIGKILL)
        run.wait()
        newest = max(work.rglob("checkpoints/step-*"))
        if damaged == 0:
            weights = newest / "student.safetensors"
            weights.write_bytes(weights.read_bytes()[:-100])
        else:
            flip_bit(moments.choice(sorted(newest.glob("*.safetensors"))), moments)
        run = begin(target, work)
        complete(run)
        if f"{newest.name}: unreadable, trying the one before it" in run.stdout:  # else the run was complete already
            check_same(work, expected)
            damaged += 1
    row = {"name": target.name, "kills": killed, "seconds": seconds, "calls": len(chosen), "total": total}
    return row | {"full_disks": full_disks, "damaged": damaged}


def flip_bit(path: Path, moments: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
    path.write_bytes(content)


def check_inputs(folder: Path) -> None:
    """A run that was stopped does not go on from another network, noise schedule or data behind the same path."""
    work = folder / "inputs"
    start_over(work, work)
    options = [*SMALL, "data.name=data", "data.resolution=8", "data.label_column=null", "model.pretrained=null"]
    complete(Run("pretrain.py", [*options, "pretrain.max_steps=1", "pretrain.batch_size=8"], work))
    options += ["finetune.range=0", "finetune.checkpoint_every=1"]
    complete(Run("finetune.py", [*options, "finetune.max_minutes=0.0001"], work))
    pipeline = work / "runs" / "digits" / "pretrained"
    image = work / "data" / "train" / "0" / "0000.png"
    for changed in (*pipeline.rglob("*config.json"), *pipeline.rglob("*.safetensors"), image):
        before = changed.read_bytes()
        if changed == image:
            Image.new("L", (24, 24)).save(changed)
        elif changed.suffix == ".json":
            changed.write_text(json.dumps(json.loads(before) | {"_diffusers_version": "0"}))
        else:
            changed.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        run = Run("finetune.py", [*options, "finetune.max_minutes=0.0001"], work)
        assert run.wait() == 2, f"{changed}: {run.stdout}{run.stderr}"
        assert "holds a run of other settings" in run.stderr, run.stderr
        changed.write_bytes(before)
    complete(Run("finetune.py", [*options, "finetune.max_minutes=0.0001"], work))


def check_hosts(folder: Path) -> None:
    """What a process of another host is writing is refused; one without a sign of life for five minutes is dead."""
    work = folder / "hosts"
    start_over(work, work)
    options = [*SMALL, *RANGE, "model.pretrained=null"]
    complete(Run("pretrain.py", [*SMALL, "pretrain.max_steps=1", "pretrain.batch_size=8"], work))
    lock = lock_file(work / "runs" / "digits" / "finetuned" / "0000-0250")
    lock.parent.mkdir()
    lock.write_text(f"filelock/2\npid=1\nhost=elsewhere\nmode=lease\ntoken=a\nduration={LEASE}\n")
    run = Run("finetune.py", options, work)
    while run.wait(1) is None:
        os.utime(lock)
    assert run.wait() == 2, run.stderr
    assert "in use by process 1 on elsewhere" in run.stderr, run.stderr
    complete(Run("finetune.py", options, work))
    assert not lock.exists()


def check_launcher(folder: Path, kills: int, moments: random.Random) -> dict:
    """The launcher of two processes is killed: they end, and the same command goes on to what it would have made."""
    work = folder / "launcher"
    start_over(work, work)
    complete(Run("pretrain.py", [*SMALL, "pretrain.max_steps=1", "pretrain.batch_size=8"], work))
    prepared = folder / "prepared"
    shutil.rmtree(prepared, ignore_errors=True)
    shutil.copytree(work, prepared, symlinks=True)
    command = ["bash", str(REPOSITORY / "scripts" / "launch.sh"), "2", str(REPOSITORY / "finetune.py"), *SMALL, *RANGE]
    command += ["finetune.micro_batch_size=4", "finetune.max_steps=200", "model.pretrained=null"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, cwd=work, env=environment, stdout=-3, stderr=-3, start_new_session=True)

    started = time.monotonic()
    assert start().wait() == 0
    seconds = time.monotonic() - started
    expected = fingerprint(work)
    for _ in range(kills):
        start_over(prepared, work)
        job = start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(moments.uniform(0, seconds))
        job.kill()
        job.wait()
        while (again := start()).wait() != 0:  # refused while the workers save what they have
            assert time.monotonic() - started < 600 * kills, again
        check_same(work, expected, but_for="log.jsonl")  # which has a line where the workers stopped
    return {"name": "launcher of finetune.py", "kills": kills, "seconds": seconds}


def begin(target: Target, work: Path, **limits: int) -> Run:
    return Run(target.script, [*SMALL, *target.arguments], work, **limits)


def complete(run: Run) -> None:
    assert run.wait() == 0, run.stdout + run.stderr


def start_over(prepared: Path, work: Path) -> None:
    """Make `work` anew from `prepared`, or (where there is none yet) with a link to a folder of images beside it.

    They stay the same files, as caches are told by inodes and times of change.
    """
    shutil.rmtree(work, ignore_errors=True)
    if prepared.exists():
        shutil.copytree(prepared, work, symlinks=True)
        return
    (work / "assets").mkdir(parents=True)
    (work / "assets" / "digits").symlink_to(REPOSITORY / "assets" / "digits")
    images = work.with_name("images")
    (work / "data").symlink_to(images)
    pixels = np.random.default_rng(0)
    for number in range(500):
        path = images / "train" / str(number % 2) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (24, 24), dtype=np.uint8)).save(path)


def files(work: Path) -> Iterator[Path]:
    """The files under final names that the scripts write, but for what the datasets library keeps for itself."""
    for path in sorted((work / "runs").rglob("*")):
        if path.is_file() and not any(part.startswith(TEMPORARY) for part in path.parts):
            yield path


def check_readable(work: Path) -> None:
    """Read every file under a final name.

    Raises:
        Exception: as the file's library says that it can't be read.
    """
    readers = {
        ".safetensors": load_file,
        ".json": lambda path: json.loads(path.read_text()),
        ".yaml": lambda path: yaml.safe_load(path.read_text()),
        ".png": lambda path: Image.open(path).load(),
        ".npz": lambda path: dict(np.load(path)),
    }
    for path in files(work):
        if path.suffix in readers:
            readers[path.suffix](path)
        if path.name == "pixels.bin":
            sizes = np.load(path.with_name("index.npz"))["sizes"]
            assert path.stat().st_size == sizes.prod(axis=1).sum(), path


def fingerprint(work: Path) -> dict[str, str | list]:
    """File or folder → what is in it: a hash, or for a log its lines without what depends on the clock."""
    found = {}
    for path in sorted((work / "runs").rglob("*")):
        name = str(path.relative_to(work))
        if "events.out.tfevents" in name or path.suffix == ".lock":  # a lock may outlive what is complete
            continue
        if path.is_dir():
            found[name] = "folder"
        elif path.name == "log.jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            found[name] = [{key: value for key, value in line.items() if key not in TIMED} for line in lines]
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def check_same(work: Path, expected: dict, but_for: str = "") -> None:
    found = fingerprint(work)
    names = {name for name in (*found, *expected) if Path(name).name != but_for}
    different = [name for name in names if found.get(name) != expected.get(name)]
    assert not different, f"unlike the undisturbed run: {different}"


def check_full_disk(run: Run, work: Path) -> None:
    """One line that names the file, a status that is not 0, nothing half-written; or there was room enough."""
    if run.wait() == 0:
        return
    lines = run.stderr.splitlines()
    assert run.wait() in (1, 2), run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    assert "File too large" in lines[-1], run.stderr
    check_readable(work)
    assert not list((work / "runs").rglob(f"{TEMPORARY}*"))


if __name__ == "__main__":
    main()
