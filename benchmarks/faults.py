"""Kill the scripts at random moments, fill their disk, truncate their checkpoints: nothing may be lost.

    python benchmarks/faults.py                # 50 kills of each script
    python benchmarks/faults.py --kills 3

After every kill: no unreadable file under a final name. After the restart that completes the work: the same files with
the same content as those of a run that was left alone, so that nothing is left to delete by hand.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.forked import REPOSITORY, Run
from benchmarks.report import save
from deme.job.files import TEMPORARY
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
TARGETS = [
    Target("finetune.py", "finetune.py", RANGE),
    Target(
        "pretrain.py", "pretrain.py", ["pretrain.max_steps=40", "pretrain.batch_size=8", "pretrain.checkpoint_every=5"]
    ),
    Target("merge.py", "merge.py", [], [("finetune.py", ["finetune.max_steps=1"])]),
    Target(
        "merge.py, other coefficients",
        "merge.py",
        ["merge.coefficients=[1,0,0,0]"],
        [("finetune.py", ["finetune.max_steps=1"]), ("merge.py", [])],
    ),
    Target("sample_ddp.py", "sample_ddp.py", ["sample.model=pretrained"]),
    Target(
        "data cache", "finetune.py", ["data.name=data", "data.resolution=8", "finetune.range=0", "finetune.max_steps=1"]
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each script")
    parser.add_argument("--full-disks", type=int, default=10, help="of each script")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = str(Path(folder, "work", "huggingface"))  # read when datasets is imported
        complete(Run("finetune.py", ["--dry-run"], Path(folder)))  # the first one waits for the libraries
        for target in TARGETS:
            moments = random.Random(f"{arguments.seed} {target.name}")
            rows.append(disturb(target, Path(folder), arguments.kills, arguments.full_disks, moments))
            print(rows[-1], flush=True)
    titles = ["", "kills", "runs to the end", "undisturbed run, s", "full disks", "truncated checkpoints"]
    lines = [[row["name"], *(f"{value:.3g}" for value in list(row.values())[1:])] for row in rows]
    save("faults", "cpu", rows, markdown_table(titles, lines), ceiling={})


def disturb(target: Target, folder: Path, kills: int, full_disks: int, moments: random.Random) -> dict:
    """All faults of one script.

    Args:
        folder: to work in.
        kills: how many at least.
        full_disks: sizes of a disk that are tried.
        moments: draws the moments and the sizes.
    """
    prepared = folder / "prepared"
    work = folder / "work"
    shutil.rmtree(prepared, ignore_errors=True)
    start_over(prepared, work)
    for script, arguments in target.before:
        complete(Run(script, [*SMALL, *arguments], work))
    shutil.copytree(work, prepared)

    started = time.monotonic()
    complete(begin(target, work))
    seconds = time.monotonic() - started
    expected = fingerprint(work)

    killed = 0
    rounds = 0
    while killed < kills:
        start_over(prepared, work)
        rounds = rounds + 1
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

    sizes = [path.stat().st_size for path in files(work)]
    for _ in range(full_disks):
        start_over(prepared, work)
        check_full_disk(begin(target, work, int(max(sizes) * moments.random())), work)
        complete(begin(target, work))
        check_same(work, expected)

    truncated = 0
    while target.name in ("finetune.py", "pretrain.py") and not truncated:
        start_over(prepared, work)
        run = begin(target, work)
        while run.wait(0.01) is None and len(list(work.rglob("checkpoints/step-*"))) < 2:
            pass
        run.send(signal.SIGKILL)
        run.wait()
        checkpoints = sorted(work.rglob("checkpoints/step-*"))
        weights = checkpoints[-1] / "student.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        run = begin(target, work)
        complete(run)
        truncated += f"{checkpoints[-1].name}: unreadable, trying the one before it" in run.stdout
        if truncated:  # else the run was complete already
            check_same(work, expected)
    row = {"name": target.name, "kills": killed, "rounds": rounds, "seconds": seconds}
    return row | {"full_disks": full_disks, "truncated": truncated}


def begin(target: Target, work: Path, file_size_limit: int | None = None) -> Run:
    return Run(target.script, [*SMALL, *target.arguments], work, file_size_limit)


def complete(run: Run) -> None:
    assert run.wait() == 0, run.stdout + run.stderr


def start_over(prepared: Path, work: Path) -> None:
    """Make `work` anew from `prepared`, or (where there is none yet) with a folder of images."""
    shutil.rmtree(work, ignore_errors=True)
    if prepared.exists():
        shutil.copytree(prepared, work)
        return
    (work / "assets").mkdir(parents=True)
    (work / "assets" / "digits").symlink_to(REPOSITORY / "assets" / "digits")
    pixels = np.random.default_rng(0)
    for number in range(500):
        path = work / "data" / "train" / str(number % 2) / f"{number:04d}.png"
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
        if "events.out.tfevents" in name:
            continue
        if path.is_dir():
            found[name] = "folder"
        elif path.name == "log.jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            found[name] = [{key: value for key, value in line.items() if key not in TIMED} for line in lines]
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def check_same(work: Path, expected: dict) -> None:
    found = fingerprint(work)
    different = [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
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
