"""Memory of finetuning Stable Diffusion v1-4's network: each part, and a real optimizer step.

    python benchmarks/text_to_image_memory.py                     # 16×16 latents: its peak on a CPU of 24 GiB
    python benchmarks/text_to_image_memory.py --device cuda       # 64×64, four images, VAE and text encoder elsewhere
    python benchmarks/text_to_image_memory.py --lora 16           # a LoRA of this rank instead, and an ensemble of four
    python benchmarks/text_to_image_memory.py --quick             # a small network

The bytes of the parts are counted on the meta device; the step is finetune.py's loop with latents that were encoded
before: student with projections, teacher in bf16, EMA, AdamW, gradient checkpointing. With --lora the frozen base is in
bf16, and the teacher shares it.
"""

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

from benchmarks.measure import memory_taken, parse
from benchmarks.report import save
from benchmarks.trainers import OBJECTIVE, bare_run
from benchmarks.unets import STABLE_DIFFUSION
from deme.config.trainings import Finetune
from deme.data.examples import TrainingImages
from deme.method.process import process_of
from deme.models.adapters import new_lora, sharing_weights
from deme.models.denoisers import with_projections
from deme.models.encoders import Encoded, LatentsAndText
from deme.report.tables import markdown_table
from deme.training.state import Networks, with_new_lora
from deme.training.trainer import Trainer

SMALL = {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 32}
FLOAT, HALF = 4, 2  # bytes
EXPERTS = 4  # of an ensemble


def main() -> None:
    arguments = parse(__doc__, lora={"type": int, "metavar": "RANK"})
    on_gpu = arguments.device == "cuda"
    settings = STABLE_DIFFUSION | {"sample_size": 64 if on_gpu else 16} | (SMALL if arguments.quick else {})
    images = 4 if on_gpu else 1

    lora = {} if arguments.lora is None else {"lora_rank": arguments.lora, "base_precision": "bf16"}
    finetune = Finetune(batch_size=images, gradient_checkpointing=True, mixed_precision="bf16", **lora)

    parts = count_lora_parts(settings, finetune) if lora else count_parts(settings)
    fixed = sum(parts.values())
    peak = step_peak(settings, finetune, arguments.device)
    size = settings["sample_size"]
    measured = f"peak of the {'GPU' if on_gpu else 'process'} in two steps, {images} of {size}×{size} latents"
    rows = [*parts.items(), ("together", fixed), (measured, peak), ("the same, less the parts", peak - fixed)]
    if lora:
        rows.append((f"ensemble of {EXPERTS} LoRAs on one base, bf16", ensemble_bytes(settings, finetune)))
    table = markdown_table(["part", "GB"], [[name, f"{count / 1e9:.2f}"] for name, count in rows])
    found = [{"name": name, "bytes": count} for name, count in rows]
    save("text_to_image_memory" + "_lora" * bool(lora), arguments.device, found, table, ceiling={})


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


def count_lora_parts(settings: dict, finetune: Finetune) -> dict[str, int]:
    """The same where a LoRA is trained: bytes of the parameters, each counted once."""
    with torch.device("meta"):
        base = frozen_base(settings)
        student = new_lora(base, finetune)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    adapter, whole = sum(part.nbytes for part in trained), bytes_of(student, sharing_weights(base))
    return {
        f"base, bf16, of student and teacher ({base.num_parameters():,} parameters)": whole - adapter,
        f"LoRA of rank {finetune.lora_rank}, float32 ({adapter // FLOAT:,} parameters)": adapter,
        "its gradient": adapter,
        "EMA": adapter,
        "AdamW's two moments": 2 * adapter,
    }


def frozen_base(settings: dict) -> nn.Module:
    """As `freeze_base` makes it, but not in float32 first, which would be the peak."""
    torch.set_default_dtype(torch.bfloat16)
    base = UNet2DConditionModel(**settings).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    for module in base.modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.float()
    return base


def ensemble_bytes(settings: dict, finetune: Finetune) -> int:
    """Bytes of an ensemble's parameters, each counted once, with the base in bf16."""
    with torch.device("meta"):
        base = frozen_base(settings)
        return bytes_of(*(new_lora(base, finetune) for _ in range(EXPERTS)))


def bytes_of(*networks: nn.Module) -> int:
    """Bytes of all parameters, each counted once."""
    unique = {parameter for network in networks for parameter in network.parameters()}
    return sum(parameter.nbytes for parameter in unique)


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


def step_peak(settings: dict, finetune: Finetune, device: str) -> int:
    """Bytes at the peak of two optimizer steps: AdamW's moments exist from the first one on."""
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16")
    encoder = LatentsAndText(AutoencoderKL(latent_channels=4), [], [])  # of which only settings are used
    if finetune.lora_rank is None:
        teacher = UNet2DConditionModel(**settings)
        networks = Networks(with_projections(teacher), teacher, process_of(DDPMScheduler()), encoder)
    else:
        start = Networks(frozen_base(settings), None, process_of(DDPMScheduler()), encoder)
        networks = with_new_lora(start, finetune, OBJECTIVE)
    with tempfile.TemporaryDirectory() as folder:
        run = bare_run(OBJECTIVE, finetune, Path(folder))
        images = TrainingImages(EncodedNoise(settings), [], 8 * settings["sample_size"])
        trainer = Trainer(accelerator, networks, images, run)
        for _ in range(2):
            trainer.step()
    return memory_taken(device)


if __name__ == "__main__":
    main()
