"""Stable Diffusion XL: two text encoders, a pooled text, and the sizes of crops."""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from test_text_to_image import PROMPTS, losses, text_config, text_to_image  # noqa: F401  fixtures
from text_to_image import tiny_xl_pipeline

from deme.config.sections import Sample
from deme.errors import UserError
from deme.models.denoisers import load_denoiser, load_scheduler
from deme.models.drawing import Drawing
from deme.models.encoder_loading import load_encoder
from deme.models.encoders import Captioned
from deme.models.pipelines import INDEX, find_pipeline
from deme.models.variants import ModelFiles


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """A pipeline's folder."""
    folder = tmp_path_factory.mktemp("xl") / "pretrained"
    tiny_xl_pipeline().save_pretrained(folder)
    return folder


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES = (
    EulerDiscreteScheduler(**BETAS),  # which has no clip_sample
    DDIMScheduler(**BETAS, clip_sample=False),
    DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
    DDIMScheduler(**BETAS),  # clips
)
BOTH = {"clip_sample": True, "steps_offset": 0}


@pytest.mark.parametrize(
    ("negative", "zeros", "schedule", "scale"),
    [("", True, 0, 7.5), ("", False, 1, 7.5), ("blurred", True, 2, 7.5), ("blurred", True, 3, 2)],  # clipping is rough
)
def test_images_are_those_of_diffusers_pipeline(xl, tmp_path, negative, zeros, schedule, scale):
    """From the same latents, prompts and schedule, to one grey level; an empty negative prompt is zeros."""
    folder = shutil.copytree(xl, tmp_path / "copy")
    SCHEDULES[schedule].save_pretrained(folder / "scheduler")
    index = json.loads((folder / INDEX).read_text()) | {"force_zeros_for_empty_prompt": zeros}
    (folder / INDEX).write_text(json.dumps(index))
    network = load_denoiser(folder / "unet")
    settings = Sample(num_inference_steps=3, guidance_scale=scale, negative_prompt=negative)
    shape = (4, 4, 4)
    drawing = Drawing(load_scheduler(folder), load_encoder(folder, network), settings, shape, torch.device("cpu"))
    found = drawing.images(lambda _: network, range(6), PROMPTS)

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.scheduler = DDIMScheduler.from_pretrained(folder / "scheduler", clip_sample=schedule == 3)
    expected = pipeline(
        PROMPTS,
        height=8,
        width=8,
        num_inference_steps=3,
        guidance_scale=scale,
        negative_prompt=[negative] * len(PROMPTS) if negative or not zeros else None,
        latents=torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(6)]),
        output_type="np",
    ).images
    assert np.abs(found[:, 0].numpy() - np.round(expected[..., 0] * 255)).max() <= 1


@pytest.mark.parametrize(("schedule", "recorded"), enumerate([{"steps_offset": 0}, {"steps_offset": 0}, {}, BOTH]))
def test_only_settings_that_images_did_not_have_before_are_recorded(xl, tmp_path, schedule, recorded):
    """So folders and searches of the time before fit where they are right, and are refused where they are not."""
    folder = shutil.copytree(xl, tmp_path / "copy")
    SCHEDULES[schedule].save_pretrained(folder / "scheduler")
    found = ModelFiles(folder, [folder / "unet"]).sampling()
    assert found == {f"scheduler.{key}": value for key, value in recorded.items()}


def test_an_xl_network_must_name_its_size(xl, tmp_path):
    """Which it is told with each image; a pair counts as one."""
    folder = shutil.copytree(xl, tmp_path / "copy")
    file = folder / "unet" / "config.json"
    for size in ([4, 4], None):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": size}))
        if size is not None:
            encoder = load_encoder(find_pipeline(str(folder)), load_denoiser(folder / "unet"))
            assert encoder.condition([""])["time_ids"].tolist() == [[8, 8, 0, 0, 8, 8]]
    with pytest.raises(UserError, match=r"unet/config\.json: sample_size=null: must be"):
        find_pipeline(str(folder))


def test_how_an_empty_prompt_is_encoded_counts_for_records(xl, tmp_path):
    """Images and latents of one way are not taken for those of the other; the default counts as nothing."""
    folder = shutil.copytree(xl, tmp_path / "copy")
    index, found = json.loads((folder / INDEX).read_text()), {}
    for zeros in (True, False):
        (folder / INDEX).write_text(json.dumps(index | {"force_zeros_for_empty_prompt": zeros}))
        found[zeros] = ModelFiles(folder, [folder / "unet"]).hashes()
    (folder / INDEX).unlink()
    assert found[True] == ModelFiles(folder, [folder / "unet"]).hashes() != found[False]


def test_a_network_sees_the_sizes_of_the_crops(xl):
    """As diffusers' training script passes them; other sizes are another prediction."""
    network = load_denoiser(xl / "unet")
    encoder, pipeline = load_encoder(xl, network), StableDiffusionXLPipeline.from_pretrained(xl, add_watermarker=False)
    pixels, sizes = torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([[20, 30, 1, 2, 8, 8], [8, 8, 0, 0, 8, 8]])
    latents, condition = encoder.encode(Captioned(pixels, PROMPTS[:2], sizes))
    embeddings, _, pooled, _ = pipeline.encode_prompt(PROMPTS[:2], do_classifier_free_guidance=False)
    timesteps = torch.tensor([10, 900])
    with torch.no_grad():
        found = network(latents, timesteps, **condition).sample
        added = {"text_embeds": pooled, "time_ids": sizes}
        plain = pipeline.unet(latents, timesteps, embeddings, added_cond_kwargs=added).sample
        other = network(latents, timesteps, **condition | {"time_ids": sizes.flip(0)}).sample
    torch.testing.assert_close(found, plain)
    assert not torch.allclose(found, other)


def test_the_whole_recipe(text_config, xl, tmp_path):  # noqa: F811
    """Cached latents train as others; diffusers loads the merged network."""
    options = [f"model.pretrained={xl}", "model.projection=false", "finetune.max_steps=2"]
    run("finetune.py", text_config, *options)
    expected = losses(tmp_path)
    shutil.rmtree(tmp_path / "tiny")
    run("finetune.py", text_config, *options, "data.cache_latents=true")
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-4)
    run("merge.py", text_config, *options)
    run("sample_ddp.py", text_config, *options, "sample.model=merged")
    drawn = sorted((tmp_path / "tiny/samples/merged").glob("*.png"))
    assert len({np.array(Image.open(path)).tobytes() for path in drawn}) == len(PROMPTS)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "tiny/merged", add_watermarker=False)
    assert pipeline.config.force_zeros_for_empty_prompt is True


@pytest.mark.long
def test_the_script_makes_loras_of_both_forms(xl, tmp_path):
    """On a tiny pipeline: one LoRA of four ranges under diffusers' names, and the same under kohya's."""
    data = tmp_path / "images"
    data.mkdir()
    lines = ["file_name,text"]
    for number, prompt in enumerate(PROMPTS):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 9 + number), np.uint8)).save(
            data / f"{number}.png"
        )
        lines.append(f"{number}.png,{prompt}")
    (data / "metadata.csv").write_text("\n".join(lines))
    options = [f"model.pretrained={xl}", f"data.name={data}", "data.resolution=8", f"output_dir={tmp_path}"]
    options += ["finetune={max_steps: 2, lora_rank: 2, batch_size: 2, preview_every: null, mixed_precision: no}"]
    options += ["finetune.base_precision=null", "sample.mixed_precision=no"]
    command = ["bash", str(REPOSITORY / "scripts/sdxl_lora.sh"), *options]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"AS_IT_IS": "1"})
    assert result.returncode == 0, result.stderr
    for name, key in (("merged", "lora_A.weight"), ("merged-kohya", "lora_down.weight")):
        tensors = load_file(tmp_path / "sdxl_lora" / name / "pytorch_lora_weights.safetensors")
        ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith(key)}
        assert ranks == {8}
