"""A UNet that is trained by flow matching, through every script, and loaded by diffusers alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL_SEARCH, run
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}


@pytest.fixture
def flow_file(config_file) -> Path:
    """The tiny configuration with flow matching, logit-normal timesteps and ranges of different widths."""
    config = yaml.safe_load(config_file.read_text())
    config["model"]["pretrained"] = None
    config["timesteps"] = {"edges": [0, 300, 1000], "density": "logit_normal", "logit_mean": 0.5}
    config["pretrain"] |= {"scheduler": FLOW, "preview_every": 4}
    config["data"] = {"held_out_images": 32}
    config["sample"] |= {"scheduler": "euler"}
    config["finetune"] |= {"consistency_weight": 1.0}
    config["distill"] = {"max_steps": 2}
    config["analyze"] = {"timesteps": 4, "images": 4, "batch_size": 4, "landscape_points": 3, "landscape_images": 8}
    config["analyze"] |= {"sketch": 64}
    config_file.write_text(yaml.safe_dump(config))
    return config_file


def test_the_whole_method(flow_file):
    folder = flow_file.parent / "tiny"
    run("pretrain.py", flow_file)
    run("finetune.py", flow_file)
    run("finetune.py", flow_file, "finetune.range=min_snr")
    run("search.py", flow_file, *SMALL_SEARCH, "search.report_images=0", "search.method=closed_form")
    run("merge.py", flow_file, "merge.coefficients=search")
    run("finetune.py", flow_file, "finetune.range=distilled")
    for model in ("pretrained", "ensemble", "merged", "distilled"):
        run("sample_ddp.py", flow_file, f"sample.model={model}")
    run("evaluate.py", flow_file)
    run("analyze.py", flow_file)
    run("report.py", flow_file)
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert {Path(row["samples"]).name for row in rows} == {"pretrained", "ensemble", "merged", "distilled"}
    assert "DDPMPipeline.from_pretrained" in (folder / "merged" / "README.md").read_text()

    # diffusers draws the same images from the pretrained folder
    pipeline = DDPMPipeline.from_pretrained(folder / "pretrained")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    assert pipeline.scheduler.config.shift == 2.0
    generators = [torch.Generator().manual_seed(seed) for seed in range(6)]
    expected = (pipeline(6, generators, num_inference_steps=3, output_type="np").images * 255).round()
    drawn = np.stack([np.asarray(Image.open(folder / f"samples/pretrained/{seed:06d}.png")) for seed in range(6)])
    assert np.abs(drawn[..., None] - expected).max() <= 1
    assert expected.std() > 10

    # what a range draws from is in its record
    record = (folder / "finetuned" / "0000-0300" / "config.yaml").read_text()
    assert "logit_mean: 0.5" in record
    refused = run("finetune.py", flow_file, "timesteps.logit_mean=0.7", status=2).stderr
    assert "timesteps.logit_mean" in refused


def test_a_flow_is_never_sampled_or_trained_as_a_ddpm(flow_file, config_file, pretrained):
    run("pretrain.py", flow_file, "pretrain.max_steps=1", "pretrain.preview_every=null")
    for override, reason in (
        ("sample.scheduler=ddim", "sample.scheduler=ddim: must be one of euler, heun, unipc, dpmsolver++"),
        ("sample.prediction_scale=1.01", "has prediction_type=flow_prediction"),
    ):
        refused = run("sample_ddp.py", flow_file, "sample.model=pretrained", override, status=2).stderr
        assert reason in refused
    ddpm = f"model.pretrained={pretrained}"
    refused = run("sample_ddp.py", flow_file, ddpm, "sample.model=pretrained", "sample.scheduler=heun", status=2).stderr
    assert "sample.scheduler=heun: must be one of ddim" in refused
    refused = run("finetune.py", flow_file, ddpm, status=2).stderr
    assert "timesteps.density=logit_normal: the network was not trained by flow matching" in refused
    refused = run("pretrain.py", flow_file, "name=other", "pretrain.scheduler._class_name=foo", status=2).stderr
    assert "_class_name=foo: not one of DDPMScheduler, FlowMatchEulerDiscreteScheduler" in refused
    assert len(refused.splitlines()) == 1
