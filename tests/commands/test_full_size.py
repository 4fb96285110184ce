"""The published networks at full size: one real optimizer step, one image, on the CPU."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, UNet2DModel

from benchmarks.text_to_image_memory import count_lora_parts, ensemble_bytes
from benchmarks.trainers import make_trainer
from benchmarks.unets import CHURCH, CIFAR10, STABLE_DIFFUSION
from deme.config.trainings import Finetune
from deme.method.sampling import sample_images

pytestmark = pytest.mark.long

CIFAR10_PROJECTIONS = [128, 256, 256, 256, 256, 256, 256, 256, 128]
CHURCH_PROJECTIONS = [128, 128, 256, 256, 512, 512, 512, 512, 512, 256, 256, 128, 128]


@pytest.mark.parametrize(
    ("settings", "millions", "projected_millions", "channels"),
    [(CIFAR10, 35.7, 36.2, CIFAR10_PROJECTIONS), (CHURCH, 113.7, 115.3, CHURCH_PROJECTIONS)],
    ids=["cifar10", "church"],
)
def test_one_step_and_one_image(tmp_path, settings, millions, projected_millions, channels):
    torch.manual_seed(0)
    pretrained = UNet2DModel(**settings)
    size = settings["sample_size"]
    pixels = [torch.randint(0, 256, (3, size, size), dtype=torch.uint8)]
    finetune = Finetune(max_steps=1, batch_size=1, checkpoint_every=1)
    trainer = make_trainer(Accelerator(cpu=True), pretrained, pixels, finetune, tmp_path)
    student = trainer.student
    blocks = (*student.down_blocks, student.mid_block, *student.up_blocks)
    assert [block.projection.out_channels for block in blocks] == channels
    assert pretrained.num_parameters() / 1e6 == pytest.approx(millions, abs=0.05)
    assert student.num_parameters() / 1e6 == pytest.approx(projected_millions, abs=0.05)

    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    assert trainer.run()
    assert all(
        not torch.equal(weight, before[name]) for name, weight in student.state_dict().items() if "weight" in name
    )
    image = sample_images(lambda _: student.eval(), DDIMScheduler(), [0], (3, size, size), "cpu", num_inference_steps=1)
    assert image.shape == (1, 3, size, size)
    assert image.std() > 0


def test_loras_on_stable_diffusion_hold_one_base():
    """860 million parameters in bf16, once for student and teacher, once for an ensemble; on the meta device."""
    finetune = Finetune(lora_rank=16, mixed_precision="bf16", base_precision="bf16")
    base, lora, *others = count_lora_parts(STABLE_DIFFUSION, finetune).values()
    assert base == pytest.approx(2 * 859.5e6, rel=1e-3)
    assert lora == 4 * 3_188_736  # the Hub's LoRAs of this rank on Stable Diffusion 1 have as many
    assert sum(others) == 4 * lora
    assert ensemble_bytes(STABLE_DIFFUSION, finetune) == base + 4 * lora
