import json
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, SMALL_SEARCH, environment, old_name, run
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from pages import browse, check_html
from PIL import Image
from psutil import process_iter
from text_to_image import tiny_clip, tiny_pipeline

BLOCKS = {
    "cifar10": (["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], (8, 16, 16, 16)),
    "lsun_church": (["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"], (8, 8, 8, 8, 16, 16)),
}
BLOCKS["lsun_bedroom"] = BLOCKS["lsun_church"]
RESOLUTION = 32
# instead of pytorch_fid's minute of matrix roots: what it is called with; all else is imported from the real package
FAKE_PYTORCH_FID = {
    "__init__.py": "from pkgutil import extend_path\n__path__ = extend_path(__path__, __name__)\n",
    "__main__.py": "import sys\nprint('pytorch_fid', *sys.argv[1:], sep='|')\n",
}


def script_environment() -> dict[str, str]:
    return environment() | {"CONDA_DEFAULT_ENV": "deme"}


def script_command(script: str, *options: str) -> list:
    return ["bash", REPOSITORY / "scripts" / script, *options]


def run_script(script: str, *options: str, status: int = 0, **variables: str) -> str:
    """Run a shell script in the environment that runs the tests; its standard output.

    Args:
        variables: of the environment; PATH=forked_python saves the imports.
    """
    settings = script_environment() | variables
    result = subprocess.run(script_command(script, *options), env=settings, capture_output=True, text=True)
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout


def test_the_digits_script_runs_from_pretrained_to_pictures_and_skips_what_is_complete(tmp_path, forked_python):
    """The README's first command, made short by overrides: six rows, the pictures, nothing done twice, and a page."""
    options = [f"output_dir={tmp_path / 'with space'}", "finetune.max_steps=2", "distill.max_steps=2"]
    options += ["timesteps.num_ranges=2"]
    options += [
        "finetune.preview_every=2",
        "sample.num_images=24",
        "self_training.num_images=64",
        "sample.num_inference_steps=2",
        "evaluate.blocks=2",
        "evaluate.classifier_epochs=1",
        *SMALL_SEARCH,
    ]
    first = run_script("digits.sh", *options, PATH=forked_python)
    second = run_script("digits.sh", *options, NUM_PROCESSES="1", PATH=forked_python)
    rows = re.findall(r"^\| (\w+) \| 24 \| \d", first, flags=re.MULTILINE)
    assert rows == ["pretrained", "continued", "ensemble", "merged", "distilled", "neon"]
    pictures = first.split("pictures:\n")[-1].splitlines()
    assert len(pictures) == 6 + 2 + 2 + 2  # grids; previews: ranges, the control (twice as long), distilled, self
    assert all(Path(picture).exists() for picture in pictures)
    assert ": started" not in second
    page = check_html(tmp_path / "with space" / "digits" / "report.html")
    titles = re.findall("<h2>(.*)</h2>", page)
    expected = ["Results", "Samples at equal seeds", "Training", "Merging coefficients", "Search", "How it was made"]
    assert titles == [*expected, "Not there yet"]
    missing = page.split('id="missing"')[1]
    assert re.findall("<code>(.*)</code>", missing) == ["analyze.py"]
    assert first.split("| model |")[1:] == second.split("| model |")[1:]
    assert "classifier FD" in (tmp_path / "with space" / "digits" / "merged" / "README.md").read_text()
    config = REPOSITORY / "configs" / "digits.yaml"
    few = ["analyze.timesteps=8", "analyze.images=16", "analyze.landscape_points=2", "analyze.landscape_images=8"]
    for script in ("analyze.py", "report.py"):
        run(script, config, *options, *few)
    page = check_html(tmp_path / "with space" / "digits" / "report.html")
    assert re.findall("<h2>(.*)</h2>", page) == [*expected[:5], "Analyses", expected[5]]
    assert page.count("<img") == 4 + 2 + 4 + 11  # results, samples, training; coefficients, moved; search; analyses
    browse(tmp_path / "with space" / "digits" / "report.html")


def test_the_flow_script_takes_a_transformer_through_the_whole_method(tmp_path, forked_python):
    """From the embedded pipeline, made short by overrides: one row for each model."""
    options = [f"output_dir={tmp_path}", "finetune.max_steps=2", "distill.max_steps=2", "timesteps.num_ranges=2"]
    options += ["sample.num_images=20", "sample.num_inference_steps=2", "self_training.num_images=64"]
    options += ["evaluate.blocks=2", "evaluate.classifier_epochs=1", *SMALL_SEARCH]
    table = run_script("digits_flow.sh", *options, PATH=forked_python)
    rows = re.findall(r"^\| (\w+) \| 20 \| \d", table, flags=re.MULTILINE)
    assert rows == ["pretrained", "continued", "ensemble", "merged", "distilled", "neon"]
    assert (tmp_path / "digits_flow" / "finetuned" / "0000-0500" / "transformer").is_dir()


@pytest.mark.long
def test_signals_to_a_shell_script_reach_every_process_and_mistakes_are_answered_first(tmp_path):
    """SIGTERM, then Ctrl-C after the resume: all save checkpoints, the status is the signal's."""
    options = [f"output_dir={tmp_path}", "finetune.log_every=1"]
    options += ["evaluate.classifier_epochs=1"]  # a training waits for its core
    assert run_script("digits.sh", *options, "finetune.max_steps=many", status=2) == ""
    folders = [tmp_path / "digits" / "finetuned" / name for name in ("0000-0250", "0250-0500")]  # start first
    last = [0, 0]
    for number in (signal.SIGTERM, signal.SIGINT):
        command, settings = script_command("digits.sh", *options), script_environment()
        with subprocess.Popen(command, env=settings, stdout=-1, preexec_fn=heed_interrupts) as script:
            end = time.monotonic() + 120
            while any(newest_step(folder) <= step for folder, step in zip(folders, last, strict=True)):
                assert time.monotonic() < end
                time.sleep(0.05)
            script.send_signal(number)
            output = script.communicate(timeout=60)[0]
        assert script.returncode in (128 + number, -number), output
        last = [int(max((folder / "checkpoints").glob("step-*")).name[5:]) for folder in folders]
        assert last == [newest_step(folder) for folder in folders]
    time.sleep(0.5)
    assert not any(str(tmp_path) in " ".join(process.info["cmdline"] or []) for process in process_iter(["cmdline"]))


@pytest.mark.parametrize(
    ("variable", "value", "rule"),
    [
        ("MAX_MINUTES", "abc", "a number above 0"),
        ("MAX_MINUTES", "-5", "a number above 0"),
        ("MAX_MINUTES", "0", "a number above 0"),
        ("NUM_PROCESSES", "0", "a whole number above 0"),
        ("NUM_PROCESSES", "abc", "a whole number above 0"),
        ("NUM_PROCESSES", "1.5", "a whole number above 0"),
    ],
)
def test_mistakes_in_the_environment_are_answered_in_one_line(variable, value, rule, tmp_path):
    settings = script_environment() | {variable: value}
    command = script_command("digits.sh", f"output_dir={tmp_path}")
    result = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"{variable}={value}: must be {rule}\n"


def heed_interrupts() -> None:
    """Where the tests run in the background, Ctrl-C is ignored by all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def newest_step(folder: Path) -> int:
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.long
def test_cifar10_from_scratch_goes_from_raw_data_to_the_table_in_pieces(tmp_path, forked_python):
    """Made small by overrides; the first piece ends without an error before it has trained the base."""
    data = tmp_path / "data"
    make_photographs(data, 40, (40, 36))
    unet = "pretrain.unet={in_channels: 3, out_channels: 3, layers_per_block: 1, block_out_channels: [8, 8], "
    unet += "norm_num_groups: 4, down_block_types: [DownBlock2D, DownBlock2D], up_block_types: [UpBlock2D, UpBlock2D]}"
    options = [f"output_dir={tmp_path}", f"data.name={data}", "data.image_column=image", "data.held_out_images=4", unet]
    options += ["pretrain.max_steps=40", "pretrain.batch_size=4"]
    options += ["pretrain.log_every=5", "pretrain.held_out_every=20", "finetune.max_steps=2", "finetune.batch_size=4"]
    options += ["distill.max_steps=2"]
    options += [f"{section}.mixed_precision=no" for section in ("pretrain", "finetune", "sample")]
    options += ["self_training.num_images=8", "sample.num_images=12", "sample.num_inference_steps=2"]
    options += ["evaluate.classifier_width=8", "evaluate.classifier_epochs=1", *SMALL_SEARCH]
    first = run_script("cifar10_scratch.sh", *options, NUM_PROCESSES="1", MAX_MINUTES="0.02", PATH=forked_python)
    assert "stopped by its time limit: the same command resumes" in first
    assert "| model |" not in first
    table = run_script("cifar10_scratch.sh", *options, NUM_PROCESSES="1", PATH=forked_python)
    rows = re.findall(r"^\| (\w+) \| 12 \| [\d.]+ \| [\d.]+ ± [\d.]+ \| ", table, flags=re.MULTILINE)
    assert rows == ["pretrained", "continued", "ensemble", "merged", "distilled", "neon"]


def make_photographs(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Images in two classes' folders, wider than high."""
    random = np.random.default_rng(0)
    for index in range(count):
        path = folder / "train" / f"class{index % 2}" / f"{index:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def make_pretrained(folder: Path, benchmark: str) -> None:
    """A benchmark's UNet with few channels: CIFAR-10 as the google/ddpm models are, flat; Church so with .bin weights
    under the old names; Bedroom as a pipeline folder."""
    down, channels = BLOCKS[benchmark]
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=RESOLUTION,
        layers_per_block=1,
        block_out_channels=channels,
        norm_num_groups=4,
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        downsample_padding=0,
        freq_shift=1,
        flip_sin_to_cos=False,
        norm_eps=1e-6,
        attention_head_dim=None,
    )
    if benchmark == "lsun_bedroom":
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
        return
    unet.save_pretrained(folder)
    DDPMScheduler().save_pretrained(folder)
    if benchmark == "lsun_church":
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        state = {old_name(name): weight for name, weight in unet.state_dict().items()}
        torch.save(state, folder / "diffusion_pytorch_model.bin")


@pytest.mark.long
@pytest.mark.parametrize("benchmark", ["cifar10", "lsun_church", "lsun_bedroom"])
def test_a_benchmark_runs_from_statistics_to_fid(benchmark, tmp_path, forked_python):
    """Each script with its own configuration, on a tiny pipeline and a local folder: every stage, and again resumed."""
    make_pretrained(tmp_path / "pretrained", benchmark)
    make_photographs(tmp_path / "data", 20, (48, 40))
    for name, content in FAKE_PYTORCH_FID.items():
        file = tmp_path / "fake" / "pytorch_fid" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    options = [
        f"output_dir={tmp_path}",
        f"model.pretrained={tmp_path / 'pretrained'}",
        f"data.name={tmp_path / 'data'}",
    ]
    options += ["data.image_column=image", "data.label_column=label", f"data.resolution={RESOLUTION}"]
    options += ["data.cache_gb=0", "finetune.max_steps=1", "finetune.batch_size=4", "finetune.micro_batch_size=2"]
    options += ["finetune.mixed_precision=no", "sample.mixed_precision=no", "sample.num_inference_steps=2"]
    options += ["sample.num_images=8", "merge.coefficients=null"]
    options += ["evaluate.features=classifier", "evaluate.classifier_epochs=1"]  # Inception's matrix roots take minutes
    variables = {"PYTHONPATH": str(tmp_path / "fake"), "PATH": forked_python}
    output = run_script(f"{benchmark}.sh", *options, **variables)
    assert f"{tmp_path / 'data'}: 20 images" in output
    assert re.search(r"GB  together; [\d,.]+ GB are free", output)
    assert "GPU hours together" in output
    folder = tmp_path / benchmark
    assert re.findall(r"^\| (\w+) \| 8 \| \d", output, flags=re.MULTILINE) == ["pretrained", "merged"]
    assert (
        output.splitlines()[-1] == f"pytorch_fid|{folder / 'samples' / 'merged'}|{folder / 'stats' / 'classifier.npz'}"
    )
    assert len(list((folder / "samples" / "merged").glob("*.png"))) == 8
    if benchmark == "cifar10":
        again = run_script(f"{benchmark}.sh", *options, **variables)
        assert ": started" not in again


@pytest.mark.long
def test_stable_diffusion_runs_from_its_folders_to_the_table(tmp_path, forked_python):
    """The script with its own configuration on a tiny pipeline, captioned images and a file of prompts."""
    tiny_pipeline().save_pretrained(tmp_path / "pretrained")
    tiny_clip(tmp_path / "clip")
    data = tmp_path / "data" / "train"
    data.mkdir(parents=True)
    lines = ["file_name,text"]
    for number in range(20):
        Image.effect_noise((9, 8), 50).save(data / f"{number}.png")
        lines.append(f"{number}.png,number {number}")
    (data / "metadata.csv").write_text("\n".join(lines))
    (tmp_path / "prompts.csv").write_text("text\n" + "a cat\n" * 12)
    options = [
        f"output_dir={tmp_path}",
        f"model.pretrained={tmp_path / 'pretrained'}",
        f"data.name={tmp_path / 'data'}",
    ]
    options += ["data.resolution=8", "finetune.max_steps=1", "finetune.batch_size=4", "finetune.micro_batch_size=2"]
    options += ["finetune.mixed_precision=no", "sample.mixed_precision=no", "sample.num_inference_steps=2"]
    options += [f"sample.prompts={tmp_path / 'prompts.csv'}", "sample.num_images=12", "sample.size_on_disk=8"]
    options += [f"evaluate.clip_model={tmp_path / 'clip'}", "evaluate.features=classifier", "data.label_column=text"]
    options += ["evaluate.reference=null", "evaluate.classifier_epochs=1", "evaluate.classifier_width=2"]
    options += ["search.images=16"]
    variables = {"REFERENCE": "none", "PATH": forked_python}
    output = run_script("stable_diffusion_v1_4.sh", *options, **variables)
    assert re.search(r"GB  encoded images and captions", output)
    assert re.search(r"GPU hours  drawing 48 images", output)
    rows = re.findall(r"^\| (\w+) \| 12 \|.*\|$", output, flags=re.MULTILINE)
    assert rows == ["pretrained", "continued", "ensemble", "merged"]
    assert "CLIP score" in (tmp_path / "stable_diffusion_v1_4" / "merged" / "README.md").read_text()
    assert ": started" not in run_script("stable_diffusion_v1_4.sh", *options, **variables)


def test_conda_gets_the_pinned_requirements():
    environment_file = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    assert environment_file["name"] == "deme"
    assert {"pip": ["-r requirements.txt"]} in environment_file["dependencies"]
