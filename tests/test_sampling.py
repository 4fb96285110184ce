import numpy as np
import pytest
import torch
from conftest import tiny_unet
from diffusers import DDIMPipeline, DDPMScheduler

from deme.sampling import ensemble, initial_noise, sample_images, save_grid

SCHEDULER = DDPMScheduler(beta_end=0.03, clip_sample_range=1.5)
SHAPE = (1, 8, 8)


def sample(network_at, seeds=range(4), steps=5, **settings):
    return sample_images(network_at, SCHEDULER, seeds, SHAPE, "cpu", steps, **settings)


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
    noise = initial_noise([torch.Generator().manual_seed(seed) for seed in range(4)], SHAPE)
    monkeypatch.setattr("diffusers.pipelines.ddim.pipeline_ddim.randn_tensor", lambda *args, **kwargs: noise)
    pipeline = DDIMPipeline(unet, SCHEDULER)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(batch_size=4, num_inference_steps=5, output_type="np").images
    expected = (expected * 255).round().astype(np.int16)
    drawn = sample(single(unet)).permute(0, 2, 3, 1).numpy().astype(np.int16)
    assert np.abs(drawn - expected).max() <= 1
    assert expected.std() > 10


def test_one_network_call_per_step_at_the_leading_timesteps():
    """3 steps visit t = 666, 333, 0."""
    calls = []
    sample(single(Recorder("only", calls)), steps=3)
    assert calls == [("only", 666), ("only", 333), ("only", 0)]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_depends_on_its_seed_alone(eta):
    predict = single(tiny_unet())
    together = sample(predict, seeds=[3, 1, 2], eta=eta)
    for image, seed in zip(together, [3, 1, 2], strict=True):
        alone = sample(predict, seeds=[seed], eta=eta)[0]
        assert (image.int() - alone.int()).abs().max() <= 1
    assert not torch.equal(together[0], together[1])


def test_eta_adds_noise():
    predict = single(tiny_unet())
    assert not torch.equal(sample(predict, eta=0.0), sample(predict, eta=1.0))


def test_the_ensemble_uses_the_expert_of_each_timestep():
    calls = []
    experts = [Recorder("low", calls), Recorder("high", calls)]
    sample(ensemble(experts, [(0, 334), (334, 1000)]), steps=3)
    assert calls == [("high", 666), ("low", 333), ("low", 0)]


def test_an_ensemble_of_one_network_is_that_network():
    unet = tiny_unet()
    assert torch.equal(sample(ensemble([unet, unet], [(0, 500), (500, 1000)])), sample(single(unet)))


def test_grids_hold_every_image(tmp_path):
    from PIL import Image

    save_grid(torch.full((5, 1, 8, 8), 200, dtype=torch.uint8), tmp_path / "grid.png")
    pixels = np.array(Image.open(tmp_path / "grid.png").convert("L"))
    assert pixels.shape == (2 * 34 + 2, 3 * 34 + 2)
    assert (pixels == 200).sum() == 5 * 32 * 32
