"""Memory of finetuning Stable Diffusion v1-4's network: each part, and a real optimizer step.

    python benchmarks/text_to_image_memory.py                     # 16×16 latents: its peak on a CPU of 24 GiB
    python benchmarks/text_to_image_memory.py --device cuda       # 64×64, four images, VAE and text encoder elsewhere
    python benchmarks/text_to_image_memory.py --quick             # a small network

The bytes of the parts are counted on the meta device; the step is finetune.py's loop with latents that were encoded
before: student with projections, teacher in bf16, EMA, AdamW, gradient checkpointing.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn

from benchmarks.measure import memory_taken
from benchmarks.report import save
from benchmarks.trainers import OBJECTIVE, bare_run
from benchmarks.unets import STABLE_DIFFUSION
from deme.config.trainings import Finetune
from deme.data.examples import TrainingImages
from deme.models.denoisers import with_projections
from deme.models.encoders import Encoded, LatentsAndText
from deme.report.tables import markdown_table
from deme.training.state import Networks
from deme.training.trainer import Trainer

SMALL = {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 32}
FLOAT, HALF = 4, 2  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small network")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    settings = STABLE_DIFFUSION | {"sample_size": 64 if on_gpu else 16} | (SMALL if arguments.quick else {})
    images = 4 if on_gpu else 1

    parts = count_parts(settings)
    fixed = sum(parts.values())
    peak = step_peak(settings, images, arguments.device)
    size = settings["sample_size"]
    measured = f"peak of the {'GPU' if on_gpu else 'process'} in two steps, {images} of {size}×{size} latents"
    rows = [*parts.items(), ("together", fixed), (measured, peak), ("the same, less the parts", peak - fixed)]
    table = markdown_table(["part", "GB"], [[name, f"{count / 1e9:.2f}"] for name, count in rows])
    found = [{"name": name, "bytes": count} for name, count in rows]
    save("text_to_image_memory", arguments.device, found, table, ceiling={})


def count_parts(settings: dict) -> dict[str, int]:
    """Bytes of each part that stays in memory throughout a run, by name."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**settings)
        student = with_projections(unet).num_parameters()
    return {
        f"student, float32 ({student:,} parameters)": FLOAT * student,
        "its gradient": FLOAT * student,
        "EMA": FLOAT * student,
        "AdamW's two moments": 2 * FLOAT * student,
        "teacher, bf16": HALF * unet.num_parameters(),
    }


class EncodedNoise:
    """As cached latents and embeddings, without a meaning.

    Args:
        settings: of the network that they fit.
    """

    threads = 0

    def __init__(self, settings: dict):
        self.moments = (8, settings["sample_size"], settings["sample_size"])
        self.embeddings = (77, settings["cross_attention_dim"])

    def __len__(self) -> int:
        return 1000

    def batch(self, indices: Sequence[int], random: np.random.Generator | None = None) -> Encoded:
        """So many."""
        return Encoded(torch.randn(len(indices), *self.moments), torch.randn(len(indices), *self.embeddings))


def step_peak(settings: dict, images: int, device: str) -> int:
    """Bytes at the peak of two optimizer steps: AdamW's moments exist from the first one on."""
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16")
    teacher = UNet2DConditionModel(**settings)
    finetune = Finetune(batch_size=images, gradient_checkpointing=True, mixed_precision="bf16")
    encoder = LatentsAndText(AutoencoderKL(latent_channels=4), nn.Identity(), None)  # of which only settings are used
    networks = Networks(with_projections(teacher), teacher, DDPMScheduler(), encoder)
    with tempfile.TemporaryDirectory() as folder:
        run = bare_run(OBJECTIVE, finetune, Path(folder))
        trainer = Trainer(accelerator, networks, TrainingImages(EncodedNoise(settings), []), run)
        for _ in range(2):
            trainer.step()
    return memory_taken(device)


if __name__ == "__main__":
    main()
