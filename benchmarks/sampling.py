"""Sampling on a CPU, noise to PNG: sample_ddp.py's path against diffusers' DDIMPipeline and two network calls per step.

A second table shows what the choices behind it are worth: memory format, compiling, threads, batch. A GPU is
measured by gpu_first.py.

python benchmarks/sampling.py
python benchmarks/sampling.py --quick
"""

import copy
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import alternate, parse, ratios, spread
from benchmarks.report import save
from benchmarks.unets import CHURCH, CIFAR10
from deme.config.sections import Sample
from deme.data.drawing import draw
from deme.job.files import read_json
from deme.models.denoisers import freeze
from deme.models.drawing import Drawing
from deme.models.encoders import Pixels
from deme.report.tables import markdown_table

DIGITS = Path(__file__).resolve().parent.parent / "assets" / "digits" / "unet"


def main() -> None:
    arguments = parse(__doc__)
    repeats = 1 if arguments.quick else 3
    shapes = {
        "CIFAR-10": (CIFAR10, 32, (8, 16, 10)),  # batch, images, steps
        "Church": (CHURCH, 32, (8, 16, 10)),
        "digits": (read_json(DIGITS / "config.json"), 8, (256, 2048, 50)),
    }
    rows = []
    for name, (settings, size, work) in shapes.items():
        batch, images, steps = (2, 2, 2) if arguments.quick else work
        unet = UNet2DModel.from_config(settings | {"sample_size": size}).eval()
        rows += measure(f"{name}, {size}×{size}", unet, batch, images, steps, repeats)
    titles = ["", "batch", "steps", "images/s", "× DDIMPipeline", "× two calls per step", "share without network"]
    lines = [
        [f"{row['unet']}: {row['name']}", str(row["batch"]), str(row["steps"]), spread(row["images_per_second"])]
        + [spread(row[key]) for key in ("times_pipeline", "times_two_calls")]
        + [f"{row['share_without_network']:.1%}" if "share_without_network" in row else "-"]
        for row in rows
    ]
    settings, size, (batch, *_) = shapes["CIFAR-10" if arguments.quick else "Church"]
    unet = UNet2DModel.from_config(settings | {"sample_size": size}).eval()
    found = choices(unet, batch, repeats, compiled=not arguments.quick)
    values = [[name, *(spread(row["images_per_second"]) for row in found[name].values())] for name in found]
    what = f"{'CIFAR-10' if arguments.quick else 'Church'}, {size}×{size}, batch {batch}: images/s of one network call"
    second = markdown_table([what, *next(iter(found.values()))], values)
    save("sampling", "cpu", [*rows, found], f"{markdown_table(titles, lines)}\n\n{second}")


def measure(title: str, unet: nn.Module, batch: int, images: int, steps: int, repeats: int) -> list[dict]:
    """One row per variant."""
    stock = copy.deepcopy(unet)
    pipeline = DDIMPipeline(stock, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    seeds = list(range(images))

    def ours(precision: str, network: Callable | None = None) -> Callable[[], None]:
        network = network or freeze(copy.deepcopy(unet), "cpu", precision)
        encoder = Pixels(unet.config.in_channels)
        encoder.prepare(torch.device("cpu"), precision)

        def work() -> None:
            settings = Sample(batch_size=batch, num_inference_steps=steps, mixed_precision=precision)
            drawing = Drawing(DDPMScheduler(), encoder, settings, shape, torch.device("cpu"))
            with tempfile.TemporaryDirectory() as folder:
                draw(drawing, lambda _: network, seeds, {}, Path(folder), is_silent=True)

        return work

    def autocast_images(part: list[int]) -> list[Image.Image]:
        with torch.autocast("cpu", torch.bfloat16):  # a bfloat16 network itself makes no images there
            return pipeline_images(pipeline, part, steps)

    pipeline_name = "DDIMPipeline, float32"
    two_calls_name = "two calls per step, float32"
    precisions = {"sample_ddp.py, no": "no", "sample_ddp.py, bf16": "bf16"}
    contenders = {
        pipeline_name: lambda: save_loop(lambda part: pipeline_images(pipeline, part, steps), seeds, batch),
        two_calls_name: lambda: save_loop(lambda part: two_call_images(stock, part, steps), seeds, batch),
        **{name: ours(precision) for name, precision in precisions.items()},
        "DDIMPipeline, bf16 autocast": lambda: save_loop(autocast_images, seeds, batch),
        "without network": ours("no", lambda images, *_, **__: (images,)),
    }
    taken = alternate(contenders, repeats, "cpu")
    rest = statistics.median(taken.pop("without network"))
    rows = []
    for name, values in taken.items():
        row = {"unet": title, "name": name, "batch": batch, "steps": steps}
        row |= {"images_per_second": [images / value for value in values]}
        row |= {
            "times_pipeline": ratios(taken[pipeline_name], values),
            "times_two_calls": ratios(taken[two_calls_name], values),
        }
        if name in precisions:
            row |= {"share_without_network": rest / statistics.median(values)}
        rows.append(row)
    return rows


def choices(unet: nn.Module, batch: int, repeats: int, compiled: bool) -> dict[str, dict[str, dict]]:
    """Choice → precision → its images/s; what sample_ddp.py does first."""
    threads = torch.get_num_threads()

    def network(choice: str, precision: str) -> Callable:
        if choice in ("contiguous", "channels_last"):
            layout = torch.channels_last if choice == "channels_last" else torch.contiguous_format
            return copy.deepcopy(unet).to(memory_format=layout)
        if choice == "compiled":
            return torch.compile(copy.deepcopy(unet).to(memory_format=torch.channels_last))  # it sees the convolutions
        return freeze(copy.deepcopy(unet), "cpu", precision)

    def call(choice: str, precision: str) -> tuple[Callable[[], None], int]:
        size = int(choice.removeprefix("batch ")) if choice.startswith("batch ") else batch
        predict = network(choice, precision)
        channels = unet.config.in_channels
        side = unet.config.sample_size
        images = torch.randn(size, channels, side, side)
        timestep = torch.tensor(500)

        def work() -> None:
            torch.set_num_threads(1 if choice == "1 thread" else threads)
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
                predict(images, timestep)
            torch.set_num_threads(threads)

        return work, size

    names = ["as sample_ddp.py has it", "contiguous", "channels_last"]
    names += ["compiled"] if compiled else []
    names += ["1 thread"]
    names += [f"batch {size}" for size in (batch // 8, batch // 2, 2 * batch, 4 * batch) if size > 0]
    found: dict[str, dict[str, dict]] = {name: {} for name in names}
    for precision in ("no", "bf16"):
        calls = {name: call(name, precision) for name in names}
        taken = alternate({name: work for name, (work, _) in calls.items()}, repeats, "cpu")
        for name, values in taken.items():
            found[name][precision] = {"images_per_second": [calls[name][1] / value for value in values]}
    return found


def save_loop(images_of: Callable[[list[int]], list[Image.Image]], seeds: list[int], batch: int) -> None:
    """Draw batch by batch and save each image, as scripts around a pipeline do."""
    with tempfile.TemporaryDirectory() as folder:
        for start in range(0, len(seeds), batch):
            part = seeds[start : start + batch]
            for seed, image in zip(part, images_of(part), strict=True):
                image.save(Path(folder) / f"{seed:06d}.png")


def pipeline_images(pipeline: DDIMPipeline, seeds: list[int], steps: int) -> list[Image.Image]:
    generators = [torch.Generator(pipeline.device).manual_seed(seed) for seed in seeds]
    return pipeline(batch_size=len(seeds), generator=generators, num_inference_steps=steps).images


@torch.no_grad()
def two_call_images(unet: nn.Module, seeds: list[int], steps: int) -> list[Image.Image]:
    """DDIM with two network calls on the same input per step."""
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(steps)
    size = unet.config.sample_size
    channels = unet.config.in_channels
    torch.manual_seed(seeds[0])
    images = torch.randn(len(seeds), channels, size, size, device=unet.device, dtype=unet.dtype)
    for timestep in scheduler.timesteps:
        unet(images, timestep)
        images = scheduler.step(unet(images, timestep).sample, timestep, images).prev_sample
    return DDIMPipeline.numpy_to_pil((images / 2 + 0.5).clamp(0, 1).float().cpu().permute(0, 2, 3, 1).numpy())


if __name__ == "__main__":
    main()
