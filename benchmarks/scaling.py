"""How finetuning and sampling gain from more processes, and from ranges side by side.

    python benchmarks/scaling.py                     # 1 and 2 processes of one thread
    python benchmarks/scaling.py --device cuda       # 1 and all GPUs
    python benchmarks/scaling.py --quick

Whole commands on CIFAR-10's network. Efficiency: the gain in speed over the first row, per gain in threads or GPUs.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import parse
from benchmarks.report import save
from benchmarks.unets import CIFAR10
from deme.files import markdown_table

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = {"block_out_channels": [32, 64, 64, 64]}


def main() -> None:
    arguments = parse(__doc__)
    on_gpu = arguments.device == "cuda"
    most = torch.cuda.device_count() if on_gpu else 2
    # (processes, threads of each)
    shapes = [(1, 1), (most, 1)] if on_gpu else [(1, 1), (1, 2), (2, 1)]
    steps, batch, images = (12, 4, 8) if arguments.quick else (512, 64, 4096) if on_gpu else (12, 8, 48)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unet = UNet2DModel(**CIFAR10 | (SMALL if arguments.quick else {}))
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "pretrained")
        options = [f"output_dir={folder}", f"model.pretrained={folder / 'pretrained'}", "data.resolution=32"]
        options += [f"data.name={make_images(folder / 'data', 4 * batch)}", "data.label_column=null"]
        options += [f"finetune.max_steps={steps}", f"finetune.batch_size={batch}", "finetune.log_every=4"]
        options += [f"finetune.micro_batch_size={batch // most}", "timesteps.num_ranges=2"]
        options += [f"sample.num_images={images}", f"sample.batch_size={batch // 2}", "sample.num_inference_steps=5"]
        options += ["sample.model=pretrained"]
        for processes, threads in shapes:
            rows.append(finetuning(options, folder, processes, threads, on_gpu))
        for processes, threads in shapes:
            rows.append(sampling(options, folder, processes, threads, on_gpu))
        rows += ranges(options, folder, most, on_gpu)
    for row in rows:
        first = next(other for other in rows if other["what"] == row["what"])
        row["times_first"] = row["speed"] / first["speed"]
        more = row["processes"] * row["threads"] / (first["processes"] * first["threads"])
        row["efficiency"] = row["times_first"] / more
    titles = ["", "processes", "threads each", "speed", "× the first", "efficiency"]
    lines = [
        [
            f"{row['what']}, {row['unit']}",
            str(row["processes"]),
            str(row["threads"]),
            f"{row['speed']:.3g}",
            f"{row['times_first']:.2f}",
            f"{row['efficiency']:.0%}",
        ]
        for row in rows
    ]
    save("scaling", arguments.device, rows, markdown_table(titles, lines))


def start(script: str, options: list[str], processes: int, threads: int, on_gpu: bool) -> subprocess.Popen:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        launcher += ["--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | ({} if on_gpu else {"ACCELERATE_USE_CPU": "true"})
    command = [*launcher, str(REPOSITORY / script), *options]
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL)


def finish(run: subprocess.Popen) -> None:
    if run.wait() != 0:
        sys.exit(run.returncode)


def finetuning(options: list[str], folder: Path, processes: int, threads: int, on_gpu: bool) -> dict:
    name = f"finetune-{processes}-{threads}"
    finish(start("finetune.py", [*options, f"name={name}", "finetune.range=0"], processes, threads, on_gpu))
    lines = (folder / name / "finetuned" / "0000-0500" / "log.jsonl").read_text().splitlines()
    speeds = [json.loads(line)["images_per_second"] for line in lines][1:]  # the first steps warm up
    row = {"what": "finetuning", "unit": "images/s", "processes": processes, "threads": threads}
    return row | {"speed": statistics.median(speeds)}


def sampling(options: list[str], folder: Path, processes: int, threads: int, on_gpu: bool) -> dict:
    """The speed from the end of the first batch on."""
    name = f"sample-{processes}-{threads}"
    finish(start("sample_ddp.py", [*options, f"name={name}"], processes, threads, on_gpu))
    times = sorted(path.stat().st_mtime for path in (folder / name / "samples" / "pretrained").glob("*.png"))
    batch_size = next(int(option.split("=")[1]) for option in options if option.startswith("sample.batch_size"))
    first = processes * batch_size
    row = {"what": "sampling", "unit": "images/s", "processes": processes, "threads": threads}
    return row | {"speed": (len(times) - first) / (times[-1] - times[first - 1])}


def ranges(options: list[str], folder: Path, most: int, on_gpu: bool) -> list[dict]:
    """Two ranges one after another, in one process with all threads or on one GPU; then side by side."""
    threads, rows = (1, []) if on_gpu else (2, [])
    for what, commands in {"together": [[]], "side by side": [["finetune.range=0"], ["finetune.range=1"]]}.items():
        begin = time.perf_counter()
        environment_threads = threads // len(commands) or 1
        runs = []
        for number, extra in enumerate(commands):
            if on_gpu:
                os.environ["CUDA_VISIBLE_DEVICES"] = str(number % most)
            runs.append(start("finetune.py", [*options, f"name=ranges-{what}", *extra], 1, environment_threads, on_gpu))
        for run in runs:
            finish(run)
        taken = time.perf_counter() - begin
        row = {"what": "two ranges, whole commands", "unit": "per minute", "processes": len(commands)}
        rows.append(row | {"threads": environment_threads, "speed": 2 / taken * 60})
    return rows


def make_images(folder: Path, count: int) -> Path:
    """Noise as PNGs."""
    from torchvision.io import write_png

    (folder / "train").mkdir(parents=True)
    for number in range(count):
        write_png(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), str(folder / "train" / f"{number}.png"))
    return folder


if __name__ == "__main__":
    main()
