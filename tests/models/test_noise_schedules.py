"""Images of a pretrained noise schedule's file, against diffusers' own pipeline with the scheduler that wrote it."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from conftest import run, tiny_unet
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from deme.config.sections import Sample
from deme.errors import UserError
from deme.method.sampling import ensemble, make_sampler, passed_over, sample_images
from deme.models.denoisers import load_scheduler
from deme.models.encoders import to_bytes
from deme.models.schedules import check_header
from deme.models.variants import ModelFiles

SHAPE = (1, 8, 8)
ZERO_TERMINAL = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
SETTINGS = [
    ZERO_TERMINAL,
    ZERO_TERMINAL | {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False},
    {"timestep_spacing": "linspace"},
    {"steps_offset": 1, "set_alpha_to_one": False},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 1.5, "clip_sample": False},
    {"clip_sample_range": 0.5},
    {"trained_betas": [0.001 * (1 + i / 300) for i in range(1000)], "prediction_type": "sample"},
]


def drawn(scheduler, **settings) -> np.ndarray:
    unets = ensemble([tiny_unet()], [(0, 1000)])
    images = sample_images(unets, make_sampler(scheduler, "ddim", **settings), range(4), SHAPE, "cpu", 5)
    return to_bytes(images).permute(0, 2, 3, 1).numpy().astype(int)


def expected_of(scheduler: DDIMScheduler, monkeypatch) -> np.ndarray:
    import torch

    noise = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in range(4)])
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *args, **kwargs: noise)
    pipeline = DDIMPipeline(tiny_unet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return (pipeline(batch_size=4, num_inference_steps=5, output_type="np").images * 255).round().astype(int)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_nothing_that_the_file_says_is_dropped(pretrained, tmp_path, monkeypatch, settings):
    """Spacing, zero terminal SNR, offset, clipping, thresholding, betas: to one grey level."""
    folder = shutil.copytree(pretrained, tmp_path / "copy")
    DDIMScheduler(**settings).save_pretrained(folder / "scheduler")
    expected = expected_of(DDIMScheduler(**settings), monkeypatch)
    assert np.abs(drawn(load_scheduler(folder)) - expected).max() <= 1
    plain = drawn(DDPMScheduler())
    assert np.abs(plain - expected).max() > 10  # the setting counts


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_spacing_that_is_asked_for_counts(pretrained, tmp_path, monkeypatch, spacing):
    folder = shutil.copytree(pretrained, tmp_path / "copy")
    DDIMScheduler(**ZERO_TERMINAL).save_pretrained(folder / "scheduler")
    expected = expected_of(DDIMScheduler(**ZERO_TERMINAL | {"timestep_spacing": spacing}), monkeypatch)
    assert np.abs(drawn(load_scheduler(folder), timestep_spacing=spacing) - expected).max() <= 1


def test_a_file_that_names_no_spacing_is_sampled_as_published(pretrained, tmp_path):
    """DDIM at t = 666, 333, 0, whatever the default of the class in the file; other samplers by their own default."""
    folder = shutil.copytree(pretrained, tmp_path / "copy")
    file = folder / "scheduler" / "scheduler_config.json"
    for name in ("DDPMScheduler", "EulerDiscreteScheduler"):
        file.write_text(json.dumps({"_class_name": name}))
        ddim, euler = (make_sampler(load_scheduler(folder), name) for name in ("ddim", "euler"))
        ddim.set_timesteps(3)
        assert ddim.timesteps.tolist() == [666, 333, 0]
        assert euler.config.timestep_spacing == EulerDiscreteScheduler().config.timestep_spacing == "linspace"


@pytest.mark.parametrize(
    ("settings", "sampler", "lacking"),
    [
        ({"rescale_betas_zero_snr": True}, "pndm", "rescale_betas_zero_snr"),
        ({"thresholding": True}, "euler", "thresholding"),
        ({}, "DPMSolverSinglestepScheduler", "timestep_spacing"),
    ],
)
def test_samplers_that_lack_what_the_schedule_needs_are_refused(settings, sampler, lacking):
    spacing = "trailing" if lacking == "timestep_spacing" else None
    with pytest.raises(UserError, match=f"Scheduler has no {lacking}$"):
        make_sampler(DDPMScheduler(**settings), sampler, spacing)


@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "unipc"])
def test_predictions_are_clipped(sampler):
    """A network that predicts images of 3 and −0.5 gives such images, or with sample.clip 1 and −0.5."""
    schedule = DDPMScheduler(clip_sample=False, prediction_type="sample")
    expected = torch.tensor([3.0, -0.5]).reshape(1, 1, 1, 2)

    def network(images, timestep, return_dict):
        return (expected.expand_as(images),)

    for clip, most in ((False, 3), (True, 1)):
        made = make_sampler(schedule, sampler, clip=clip)
        images = sample_images(lambda _: network, made, [0, 1], (1, 1, 2), "cpu", 10)
        torch.testing.assert_close(images, expected.clamp(max=most).expand(2, -1, -1, -1), atol=0.05, rtol=0)
    assert passed_over(schedule, make_sampler(schedule, sampler, clip=True)) == []


def test_what_can_not_clip_is_refused():
    with pytest.raises(UserError, match=r"PNDMScheduler can't clip: set sample\.clip=false"):
        make_sampler(DDPMScheduler(), "pndm", clip=True)
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler can't clip"):
        make_sampler(FlowMatchEulerDiscreteScheduler(), "euler", clip=True)


def test_what_a_sampler_passes_over_is_said():
    schedule = DDPMScheduler(clip_sample=True)
    assert passed_over(schedule, make_sampler(schedule, "pndm")) == ["clip_sample=true"]
    assert passed_over(schedule, make_sampler(schedule, "ddim")) == []


@pytest.mark.parametrize(
    ("named", "settings", "recorded"),
    [
        ("leading", {}, None),
        (None, {}, None),
        ("trailing", {"timestep_spacing": "leading"}, None),
        ("trailing", {}, "trailing"),
        ("trailing", {"scheduler": "DDIMScheduler"}, "trailing"),
        ("leading", {"timestep_spacing": "linspace"}, "linspace"),
        ("trailing", {"scheduler": "unipc"}, None),
        ("leading", {"scheduler": "unipc", "timestep_spacing": "trailing"}, "trailing"),
    ],
)
def test_only_spacings_that_images_did_not_have_before_are_recorded(pretrained, tmp_path, named, settings, recorded):
    """So folders and searches of the time before fit where they are right, and are refused where they are not."""
    folder = shutil.copytree(pretrained, tmp_path / "copy")
    content = {"_class_name": "DDPMScheduler"} | ({} if named is None else {"timestep_spacing": named})
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))
    found = ModelFiles(folder, [folder / "unet"]).spacing(Sample(**settings))
    assert found == ({} if recorded is None else {"sample.timestep_spacing": recorded})


def test_samples_of_another_spacing_are_refused(config_file, tmp_path):
    model = "sample.model=pretrained"
    run("sample_ddp.py", config_file, model)
    record = yaml.safe_load((tmp_path / "tiny" / "samples" / "pretrained" / "samples.yaml").read_text())
    assert "sample.timestep_spacing" not in record["identity"]
    result = run("sample_ddp.py", config_file, model, "sample.timestep_spacing=trailing", status=2)
    assert "sample.timestep_spacing=trailing (was not recorded)" in result.stderr
    assert "0 of 6 images to draw" in run("sample_ddp.py", config_file, model, "sample.timestep_spacing=leading").stdout
    result = run("sample_ddp.py", config_file, model, "sample.timestep_spacing=even", status=2)
    assert "sample.timestep_spacing=even: must be one of leading, trailing, linspace" in result.stderr


@pytest.mark.parametrize(
    ("header", "schedule", "message"),
    [
        ({"ss_v_parameterization": "True"}, {}, "ss_v_parameterization=True in its header, but b has .*=epsilon"),
        ({"modelspec.prediction_type": "v"}, {}, r"modelspec\.prediction_type=v in its header, but b has .*=epsilon"),
        ({"modelspec.prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}, "but b has .*=v_prediction"),
        ({"ss_zero_terminal_snr": "true"}, {}, "in its header, but b has rescale_betas_zero_snr=false"),
        ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, ZERO_TERMINAL, None),
        ({"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"}, ZERO_TERMINAL, None),  # kohya's defaults
        ({"modelspec.prediction_type": "None"}, {}, None),
        ({"modelspec.prediction_type": "epsilon"}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, None),
    ],
)
def test_a_header_of_another_schedule_is_refused(header, schedule, message):
    if message is None:
        check_header(header, schedule, "b")
    else:
        with pytest.raises(UserError, match=message):
            check_header(header, schedule, "b")


V = {"modelspec.prediction_type": "v"}


@pytest.mark.parametrize(
    ("header", "schedule"),
    [
        ({"modelspec.prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}),  # kohya's default
        (V | {"modelspec.merged_from": "a, b"}, {}),  # its merges do not know what their inputs predict
    ],
)
def test_what_kohyas_programs_write_of_any_lora_says_nothing(header, schedule):
    check_header(header, schedule, "b", is_lora=True)
    for given, of_base, is_lora in ((header, schedule, False), (V, {}, True)):
        with pytest.raises(UserError, match="in its header, but b has prediction_type="):
            check_header(given, of_base, "b", is_lora)
