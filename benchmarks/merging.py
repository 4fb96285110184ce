"""merge.py compared with merging state dicts or whole modules: time, peak anonymous memory, bytes read and written.

python benchmarks/merging.py             # 2, 4, 8 experts of 114 M parameters
python benchmarks/merging.py --largest   # also 2 of 860 M
python benchmarks/merging.py --quick
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import parse, ratios, spread
from benchmarks.report import save
from benchmarks.unets import CHURCH, SMALL
from deme.config.reading import load_config
from deme.models.weights import ATTENTION_NAMES, todays_name
from deme.report.tables import markdown_table

REPOSITORY = Path(__file__).resolve().parent.parent
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONTENDERS = ("merge.py", "state dicts")


def main() -> None:
    arguments = parse(
        __doc__,
        largest={"action": "store_true", "help": "also 2 experts of 860 M parameters: 14 GB of disk, 21 GB of memory"},
        measure={"help": "JSON: do one merge and print what it took"},
    )
    if arguments.measure:
        print(json.dumps(measure(**json.loads(arguments.measure))))
        return
    church = ("Church", "UNet2DModel", CHURCH)
    renamed = ("Church, old attention names", "UNet2DModel", CHURCH)
    stable_diffusion = ("Stable Diffusion v1", "UNet2DConditionModel", {})
    cases = [(church, 2), (church, 4), (church, 8), (renamed, 4), *([(stable_diffusion, 2)] * arguments.largest)]
    if arguments.quick:
        cases = [(("small", "UNet2DModel", SMALL), 2)]
    rows = []
    for network, experts in cases:
        with tempfile.TemporaryDirectory() as folder:
            rows += compare(Path(folder).resolve(), *network, experts, 1 if arguments.quick else 3)
    titles = ["merging", "experts", "GB each", "s, without imports", "× state dicts", "s, whole command"]
    titles += ["× whole modules", "anonymous memory / output", "read / inputs", "written / output"]
    lines = [
        [
            f"{row['network']}: {row['name']}",
            str(row["experts"]),
            f"{row['model_bytes'] / 1e9:.2f}",
            spread(row["seconds"]),
            spread(row["times_state_dicts"]),
            spread(row["command_seconds"]) if "command_seconds" in row else "-",
            spread(row["times_whole_modules"]) if row.get("times_whole_modules") else "-",
            spread(row["anonymous"]),
            *(f"{row[key]:.2f}" for key in ("read", "written")),
        ]
        for row in rows
    ]
    save("merging", "cpu", rows, markdown_table(titles, lines))


def compare(folder: Path, title: str, kind: str, settings: dict, experts: int, repeats: int) -> list[dict]:
    """One row per variant."""
    model_bytes = make_inputs(folder, kind, settings, experts, old_names=title.endswith("old attention names"))
    runs: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    command_seconds = []
    whole_modules = []
    for _ in range(repeats):
        for name in CONTENDERS:
            runs[name].append(child(folder, name, experts, cold=False))
        command_seconds.append(whole_command(folder, experts))
        if kind == "UNet2DModel" and experts == 4:
            whole_modules.append(whole_modules_command(folder, experts))
    rows = []
    for name in CONTENDERS:
        cold = child(folder, name, experts, cold=True)
        taken, reference = ([run["seconds"] for run in runs[contender]] for contender in (name, "state dicts"))
        row = {"network": title, "name": name, "experts": experts, "model_bytes": model_bytes, "seconds": taken}
        row |= {"times_state_dicts": ratios(reference, taken)}
        row |= {"anonymous": [run["anonymous"] / model_bytes for run in runs[name]]}
        row |= {"read": cold["read"] / (experts + 1) / model_bytes, "written": cold["written"] / model_bytes}
        if name == "merge.py":
            row |= {"command_seconds": command_seconds, "whole_modules_seconds": whole_modules}
            row |= {"times_whole_modules": ratios(whole_modules, command_seconds) if whole_modules else []}
        rows.append(row)
    return rows


def options(folder: Path, experts: int) -> list[str]:
    """merge.py's command line for the inputs in `folder`."""
    coefficients = [0.5 / experts] * experts
    values = [f"name={experts}", f"output_dir={folder}", f"model.pretrained={folder / 'pretrained'}"]
    return [*values, f"timesteps.num_ranges={experts}", f"merge.coefficients={coefficients}"]


def make_inputs(folder: Path, kind: str, settings: dict, experts: int, old_names: bool) -> int:
    """Write a pretrained pipeline and its finetuned UNets, of random weights; the bytes of one.

    Args:
        old_names: the pretrained attention layers' names are those of diffusers up to 0.15, as google/ddpm-* has them.
    """
    import diffusers
    from safetensors.torch import save_file

    with torch.device("meta"):
        unet = getattr(diffusers, kind)(**settings)
    shapes = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    config = load_config(REPOSITORY / "configs" / "digits.yaml", options(folder, experts))
    for path in (folder / "pretrained" / "unet", *config.paths.finetuned):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({"_class_name": kind, **settings}))
        is_old = old_names and path.parent.name == "pretrained"
        tensors = {old_name(name) if is_old else name: torch.randn(shape) for name, shape in shapes.items()}
        save_file(tensors, path / WEIGHTS)
    diffusers.DDPMScheduler().save_pretrained(folder / "pretrained" / "scheduler")
    return (folder / "pretrained" / "unet" / WEIGHTS).stat().st_size


def old_name(name: str) -> str:
    for before, today in ATTENTION_NAMES.items():
        name = name.replace(f".{today}.", f".{before}.")
    return name


def child(folder: Path, name: str, experts: int, cold: bool) -> dict:
    settings = {"folder": str(folder), "name": name, "experts": experts, "cold": cold}
    command = [sys.executable, __file__, "--measure", json.dumps(settings)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def whole_command(folder: Path, experts: int) -> float:
    start = time.perf_counter()
    subprocess.run(["rm", "-r", folder / str(experts) / "merged"], check=True)
    command = [sys.executable, "merge.py", *options(folder, experts)]
    subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def whole_modules_command(folder: Path, experts: int) -> float:
    config = load_config(REPOSITORY / "configs" / "digits.yaml", options(folder, experts))
    start = time.perf_counter()
    command = [sys.executable, "benchmarks/whole_modules.py", folder / "modules.pt", folder / "pretrained" / "unet"]
    subprocess.run([*command, *config.paths.finetuned], check=True, cwd=REPOSITORY)
    (folder / "modules.pt").unlink()
    return time.perf_counter() - start


def measure(folder: str, name: str, experts: int, cold: bool) -> dict:
    """Merge once.

    Args:
        cold: the inputs are first dropped from the operating system's cache, so that what is read is counted.

    Returns:
        seconds, and bytes: peak of this process's anonymous memory over what it had before; read; written.
    """
    import shutil

    import safetensors.torch  # noqa: F401  outside of the time that is taken

    import merge
    from deme.method.merging import task_arithmetic, ties  # noqa: F401
    from deme.report import model_card  # noqa: F401

    config = load_config(REPOSITORY / "configs" / "digits.yaml", options(Path(folder), experts))
    shutil.rmtree(config.paths.merged, ignore_errors=True)
    os.sync()
    inputs = [Path(folder) / "pretrained" / "unet" / WEIGHTS, *(path / WEIGHTS for path in config.paths.finetuned)]
    if cold:
        for path in inputs:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    work = (
        (lambda: merge.main(config)) if name == "merge.py" else lambda: merge_state_dicts(inputs, config.paths.merged)
    )
    before = anonymous_bytes()
    start = time.perf_counter()
    before_io = io_bytes()
    with peak_anonymous() as peak:
        work()
    taken = time.perf_counter() - start
    read, written = (now - then for now, then in zip(io_bytes(), before_io, strict=True))
    return {"seconds": taken, "anonymous": peak[0] - before, "read": read, "written": written}


def merge_state_dicts(inputs: list[Path], output: Path) -> None:
    """Load all models, compute their task vectors and add them."""
    from safetensors.torch import load_file, save_file

    base, *experts = (
        {todays_name(name): tensor.clone() for name, tensor in load_file(path).items()} for path in inputs
    )
    vectors = [{name: expert[name] - base[name] for name in base} for expert in experts]
    merged = {name: base[name] + sum(0.5 / len(vectors) * vector[name] for vector in vectors) for name in base}
    (output / "unet").mkdir(parents=True)
    save_file(merged, output / "unet" / WEIGHTS)
    with (output / "unet" / WEIGHTS).open("rb") as file:
        os.fsync(file.fileno())


def anonymous_bytes() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def io_bytes() -> tuple[int, int]:
    """Bytes that this process has read from and written to the disk."""
    text = Path("/proc/self/io").read_text()
    return tuple(int(re.search(rf"^{name}: (\d+)", text, re.MULTILINE)[1]) for name in ("read_bytes", "write_bytes"))


@contextmanager
def peak_anonymous() -> Iterator[list[int]]:
    """The greatest `anonymous_bytes` within the block, looked at every 2 ms, in the list that it yields."""
    peak = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
