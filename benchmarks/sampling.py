"""Sampling, noise to PNG on disk: sample_ddp.py's path against diffusers' DDIMPipeline and two network calls per step.

A second table shows what the choices behind it are worth: memory format, compiling, threads, batch.

python benchmarks/sampling.py
python benchmarks/sampling.py --device cuda      # Church's network at 256×256, the others in fp16
python benchmarks/sampling.py --quick
"""

import copy
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import alternate, parse, ratios, spread
from benchmarks.report import save
from benchmarks.unets import CHURCH, CIFAR10
from deme.config.sections import Sample
from deme.job.files import read_json
from deme.models.encoders import Pixels
from deme.models.inference import AUTOCAST_TYPES, freeze
from deme.report.tables import markdown_table
from sample_ddp import draw

GRAPHS = "compiled, CUDA graphs"
DIGITS = Path(__file__).resolve().parent.parent / "assets" / "digits" / "unet"


def main() -> None:
    arguments = parse(__doc__)
    on_gpu = arguments.device == "cuda"
    repeats = 1 if arguments.quick else 3
    shapes = {
        "CIFAR-10": (CIFAR10, 32, (256, 512, 50) if on_gpu else (8, 16, 10)),  # batch, images, steps
        "Church": (CHURCH, 256, (32, 64, 50)) if on_gpu else (CHURCH, 32, (8, 16, 10)),
        "digits": (read_json(DIGITS / "config.json"), 8, (256, 2048, 50)),
    }
    rows = []
    for name, (settings, size, work) in shapes.items():
        batch, images, steps = (2, 2, 2) if arguments.quick else work
        unet = UNet2DModel.from_config(settings | {"sample_size": size}).eval()
        rows += measure(f"{name}, {size}×{size}", unet, batch, images, steps, repeats, on_gpu)
    titles = ["", "batch", "steps", "images/s", "× DDIMPipeline", "× two calls per step", "share without network"]
    lines = [
        [f"{row['unet']}: {row['name']}", str(row["batch"]), str(row["steps"]), spread(row["images_per_second"])]
        + [spread(row[key]) for key in ("times_pipeline", "times_two_calls")]
        + [f"{row['share_without_network']:.1%}" if "share_without_network" in row else "-"]
        for row in rows
    ]
    settings, size, (batch, *_) = shapes["CIFAR-10" if arguments.quick else "Church"]
    unet = UNet2DModel.from_config(settings | {"sample_size": size}).eval()
    found = choices(unet, batch, repeats, arguments.device, compiled=not arguments.quick)
    values = [[name, *(spread(row["images_per_second"]) for row in found[name].values())] for name in found]
    what = f"{'CIFAR-10' if arguments.quick else 'Church'}, {size}×{size}, batch {batch}: images/s of one network call"
    second = markdown_table([what, *next(iter(found.values()))], values)
    save("sampling", arguments.device, [*rows, found], f"{markdown_table(titles, lines)}\n\n{second}")


def measure(title: str, unet: nn.Module, batch: int, images: int, steps: int, repeats: int, on_gpu: bool) -> list[dict]:
    """One row per contender."""
    device = "cuda" if on_gpu else "cpu"
    stock_type = torch.float16 if on_gpu else torch.float32
    stock = UNet2DModel.from_config(unet.config)
    stock.load_state_dict(unet.state_dict())
    stock = stock.eval().to(device, stock_type)
    pipeline = DDIMPipeline(stock, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    seeds = list(range(images))

    def ours(precision: str, network: Callable | None = None) -> Callable[[], None]:
        network = network or freeze(copy.deepcopy(unet), device, precision)
        encoder = Pixels(unet.config.in_channels)
        encoder.prepare(torch.device(device), precision)

        def work() -> None:
            settings = Sample(batch_size=batch, num_inference_steps=steps, mixed_precision=precision)
            AcceleratorState._reset_state(reset_partial_state=True)
            accelerator = Accelerator(cpu=not on_gpu, mixed_precision=precision)
            with tempfile.TemporaryDirectory() as folder:
                drawn = (DDPMScheduler(), encoder, shape, seeds, {}, Path(folder))
                draw(accelerator, settings, lambda _: network, *drawn)

        return work

    autocast_type = torch.float16 if on_gpu else torch.bfloat16  # a bfloat16 network itself makes no images there
    whole = DDIMPipeline(copy.deepcopy(unet).to(device), DDIMScheduler()) if on_gpu else pipeline
    whole.set_progress_bar_config(disable=True)

    def autocast_images(part: list[int]) -> list[Image.Image]:
        with torch.autocast(device, autocast_type):
            return pipeline_images(whole, part, steps)

    dtype = str(stock_type).removeprefix("torch.")
    pipeline_name = f"DDIMPipeline, {dtype}"
    autocast_name = "fp16" if on_gpu else "bf16"
    two_calls_name = f"two calls per step, {dtype}"
    precisions = {"sample_ddp.py, no": "no", "sample_ddp.py, bf16": "bf16"}
    precisions |= {"sample_ddp.py, fp16": "fp16"} if on_gpu else {}
    contenders = {
        pipeline_name: lambda: save_loop(lambda part: pipeline_images(pipeline, part, steps), seeds, batch),
        two_calls_name: lambda: save_loop(lambda part: two_call_images(stock, part, steps), seeds, batch),
        **{name: ours(precision) for name, precision in precisions.items()},
        f"DDIMPipeline, {autocast_name} autocast": lambda: save_loop(autocast_images, seeds, batch),
        "without network": ours("no", lambda images, *_, **__: (images,)),
    }
    taken = alternate(contenders, repeats, device)
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


def choices(unet: nn.Module, batch: int, repeats: int, device: str, compiled: bool) -> dict[str, dict[str, dict]]:
    """Choice → precision → its images/s; what sample_ddp.py does first."""
    precisions = ("no", "bf16", "fp16") if device == "cuda" else ("no", "bf16")
    threads = torch.get_num_threads()

    def network(choice: str, precision: str) -> Callable:
        if choice in ("contiguous", "channels_last"):
            layout = torch.channels_last if choice == "channels_last" else torch.contiguous_format
            return copy.deepcopy(unet).to(device, memory_format=layout)
        frozen = freeze(copy.deepcopy(unet), device, precision)
        if not choice.startswith("compiled"):
            return frozen
        plain = copy.deepcopy(unet).to(device, memory_format=torch.channels_last)  # whose convolutions it can see
        return torch.compile(plain, mode="reduce-overhead" if choice == GRAPHS else None)

    def call(choice: str, precision: str) -> tuple[Callable[[], None], int]:
        size = int(choice.removeprefix("batch ")) if choice.startswith("batch ") else batch
        predict = network(choice, precision)
        channels = unet.config.in_channels
        side = unet.config.sample_size
        images = torch.randn(size, channels, side, side, device=device)
        timestep = torch.tensor(500, device=device)
        dtype = AUTOCAST_TYPES[precision] or torch.bfloat16

        def work() -> None:
            torch.set_num_threads(1 if choice == "1 thread" else threads)
            with torch.inference_mode(), torch.autocast(device, dtype, enabled=precision != "no"):
                predict(images, timestep)
            torch.set_num_threads(threads)

        return work, size

    names = ["as sample_ddp.py has it", "contiguous", "channels_last"]
    names += ["compiled"] if compiled else []
    names += [GRAPHS] if compiled and device == "cuda" else []
    names += [] if device == "cuda" else ["1 thread"]
    names += [f"batch {size}" for size in (batch // 8, batch // 2, 2 * batch, 4 * batch) if size > 0]
    found: dict[str, dict[str, dict]] = {name: {} for name in names}
    for precision in precisions:
        calls = {name: call(name, precision) for name in names}
        taken = alternate({name: work for name, (work, _) in calls.items()}, repeats, device)
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
    """DDIM whose network is called twice with the same input in every step."""
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
