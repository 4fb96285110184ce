"""Memory of finetuning per GPU, by images per forward pass: LSUN-Church's network at 256×256.

    python benchmarks/memory.py --device cuda
    python benchmarks/memory.py                  # without a GPU: peak memory of the process
    python benchmarks/memory.py --quick          # a small network at 32×32

Two optimizer steps of finetune.py's loop each, in a process of its own: student with projections, teacher, EMA, AdamW.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import memory_taken, parse
from benchmarks.report import save
from deme.report.tables import markdown_table

MODES = [(precision, checkpointing) for precision in ("no", "bf16") for checkpointing in (False, True)]
OUT_OF_MEMORY = 3  # exit status


def main() -> None:
    arguments = parse(
        __doc__,
        batch_sizes={"type": int, "nargs": "+", "help": "images per forward pass"},
        measure={"help": argparse.SUPPRESS},  # one row's settings as JSON: what the child processes do
    )
    if arguments.measure is not None:
        measure(**json.loads(arguments.measure))
        return
    batch_sizes = arguments.batch_sizes or (
        [1, 2] if arguments.quick or arguments.device == "cpu" else [1, 4, 8, 16, 32]
    )

    rows = []
    for precision, checkpointing in MODES:
        mode = {"mixed_precision": precision, "gradient_checkpointing": checkpointing}
        gib = []
        for batch_size in batch_sizes:
            settings = {"batch_size": batch_size, "device": arguments.device, "quick": arguments.quick}
            command = [sys.executable, __file__, "--measure", json.dumps(mode | settings)]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if child.returncode not in (0, OUT_OF_MEMORY):
                sys.exit(child.returncode)
            gib.append(float(child.stdout.splitlines()[-1]) if child.returncode == 0 else None)
            print({**mode, "batch_size": batch_size, "gib": gib[-1]}, flush=True)  # a time limit loses the table alone
        rows.append({**mode, "gib": gib, "batch_sizes": batch_sizes})

    titles = ["mixed_precision, GiB", *(f"{size} image{'s' * (size > 1)}" for size in batch_sizes)]
    lines = [
        [
            row["mixed_precision"] + ", gradient_checkpointing" * row["gradient_checkpointing"],
            *("-" if gib is None else f"{gib:.1f}" for gib in row["gib"]),
        ]
        for row in rows
    ]
    save("memory", arguments.device, rows, markdown_table(titles, lines))


def measure(mixed_precision: str, gradient_checkpointing: bool, batch_size: int, device: str, quick: bool) -> None:
    """Print the GiB that two optimizer steps took at their peak."""
    import torch
    from accelerate import Accelerator
    from diffusers import UNet2DModel

    from benchmarks.trainers import make_trainer
    from benchmarks.unets import CHURCH, SMALL
    from deme.config.trainings import Finetune

    teacher = UNet2DModel(**(SMALL if quick else CHURCH))
    size = teacher.config.sample_size
    pixels = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8)] * batch_size
    modes = {"gradient_checkpointing": gradient_checkpointing, "mixed_precision": mixed_precision}
    settings = Finetune(batch_size=batch_size, **modes)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(accelerator, teacher, pixels, settings, Path(folder))
        del teacher
        try:
            for _ in range(2):  # AdamW's moments exist from the second step on
                trainer.step()
        except torch.OutOfMemoryError:
            sys.exit(OUT_OF_MEMORY)
    print(memory_taken(device) / 2**30)


if __name__ == "__main__":
    main()
