import json

import torch
from conftest import run
from diffusers import DDIMScheduler, DDPMPipeline

OWN = "model.pretrained=null"


def test_a_pipeline_folder_is_trained_and_not_trained_again(config_file):
    first = run("pretrain.py", config_file, OWN, "pretrain.scheduler.beta_end=0.03")
    folder = config_file.parent / "tiny" / "pretrained"
    assert f"wrote {folder}" in first.stdout
    pipeline = DDPMPipeline.from_pretrained(folder)
    assert pipeline.scheduler.config.beta_end == 0.03
    assert pipeline.unet.config.sample_size == 8
    lines = (config_file.parent / "tiny" / "pretraining" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    assert all(torch.isfinite(weight).all() for weight in pipeline.unet.state_dict().values())
    again = run("pretrain.py", config_file, OWN, "pretrain.scheduler.beta_end=0.03")
    assert f"{folder} is complete" in again.stdout


def test_another_number_of_timesteps_reaches_the_previews(config_file):
    """Fewer than a preview's usual steps, and not the scheduler's default."""
    run("pretrain.py", config_file, OWN, "timesteps.num_train_timesteps=40", "pretrain.preview_every=4")
    folder = config_file.parent / "tiny"
    pipeline = DDPMPipeline.from_pretrained(folder / "pretrained")
    assert DDIMScheduler.from_config(pipeline.scheduler.config).config.num_train_timesteps == 40
    assert (folder / "pretraining" / "previews" / "step-00000004.png").exists()
