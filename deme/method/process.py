"""The noise process: which timesteps are drawn, how noise is added, what a network predicts.

DDPM (Ho et al. 2020) and flow matching (Lipman et al. 2023, Liu et al. 2023) have the same methods, so that losses,
measurements and searches hold for both. The scheduler's class decides.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from deme.errors import UserError

Range = tuple[int, int]  # [low, high) of timesteps
SMALLEST = 1e-100  # stands for 0 in squared factors of signal and noise, so that quotients have their limits


class Process:
    """What both processes share. `scheduler` is the pretrained one, which samplers are made from."""

    dtype: torch.dtype  # of timesteps
    usual_sampler: str  # its short name

    def __init__(self, scheduler: SchedulerMixin):
        self.scheduler = scheduler

    @property
    def total(self) -> int:
        """T: all timesteps lie in [0, T)."""
        return self.scheduler.config.num_train_timesteps

    def draw(
        self, batch_size: int, ranges: Sequence[Range], device: torch.device | str, antithetic: bool = True
    ) -> torch.Tensor:
        """Timesteps of a batch whose parts, those of tensor_split, each have their own range: shape (batch_size,).

        The first ⌈n/2⌉ of a part are independent; the others mirror them within the range. With antithetic=False all
        are independent.
        """
        timesteps = torch.empty(batch_size, dtype=self.dtype, device=device)
        for part, timestep_range in zip(timesteps.tensor_split(len(ranges)), ranges, strict=True):
            mirrored = len(part) // 2 if antithetic else 0
            self._draw(part, timestep_range, mirrored)
        return timesteps


class DDPM(Process):
    """x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε at integer timesteps; networks predict the noise ε, x₀ or v."""

    dtype, usual_sampler = torch.int64, "ddim"

    def __init__(self, scheduler: SchedulerMixin, settings: Any = None):
        super().__init__(scheduler)
        for key in ("density", "shift"):
            given = getattr(settings, key, None)
            if given not in (None, "uniform"):
                raise UserError(f"timesteps.{key}={given}: the network was not trained by flow matching")

    @property
    def predicts(self) -> str:
        """What a network predicts, as diffusers calls it: epsilon, sample or v_prediction."""
        return self.scheduler.config.prediction_type

    def _draw(self, part: torch.Tensor, timestep_range: Range, mirrored: int) -> None:
        """The mirror image of t is low + high − 1 − t, so that each pair's mean is the range's."""
        low, high = timestep_range
        uniform = torch.randint(low, high, (len(part) - mirrored,), device=part.device)
        torch.cat([uniform, low + high - 1 - uniform[:mirrored]], out=part)

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Images with noise, shape (B, C, H, W)."""
        return self.scheduler.add_noise(clean, noise, timesteps)

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network should predict, shape (B, C, H, W)."""
        if self.predicts == "v_prediction":
            return self.scheduler.get_velocity(clean, noise, timesteps)
        return {"epsilon": noise, "sample": clean}[self.predicts]

    def signal_and_noise(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The squared factors of x₀ and of the noise, whose quotient is the signal-to-noise ratio: float64."""
        alphas_cumprod = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps].double()
        return alphas_cumprod.clamp(min=SMALLEST), (1 - alphas_cumprod).clamp(min=SMALLEST)

    def error_scale(self, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The squared error of the prediction over that of x₀, times the squared factor of the noise."""
        return {"epsilon": signal, "sample": noise, "v_prediction": torch.ones_like(signal)}[self.predicts]

    def quantiles(self) -> torch.Tensor:
        """Timesteps at equal shares of the training's density: all of them."""
        return torch.arange(len(self.scheduler.alphas_cumprod))


class FlowMatching(Process):
    """x_σ = (1 − σ) x₀ + σ ε at the timesteps T σ, which are continuous; networks predict ε − x₀."""

    dtype, usual_sampler = torch.float32, "euler"
    predicts = "flow_prediction"

    def __init__(self, scheduler: SchedulerMixin, settings: Any = None):
        super().__init__(scheduler)
        given = None if settings is None else settings.shift
        self.shift = scheduler.config.shift if given is None else given
        self.settings = settings if settings is not None and settings.density != "uniform" else None

    def _draw(self, part: torch.Tensor, timestep_range: Range, mirrored: int) -> None:
        """The mirror image of a quantile p is 1 − p."""
        shares = torch.rand(len(part) - mirrored, dtype=torch.float64, device=part.device)
        part.copy_(self._quantile(torch.cat([shares, 1 - shares[:mirrored]]), timestep_range))

    def _quantile(self, shares: torch.Tensor, timestep_range: Range) -> torch.Tensor:
        """The timesteps of [low, high) below which these shares of its draws lie.

        As diffusers draws them with compute_density_for_timestep_sampling, σ is shifted from r = 1 − u by
        σ = s r/(1 + (s − 1) r), where u is uniform or logit-normal. Here the density is restricted to the range.
        """
        low, high = timestep_range
        ends = torch.tensor([low, high], dtype=torch.float64) / self.total
        ends = ends / (self.shift - (self.shift - 1) * ends)  # of r
        if self.settings is None:
            unshifted = torch.lerp(*ends.to(shares.device), shares)
        else:
            unshifted = self._logit_normal(shares, ends, timestep_range)
        sigmas = self.shift * unshifted / (1 + (self.shift - 1) * unshifted)
        below_end = float(torch.nextafter(torch.tensor(high, dtype=self.dtype), torch.tensor(0.0)))
        return (self.total * sigmas).to(self.dtype).clamp(low, below_end)

    def _logit_normal(self, shares: torch.Tensor, ends: torch.Tensor, timestep_range: Range) -> torch.Tensor:
        """The quantiles of r between the ends, with logit(r) = −logit(u) ~ N(−logit_mean, logit_std²)."""
        mean, deviation = -self.settings.logit_mean, self.settings.logit_std
        scores = (ends.logit() - mean) / deviation
        is_upper = bool(scores[0] > 0)  # mirrored, as shares of the upper tail are as good as 1
        scores = -scores.flip(0) if is_upper else scores
        below = torch.erfc(-scores / 2**0.5) / 2  # torch.special.ndtr has no small values
        if not below[0] < below[1]:
            low, high = timestep_range
            raise UserError(f"timesteps.logit_std={deviation}: as good as no timestep of [{low}, {high}) is drawn")
        quantiles = torch.special.ndtri(torch.lerp(*below.to(shares.device), 1 - shares if is_upper else shares))
        return torch.sigmoid(mean + deviation * (-quantiles if is_upper else quantiles))

    def _sigmas(self, timesteps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        return (timesteps / self.total).to(images.dtype).view(-1, *[1] * (images.ndim - 1))

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Images with noise, shape (B, C, H, W)."""
        sigmas = self._sigmas(timesteps, clean)
        return (1 - sigmas) * clean + sigmas * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the network should predict, shape (B, C, H, W): dx_σ/dσ, the same at all timesteps."""
        return noise - clean

    def signal_and_noise(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The squared factors of x₀ and of the noise, whose quotient is the signal-to-noise ratio: float64."""
        sigmas = timesteps.double() / self.total
        return (1 - sigmas).square().clamp(min=SMALLEST), sigmas.square().clamp(min=SMALLEST)

    def error_scale(self, signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """The squared error of the prediction over that of x₀, times σ²: 1, as x₀ = x_σ − σ (ε − x₀)."""
        return torch.ones_like(signal)

    def quantiles(self) -> torch.Tensor:
        """Timesteps at equal shares of the training's density, T of them."""
        shares = (torch.arange(self.total, dtype=torch.float64) + 0.5) / self.total
        return self._quantile(shares, (0, self.total))


PROCESSES = {DDPMScheduler: DDPM, FlowMatchEulerDiscreteScheduler: FlowMatching}


def new_scheduler(num_train_timesteps: int, _class_name: str = "DDPMScheduler", **settings: Any) -> SchedulerMixin:
    """A scheduler of one of the classes in PROCESSES."""
    kinds = {kind.__name__: kind for kind in PROCESSES}
    if _class_name not in kinds:
        raise UserError(f"_class_name={_class_name}: not one of {', '.join(kinds)}")
    return kinds[_class_name](num_train_timesteps=num_train_timesteps, **settings)  # by name, or it is not saved


def process_of(scheduler: SchedulerMixin, settings: Any = None) -> DDPM | FlowMatching:
    """The noise process of a pretrained scheduler, as `load_scheduler` gives it.

    `settings` are those of timesteps: the density that a training by flow matching draws them from.
    """
    kind = type(scheduler)
    if kind not in PROCESSES:
        raise UserError(f"{kind.__name__}: not one of {', '.join(known.__name__ for known in PROCESSES)}")
    return PROCESSES[kind](scheduler, settings)
