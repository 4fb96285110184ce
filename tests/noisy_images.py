"""What the cheap objectives work on: noisy images, and a network for which every answer has a closed form."""

from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import nn

from deme.config.sections import Search
from deme.measure.noisy import Batch, Noiser, draw_probes
from deme.method.process import DDPM
from deme.method.task_vectors import Candidates
from deme.models.encoders import Pixels
from deme.search.least_squares import Squares

RANGES = [(0, 500), (500, 1000)]


class Images:
    """Forty images of noise."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=generator)

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices, random=None) -> torch.Tensor:
        return self.pixels[torch.as_tensor(np.asarray(indices))]


class Linear(nn.Module):
    """A network that is linear in its weights, and so in the coefficients."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.near = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        self.far = nn.Conv2d(1, 1, 3, padding=2, dilation=2, bias=False)

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (self.near(noisy) + self.far(noisy) * (1 + timesteps[:, None, None, None] / 1000),)


def linear_candidates() -> Candidates:
    """Two experts; each weight is a group of its own."""
    experts = {f"range {k}": Linear(k + 1).state_dict() for k in range(2)}
    return Candidates(Linear(0).state_dict(), experts, {"near.weight": 0, "far.weight": 1}, "cpu")


def noiser(accelerator) -> Noiser:
    return Noiser(Images(), Pixels(1), DDPM(DDPMScheduler()), accelerator)


def probes(accelerator, places: range = range(30), ranges=RANGES, batch_size: int = 8) -> list[Batch]:
    return draw_probes(noiser(accelerator), ranges, (0, 3), places, batch_size)


def squares(name: str, candidates: Candidates, network: nn.Module, places: range = range(30)) -> Squares:
    accelerator = Accelerator(cpu=True)
    return Squares(name, probes(accelerator, places), candidates, network, 1000, accelerator)


def problem_of(names: list[str], seed: int = 0) -> SimpleNamespace:
    """What a study takes of a search's problem: coefficients within [0, 1.5], whose sum is the value."""
    return SimpleNamespace(
        names=names,
        shape=(1, len(names)),
        settings=Search(),
        bounds=[(0.0, 1.5)] * len(names),
        stream=(seed,),
        processes=Accelerator(cpu=True),
        value=lambda objective, coefficients, images: (float(coefficients.sum()), 1),
        network_of=np.asarray,
    )
