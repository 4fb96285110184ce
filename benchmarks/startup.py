"""How fast the scripts answer when there is nothing to compute, and what takes time when there is.

python benchmarks/startup.py
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import alternate, parse, spread
from benchmarks.report import save
from deme.report.tables import markdown_table

REPOSITORY = Path(__file__).resolve().parent.parent
SCRIPTS = ("pretrain.py", "finetune.py", "merge.py", "sample_ddp.py", "evaluate.py")
ANSWERS = {f"{script} {option}": [script, option] for script in SCRIPTS for option in ("--help", "--dry-run")} | {
    "a misspelt key": ["finetune.py", "finetune.lerning_rate=1"],
    "no such pretrained folder": ["finetune.py", "model.pretrained=nowhere/at/all"],
    "another resolution": ["finetune.py", "data.resolution=16"],
    "another number of timesteps": ["sample_ddp.py", "sample.model=pretrained", "timesteps.num_train_timesteps=500"],
    "not finetuned yet": ["merge.py"],
    "not merged yet": ["sample_ddp.py"],
    "no samples": ["evaluate.py"],
}
TORCH = "import torch"
IMPORTS = (
    TORCH,
    "from diffusers import UNet2DModel",
    "import deme.models.merging",  # all that merge.py imports of the sum
    "import deme.models.drawing",  # most of what sample_ddp.py does
    "import deme.training.trainer",  # and finetune.py
)


def main() -> None:
    arguments = parse(__doc__)
    with tempfile.TemporaryDirectory() as folder:

        def answer(command: list[str]) -> None:
            script, *options = command
            line = [sys.executable, REPOSITORY / script, f"output_dir={folder}", *options]
            subprocess.run(line, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        contenders = {name: lambda command=command: answer(command) for name, command in ANSWERS.items()}

        def run(code: str) -> None:
            subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)

        contenders |= {f"python -c '{code}'": lambda code=code: run(code) for code in IMPORTS}
        taken = alternate(contenders, 1 if arguments.quick else 5, "cpu")
    torch = statistics.median(taken[f"python -c '{TORCH}'"])
    rows = [
        {"name": name, "seconds": values, "of_torch": statistics.median(values) / torch}
        for name, values in taken.items()
    ]
    lines = [[row["name"], spread(row["seconds"]), f"{row['of_torch']:.2f}"] for row in rows]
    save("startup", "cpu", rows, markdown_table(["answer", "s", "of importing torch"], lines))


if __name__ == "__main__":
    main()
