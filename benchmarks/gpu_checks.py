"""Does a GPU give what the CPU gives? Training, resuming, sampling and merging of the embedded digits, by precision.

    python benchmarks/gpu_checks.py --device cuda
    python benchmarks/gpu_checks.py --quick            # on the CPU alone: that it runs

Whole commands. A difference above its bound stops it with status 1, behind the table.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import parse
from benchmarks.report import save
from deme.models.weights import WEIGHTS
from deme.report.tables import markdown_table

REPOSITORY = Path(__file__).resolve().parent.parent
EXPERT = Path("finetuned/0000-0500")
# largest relative difference of losses, and mean difference of images in grey levels, to float32 on the CPU
BOUNDS = {"no": (1e-3, 0.05), "bf16": (5e-2, 2.0), "fp16": (1e-2, 0.5)}


def main() -> None:
    arguments = parse(__doc__)
    precisions = list(BOUNDS) if arguments.device == "cuda" else ["no"]
    rows: list[tuple[str, float, float | None]] = []  # what, found, its bound
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = 6 if arguments.quick else 200

        def run(script: str, run_name: str, device: str, *options: str) -> None:
            """A command on a device; its files are in folder/run_name."""
            environment = dict(os.environ)
            environment["ACCELERATE_USE_CPU"] = str(device == "cpu").lower()
            shared = [f"output_dir={folder}", f"name={run_name}", "timesteps.num_ranges=2", "merge.coefficients=null"]
            shared += [f"finetune.max_steps={steps}", "finetune.log_every=1", f"finetune.checkpoint_every={steps // 2}"]
            shared += ["sample.num_images=64", "sample.num_inference_steps=10", "finetune.preview_every=null"]
            subprocess.run([sys.executable, REPOSITORY / script, *shared, *options], env=environment, check=True)

        run("finetune.py", "cpu", "cpu")
        run("merge.py", "cpu", "cpu")
        run("sample_ddp.py", "cpu", "cpu")
        for precision in precisions:
            of_losses, of_images = BOUNDS[precision]
            trained = [f"finetune.mixed_precision={precision}"]
            drawn = [f"sample.mixed_precision={precision}"]
            here, again, resumed = (folder / f"{kind}-{precision}" for kind in ("first", "again", "resumed"))
            for run_folder in (here, again):
                run("finetune.py", run_folder.name, arguments.device, "finetune.range=0", *trained)
            first = slice(0, 20)  # steps; then the weights differ
            differences = np.abs(losses(here)[first] / losses(folder / "cpu")[first] - 1)
            rows.append((f"training, {precision}: losses of the first steps, relative", differences.max(), of_losses))
            change = weights(here / EXPERT), weights(again / EXPERT)
            rows.append((f"training, {precision}: weights of two runs", largest_difference(*change), None))
            shutil.copytree(here, resumed)
            shutil.rmtree(resumed / EXPERT / "unet")
            shutil.rmtree(resumed / EXPERT / "checkpoints" / f"step-{steps:08d}")
            run("finetune.py", resumed.name, arguments.device, "finetune.range=0", *trained)
            change = weights(here / EXPERT), weights(resumed / EXPERT)
            rows.append((f"training, {precision}: weights of a resumed run", largest_difference(*change), None))
            model = f"sample.model={folder / 'cpu' / 'merged'}"
            output = folder / "drawn" / precision
            run("sample_ddp.py", here.name, arguments.device, model, f"sample.output={output}", *drawn)
            change = np.abs(pixels(output) - pixels(folder / "cpu" / "samples" / "merged"))
            rows.append((f"sampling, {precision}: mean difference in grey levels", change.mean(), of_images))
        run("merge.py", "merged-again", arguments.device, f"merge.finetuned={folder / 'cpu' / 'finetuned'}")
        change = (load_file(folder / name / "merged" / "unet" / WEIGHTS) for name in ("cpu", "merged-again"))
        rows.append(("merging: weights", largest_difference(*change), 0.0))
    lines = [[what, f"{found:.2g}", "-" if bound is None else f"{bound:g}"] for what, found, bound in rows]
    table = markdown_table(["", "found", "bound"], lines)
    save("gpu_checks", arguments.device, [{"what": row[0], "found": float(row[1])} for row in rows], table, ceiling={})
    failed = [what for what, found, bound in rows if bound is not None and not found <= bound]
    if failed:
        sys.exit(f"benchmarks/gpu_checks.py: above its bound: {'; '.join(failed)}")


def losses(run: Path) -> np.ndarray:
    lines = (run / EXPERT / "log.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


def weights(training: Path) -> dict[str, torch.Tensor]:
    return load_file(training / "unet" / WEIGHTS)


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """0: equal bit for bit."""
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.array(Image.open(file)).astype(float) for file in sorted(folder.glob("*.png"))])


if __name__ == "__main__":
    main()
