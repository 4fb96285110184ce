"""How long a checkpoint stops training and takes to write, and how much it slows the next step.

python benchmarks/checkpoints.py
python benchmarks/checkpoints.py --device cuda
python benchmarks/checkpoints.py --quick
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import parse, seconds, spread
from benchmarks.report import save
from benchmarks.trainers import make_trainer
from benchmarks.unets import CHURCH, SMALL
from deme.config.trainings import Finetune
from deme.report.tables import markdown_table
from deme.training.progress import RunLog


def main() -> None:
    arguments = parse(__doc__)
    device = arguments.device
    pixels = [torch.zeros(3, 32, 32, dtype=torch.uint8)] * 4
    unet = UNet2DModel(**(SMALL if arguments.quick else CHURCH) | {"sample_size": 32})
    accelerator = Accelerator(cpu=device == "cpu")
    row: dict[str, list[float]] = {"step": [], "standstill": [], "writing": [], "next_step": []}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(accelerator, unet, pixels, Finetune(batch_size=4), Path(folder))
        trainer.checkpoints.mkdir()
        trainer.log = RunLog(Path(folder), 0, Finetune(log_with=[]))
        trainer.step()  # AdamW's moments exist from now on
        for number in range(2 if arguments.quick else 9):
            row["step"].append(seconds(trainer.step, device))
            row["standstill"].append(seconds(lambda: trainer.save(last=False), device))
            if number % 2:  # alone, or beside the training
                row["next_step"].append(seconds(trainer.step, device))
                trainer.writer.wait()
            else:
                row["writing"].append(seconds(trainer.writer.wait, device))
        newest = sorted(trainer.checkpoints.iterdir())[-1]
        size = sum(file.stat().st_size for file in newest.iterdir())
    model = sum(parameter.numel() * parameter.element_size() for parameter in trainer.student.parameters())
    first = row["standstill"][0]
    row["standstill"] = row["standstill"][1:]  # the first one allocates the copy
    share = statistics.median(row["standstill"]) / statistics.median(row["writing"])
    titles = ["checkpoint / model", "training step, s", "first standstill, s", "standstill, s", "writing, s"]
    titles += ["standstill / writing", "a step beside the writing, s"]
    line = [
        "small" if arguments.quick else "Church",
        f"{size / model:.2f}",
        spread(row["step"]),
        f"{first:.3g}",
        spread(row["standstill"]),
        spread(row["writing"]),
        f"{share:.0%}",
        spread(row["next_step"]),
    ]
    result = row | {"first_standstill": first, "checkpoint_bytes": size, "model_bytes": model}
    save("checkpoints", device, [result], markdown_table(["network", *titles], [line]))


if __name__ == "__main__":
    main()
