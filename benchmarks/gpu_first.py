"""First measurements on a GPU, in one process: correctness, then speed, the most valuable first.

    python benchmarks/gpu_first.py --seconds 250 --output FOLDER
    python benchmarks/gpu_first.py --quick                         # small and on the CPU: that it runs
    python benchmarks/gpu_first.py --table FOLDER/cells.jsonl      # writes the tables into benchmarks/README.md

Each measurement is printed and appended to FOLDER/cells.jsonl as a line of JSON. A measurement that would exceed the
remaining time is skipped. An error is also a line. The exit status is 1 if a result is wrong or a measurement failed.
"""
# ruff: noqa: E402  the clock starts before the imports, which take seconds

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

START = time.monotonic()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.gpu_cells import BF16, FP16, TRAININGS, VARIANTS, Machine
from benchmarks.report import put, write_results
from deme.report.tables import markdown_table

PLACE = "gpu_first-cuda"


class Cell(NamedTuple):
    """A measurement, and the seconds that it may take on an H100 (estimates)."""

    name: str
    seconds: float
    measure: Callable[[], dict]


def cells(machine: Machine) -> list[Cell]:
    """All measurements, the most valuable first."""
    precisions = ("no", "bf16") if machine.quick else ("bf16", "fp16", "no")
    found = [Cell("machine", 12, machine.limits)]
    found += [Cell(f"images, {p}", 3, lambda p=p: machine.compare_images(p)) for p in precisions]
    found += [Cell(f"loss and gradient, {p}", 2, lambda p=p: machine.compare_gradients(p)) for p in precisions]
    found += [Cell(f"resume, {p}", 5, lambda p=p: machine.compare_resumed(p)) for p in precisions]
    variants = VARIANTS[:4] if machine.quick else VARIANTS
    found += [Cell(f"call, Church: {v.name}", 6, lambda v=v: machine.call("Church", v)) for v in variants]
    for name, micro in TRAININGS:
        found.append(
            Cell(f"training, Church, {micro}: {name}", 14, lambda n=name, m=micro: machine.train("Church", n, m))
        )
    found += [Cell("drawing, Church, 20 steps", 25, lambda: machine.draw("Church", 64, 32, 20))]
    found += [
        Cell(f"profile, Church: {what}", 8, lambda w=what: machine.profile("Church", w))
        for what in ("call", "training")
    ]
    found += [Cell(f"call, CIFAR-10: {v.name}", 4, lambda v=v: machine.call("CIFAR-10", v)) for v in variants]
    found += [Cell("training, CIFAR-10, 256: finetune.py", 10, lambda: machine.train("CIFAR-10", "finetune.py", 256))]
    found += [Cell("drawing, CIFAR-10, 50 steps", 15, lambda: machine.draw("CIFAR-10", 1024, 256, 50))]
    for half in () if machine.quick else (BF16, FP16):
        compiled = half._replace(compiled=True)
        found.append(Cell(f"call, Church: {compiled.name}", 90, lambda v=compiled: machine.call("Church", v)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=250, help="that all may take, imports included")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="small and on the CPU")
    parser.add_argument("--table", type=Path, metavar="FILE", help="of an earlier run, into benchmarks/README.md")
    arguments = parser.parse_args()
    if arguments.table is not None:
        write_tables(read(arguments.table))
        return
    if not arguments.quick and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --quick runs on the CPU")
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = run(cells(Machine(arguments.quick)), arguments.seconds, arguments.output / "cells.jsonl")
    if failed:
        sys.exit(f"benchmarks/gpu_first.py: wrong or failed: {'; '.join(failed)}")


def run(planned: list[Cell], seconds: float, file: Path) -> list[str]:
    """Measure all cells, one line each; returns the names of those that are wrong or failed.

    Args:
        seconds: since the start of the process, within which all must end.
    """
    failed = []
    with file.open("w", encoding="utf-8") as lines:

        def emit(row: dict) -> None:
            line = json.dumps({"at": round(time.monotonic() - START, 1)} | row)
            for stream in (lines, sys.stdout):
                print(line, file=stream, flush=True)

        emit({"cell": "imports", "command": " ".join(["python", "benchmarks/gpu_first.py", *sys.argv[1:]])})
        for name, estimate, measure in planned:
            left = seconds - (time.monotonic() - START)
            if left < estimate:
                emit({"cell": name, "left out": f"{left:.0f} s are left, {estimate:.0f} s may be needed"})
                continue
            try:
                gc.collect()
                torch.cuda.empty_cache()
                row = measure()
            except Exception as error:  # out of memory, or whatever a new machine raises: the others are measured
                row = {"error": f"{type(error).__name__}: {error}"[:500]}
            if "error" in row or row.get("wrong"):
                failed.append(name)
            emit({"cell": name} | row)
    return failed


def read(file: Path) -> list[dict]:
    """The lines of an earlier run."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_tables(rows: list[dict]) -> None:
    """Print the tables of a run, and write them into README.md and its rows into results/."""
    machine = next((row for row in rows if row["cell"] == "machine"), {})
    gpu = machine.get("gpu", "a machine that was not told")
    table = f"`{rows[0]['command']}` on {gpu}, torch {machine.get('torch', '?')}:\n\n{tables(rows)}"
    print(table)
    folder = Path(__file__).resolve().parent
    write_results(PLACE, {"command": rows[0]["command"], "machine": gpu, "rows": rows})
    put(folder / "README.md", PLACE, table)


def tables(rows: list[dict]) -> str:
    """One Markdown table per kind of cell, with a column per number."""
    found = []
    for kind in ("machine", "images", "loss", "resume", "call", "training", "drawing", "profile", "left out", "error"):
        chosen = [
            row
            for row in rows
            if kind in row or (row["cell"].startswith(kind) and not {"left out", "error"} & row.keys())
        ]
        if not chosen:
            continue
        keys = list(dict.fromkeys(key for row in chosen for key in row if key not in ("at", "cell")))
        lines = [[row["cell"], *(shown(row.get(key)) for key in keys)] for row in chosen]
        found.append(markdown_table(["", *keys], lines))
    return "\n\n".join(found)


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    main()
