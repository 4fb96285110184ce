"""The speedup of finetuning and sampling by more processes, and by ranges side by side.

    python benchmarks/scaling.py                     # 1, 2 and 4 processes of one thread
    python benchmarks/scaling.py --device cuda       # 1, 2, 4 and all GPUs
    python benchmarks/scaling.py --quick

Whole commands on CIFAR-10's network, three rounds in which each has a turn. Efficiency: the gain in speed over
the first row, per gain in cores or GPUs; processes that share a core are marked.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import parse, spread
from benchmarks.report import save
from benchmarks.unets import CIFAR10, SMALL
from deme.config.trainings import Finetune
from deme.report.tables import markdown_table
from scripts.estimate import FLOAT, unet_cost

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    arguments = parse(__doc__)
    on_gpu = arguments.device == "cuda"
    cores = torch.cuda.device_count() if on_gpu else len(os.sched_getaffinity(0))  # or GPUs
    most = cores if on_gpu else 4  # processes
    # (processes, threads of each)
    shapes = [(number, 1) for number in sorted({1, 2, 4, most}) if number <= most]
    shapes += [] if on_gpu else [(1, 2)]
    steps, batch, images = (12, 4, 24) if arguments.quick else (512, 64, 4096) if on_gpu else (12, 8, 48)
    speeds: dict[tuple, list[float]] = defaultdict(list)  # what, processes, threads of each
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network = SMALL if arguments.quick else CIFAR10
        unet = UNet2DModel(**network)
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "pretrained")
        options = [f"model.pretrained={folder / 'pretrained'}", "data.resolution=32", "data.label_column=null"]
        options += [f"data.name={make_images(folder / 'data', 4 * batch)}"]
        options += [f"finetune.max_steps={steps}", f"finetune.batch_size={batch}", "finetune.log_every=4"]
        options += [f"finetune.micro_batch_size={batch // most}", "timesteps.num_ranges=2"]
        options += [f"sample.num_images={images}", f"sample.batch_size={batch // 2}", "sample.num_inference_steps=5"]
        options += ["sample.model=pretrained", "merge.coefficients=[0.5,0.5]"]
        for number in range(1 if arguments.quick else 3):
            output = folder / str(number)
            here = [*options, f"output_dir={folder / str(number)}"]
            for shape in shapes:
                speeds["finetuning, images/s", *shape].append(finetuning(here, output, *shape, on_gpu))
                speeds["sampling, images/s", *shape].append(sampling(here, output, *shape, on_gpu))
            for processes, threads in [(1, 1), (2, 1)] if on_gpu else [(1, 2), (2, 1)]:
                taken = two_ranges(here, processes, threads, cores, on_gpu)
                speeds["two ranges, whole commands per hour", processes, threads].append(2 * 3600 / taken)
    rows = []
    for what, processes, threads in sorted(speeds, key=lambda key: key[0]):
        values = speeds[what, processes, threads]
        row = {"what": what, "processes": processes, "threads": threads, "speed": values}
        first = next((other for other in rows if other["what"] == what), row)
        row["times_first"] = statistics.median(values) / statistics.median(first["speed"])
        used = [min(each["processes"] * each["threads"], cores) for each in (row, first)]  # they may be shared
        row["efficiency"] = row["times_first"] * used[1] / used[0]
        rows.append(row | {"oversubscribed": processes * threads > cores})
    titles = ["", "processes", "threads each", "speed", "× the first", "efficiency"]
    lines = [
        [
            row["what"],
            f"{row['processes']}{', oversubscribed' * row['oversubscribed']}",
            str(row["threads"]),
            spread(row["speed"]),
            f"{row['times_first']:.2f}",
            f"{row['efficiency']:.0%}",
        ]
        for row in rows
    ]
    parameters, *_ = unet_cost(network | {"_class_name": "ProjectedUNet2DModel"}, Finetune())
    exchange = exchanged(rows, batch, FLOAT * parameters)
    save("scaling", arguments.device, rows, f"{markdown_table(titles, lines)}\n\n{exchange}")


def exchanged(rows: list[dict], batch: int, size: int) -> str:
    """Gradients of a step against its time, by numbers of processes; noted in the rows of finetuning, too.

    Args:
        batch: images per step.
        size: bytes of the gradients.
    """
    lines = []
    for row in rows:
        if row["what"].startswith("finetuning") and row["threads"] == 1:
            row["seconds_per_step"] = batch / statistics.median(row["speed"])
            row["sent_bytes"] = 2 * (row["processes"] - 1) / row["processes"] * size  # a ring's all-reduce
            sent, taken = row["sent_bytes"] / 1e6, row["seconds_per_step"]
            lines.append([str(row["processes"]), f"{taken:.3g}", f"{sent:.0f}", f"{sent / taken:.0f}"])
    titles = ["processes", "s per optimizer step", "MB that each sends, of a ring", "MB/s, over the step"]
    what = f"An optimizer step of {batch} images has {size / 1e6:.0f} MB of float32 gradients, exchanged once:"
    return f"{what}\n\n{markdown_table(titles, lines)}"


def start(
    script: str, options: list[str], processes: int, threads: int, on_gpu: bool, gpu: int | None = None
) -> subprocess.Popen:
    """Start a script in so many processes.

    Args:
        gpu: the only one to be used.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | ({} if on_gpu else {"ACCELERATE_USE_CPU": "true"})
    environment |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    command = ["bash", REPOSITORY / "scripts" / "launch.sh", str(processes), REPOSITORY / script, *options]
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL)


def finish(run: subprocess.Popen) -> None:
    if run.wait() != 0:
        sys.exit(run.returncode)


def finetuning(options: list[str], output: Path, processes: int, threads: int, on_gpu: bool) -> float:
    """Images/s between two lines of the log."""
    name = f"finetune-{processes}-{threads}"
    finish(start("finetune.py", [*options, f"name={name}", "finetune.range=0"], processes, threads, on_gpu))
    lines = (output / name / "finetuned" / "0000-0500" / "log.jsonl").read_text().splitlines()
    return statistics.median([json.loads(line)["images_per_second"] for line in lines][1:])  # the first steps warm up


def sampling(options: list[str], output: Path, processes: int, threads: int, on_gpu: bool) -> float:
    """Images/s from the end of the first batch on."""
    name = f"sample-{processes}-{threads}"
    finish(start("sample_ddp.py", [*options, f"name={name}"], processes, threads, on_gpu))
    times = sorted(path.stat().st_mtime for path in (output / name / "samples" / "pretrained").glob("*.png"))
    batch_size = next(int(option.split("=")[1]) for option in options if option.startswith("sample.batch_size"))
    first = processes * batch_size
    return (len(times) - first) / (times[-1] - times[first - 1])


def two_ranges(options: list[str], processes: int, threads: int, num_gpus: int, on_gpu: bool) -> float:
    """Seconds for both: one command that takes one after the other, or two commands side by side."""
    commands = [[]] if processes == 1 else [["finetune.range=0"], ["finetune.range=1"]]
    begin = time.perf_counter()
    runs = []
    for number, extra in enumerate(commands):
        gpu = number % num_gpus if on_gpu else None
        runs.append(start("finetune.py", [*options, f"name=ranges-{processes}", *extra], 1, threads, on_gpu, gpu))
    for run in runs:
        finish(run)
    return time.perf_counter() - begin


def make_images(folder: Path, count: int) -> Path:
    """Noise as PNGs."""
    from torchvision.io import write_png

    (folder / "train").mkdir(parents=True)
    for number in range(count):
        write_png(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), str(folder / "train" / f"{number}.png"))
    return folder


if __name__ == "__main__":
    main()
