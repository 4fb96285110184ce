from itertools import pairwise
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import tiny_unet
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, LDMPipeline

from deme.errors import RunError, UserError
from deme.method.sampling import (
    FLOW_NAMES,
    SHORT_NAMES,
    ensemble,
    guided,
    make_sampler,
    network_calls,
    sample_images,
    scaled,
    try_sampler,
)
from deme.models.encoders import to_bytes

SCHEDULER = DDPMScheduler(beta_end=0.03, clip_sample_range=1.5)
SHAPE = (1, 8, 8)


def sample(network_at, seeds=range(4), steps=5, sampler="ddim", **settings):
    made = make_sampler(SCHEDULER, sampler)
    return to_bytes(sample_images(network_at, made, seeds, SHAPE, "cpu", steps, **settings))


def single(unet):
    return ensemble([unet], [(0, 1000)])


class Recorder(torch.nn.Module):
    """Predicts no noise and writes down when it is called."""

    def __init__(self, name, calls):
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, noisy, timestep, return_dict):
        self.calls.append((self.name, int(timestep)))
        return (torch.zeros_like(noisy),)


def test_equals_diffusers_pipeline_from_the_same_noise(monkeypatch):
    """Same betas, same clipping, same images as DDIMPipeline, up to rounding to grey levels."""
    unet = tiny_unet()
    noise = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in range(4)])
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *args, **kwargs: noise)
    pipeline = DDIMPipeline(unet, SCHEDULER)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(batch_size=4, num_inference_steps=5, output_type="np").images
    expected = (expected * 255).round().astype(np.int16)
    drawn = sample(single(unet)).permute(0, 2, 3, 1).numpy().astype(np.int16)
    assert np.abs(drawn - expected).max() <= 1
    assert expected.std() > 10


class Identity(torch.nn.Module):
    """Stands for the autoencoder of a latent pipeline: its latents are the images."""

    config = SimpleNamespace(scaling_factor=1.0)
    device = torch.device("cpu")

    def decode(self, latents):
        return SimpleNamespace(sample=latents)


class Conditional(torch.nn.Module):
    """Predicts a multiple of its input, which the condition says; counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images, timestep, encoder_hidden_states, return_dict=False):
        self.calls += 1
        return (images * encoder_hidden_states[:, :, None, None],)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
def test_guidance_equals_two_separate_calls(scale):
    """unconditional + scale · (conditional − unconditional), from one call; at scale 1 half as large a one."""
    network = Conditional()
    images = torch.randn(3, 1, 2, 2)
    condition = {"encoder_hidden_states": torch.tensor([[1.0], [2.0], [3.0]])}
    unconditional = {"encoder_hidden_states": torch.tensor([[0.1], [0.2], [0.3]])}
    [found] = guided(lambda _: network, condition, unconditional, scale)(500)(images, 500, return_dict=False)
    assert network.calls == 1
    [with_text] = network(images, 500, **condition)
    [without] = network(images, 500, **unconditional)
    torch.testing.assert_close(found, without + scale * (with_text - without))


def test_without_a_condition_the_network_is_called_as_it_is():
    unet = tiny_unet()
    [found] = guided(lambda _: unet, {}, {}, 7.5)(5)(torch.zeros(1, *SHAPE), 5, return_dict=False)
    [expected] = unet(torch.zeros(1, *SHAPE), 5, return_dict=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [*SHORT_NAMES, "HeunDiscreteScheduler", "DEISMultistepScheduler"])
def test_every_sampler_equals_diffusers_pipeline_with_it(name):
    """The latent pipeline, as it takes any scheduler; the same seeds, up to rounding to grey levels."""
    unet = tiny_unet()
    pipeline = LDMPipeline(Identity(), unet, make_sampler(SCHEDULER, name))
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    expected = pipeline(4, generators, num_inference_steps=5, output_type="np").images
    drawn = sample(single(unet), sampler=name).permute(0, 2, 3, 1).numpy().astype(np.int16)
    assert np.abs(drawn - (expected * 255).round().astype(np.int16)).max() <= 1
    assert expected.std() > 0.1


def test_a_stochastic_sampler_equals_diffusers_pipeline_with_it():
    """DDPM: each image's noise from its own generator."""
    unet = tiny_unet()
    pipeline = DDPMPipeline(unet, SCHEDULER)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    expected = pipeline(4, generators, num_inference_steps=5, output_type="np").images
    drawn = sample(single(unet), sampler="DDPMScheduler").permute(0, 2, 3, 1).numpy().astype(np.int16)
    assert np.abs(drawn - (expected * 255).round().astype(np.int16)).max() <= 1


FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.mark.parametrize(("name", "calls"), [("euler", 5), ("heun", 9), ("unipc", 5), ("dpmsolver++", 5)])
def test_every_sampler_of_a_flow_equals_diffusers_loop_with_it(name, calls):
    """With the sampler that diffusers' own class makes of the shift, from the same noise."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    kind = getattr(diffusers, FLOW_NAMES[name])
    stepper = kind(**(flow if name in ("unipc", "dpmsolver++") else {"shift": 3.0}))
    stepper.set_timesteps(5)
    unet, seen = tiny_unet(), []
    expected = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in range(4)])
    with torch.no_grad():
        for timestep in stepper.timesteps:
            expected = stepper.step(unet(expected, timestep).sample, timestep, expected).prev_sample
    unet.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[1])))
    drawn = sample_images(single(unet), make_sampler(FLOW, name), range(4), SHAPE, "cpu", 5)
    torch.testing.assert_close(drawn, expected)
    assert seen == stepper.timesteps.tolist()
    assert len(seen) == calls == network_calls(make_sampler(FLOW, name), 5)


def test_a_flow_to_one_image_is_followed_to_it():
    """The velocity (x_σ − x₀)/σ of a single image x₀ leads any noise to it, by each sampler."""
    image = torch.rand(SHAPE)

    def network(images, timestep, return_dict):
        return ((images - image) / (timestep / 1000),)

    for name in ("euler", "heun"):
        found = sample_images(lambda _: network, make_sampler(FLOW, name), [0, 1], SHAPE, "cpu", 3)
        torch.testing.assert_close(found, image.expand_as(found))


def test_the_ensemble_of_a_flow_chooses_by_the_continuous_timestep():
    """It begins at T = 1000, the end of the last range."""
    calls = []
    experts = [Recorder("low", calls), Recorder("high", calls)]
    stepper = make_sampler(FlowMatchEulerDiscreteScheduler(), "euler")
    sample_images(ensemble(experts, [(0, 500), (500, 1000)]), stepper, [0], SHAPE, "cpu", 3)
    assert calls == [("high", 1000), ("high", 500), ("low", 1)]  # 500.5 is written down as 500
    assert stepper.timesteps.tolist() == pytest.approx([1000.0, 500.5, 1.0])


@pytest.mark.parametrize("name", ["ddim", "pndm", "EulerDiscreteScheduler", "DDPMScheduler", "foo"])
def test_samplers_of_ddpm_are_refused_for_a_flow(name):
    with pytest.raises(
        UserError, match=r"^must be one of euler, heun, unipc, dpmsolver.*: the network was trained by flow"
    ):
        make_sampler(FLOW, name)


@pytest.mark.parametrize("name", ["heun", "unipc", "dpmsolver++"])
@pytest.mark.parametrize("key", ["use_karras_sigmas", "stochastic_sampling"])
def test_a_flow_sampler_that_would_pass_over_a_setting_of_the_schedule_is_refused(name, key):
    with pytest.raises(UserError, match=f"^{FLOW_NAMES[name]} has no {key}$"):
        make_sampler(FlowMatchEulerDiscreteScheduler(**{key: True}), name)
    assert make_sampler(FlowMatchEulerDiscreteScheduler(**{key: True}), "euler").config[key]


def test_a_flow_has_no_timestep_spacing():
    with pytest.raises(UserError, match=r"^UniPCMultistepScheduler has no timestep_spacing$"):
        make_sampler(FLOW, "unipc", "trailing")


@pytest.mark.parametrize("name", ["heun", "foo", "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_samplers_that_can_not_take_the_noise_schedule_are_refused(name):
    with pytest.raises(UserError, match=r"must be one of ddim, pndm, dpmsolver\+\+, unipc, euler, DDIMScheduler, "):
        make_sampler(SCHEDULER, name)


@pytest.mark.parametrize("name", [*SHORT_NAMES, "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_samplers_keep_the_pretrained_betas(name):
    """Also those that are diffusers' defaults for DDPM, but not for the sampler."""
    for scheduler in (SCHEDULER, DDPMScheduler()):
        assert torch.equal(make_sampler(scheduler, name).betas, scheduler.betas)


def test_what_a_sampler_can_not_do_is_found_by_trying():
    try_sampler(make_sampler(SCHEDULER, "pndm"), 4, SHAPE)
    with pytest.raises(UserError, match=r"^3 steps of PNDMScheduler: ValueError: "):
        try_sampler(make_sampler(SCHEDULER, "pndm"), 3, SHAPE)
    with pytest.raises(UserError, match="sigmoid"):
        make_sampler(DDPMScheduler(beta_schedule="sigmoid"), "euler")


def test_the_sampler_computes_in_float32():
    """UniPC's own products do, also around a network that computes in bf16."""
    unet = tiny_unet()

    def predict(images, *timesteps, **named):
        assert images.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        return (unet(images, *timesteps, **named)[0].bfloat16(),)

    def rounded(*inputs, **named):
        return (predict(*inputs, **named)[0].float(),)

    assert torch.equal(sample(single(predict), sampler="unipc"), sample(single(rounded), sampler="unipc"))


def test_one_network_call_per_step_at_the_leading_timesteps():
    """3 steps visit t = 666, 333, 0."""
    calls = []
    sample(single(Recorder("only", calls)), steps=3)
    assert calls == [("only", 666), ("only", 333), ("only", 0)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"eta": 1.0}, {"sampler": "DDPMScheduler"}, {"sampler": "EulerAncestralDiscreteScheduler"}],
    ids=str,
)
def test_an_image_depends_on_its_seed_alone(settings):
    predict = single(tiny_unet())
    together = sample(predict, seeds=[3, 1, 2], **settings)
    for image, seed in zip(together, [3, 1, 2], strict=True):
        alone = sample(predict, seeds=[seed], **settings)[0]
        assert (image.int() - alone.int()).abs().max() <= 1
    assert not torch.equal(together[0], together[1])


def test_eta_adds_noise():
    predict = single(tiny_unet())
    assert not torch.equal(sample(predict, eta=0.0), sample(predict, eta=1.0))


def test_images_that_are_not_finite_stop_by_seed_and_step():
    """One image of a batch, from the second of three steps on; the others do not matter."""

    class Poison(torch.nn.Module):
        calls = 0

        def forward(self, noisy, timestep, return_dict):
            self.calls += 1
            prediction = torch.zeros_like(noisy)
            if self.calls == 2:
                prediction[1] = torch.nan
            return (prediction,)

    with pytest.raises(RunError, match=r"^seed 8: NaN or infinite after step 2 of 3$"):
        sample(single(Poison()), seeds=[7, 8], steps=3)


def test_the_ensemble_uses_the_expert_of_each_timestep():
    calls = []
    experts = [Recorder("low", calls), Recorder("high", calls)]
    sample(ensemble(experts, [(0, 334), (334, 1000)]), steps=3)
    assert calls == [("high", 666), ("low", 333), ("low", 0)]


class Linear(torch.nn.Module):
    """Predicts a multiple of its input as noise."""

    def forward(self, noisy, timestep, return_dict=False, shift=0.0):
        return (0.7 * noisy + shift,)


SCALES = [(0, 500, 1.25), (500, 1000, 0.8)]


def test_predicted_noise_is_divided_by_the_scale_of_its_range():
    """DDIM of ε = a x multiplies x by √ᾱ_s (1 − √(1 − ᾱ_t) a/λ) / √ᾱ_t + √(1 − ᾱ_s) a/λ from t to s."""
    schedule = DDPMScheduler(clip_sample=False)
    found = sample_images(scaled(single(Linear()), SCALES), make_sampler(schedule, "ddim"), [3], SHAPE, "cpu", 4)
    signals, factor = [*schedule.alphas_cumprod[[750, 500, 250, 0]].tolist(), 1.0], 1.0
    for (high, low), scale in zip(pairwise(signals), (0.8, 0.8, 1.25, 1.25), strict=True):
        slope = 0.7 / scale
        factor *= (low / high) ** 0.5 * (1 - (1 - high) ** 0.5 * slope) + (1 - low) ** 0.5 * slope
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(found[0], factor * noise)


def test_a_scale_of_1_changes_no_bit():
    """Nor does none; another one in half of the timesteps does."""
    network = single(tiny_unet())
    plain = sample(network)
    for scales in ([], [(0, 1000, 1.0)], [(0, 500, 1.0), (500, 1000, 1)]):
        assert torch.equal(sample(scaled(network, scales)), plain)
    assert not torch.equal(sample(scaled(network, [(0, 500, 1.02), (500, 1000, 1.0)])), plain)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_guided_prediction_is_scaled_as_a_whole(scale):
    """The same as dividing what guidance makes of the two predictions."""
    images, condition = torch.randn(2, *SHAPE), {"shift": torch.tensor([[[[2.0]]], [[[1.0]]]])}
    empty = {"shift": torch.tensor([[[[0.5]]]])}
    whole = guided(single(Linear()), condition, empty, scale)(700)(images, 700)[0]
    found = guided(scaled(single(Linear()), SCALES), condition, empty, scale)(700)(images, 700)[0]
    torch.testing.assert_close(found, whole / 0.8)


def test_an_ensemble_of_one_network_is_that_network():
    unet = tiny_unet()
    assert torch.equal(sample(ensemble([unet, unet], [(0, 500), (500, 1000)])), sample(single(unet)))
