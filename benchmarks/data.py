"""Batches of training images: cached or decoded on the fly, compared with decoding in the loader.

python benchmarks/data.py            # CIFAR-10 from ../shared/cifar10 where it is there, and images made here
python benchmarks/data.py --quick
"""

import statistics
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import alternate, parse, ratios, seconds, spread
from benchmarks.report import save
from benchmarks.unets import CHURCH
from deme.config.sections import Data
from deme.config.trainings import Finetune
from deme.data.crops import CroppedImages
from deme.data.decoding import ahead, available_threads
from deme.data.examples import load_training_images
from deme.data.opening import open_source
from deme.report.tables import markdown_table
from scripts.estimate import GPU_TFLOPS, unet_cost

CIFAR10 = Path(__file__).resolve().parent.parent.parent / "shared" / "cifar10"
BATCH_SIZE = 64


def main() -> None:
    arguments = parse(__doc__)
    rows = []
    repeats, count = (1, 64) if arguments.quick else (3, 2000)
    with tempfile.TemporaryDirectory() as folder:
        make_photographs(Path(folder) / "photographs", count)
        photographs = Data(name=f"{folder}/photographs", label_column=None, resolution=256)
        rows += compare("JPEGs of 384×288 at 256×256", photographs, Path(folder), repeats)
        if CIFAR10.exists() and not arguments.quick:
            cifar10 = Data(name=str(CIFAR10), image_column="image", split="train[:20%]", resolution=32)
            rows += compare("CIFAR-10, JPEGs at 32×32", cifar10, Path(folder), repeats)
    titles = [
        "batches of 64",
        "images/s",
        "× loader",
        "images/s per thread",
        "images/s of the first pass, which decodes",
    ]
    lines = [
        [
            f"{row['data']}: {row['name']}",
            spread(row["images_per_second"]),
            spread(row["times_loader"]),
            spread([value / row["threads"] for value in row["images_per_second"]]) if "threads" in row else "-",
            f"{row['first_pass']:,.0f}" if "first_pass" in row else "-",
        ]
        for row in rows
    ]
    save("data", "cpu", rows, f"{markdown_table(titles, lines)}\n\n{cores_of_a_gpu(rows)}")


def cores_of_a_gpu(rows: list[dict]) -> str:
    """One line: how many cores decode images for one GPU that finetunes Church's network."""
    *_, flops = unet_cost(CHURCH, Finetune())
    passes = 4  # a backward pass costs two forward passes, the teacher one
    needed = GPU_TFLOPS * 1e12 / (passes * flops)
    [alone] = [row for row in rows if row.get("threads") == 1 and "256×256" in row["data"]]
    per_core = statistics.median(alone["images_per_second"])
    return (
        f"Finetuning Church's network at 256×256 takes {needed:.0f} images/s at {GPU_TFLOPS:g} TFLOP/s, the guess of "
        f"scripts/estimate.py for one GPU: decoding them on the fly keeps {needed / per_core:.2f} cores busy."
    )


def compare(title: str, data: Data, folder: Path, repeats: int) -> list[dict]:
    """One row per variant."""
    found: dict[str, CroppedImages] = {}

    def load(name: str, **settings: float) -> float:
        part = Data(**{**vars(data), **settings})
        return seconds(
            lambda: found.update({name: load_training_images(open_source(part), 3, folder / "cache").training}), "cpu"
        )

    first = {"in memory": load("in memory", cache_gb=100.0), "mapped file": load("mapped file", cache_gb=0.0)}
    load("on the fly", cache_gb=0.0, cache_disk_gb=0.0)
    streamed = found.pop("on the fly")
    count = len(found["in memory"])
    rows = datasets.load_dataset(data.name, split=data.split)
    contenders = {"decoding in the loader": lambda: loader_epoch(rows, data)}
    contenders |= {name: lambda images=images: cached_epoch(images) for name, images in found.items()}
    threads = {f"on the fly, {number} thread(s)": number for number in sorted({1, available_threads()})}
    contenders |= {name: lambda number=number: cached_epoch(streamed, number) for name, number in threads.items()}
    taken = alternate(contenders, repeats, "cpu")
    result = []
    for name, values in taken.items():
        row = {"data": title, "name": name, "images_per_second": [count / value for value in values]}
        row |= {"times_loader": ratios(taken["decoding in the loader"], values)}
        row |= {"first_pass": count / first[name]} if name in first else {}
        result.append(row | ({"threads": threads[name]} if name in threads else {}))
    return result


def cached_epoch(images: CroppedImages, threads: int = 0) -> None:
    """An epoch of batches, as in deme/data/examples.py."""
    order = np.random.default_rng(0).permutation(len(images))

    def batch(start: int) -> torch.Tensor:
        return images.batch(order[start : start + BATCH_SIZE], np.random.default_rng(start))

    for pixels in ahead(batch, range(0, len(order), BATCH_SIZE), threads):
        pixels.float().div_(127.5).sub_(1)


def loader_epoch(rows: datasets.Dataset, data: Data) -> None:
    """An epoch of batches, as in diffusers' examples."""
    augment = transforms.Compose(
        [
            transforms.Resize(data.resolution),
            (transforms.CenterCrop if data.center_crop else transforms.RandomCrop)(data.resolution),
            transforms.RandomHorizontalFlip() if data.random_flip else transforms.Lambda(lambda image: image),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )

    def collate(examples: list[dict]) -> torch.Tensor:
        return torch.stack([augment(example[data.image_column].convert("RGB")) for example in examples])

    for _ in DataLoader(rows, batch_size=BATCH_SIZE, shuffle=True, collate_fn=collate):
        pass


def make_photographs(folder: Path, count: int) -> None:
    """JPEGs of smooth noise, about as large as photographs."""
    random = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    for number in range(count):
        small = random.integers(0, 256, (36, 48, 3), dtype=np.uint8)
        Image.fromarray(small).resize((384, 288), Image.Resampling.BICUBIC).save(folder / "train" / f"{number}.jpg")


if __name__ == "__main__":
    main()
