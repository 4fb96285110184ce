import copy
import json

import pytest
import torch
from conftest import tiny_unet
from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models import ModelMixin
from text_to_image import tiny_conditional_unet

from deme.method.projection import PROJECTION_SUFFIX, with_identity_projections
from deme.models.denoisers import load_denoiser, with_projections
from deme.projection import ProjectedUNet2DConditionModel, ProjectedUNet2DModel

INPUT = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
TIMESTEPS = torch.tensor([1, 500, 999])


def projections(unet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in unet.named_parameters() if name.endswith(PROJECTION_SUFFIX)}


@torch.no_grad()
def randomize(unet: torch.nn.Module) -> None:
    for weight in projections(unet).values():
        weight.add_(0.1 * torch.randn_like(weight))


@torch.no_grad()
def output(unet: torch.nn.Module) -> torch.Tensor:
    return unet(INPUT, TIMESTEPS).sample


def test_identity_projections_change_no_bit():
    unet = tiny_unet()
    assert torch.equal(output(with_projections(unet).eval()), output(unet))


def test_channel_counts_are_those_of_the_blocks_outputs():
    """(8, 16, 16) channels: down 8 16 16, mid 16, up 16 16 8."""
    unet = tiny_unet(
        block_out_channels=[8, 16, 16],
        down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    )
    shapes = {name: tuple(w.shape) for name, w in projections(with_projections(unet)).items()}
    blocks = [
        "down_blocks.0",
        "down_blocks.1",
        "down_blocks.2",
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
        "up_blocks.2",
    ]
    channels = [8, 16, 16, 16, 16, 16, 8]
    assert shapes == {f"{b}{PROJECTION_SUFFIX}": (c, c, 1, 1) for b, c in zip(blocks, channels, strict=True)}


@pytest.mark.parametrize(
    "settings",
    [
        {"mid_block_type": None},
        {
            "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"],
            "up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D"],
        },
        {"down_block_types": ["ResnetDownsampleBlock2D"] * 2, "up_block_types": ["ResnetUpsampleBlock2D"] * 2},
    ],
)
def test_any_architecture(settings):
    if "SkipDownBlock2D" in settings.get("down_block_types", []):
        settings = settings | {
            "block_out_channels": [32, 64],
            "norm_num_groups": 32,
            "in_channels": 3,
            "out_channels": 3,
        }
        unet, x = tiny_unet(**settings), INPUT.expand(3, 3, 8, 8)
    else:
        unet, x = tiny_unet(**settings), INPUT
    projected = with_projections(unet).eval()
    with torch.no_grad():
        assert torch.equal(projected(x, TIMESTEPS).sample, unet(x, TIMESTEPS).sample)


def test_skip_connections_are_taken_before_the_projection():
    """A zero projection after the last down block leaves its skip connections, so the output still depends on them."""
    projected = with_projections(tiny_unet()).eval()
    seen = []
    projected.up_blocks[0].register_forward_pre_hook(lambda _block, inputs: seen.append(inputs[1]))
    output(projected)
    with torch.no_grad():
        projected.down_blocks[1].projection.weight.zero_()
    output(projected)
    for before, after in zip(*seen, strict=True):
        assert torch.equal(before, after)
        assert before.abs().sum() > 0


def test_every_projection_gets_a_gradient():
    projected = with_projections(tiny_unet())
    projected(INPUT, TIMESTEPS).sample.square().mean().backward()
    for name, weight in projections(projected).items():
        assert weight.grad.abs().sum() > 0, name


def test_save_and_load(tmp_path):
    projected = with_projections(tiny_unet()).eval()
    randomize(projected)
    projected.save_pretrained(tmp_path)
    loaded = ProjectedUNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(output(loaded), output(projected))
    assert loaded.config["_class_name"] == "ProjectedUNet2DModel"
    assert loaded.config.block_out_channels == projected.config.block_out_channels
    assert isinstance(loaded, ModelMixin)
    assert not torch.equal(output(projected), output(UNet2DModel.from_config(projected.config)))


def test_deep_copies_do_not_share_projections():
    projected = with_projections(tiny_unet()).eval()
    before, twin = output(projected), copy.deepcopy(projected)
    randomize(twin)
    assert torch.equal(output(projected), before)
    assert not torch.equal(output(twin), before)


def test_missing_projections_are_identities():
    name = f"mid_block{PROJECTION_SUFFIX}"
    finetuned = {"w": torch.ones(1), name: 3 * torch.eye(2)[:, :, None, None]}
    base = with_identity_projections({"w": torch.zeros(1)}, finetuned)
    assert torch.equal(base[name], torch.eye(2)[:, :, None, None])
    assert with_identity_projections(finetuned, finetuned) == finetuned


def test_a_folder_made_when_all_modules_lay_side_by_side_loads(tmp_path):
    """Its model_index.json names deme.projection and the class, as merge.py has always written them."""
    projected = with_projections(tiny_unet()).eval()
    randomize(projected)
    projected.save_pretrained(tmp_path / "unet")
    DDPMScheduler(beta_end=0.03).save_pretrained(tmp_path / "scheduler")
    index = {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"]}
    index["unet"] = ["deme.projection", "ProjectedUNet2DModel"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipeline = DDIMPipeline.from_pretrained(tmp_path)
    assert torch.equal(output(pipeline.unet), output(projected))
    pipeline.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["unet"] == index["unet"]
    assert torch.equal(output(DDIMPipeline.from_pretrained(tmp_path / "again").unet), output(projected))


@pytest.mark.parametrize("settings", [{}, {"mid_block_type": None}])
def test_projections_fit_text_to_image_networks_too(tmp_path, settings):
    """Identities change no bit; random ones are saved and loaded, and merged into a network that has none."""
    unet = tiny_conditional_unet(**settings)
    inputs = (torch.randn(2, 4, 4, 4), torch.tensor([1, 500]), torch.randn(2, 77, 16))
    projected = with_projections(unet).eval()
    with torch.no_grad():
        assert torch.equal(projected(*inputs).sample, unet(*inputs).sample)
        randomize(projected)
        expected = projected(*inputs).sample
        assert not torch.allclose(expected, unet(*inputs).sample)
        projected.save_pretrained(tmp_path)
        found = load_denoiser(tmp_path)
        assert type(found) is ProjectedUNet2DConditionModel
        assert torch.equal(found(*inputs).sample, expected)
    names = [name for name in found.state_dict() if name.endswith(PROJECTION_SUFFIX)]
    assert len(names) == 5 - bool(settings)
    assert with_identity_projections(unet.state_dict(), found.state_dict()).keys() == found.state_dict().keys()
