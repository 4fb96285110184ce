"""Tiny real models and real subprocesses that the tests share."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hypothesis import settings
from robustness.forked import Run
from robustness.forked_python import ForkedPython

settings.register_profile("no deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("no deadline")

PICKLED_WEIGHTS = "diffusion_pytorch_model.bin"
REPOSITORY = Path(__file__).resolve().parent.parent
TINY_UNET = {
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}


def tiny_unet(seed: int = 0, **settings) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(sample_size=8, **(TINY_UNET | settings)).eval()


@pytest.fixture(autouse=True)
def no_accelerator_is_left():
    """accelerate keeps the first precision of a process, which the next test may not want."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def one_thread():
    """torch computes in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """A pipeline folder with a small random UNet and a scheduler whose betas are not diffusers' defaults."""
    folder = tmp_path_factory.mktemp("pipeline") / "pretrained"
    DDPMPipeline(tiny_unet(), DDPMScheduler(beta_end=0.03, clip_sample_range=1.5)).save_pretrained(folder)
    return folder


@pytest.fixture
def config_file(tmp_path, pretrained) -> Path:
    """A configuration that runs every script in seconds, into tmp_path/tiny."""
    config = {
        "name": "tiny",
        "output_dir": str(tmp_path),
        "model": {"pretrained": str(pretrained)},
        "timesteps": {"num_ranges": 2},
        "pretrain": {"unet": TINY_UNET, "max_steps": 4, "batch_size": 8, "log_every": 2},
        "finetune": {"max_steps": 6, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3, "log_every": 1},
        "merge": {"coefficients": [0.5, 0.25]},
        "sample": {"num_images": 6, "batch_size": 4, "num_inference_steps": 3},
        "evaluate": {"features": "classifier", "classifier_epochs": 1},
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


SMALL_SEARCH = ["search.trials=2", "search.num_images=8", "search.control_images=16", "search.finalists=1"]
SMALL_SEARCH += ["search.finalist_images=8", "search.num_inference_steps=2", "search.images=16"]
SMALL_SEARCH += ["search.report_images=12"]


def command(script: str, config_file: Path, *overrides: str, processes: int = 1) -> list[str]:
    """The command line that starts a script."""
    launcher = ["bash", str(REPOSITORY / "scripts" / "launch.sh"), str(processes)]
    return [*launcher, str(REPOSITORY / script), "--config", str(config_file), *overrides]


def environment() -> dict[str, str]:
    """One thread, so that runs are equal bit for bit; the CPU even where there is a GPU; this Python first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1", "PATH": path}
    return os.environ | settings


@pytest.fixture(scope="session")
def forked_python(tmp_path_factory) -> str:
    """PATH for shell scripts whose `python` need not import the libraries again."""
    folder = tmp_path_factory.mktemp("bin")
    ForkedPython(folder)
    return f"{folder}{os.pathsep}{environment()['PATH']}"


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_name(name: str) -> str:
    """What diffusers up to 0.15 called a tensor."""
    for today, before in OLD_NAMES.items():
        name = name.replace(today, before)
    return name


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def distributed(processes: int) -> list[dict[str, str]]:
    """The environment of each process, as accelerate's launcher or torchrun makes it."""
    if processes == 1:
        return [dict(os.environ)]
    [port] = free_ports(1)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    return [os.environ | shared | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(processes)]


def run(
    script: str,
    config_file: Path,
    *overrides: str,
    processes: int = 1,
    status: int = 0,
    timeout: float = 300,
    fresh: bool = False,
) -> subprocess.CompletedProcess:
    """Run a script and require its exit status: forked, which saves importing the libraries.

    Args:
        fresh: as a user would, for what the libraries read when they are imported, or what the launcher does.
    """
    line = command(script, config_file, *overrides, processes=processes)
    folder = config_file.parent
    if fresh:
        result = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=timeout, cwd=folder)
    else:
        arguments = ["--config", str(config_file), *overrides]
        runs = [Run(script, arguments, folder, environment=variables) for variables in distributed(processes)]
        statuses = [run.wait(timeout) for run in runs]
        output = ("".join(getattr(run, stream) for run in runs) for stream in ("stdout", "stderr"))
        result = subprocess.CompletedProcess(line, next(filter(lambda status: status != 0, statuses), 0), *output)
    assert result.returncode == status, f"{script} {overrides}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="session")
def torch_home(tmp_path_factory):
    """Inception weights drawn from a kaiming normal, where pytorch_fid looks for its download.

    (Default-initialised networks map everything to nearly the same features.)
    """
    import torchvision
    from pytorch_fid import inception

    torch.manual_seed(0)
    network = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    for name, block in {
        "Mixed_5b": inception.FIDInceptionA(192, pool_features=32),
        "Mixed_5c": inception.FIDInceptionA(256, pool_features=64),
        "Mixed_5d": inception.FIDInceptionA(288, pool_features=64),
        "Mixed_6b": inception.FIDInceptionC(768, channels_7x7=128),
        "Mixed_6c": inception.FIDInceptionC(768, channels_7x7=160),
        "Mixed_6d": inception.FIDInceptionC(768, channels_7x7=160),
        "Mixed_6e": inception.FIDInceptionC(768, channels_7x7=192),
        "Mixed_7b": inception.FIDInceptionE_1(1280),
        "Mixed_7c": inception.FIDInceptionE_2(2048),
    }.items():
        setattr(network, name, block)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    home = tmp_path_factory.mktemp("torch")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), home / "hub" / "checkpoints" / inception.FID_WEIGHTS_URL.rsplit("/", 1)[1])
    return home
