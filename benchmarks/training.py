"""An optimizer step of finetune.py's loop on a CPU, compared with a plain accelerate loop for the same work.

    python benchmarks/training.py
    python benchmarks/training.py --quick

The plain loop is written as diffusers' examples write theirs: images decoded in the loader, the loss read at every
step, the EMA parameter by parameter, torch's defaults for AdamW and the memory format. A GPU is measured by
gpu_first.py.
"""

import io
import multiprocessing
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import ceiling, has_bf16, parse, ratios, seconds, spread
from benchmarks.report import save
from benchmarks.trainers import make_accelerator, make_trainer
from benchmarks.unets import CHURCH, SMALL
from deme.config.trainings import Finetune
from deme.data.crops import CroppedImages
from deme.job.processes import peak_memory
from deme.models.denoisers import with_projections
from deme.report.tables import markdown_table
from deme.training.trainer import Trainer

NUM_IMAGES = 64
IMAGE_SIZE = 32
BATCH_SIZE = 4
TYPES = {"no": "float32", "bf16": "bfloat16"}  # whose matrix products set the limit
Step = Callable[[], None]


def main() -> None:
    arguments = parse(__doc__)
    precisions = ["no", "bf16"] if has_bf16() else ["no"]
    names = [f"{contender}, {precision}" for precision in precisions for contender in ("plain loop", "finetune.py")]
    limits = ceiling("cpu")
    context = multiprocessing.get_context("spawn")
    workers: dict[str, Connection] = {}
    for name in names:
        workers[name], theirs = context.Pipe()
        context.Process(target=work, args=(name, arguments.quick, theirs), daemon=True).start()
        theirs.close()  # so that a worker that dies is noticed
    for worker in workers.values():
        worker.recv()  # it is ready

    def step(name: str) -> float:
        workers[name].send("step")
        return workers[name].recv()

    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(3 if arguments.quick else 10):
        for name in names:
            seconds_of_step = step(name)
            if number > 1:  # AdamW's moments exist from the second step on
                taken[name].append(seconds_of_step)
    measured = {}
    for name in names:
        workers[name].send("measure")
        measured[name] = workers[name].recv()

    rows = []
    flops = measured["plain loop, no"]["flops"]
    for name, values in taken.items():
        precision = name.split(", ")[1]
        rate = flops / statistics.median(values)
        row = {"name": name, "seconds_per_step": values, "images_per_second": [BATCH_SIZE / value for value in values]}
        row |= {"times_plain": ratios(taken[f"plain loop, {precision}"], values)}
        row |= {"times_plain_float32": ratios(taken["plain loop, no"], values)}
        row |= {"flop_per_second": rate, "share_of_ceiling": rate / limits[TYPES[precision]]}
        rows.append(row | measured[name])
    titles = ["mixed_precision", "images/s", "× plain loop", "× plain loop, no", "peak memory, GiB", "TFLOP/s"]
    titles += ["share of the matrix products' rate"]
    lines = [
        [
            row["name"],
            spread(row["images_per_second"]),
            spread(row["times_plain"]),
            spread(row["times_plain_float32"]),
            f"{row['peak_memory'] / 2**30:.2f}",
            f"{row['flop_per_second'] / 1e12:.3f}",
            f"{row['share_of_ceiling']:.0%}",
        ]
        for row in rows
    ]
    ours = [row for row in rows if "shares" in row]
    parts = [[row["name"], *(f"{share:.1%}" for share in row["shares"].values())] for row in ours]
    network = "A small network" if arguments.quick else "Church's network"
    what = f"{network} at {IMAGE_SIZE}×{IMAGE_SIZE}, batch {BATCH_SIZE}; where a step's time goes:"
    shares = markdown_table(["", *ours[0]["shares"]], parts)
    tables = [markdown_table(titles, lines), what, shares]
    save("training", "cpu", rows, "\n\n".join(tables), limits)


def work(name: str, quick: bool, parent: Connection) -> None:
    """The process of one variant: takes a step at each request, and returns its measurements at the end."""
    contender, precision = name.split(", ")
    images = [smooth_noise(number, IMAGE_SIZE) for number in range(NUM_IMAGES)]
    torch.manual_seed(0)
    teacher = UNet2DModel(**(SMALL if quick else CHURCH) | {"sample_size": IMAGE_SIZE})
    if contender == "plain loop":
        step, trainer = plain_step(teacher, images, BATCH_SIZE, precision, "cpu"), None
    else:
        trainer = our_trainer(teacher, images, precision)
        step = trainer.step
    parent.send("ready")
    while parent.recv() == "step":
        parent.send(seconds(step, "cpu"))
    found = {"peak_memory": peak_memory("cpu")}
    if trainer is not None:
        found["shares"] = breakdown(trainer)
    else:  # the same work, in operations that torch can count
        with FlopCounterMode(display=False) as counter:
            step()
        found["flops"] = counter.get_total_flops()
    parent.send(found)


def smooth_noise(seed: int, size: int) -> np.ndarray:
    """uint8 (size, size, 3) that compresses about as well as a photograph."""
    small = np.random.default_rng(seed).integers(0, 256, (max(2, size // 8), max(2, size // 8), 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC))


def our_trainer(teacher: UNet2DModel, images: list, precision: str) -> Trainer:
    pixels = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    settings = Finetune(batch_size=BATCH_SIZE, mixed_precision=precision)
    accelerator = make_accelerator("cpu", precision)
    return make_trainer(accelerator, teacher, pixels, settings, Path("unused"), random_flip=True)


def plain_step(teacher: UNet2DModel, images: list, batch_size: int, precision: str, device: str) -> Step:
    """A plain loop's step of one micro-batch."""
    settings = Finetune()
    accelerator = make_accelerator(device, precision)
    size = teacher.config.sample_size
    scheduler = DDPMScheduler()
    augment = transforms.Compose(
        [
            transforms.Resize(size),
            transforms.CenterCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    files = [encoded(image) for image in images]

    def collate(rows: list[int]) -> torch.Tensor:
        return torch.stack([augment(Image.open(io.BytesIO(files[row])).convert("RGB")) for row in rows])

    data = DataLoader(range(len(files)), batch_size=batch_size, shuffle=True, collate_fn=collate)
    student = with_projections(teacher).train()
    teacher.requires_grad_(False)
    teacher.to(accelerator.device, torch.bfloat16 if precision == "bf16" else torch.float32)
    ema = EMAModel(student.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate)
    schedule = get_scheduler("constant", optimizer)
    student, optimizer, data, schedule = accelerator.prepare(student, optimizer, data, schedule)
    ema.to(accelerator.device)
    batches = endless(data)
    losses = []

    def step() -> None:
        clean = next(batches)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, 250, (len(clean),), device=clean.device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with accelerator.accumulate(student):
            prediction = student(noisy, timesteps).sample
            with torch.no_grad():
                reference = teacher(noisy.to(teacher.dtype), timesteps).sample
            loss = F.mse_loss(prediction.float(), noise) + F.mse_loss(prediction.float(), reference.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            ema.step(student.parameters())
        losses.append(loss.detach().item())

    return step


def encoded(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG")
    return file.getvalue()


def endless(data: DataLoader) -> Iterator[torch.Tensor]:
    while True:
        yield from data


def breakdown(trainer: Trainer, steps: int = 3) -> dict[str, float]:
    """Part of a step → its share of the step's time."""
    spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(part: str, owner: object, name: str) -> Iterator[None]:
        original = getattr(owner, name)

        def measured(*args, **kwargs):
            results = []
            spent[part] += seconds(lambda: results.append(original(*args, **kwargs)), "cpu")
            return results[0]

        setattr(owner, name, measured)
        try:
            yield
        finally:
            setattr(owner, name, original)

    with (
        timed("data", CroppedImages, "batch"),
        timed("forward", trainer.model, "forward"),
        timed("teacher", trainer.teacher, "forward"),
        timed("backward", trainer.accelerator, "backward"),
        timed("clipping", trainer.accelerator, "clip_grad_norm_"),
        timed("optimizer", trainer.optimizer, "step"),
        timed("EMA", trainer.state, "finish_step"),
    ):
        total = sum(seconds(trainer.step, "cpu") for _ in range(steps))
    return {part: value / total for part, value in spent.items()} | {"rest": 1 - sum(spent.values()) / total}


if __name__ == "__main__":
    main()
