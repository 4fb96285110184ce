"""The published networks at full size: one real optimizer step, one image, on the CPU."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel

from benchmarks.unets import CHURCH, CIFAR10
from deme.config import Finetune
from deme.data import CroppedImages
from deme.projection import ProjectedUNet2DModel
from deme.sampling import sample_images
from deme.training import Objective, Trainer

SCHEDULER = DDPMScheduler()
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
    student = ProjectedUNet2DModel.from_unet(pretrained)
    blocks = (*student.down_blocks, student.mid_block, *student.up_blocks)
    assert [block.projection.out_channels for block in blocks] == channels
    assert pretrained.num_parameters() / 1e6 == pytest.approx(millions, abs=0.05)
    assert student.num_parameters() / 1e6 == pytest.approx(projected_millions, abs=0.05)

    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    size = settings["sample_size"]
    images = CroppedImages([torch.randint(0, 256, (3, size, size), dtype=torch.uint8)], size, False, False)
    finetune = Finetune(max_steps=1, batch_size=1, checkpoint_every=1)
    objective = Objective("full size", (2, 0, 250), (0, 250), global_probability=0.3, consistency_weight=1.0)
    trainer = Trainer(Accelerator(cpu=True), student, pretrained, SCHEDULER, images, objective, finetune, 0, tmp_path)
    assert trainer.run()
    assert all(
        not torch.equal(weight, before[name]) for name, weight in student.state_dict().items() if "weight" in name
    )
    image = sample_images(lambda _: student.eval(), SCHEDULER, [0], (3, size, size), "cpu", num_inference_steps=1)
    assert image.shape == (1, 3, size, size)
    assert image.float().std() > 0
