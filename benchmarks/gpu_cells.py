"""Measurements of gpu_first.py: GPU against CPU, and variants of a network call, a training step and sampling."""

import copy
import shutil
import statistics
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from benchmarks.sampling import pipeline_images, save_loop, two_call_images
from benchmarks.trainers import make_accelerator, make_trainer
from benchmarks.training import plain_step, smooth_noise
from benchmarks.unets import CHURCH, CIFAR10, SMALL
from deme.config.sections import Sample
from deme.config.trainings import Finetune
from deme.data.drawing import draw
from deme.method.losses import decoupled_loss
from deme.method.process import process_of
from deme.method.sampling import make_sampler, sample_images
from deme.models.denoisers import AUTOCAST_TYPES, freeze, load_denoiser, load_scheduler
from deme.models.drawing import Drawing
from deme.models.encoders import Pixels, to_bytes

DIGITS = Path(__file__).resolve().parent.parent / "assets" / "digits"
PASSES = (
    4  # through a network, of the images of a training step: the student's forward, twice that backward, the teacher's
)
# to float32 on the CPU: mean difference of images in grey levels; relative differences of loss and gradient
BOUNDS = {"no": (0.05, 1e-4, 1e-3), "bf16": (3.0, 2e-2, 0.1), "fp16": (0.5, 5e-3, 2e-2)}


class Variant(NamedTuple):
    """A way to call a frozen network."""

    precision: str
    frozen: bool = True  # by `freeze`, as sample_ddp.py does it; otherwise as DDIMPipeline calls it
    autocast: bool = False  # around float32 weights, in the channels-last format
    tuned: bool = False  # cuDNN tries all algorithms
    graph: bool = False  # one CUDA graph
    compiled: bool = False

    @property
    def name(self) -> str:
        kind = "as sample_ddp.py" if self.frozen else "float32 under autocast" if self.autocast else "as DDIMPipeline"
        extra = [key for key in ("tuned", "graph", "compiled") if getattr(self, key)]
        return ", ".join([self.precision, kind, *extra])


FP16, BF16 = Variant("fp16"), Variant("bf16")
VARIANTS = [FP16._replace(frozen=False), FP16, BF16, BF16._replace(frozen=False, autocast=True)]
VARIANTS += [BF16._replace(frozen=False), BF16._replace(tuned=True), BF16._replace(graph=True)]
TRAININGS = [("finetune.py", 16), ("plain loop", 16), ("finetune.py", 32), ("finetune.py, gradient_checkpointing", 32)]
TRAININGS += [("finetune.py", 4)]


class Machine:
    """What is measured on a GPU, or small on the CPU.

    Args:
        quick: small, on the CPU, and each measurement of a few repeats.
    """

    def __init__(self, quick: bool):
        self.quick = quick
        self.device = "cpu" if quick else "cuda"
        self.rates: dict[str, float] = {}  # of `limits`
        self.networks = {
            "Church": (SMALL | {"sample_size": 16}, 2) if quick else (CHURCH, 32),  # settings, batch of a call
            "CIFAR-10": (SMALL | {"sample_size": 16}, 2) if quick else (CIFAR10, 256),
        }
        self.trained_in = "no" if quick else "bf16"  # many CPUs have no bf16, and take long
        self.unet = cache(self._unet)
        self.flops = cache(self._flops)

    def limits(self) -> dict:
        """The device and its limits: FLOP/s of matrix products, bytes/s of a copy."""
        self.rates = measure.ceiling(self.device)
        found = {"torch": torch.__version__, "cc": shutil.which("cc")}
        if self.device == "cuda":
            found |= {"gpu": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
        return found | self.rates

    # --- is it right?

    def compare_images(self, precision: str) -> dict:
        """Digits from the same seeds as on the CPU in float32, ten steps."""
        scheduler, unet = load_scheduler(DIGITS), load_denoiser(DIGITS / "unet")
        seeds, shape = range(64), (unet.config.in_channels, 8, 8)

        def drawn(device: str, precision: str) -> torch.Tensor:
            network = freeze(copy.deepcopy(unet), device, precision)
            sampler = make_sampler(scheduler, "ddim")
            return to_bytes(sample_images(lambda _: network, sampler, seeds, shape, device, 10)).cpu().float()

        with without_tf32():
            difference = (drawn(self.device, precision) - drawn("cpu", "no")).abs().mean().item()
        return {"grey levels": difference, "wrong": not difference <= BOUNDS[precision][0]}

    def compare_gradients(self, precision: str) -> dict:
        """Loss and gradient of the same tensors as on the CPU in float32: each device draws its own random numbers."""
        process, unet = process_of(load_scheduler(DIGITS)), load_denoiser(DIGITS / "unet")
        generator = torch.Generator().manual_seed(0)
        clean, noise = (torch.randn(32, unet.config.in_channels, 8, 8, generator=generator) for _ in range(2))
        timesteps = torch.randint(0, 1000, (32,), generator=generator)

        def computed(device: str, precision: str) -> tuple[float, torch.Tensor]:
            student = copy.deepcopy(unet).to(device).requires_grad_(True)
            teacher = freeze(copy.deepcopy(unet), device, precision)
            inputs = (tensor.to(device) for tensor in (clean, noise, timesteps))
            with make_accelerator(device, precision).autocast():
                loss, _ = decoupled_loss(student, teacher, copy.deepcopy(process), *inputs, {})
            loss.backward()
            return loss.item(), torch.cat([p.grad.flatten().double().cpu() for p in student.parameters()])

        with without_tf32():
            (loss, gradient), (expected, wanted) = computed(self.device, precision), computed("cpu", "no")
        found = {"loss": abs(loss / expected - 1), "gradient": float((gradient - wanted).norm() / wanted.norm())}
        return found | {"wrong": not all(x <= y for x, y in zip(found.values(), BOUNDS[precision][1:], strict=True))}

    def compare_resumed(self, precision: str) -> dict:
        """Largest difference between weights of a resumed training, of a repeated one, and of one that ran through."""
        unet = load_denoiser(DIGITS / "unet")
        generator = torch.Generator().manual_seed(0)
        pixels = [torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8, generator=generator) for _ in range(64)]
        settings = Finetune(max_steps=8, checkpoint_every=4, log_every=4, batch_size=32, mixed_precision=precision)

        def trained(folder: Path) -> list[torch.Tensor]:
            trainer = make_trainer(make_accelerator(self.device, precision), unet, pixels, settings, folder)
            trainer.run()
            return [tensor.cpu() for tensor in trainer.student.state_dict().values()]

        with tempfile.TemporaryDirectory() as name:
            once, again = Path(name) / "once", Path(name) / "again"
            through = trained(once)
            shutil.rmtree(once / "checkpoints" / "step-00000008")
            found = {"resumed": largest_difference(through, trained(once))}
            found |= {"repeated": largest_difference(through, trained(again))}
        return found | {"wrong": not found["resumed"] <= 4 * found["repeated"]}

    # --- how fast is it?

    def call(self, name: str, variant: Variant) -> dict:
        """One call of a network."""
        settings, batch = self.networks[name]
        dtype = AUTOCAST_TYPES[variant.precision]
        network = copy.deepcopy(self.unet(name))
        images = torch.randn(batch, 3, settings["sample_size"], settings["sample_size"], device=self.device)
        around = nullcontext
        if variant.frozen:
            network = freeze(network, self.device, variant.precision)
        elif variant.autocast:
            network, around = freeze(network, self.device, "no"), lambda: torch.autocast(self.device, dtype)
        else:
            network, images = network.to(self.device, dtype), images.to(dtype)
        timestep = torch.tensor(500, device=self.device)
        predict = torch.compile(network) if variant.compiled else network

        def work() -> None:
            with torch.inference_mode(), around():
                predict(images, timestep, return_dict=False)

        torch.backends.cudnn.benchmark = variant.tuned
        first = measure.seconds(work, self.device)
        taken = self.median(graph_of(work) if variant.graph and self.device == "cuda" else work)
        torch.backends.cudnn.benchmark = False
        rate = self.flops(name) * batch / taken
        return {"images/s": batch / taken, "ms": 1e3 * taken, "first call, s": first} | self.share(rate)

    def train(self, name: str, way: str, batch: int) -> dict:
        """An optimizer step of one micro-batch, in bf16 on a GPU."""
        batch = min(batch, 2) if self.quick else batch
        step = self.step(name, way, batch)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = self.median(step, 5)
        found = {"images/s": batch / taken, "ms": 1e3 * taken} | self.share(PASSES * self.flops(name) * batch / taken)
        return found | {"peak GiB": measure.memory_taken(self.device) / 2**30}

    def step(self, name: str, way: str, batch: int) -> Callable[[], None]:
        """finetune.py's step, or that of a plain loop."""
        settings, _ = self.networks[name]
        unet = copy.deepcopy(self.unet(name)).requires_grad_(True)
        images = [smooth_noise(number, settings["sample_size"]) for number in range(batch)]
        if way == "plain loop":
            return plain_step(unet, images, batch, self.trained_in, self.device)
        checkpointing = way.endswith("gradient_checkpointing")
        training = Finetune(batch_size=batch, mixed_precision=self.trained_in, gradient_checkpointing=checkpointing)
        pixels = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
        accelerator = make_accelerator(self.device, self.trained_in)
        return make_trainer(accelerator, unet, pixels, training, Path("unused"), random_flip=True).step

    def draw(self, name: str, images: int, batch: int, steps: int) -> dict:
        """From noise to PNG files, images/s: DDIMPipeline, a loop that calls the network twice, sample_ddp.py."""
        settings, _ = self.networks[name]
        if self.quick:
            images, batch, steps = 2, 2, 2
        precision, dtype = ("no", torch.float32) if self.quick else ("fp16", torch.float16)
        stock = copy.deepcopy(self.unet(name)).to(self.device, dtype)
        pipeline = DDIMPipeline(stock, DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        network = freeze(copy.deepcopy(self.unet(name)), self.device, precision)
        encoder = Pixels(3)
        encoder.prepare(torch.device(self.device), precision)
        seeds = list(range(images))

        def ours() -> None:
            sampling = Sample(batch_size=batch, num_inference_steps=steps, mixed_precision=precision)
            shape = (3, settings["sample_size"], settings["sample_size"])
            with tempfile.TemporaryDirectory() as folder:
                drawing = Drawing(DDPMScheduler(), encoder, sampling, shape, torch.device(self.device))
                draw(drawing, lambda _: network, seeds, {}, Path(folder), is_silent=True)

        ways = {
            "DDIMPipeline": lambda: save_loop(lambda part: pipeline_images(pipeline, part, steps), seeds, batch),
            "two calls": lambda: save_loop(lambda part: two_call_images(stock, part, steps), seeds, batch),
            "sample_ddp.py": ours,
        }
        taken = measure.alternate(ways, 1, self.device)  # which warms up first
        found = {name: images / seconds for name, [seconds] in taken.items()}
        return found | {"× DDIMPipeline": found["sample_ddp.py"] / found["DDIMPipeline"]}

    def profile(self, name: str, what: str) -> dict:
        """The kernels that take most of the time of a network call, or of a training step, and their shares."""
        settings, batch = self.networks[name]
        if what == "training":
            work = self.step(name, "finetune.py", min(batch, 16))
        else:
            network = freeze(copy.deepcopy(self.unet(name)), self.device, self.trained_in)
            images = torch.randn(batch, 3, settings["sample_size"], settings["sample_size"], device=self.device)

            def work() -> None:
                with torch.inference_mode():
                    network(images, torch.tensor(500, device=self.device), return_dict=False)

        work()
        activity = ProfilerActivity.CPU if self.device == "cpu" else ProfilerActivity.CUDA
        with profile(activities=[activity]) as profiler:
            measure.seconds(work, self.device)
        key = "self_cpu_time_total" if self.device == "cpu" else "self_device_time_total"
        spent = sorted(((getattr(event, key), event.key) for event in profiler.key_averages()), reverse=True)
        total = sum(taken for taken, _ in spent)
        return {kernel[:80]: taken / total for taken, kernel in spent[:12]}

    # --- what they share

    def _unet(self, name: str) -> nn.Module:
        torch.manual_seed(0)
        return UNet2DModel(**self.networks[name][0]).eval().requires_grad_(False)

    def _flops(self, name: str) -> int:
        """Operations of a pass of one image."""
        settings, _ = self.networks[name]
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            UNet2DModel(**settings)(torch.zeros(1, 3, settings["sample_size"], settings["sample_size"]), 0)
        return counter.get_total_flops()

    def median(self, work: Callable[[], object], repeats: int = 8) -> float:
        """Seconds, after two calls that warm up: AdamW's moments exist from the second step on."""
        times = [measure.seconds(work, self.device) for _ in range(3 if self.quick else 2 + repeats)]
        return statistics.median(times[2:])

    def share(self, rate: float) -> dict:
        """FLOP/s, and what share of the matrix products' in bf16 they are."""
        known = self.rates.get("bfloat16")
        return {"TFLOP/s": rate / 1e12} | ({} if known is None else {"share of matrix products": rate / known})


def without_tf32():
    """A context in which float32 convolutions on a GPU do not use TF32."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def graph_of(work: Callable[[], None]) -> Callable[[], None]:
    """The work captured as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """0: equal bit for bit."""
    return max(float((one - other).abs().max()) for one, other in zip(first, second, strict=True))
