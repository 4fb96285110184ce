"""Bad input to every script: one line that names the key or file and its value, status 2, nothing written or lost.

The script files run in this process, as `python SCRIPT` would run them: a hundred starts of Python would take minutes.
"""

import importlib
import json
import re
import runpy
import shlex
import shutil
import signal
import socket
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import REPOSITORY, tiny_unet
from PIL import Image
from pytorch_fid import inception
from safetensors.torch import load_file, save_file

from deme.job.command import SIGNALS
from deme.models.denoisers import with_projections
from deme.models.weights import WEIGHTS


@pytest.fixture
def start(config_file, monkeypatch, capfd):
    """Runs a script in the configuration's folder: (exit status, standard error)."""
    monkeypatch.chdir(config_file.parent)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("TORCH_HOME", str(config_file.parent / "torch"))
    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def start(script: str, *arguments: str) -> tuple[int, str]:
        if "--config" not in arguments:
            arguments = ("--config", str(config_file), *arguments)
        monkeypatch.setattr(sys, "argv", [str(REPOSITORY / script), *arguments])
        capfd.readouterr()
        status = 0
        try:
            runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        except SystemExit as end:
            status = end.code
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return status, capfd.readouterr().err

    yield start
    for number, handler in handlers.items():
        signal.signal(number, handler)


def assert_refused(start, root: Path, script: str, arguments: list[str], message: str) -> None:
    """The script exits with status 2, and the last line on standard error, the only one of its own, is the message.

    Args:
        message: the whole line after `SCRIPT: error: `, with {root} for the folder and … for any text.
    """
    status, errors = start(script, *arguments)
    lines = [line for line in errors.splitlines() if line.startswith(script)]
    assert status == 2, errors
    assert len(lines) == 1, errors
    assert errors.splitlines()[-1] == lines[0], errors
    assert "Traceback" not in errors, errors
    parts = f"{script}: error: {message}".replace("{root}", str(root)).split("…")
    pattern = ".+?".join(map(re.escape, parts))
    assert re.fullmatch(pattern, lines[0]), f"{lines[0]}\nis not\n{message}"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def experts(root: Path, pretrained: Path) -> None:
    """Two finetuned UNets, made without training."""
    for index, name in enumerate(["0000-0500", "0500-1000"]):
        with_projections(tiny_unet(index)).save_pretrained(root / "tiny" / "finetuned" / name / "unet")


def different_experts(root: Path, pretrained: Path) -> None:
    """The same, but neither is the pretrained one."""
    experts(root, pretrained)
    edit_weights(root / "tiny" / "finetuned" / "0000-0500" / "unet", lambda tensors: tensors["conv_in.bias"].add_(0.1))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def damaged_expert(change):
    """The weights' tensors of the second expert changed."""

    def prepare(root: Path, pretrained: Path) -> None:
        experts(root, pretrained)
        edit_weights(root / "tiny" / "finetuned" / "0500-1000" / "unet", change)

    return prepare


def replaced_expert(write):
    """The weights' file of the second expert written anew."""

    def prepare(root: Path, pretrained: Path) -> None:
        experts(root, pretrained)
        write(root / "tiny" / "finetuned" / "0500-1000" / "unet" / WEIGHTS)

    return prepare


def merged_experts(change=lambda folder: None):
    """Two experts and a merged pipeline, made without merging; then the second expert's folder changed."""

    def prepare(root: Path, pretrained: Path) -> None:
        experts(root, pretrained)
        shutil.copytree(pretrained, root / "tiny" / "merged")
        change(root / "tiny" / "finetuned" / "0500-1000" / "unet")

    return prepare


def another_architecture(root: Path, pretrained: Path) -> None:
    experts(root, pretrained)
    wider = with_projections(tiny_unet(block_out_channels=[8, 32]))
    wider.save_pretrained(root / "tiny" / "finetuned" / "0500-1000" / "unet")


def small_networks(root: Path, pretrained: Path) -> None:
    """All of 4×4 pixels."""
    experts(root, pretrained)
    copied_pretrained(edit_json("unet/config.json", sample_size=4))(root, pretrained)
    for file in (root / "tiny").rglob("config.json"):
        edit_json(file.name, sample_size=4)(file.parent)


def copied_pretrained(change):
    """A copy of the pretrained pipeline in copy/, changed."""

    def prepare(root: Path, pretrained: Path) -> None:
        shutil.copytree(pretrained, root / "copy")
        change(root / "copy")

    return prepare


def edit_json(file: str, **values):
    """The JSON file in the copy's folder with other values."""

    def change(folder: Path) -> None:
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | values))

    return change


def images(change):
    """A folder of images in data/, changed."""

    def prepare(root: Path, pretrained: Path) -> None:
        for name in ("a.png", "b.png", "c.png"):
            path = root / "data" / "train" / "kind" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((16, 16), 50).save(path)
        change(root / "data" / "train" / "kind")

    return prepare


def both(*preparations):
    """One after another."""

    def prepare(root: Path, pretrained: Path) -> None:
        for preparation in preparations:
            preparation(root, pretrained)

    return prepare


def samples(*names: str, sizes: tuple[int, ...] = (8, 8, 8)):
    """A folder of images in tiny/samples/other."""

    def prepare(root: Path, pretrained: Path) -> None:
        folder = root / "tiny" / "samples" / "other"
        folder.mkdir(parents=True)
        for name, size in zip(names, sizes, strict=False):
            Image.new("L", (size, size)).save(folder / name)

    return prepare


def sampled_before(root: Path, pretrained: Path) -> None:
    samples("000000.png")(root, pretrained)
    (root / "tiny" / "samples" / "other" / "samples.yaml").write_text("identity: {weights: [abc]}\nnum_images: 6\n")


def damaged_record(root: Path, pretrained: Path) -> None:
    samples("000000.png")(root, pretrained)
    (root / "tiny" / "samples" / "other" / "samples.yaml").write_text("identity: null\nnum_images: 6\n")


def damaged_run(root: Path, pretrained: Path) -> None:
    file = root / "tiny" / "finetuned" / "0000-0500" / "config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("trained_from: null\n")


def yaml_file(text: str):
    return lambda root, pretrained: (root / "bad.yaml").write_text(text)


def statistics(**arrays):
    return lambda root, pretrained: np.savez(root / "reference.npz", **arrays)


def single_array(root: Path, pretrained: Path) -> None:
    with (root / "reference.npz").open("wb") as file:
        np.save(file, np.zeros(2))


def two_features(root: Path, pretrained: Path) -> None:
    samples("0.png", "1.png", "2.png")(root, pretrained)
    statistics(mu=np.zeros(2), sigma=np.eye(2))(root, pretrained)


def text_bomb(root: Path, pretrained: Path) -> None:
    """A chunk of 100 MB of text, compressed, behind the header of a PNG."""
    path = root / "tiny" / "samples" / "other" / "0.png"
    image = path.read_bytes()
    body = b"zTXtkey\0\0" + zlib.compress(bytes(10**8))
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(image[:33] + chunk + image[33:])


def encrypted(root: Path, pretrained: Path) -> None:
    """The flag of encryption set on every array."""
    path = root / "reference.npz"
    archive = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        place = archive.find(signature)
        while place >= 0:
            archive[place + flags] |= 1
            place = archive.find(signature, place + 4)
    path.write_bytes(archive)


def parquet_images(rows: list, label: list | None = None):
    """A data set of these rows in data/."""

    def prepare(root: Path) -> None:
        (root / "data").mkdir()
        table = pa.table({"image": rows} | ({} if label is None else {"label": label}))
        pq.write_table(table, root / "data" / "train.parquet")

    return prepare


def damaged_inception(root: Path, pretrained: Path) -> None:
    """A download that was cut short, where torch keeps it."""
    samples("0.png", "1.png")(root, pretrained)
    folder = root / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"a": torch.ones(100)}, folder / "whole")
    content = (folder / "whole").read_bytes()
    (folder / Path(inception.FID_WEIGHTS_URL).name).write_bytes(content[: len(content) // 2])


def nothing(root: Path, pretrained: Path) -> None:
    pass


@dataclass(frozen=True)
class Mistake:
    """Bad input to a script, and how it is answered.

    Args:
        name: what is wrong.
        message: the whole line after `SCRIPT: error: `, as `assert_refused` reads it: … stands for the text of other
            libraries, for what depends on the machine and for long values.
        prepare: makes files before the script starts.
    """

    name: str
    script: str
    arguments: list[str]
    message: str
    prepare: Callable[[Path, Path], None] = nothing


PRETRAINED = "sample.model=pretrained"
COPY = "model.pretrained=copy"
DISTILLED = ["finetune.range=distilled"]
BAD_FILE = ["--config", "bad.yaml"]
OWN_DATA = ["data.name=data", "data.image_column=image", "data.label_column=null"]
OTHER = "sample.output=tiny/samples/other"
REFERENCE = "evaluate.reference=reference.npz"
PNG = (REPOSITORY / "docs" / "overview.png").read_bytes()
OBJECTS = np.array([{"a": 1}], dtype=object)
unreadable_image = images(lambda kind: (kind / "c.png").write_text("text"))

MISTAKES = [
    Mistake(
        "an analysis of an expert that is not finite",
        "analyze.py",
        ["analyze.analyses=[task_vectors]"],
        "{root}/tiny/finetuned/0500-1000/unet: tensor conv_in.bias holds NaN or infinite values",
        damaged_expert(lambda tensors: tensors["conv_in.bias"].fill_(float("nan"))),
    ),
    Mistake(
        "an analysis of an expert of another architecture",
        "analyze.py",
        ["analyze.analyses=[task_vectors]"],
        "{root}/tiny/finetuned/0500-1000/unet/config.json: block_out_channels=[8, 32], but [8, 16] in …",
        another_architecture,
    ),
    Mistake(
        "an analysis into a file",
        "analyze.py",
        ["analyze.output=taken"],
        "analyze.output: cannot create the folder taken: …",
        both(experts, lambda root, pretrained: (root / "taken").write_text("")),
    ),
    # --- the configuration
    Mistake(
        "a micro-batch with fewer images than distilling has experts",
        "finetune.py",
        [*DISTILLED, "finetune.micro_batch_size=1"],
        "finetune.micro_batch_size=1: finetune.range=distilled spreads it over 2 timestep ranges",
        merged_experts(),
    ),
    Mistake(
        "a whole batch with fewer",
        "finetune.py",
        [*DISTILLED, "finetune.batch_size=3", "finetune.micro_batch_size=null", "timesteps.num_ranges=4"],
        "finetune.batch_size=3: finetune.range=distilled spreads it over 4 timestep ranges",
        merged_experts(),
    ),
    # --- YAML: files and values
    Mistake(
        "NUL in a path",
        "merge.py",
        BAD_FILE,
        "merge.output='a\\x00b': holds a line break, a tab or another control character",
        yaml_file('merge: {output: "a\\0b"}'),
    ),
    Mistake(
        "bytes that are no text",
        "evaluate.py",
        ["evaluate.samples=[\udcff]"],
        "evaluate.samples=[\\udcff]: not YAML: ReaderError: unacceptable character #xdcff: …",
    ),
    Mistake(
        "a file that is not YAML",
        "merge.py",
        BAD_FILE,
        "--config bad.yaml: not YAML: expected ',' or ']', but got ':' (line 4, column 2)",
        yaml_file("name: a\nmerge:\n  - [1\nb: 2\n"),
    ),
    Mistake(
        "a key that stands twice in a file",
        "merge.py",
        BAD_FILE,
        "--config bad.yaml: not YAML: found duplicate key name (line 2, column 1)",
        yaml_file("name: a\nname: b"),
    ),
    Mistake(
        "a file that holds a list",
        "merge.py",
        BAD_FILE,
        "--config bad.yaml: not a YAML mapping",
        yaml_file("- 1\n- 2\n"),
    ),
    Mistake(
        "a reference to an unknown key in a file",
        "merge.py",
        BAD_FILE,
        "name=${foo}: Interpolation key 'foo' not found",
        yaml_file("name: ${foo}"),
    ),
    Mistake(
        "a number for a name pattern",
        "merge.py",
        BAD_FILE,
        "merge.coefficients={1: [1, 1]}: must be a list of finite numbers, a mapping from name patterns to such lists, "
        "or a file of search.py",
        yaml_file("merge: {coefficients: {1: [1, 1]}}"),
    ),
    Mistake(
        "a Python object in a file",
        "merge.py",
        BAD_FILE,
        "--config bad.yaml: not YAML: could not determine a constructor for the tag "
        "'tag:yaml.org,2002:python/object/apply:os.mkdir'",
        yaml_file("name: !!python/object/apply:os.mkdir [executed]\n"),
    ),
    # --- the pretrained pipeline
    Mistake(
        "a pipeline without a noise schedule",
        "finetune.py",
        [COPY],
        "model.pretrained=copy: not a pipeline folder: copy/scheduler/scheduler_config.json is missing",
        copied_pretrained(lambda folder: shutil.rmtree(folder / "scheduler")),
    ),
    Mistake(
        "a pretrained weight that is NaN, finetuned",
        "finetune.py",
        [COPY],
        "model.pretrained=copy: copy/unet/diffusion_pytorch_model.safetensors: tensor conv_in.bias holds NaN or "
        "infinite values",
        copied_pretrained(lambda folder: edit_weights(folder / "unet", lambda t: t["conv_in.bias"].fill_(torch.nan))),
    ),
    Mistake(
        "a pretrained weight that is infinite, sampled from",
        "sample_ddp.py",
        [PRETRAINED, COPY],
        "sample.model=pretrained: copy/unet/diffusion_pytorch_model.safetensors: tensor conv_in.bias holds NaN or "
        "infinite values",
        copied_pretrained(lambda folder: edit_weights(folder / "unet", lambda t: t["conv_in.bias"].fill_(torch.inf))),
    ),
    Mistake(
        "pretrained weights that are cut short",
        "sample_ddp.py",
        [PRETRAINED, COPY],
        "sample.model=pretrained: copy/unet/diffusion_pytorch_model.safetensors: cannot be read: SafetensorError: …",
        copied_pretrained(lambda folder: (folder / "unet" / WEIGHTS).write_bytes(b"short")),
    ),
    Mistake(
        "a network's configuration that is cut short",
        "sample_ddp.py",
        [PRETRAINED, COPY],
        "sample.model=pretrained: model.pretrained=copy: copy/unet/config.json: JSONDecodeError: …",
        copied_pretrained(lambda folder: (folder / "unet" / "config.json").write_text("{")),
    ),
    Mistake(
        "an unknown kind of prediction",
        "finetune.py",
        [COPY],
        "model.pretrained=copy: copy/scheduler/scheduler_config.json: prediction_type=foo: not one of epsilon, …",
        copied_pretrained(edit_json("scheduler/scheduler_config.json", prediction_type="foo")),
    ),
    Mistake(
        "an unknown kind of noise schedule",
        "sample_ddp.py",
        [PRETRAINED, COPY],
        "sample.model=pretrained: copy/scheduler/scheduler_config.json: NotImplementedError: foo is not implemented "
        "for …DDPMScheduler…",
        copied_pretrained(edit_json("scheduler/scheduler_config.json", beta_schedule="foo")),
    ),
    Mistake(
        "a number for the pretrained network's activation",
        "finetune.py",
        [COPY],
        "model.pretrained=copy: copy/unet: AttributeError: 'int' object has no attribute 'lower'",
        copied_pretrained(edit_json("unet/config.json", act_fn=3)),
    ),
    Mistake(
        "a pretrained network of four channels",
        "finetune.py",
        [COPY],
        "model.pretrained=copy: in_channels=4: images have 1 or 3 channels",
        copied_pretrained(lambda folder: tiny_unet(in_channels=4, out_channels=4).save_pretrained(folder / "unet")),
    ),
    Mistake(
        "a pretrained network that needs classes",
        "sample_ddp.py",
        [PRETRAINED, COPY],
        "sample.model=pretrained: model.pretrained=copy: copy/unet/config.json: num_class_embeds=10: not null",
        copied_pretrained(lambda folder: tiny_unet(num_class_embeds=10).save_pretrained(folder / "unet")),
    ),
    # --- finetuned networks
    Mistake(
        "nothing merged yet that could be distilled",
        "finetune.py",
        DISTILLED,
        "{root}/tiny/merged/unet is missing; merge.py makes it",
        experts,
    ),
    Mistake(
        "an expert to distil that is missing",
        "finetune.py",
        DISTILLED,
        "{root}/tiny/finetuned/0500-1000/unet/diffusion_pytorch_model.safetensors: missing; train it with finetune.py "
        "finetune.range=1",
        merged_experts(shutil.rmtree),
    ),
    Mistake(
        "an expert to distil whose weights are damaged",
        "finetune.py",
        DISTILLED,
        "{root}/tiny/finetuned/0500-1000/unet/diffusion_pytorch_model.safetensors: tensor conv_in.bias holds NaN or "
        "infinite values",
        merged_experts(lambda folder: edit_weights(folder, lambda t: t["conv_in.bias"].fill_(torch.nan))),
    ),
    Mistake(
        "an expert to distil of other channels",
        "finetune.py",
        DISTILLED,
        "{root}/tiny/finetuned/0500-1000/unet: in_channels=3: the encoder gives 1",
        merged_experts(lambda folder: tiny_unet(in_channels=3, out_channels=3).save_pretrained(folder)),
    ),
    Mistake(
        "a merged network to distil that is damaged",
        "finetune.py",
        DISTILLED,
        "merge.output={root}/tiny/merged: {root}/tiny/merged/unet/diffusion_pytorch_model.safetensors: cannot be read: "
        "SafetensorError: …",
        both(
            merged_experts(),
            lambda root, pretrained: (root / "tiny" / "merged" / "unet" / WEIGHTS).write_bytes(b"short"),
        ),
    ),
    Mistake(
        "an expert of another architecture",
        "merge.py",
        [],
        "{root}/tiny/finetuned/0500-1000/unet/config.json: block_out_channels=[8, 32], but [8, 16] in …",
        another_architecture,
    ),
    Mistake(
        "an expert without a tensor",
        "merge.py",
        [],
        "{root}/tiny/finetuned/0500-1000/unet: the pretrained model's tensor conv_out.bias is missing",
        damaged_expert(lambda tensors: tensors.pop("conv_out.bias")),
    ),
    Mistake(
        "an expert with a tensor more",
        "merge.py",
        [],
        "{root}/tiny/finetuned/0500-1000/unet: tensor more is not in the pretrained model",
        damaged_expert(lambda tensors: tensors.update(more=torch.ones(1))),
    ),
    Mistake(
        "an expert's weight that is NaN",
        "merge.py",
        [],
        "{root}/tiny/finetuned/0500-1000/unet: tensor conv_out.bias holds NaN or infinite values",
        damaged_expert(lambda tensors: tensors["conv_out.bias"].fill_(torch.nan)),
    ),
    Mistake(
        "an expert's weight that is infinite",
        "merge.py",
        [],
        "{root}/tiny/finetuned/0500-1000/unet: tensor conv_in.bias holds NaN or infinite values",
        damaged_expert(lambda tensors: tensors["conv_in.bias"].fill_(torch.inf)),
    ),
    Mistake(
        "an expert's weights that are cut short",
        "merge.py",
        [],
        "{root}/tiny/finetuned/0500-1000/unet/diffusion_pytorch_model.safetensors: cannot be read: SafetensorError: "
        "Error while deserializing header: incomplete metadata, file not fully covered",
        replaced_expert(lambda file: file.write_bytes(file.read_bytes()[:-9])),
    ),
    Mistake(
        "an expert's weights in another format",
        "merge.py",
        [],
        "{root}/tiny/finetuned/0500-1000/unet/diffusion_pytorch_model.safetensors: cannot be read: SafetensorError: "
        "Error while deserializing header: header too large",
        replaced_expert(lambda file: torch.save({"a": torch.ones(1)}, file)),
    ),
    Mistake(
        "coefficients that overflow",
        "merge.py",
        ["merge.coefficients=[3e38,3e38]"],
        "merge.coefficients=[3e+38, 3e+38]: too large for tensor conv_in.bias, which overflows",
        damaged_expert(lambda tensors: tensors["conv_in.bias"].fill_(9)),
    ),
    Mistake(
        "coefficients that are not for every tensor",
        "merge.py",
        ["merge.coefficients={conv_in.*: [1,1]}"],
        "merge.coefficients={'conv_in.*': [1, 1]}: no pattern fits the tensor conv_norm_out.bias; add one for '*'",
        experts,
    ),
    Mistake(
        "coefficients that are for no tensor",
        "merge.py",
        ["merge.coefficients={up_blocks: [0,0], '*': [1,1]}"],
        "merge.coefficients={'up_blocks': [0, 0], '*': [1, 1]}: no tensor is left for the pattern up_blocks",
        experts,
    ),
    Mistake(
        "the pretrained pipeline for an output",
        "merge.py",
        ["model.pretrained=copy", "merge.output=copy"],
        "merge.output=copy: is, holds or lies in copy/unet, which is read",
        both(experts, copied_pretrained(lambda folder: None)),
    ),
    Mistake(
        "an output inside of an input, by a link",
        "merge.py",
        ["merge.output=link/merged"],
        "merge.output=link/merged: is, holds or lies in {root}/tiny/finetuned/0000-0500/unet, which is read",
        both(experts, lambda root, _: (root / "link").symlink_to(root / "tiny" / "finetuned" / "0000-0500" / "unet")),
    ),
    Mistake(
        "samples inside of the network that draws them",
        "sample_ddp.py",
        ["sample.model=copy", "sample.output=copy/unet/samples"],
        "sample.output=copy/unet/samples: is, holds or lies in copy/unet, which is read",
        copied_pretrained(lambda folder: None),
    ),
    Mistake(
        "weights in several files",
        "sample_ddp.py",
        ["sample.model=copy"],
        f"copy/unet/{WEIGHTS}.index.json: stands beside {WEIGHTS}; delete the one that does not count",
        copied_pretrained(lambda folder: (folder / "unet" / f"{WEIGHTS}.index.json").write_text("{}")),
    ),
    Mistake(
        "results in the place of a configuration",
        "evaluate.py",
        ["evaluate.output=tiny.yaml"],
        "evaluate.output=tiny.yaml: …",
        samples("0.png", "1.png"),
    ),
    Mistake(
        "results in the place of another JSON file",
        "evaluate.py",
        ["evaluate.output=copy/unet/config.json"],
        "evaluate.output=copy/unet/config.json: is not a file of this script, so it is not replaced",
        both(samples("0.png", "1.png"), copied_pretrained(lambda folder: None)),
    ),
    Mistake(
        "results in the place of a device",
        "evaluate.py",
        ["evaluate.output=/dev/null"],
        "evaluate.output=/dev/null: is not a file",
        samples("0.png", "1.png"),
    ),
    Mistake(
        "nested JSON without an end",
        "finetune.py",
        ["model.pretrained=copy"],
        "model.pretrained=copy: copy/unet/config.json: RecursionError: …",
        copied_pretrained(lambda folder: (folder / "unet" / "config.json").write_text("[" * 100_000)),
    ),
    Mistake(
        "an output that merge.py did not make",
        "merge.py",
        ["merge.output=data"],
        "merge.output=data: exists without a merge.yaml, so it is not replaced",
        both(experts, images(lambda kind: None)),
    ),
    # --- the search for coefficients
    Mistake(
        "searching for experts of another architecture",
        "search.py",
        ["search.method=closed_form"],
        "{root}/tiny/finetuned/0500-1000/unet/config.json: block_out_channels=[8, 32], but [8, 16] in …",
        another_architecture,
    ),
    Mistake(
        "a group that no tensor is left for",
        "search.py",
        ["search.groups=['*',conv_in.*]"],
        "search.groups=['*', 'conv_in.*']: no tensor is left for the pattern conv_in.*",
        experts,
    ),
    Mistake(
        "groups that leave a tensor",
        "search.py",
        ["search.groups=[conv_in.*]"],
        "search.groups=['conv_in.*']: no pattern fits the tensor conv_norm_out.bias; add one for '*'",
        experts,
    ),
    Mistake(
        "a resolution that the classifier of a search can't take",
        "search.py",
        ["data.resolution=4", "model.pretrained=copy"],
        "data.resolution=4: evaluate.features=classifier needs at least 8 pixels",
        small_networks,
    ),
    Mistake(
        "coefficients of a search that was not run",
        "merge.py",
        ["merge.coefficients=search"],
        "merge.coefficients=search: {root}/tiny/search/best.yaml is missing; search.py makes it",
        experts,
    ),
    Mistake(
        "coefficients from a file that does not exist",
        "merge.py",
        ["merge.coefficients=absent.yaml"],
        "merge.coefficients=absent.yaml: absent.yaml is missing; search.py makes it",
        experts,
    ),
    Mistake(
        "coefficients from a file that is not YAML",
        "merge.py",
        ["merge.coefficients=bad.yaml"],
        "merge.coefficients=bad.yaml: bad.yaml: not YAML: expected ',' or ']', but got '<stream end>'",
        both(experts, yaml_file("coefficients: [1")),
    ),
    Mistake(
        "coefficients from a file of another kind",
        "merge.py",
        ["merge.coefficients=tiny.yaml"],
        "merge.coefficients=tiny.yaml: tiny.yaml: not the coefficients of search.py: coefficients is missing",
        experts,
    ),
    Mistake(
        "coefficients in a file that are no numbers",
        "merge.py",
        ["merge.coefficients=bad.yaml"],
        "merge.coefficients=bad.yaml: bad.yaml: not the coefficients of search.py: coefficients.*[0] is not a "
        "finite number",
        both(experts, yaml_file("coefficients: {'*': [a, b]}")),
    ),
    Mistake(
        "coefficients that were found for another number of ranges",
        "merge.py",
        ["merge.coefficients=bad.yaml"],
        "bad.yaml: merge.coefficients={'*': [0.1, 0.2, 0.3]}: 3 coefficients for 2 networks",
        both(experts, yaml_file("coefficients: {'*': [0.1, 0.2, 0.3]}")),
    ),
    Mistake(
        "coefficients that were found for other networks",
        "merge.py",
        ["merge.coefficients=bad.yaml"],
        "merge.coefficients=bad.yaml: found for other networks; search again, or write its coefficients into the "
        "configuration",
        both(experts, yaml_file("{coefficients: {'*': [0.1, 0.2]}, pretrained: a, finetuned: [b, c]}")),
    ),
    # --- networks to pretrain
    # --- data
    Mistake(
        "a folder without images",
        "finetune.py",
        OWN_DATA,
        "data.name=data (data.split=train): cannot be loaded: EmptyDatasetError: The directory at {root}/data doesn't "
        "contain any data files",
        images(lambda kind: shutil.rmtree(kind)),
    ),
    Mistake(
        "an image that is cut short",
        "finetune.py",
        OWN_DATA,
        "data.name=data: row 1 ({root}/data/train/kind/b.png): not a readable image: OSError: image file is "
        "truncated; data.skip_unreadable=true leaves such images out",
        images(lambda kind: (kind / "b.png").write_bytes((kind / "b.png").read_bytes()[:90])),
    ),
    Mistake(
        "text for an image",
        "finetune.py",
        OWN_DATA,
        "data.name=data: row 2 ({root}/data/train/kind/c.png): not a readable image: UnidentifiedImageError: cannot "
        "identify image file …; data.skip_unreadable=true leaves such images out",
        unreadable_image,
    ),
    Mistake(
        "text for an image that is kept in a file",
        "finetune.py",
        [*OWN_DATA, "data.cache_gb=0"],
        "data.name=data: row 2 ({root}/data/train/kind/c.png): not a readable image: UnidentifiedImageError: cannot "
        "identify image file …; data.skip_unreadable=true leaves such images out",
        unreadable_image,
    ),
    Mistake(
        "an unknown column",
        "finetune.py",
        [*OWN_DATA, "data.label_column=kind"],
        "data.label_column=kind: data has the columns image",
        images(lambda kind: None),
    ),
    Mistake(
        "an unknown split",
        "finetune.py",
        [*OWN_DATA, "data.split=test"],
        'data.name=data (data.split=test): cannot be loaded: ValueError: Unknown split "test". Should be one of '
        "['train'].",
        images(lambda kind: None),
    ),
    Mistake(
        "rows with neither bytes nor a path",
        "finetune.py",
        OWN_DATA,
        "data.name=data: row 1: not a readable image: ValueError: no image in this row; data.skip_unreadable=true "
        "leaves such images out",
        lambda root, pretrained: parquet_images([{"bytes": PNG, "path": None}, {"bytes": None, "path": None}])(root),
    ),
    Mistake(
        "rows of other fields",
        "finetune.py",
        [*OWN_DATA, "data.skip_unreadable=true"],
        "data.name=data: none of its 1 images can be read",
        lambda root, pretrained: parquet_images([{"data": PNG}])(root),
    ),
    Mistake(
        "a label that is a list",
        "evaluate.py",
        ["data.name=data", "evaluate.samples=[]"],
        "data.label_column=label: row 0 has the label [0]",
        lambda root, pretrained: parquet_images([{"bytes": PNG, "path": None}], label=[[0]])(root),
    ),
    # --- what is sampled from
    Mistake(
        "a sampler that begins behind the last timestep",
        "sample_ddp.py",
        [COPY, PRETRAINED, "sample.num_inference_steps=1000"],
        "sample.scheduler=ddim: 1000 steps of DDIMScheduler: IndexError: …",
        copied_pretrained(edit_json("scheduler/scheduler_config.json", steps_offset=1)),
    ),
    Mistake(
        "a model's folder whose weights are cut short",
        "sample_ddp.py",
        ["sample.model=copy"],
        "sample.model=copy: copy/unet/diffusion_pytorch_model.safetensors: cannot be read: SafetensorError: …",
        copied_pretrained(lambda folder: (folder / "unet" / WEIGHTS).write_bytes(b"short")),
    ),
    Mistake(
        "a model's folder without weights",
        "sample_ddp.py",
        ["sample.model=copy"],
        "copy/unet/diffusion_pytorch_model.safetensors: missing",
        copied_pretrained(lambda folder: (folder / "unet" / WEIGHTS).unlink()),
    ),
    Mistake(
        "a model's folder without a tensor",
        "sample_ddp.py",
        ["sample.model=copy"],
        "sample.model=copy: copy/unet: weights and config.json do not fit each other (conv_in.bias …)",
        copied_pretrained(lambda folder: edit_weights(folder / "unet", lambda t: t.pop("conv_in.bias"))),
    ),
    Mistake(
        "a model's folder without its network's configuration",
        "sample_ddp.py",
        ["sample.model=copy"],
        "sample.model=copy: not a pipeline folder: copy/unet/config.json is missing",
        copied_pretrained(lambda folder: (folder / "unet" / "config.json").unlink()),
    ),
    Mistake(
        "a model's folder whose noise schedule is cut short",
        "sample_ddp.py",
        ["sample.model=copy"],
        "sample.model=copy: copy/scheduler/scheduler_config.json: JSONDecodeError: Expecting property name enclosed in "
        "double quotes: line 1 column 2 …",
        copied_pretrained(lambda folder: (folder / "scheduler" / "scheduler_config.json").write_text("{")),
    ),
    Mistake(
        "a model's folder whose noise schedule has other timesteps",
        "sample_ddp.py",
        ["sample.model=copy"],
        "timesteps.num_train_timesteps=1000: the scheduler in copy/scheduler/scheduler_config.json has 500",
        copied_pretrained(edit_json("scheduler/scheduler_config.json", num_train_timesteps=500)),
    ),
    Mistake(
        "a model's folder of an unknown kind of prediction",
        "sample_ddp.py",
        ["sample.model=copy"],
        "sample.model=copy: copy/scheduler/scheduler_config.json: prediction_type=foo: not one of epsilon, …",
        copied_pretrained(edit_json("scheduler/scheduler_config.json", prediction_type="foo")),
    ),
    # --- what stands in the output folder
    Mistake(
        "samples whose record is not whole",
        "sample_ddp.py",
        [PRETRAINED, OTHER],
        "sample.output=tiny/samples/other: holds samples of other settings: eta=0.0 (was not recorded), "
        "mixed_precision=no (was not recorded), num_inference_steps=3 (was not recorded), resolution=8 (was not "
        "recorded), sample.scheduler=ddim (was not recorded), scheduler, size_on_disk=null (was not recorded), "
        "timesteps=[[0, 1000]] (was not recorded), weights; choose another folder or set "
        "sample.overwrite=true",
        sampled_before,
    ),
    Mistake(
        "a folder of other files",
        "sample_ddp.py",
        [PRETRAINED, OTHER],
        "sample.output=tiny/samples/other: holds files but no samples.yaml; choose another folder",
        samples("a.png"),
    ),
    Mistake(
        "a damaged record of samples",
        "sample_ddp.py",
        [PRETRAINED, OTHER],
        "sample.output=tiny/samples/other: tiny/samples/other/samples.yaml: not the record of samples: identity is "
        "missing",
        damaged_record,
    ),
    Mistake(
        "a damaged record of a run",
        "finetune.py",
        ["finetune.range=0"],
        "{root}/tiny/finetuned/0000-0500/config.yaml: not the record of a run: trained_from is missing",
        damaged_run,
    ),
    # --- places that can't be written
    Mistake(
        "the root of all folders for an output",
        "merge.py",
        ["merge.output=/"],
        "merge.output=/: is, holds or lies in …/unet, which is read",
        experts,
    ),
    Mistake(
        "a folder for the file of scores",
        "evaluate.py",
        ["evaluate.output=tiny"],
        "evaluate.output=tiny: is not a file",
        samples("0.png"),
    ),
    Mistake(
        "merging below a file",
        "merge.py",
        ["merge.output=tiny.yaml/below/a"],
        "merge.output: cannot create the folder tiny.yaml/below: Not a directory",
        experts,
    ),
    # --- scores
    Mistake(
        "a folder of samples that is not finished",
        "evaluate.py",
        [],
        "evaluate.samples={root}/tiny/samples/other: holds 1 of 6 images; finish sample_ddp.py",
        sampled_before,
    ),
    Mistake(
        "images that make no equal blocks",
        "evaluate.py",
        ["evaluate.blocks=2"],
        "evaluate.blocks=2: {root}/tiny/samples/other holds 3 image(s), which is not 2 equal block(s) of at least 2",
        samples("0.png", "1.png", "2.png"),
    ),
    Mistake(
        "a single image to score",
        "evaluate.py",
        [],
        "evaluate.blocks=1: {root}/tiny/samples/other holds 1 image(s), which is not 1 equal block(s) of at least 2",
        samples("0.png"),
    ),
    Mistake(
        "images of different sizes",
        "evaluate.py",
        [],
        "{root}/tiny/samples/other/1.png: is 9 x 9, 0.png is 8 x 8; all images of a folder must have one size",
        samples("0.png", "1.png", sizes=(8, 9)),
    ),
    Mistake(
        "a classifier without labels",
        "evaluate.py",
        ["data.label_column=null"],
        "data.label_column=null: evaluate.features=classifier needs labels",
        samples("0.png", "1.png"),
    ),
    Mistake(
        "Inception weights that are cut short",
        "evaluate.py",
        ["evaluate.features=inception"],
        "evaluate.features=inception: {root}/torch/hub/checkpoints/pt_inception-2015-12-05-6726825d.pth: not the "
        "Inception weights (RuntimeError: PytorchStreamReader failed reading zip archive: …); delete it to download "
        "them again",
        damaged_inception,
    ),
    Mistake(
        "a reference of Python objects",
        "evaluate.py",
        [REFERENCE, "evaluate.samples=[]"],
        "evaluate.reference=reference.npz: not an npz file of mu and sigma (ValueError: Object arrays cannot be loaded "
        "when allow_pickle=False): `python -m pytorch_fid --save-stats IMAGES FILE.npz` makes such a file",
        statistics(mu=OBJECTS, sigma=OBJECTS),
    ),
    Mistake(
        "a reference that is a single array",
        "evaluate.py",
        [REFERENCE, "evaluate.samples=[]"],
        "evaluate.reference=reference.npz: not an npz file of mu and sigma (a single array): `python -m "
        "pytorch_fid --save-stats IMAGES FILE.npz` makes such a file",
        single_array,
    ),
    Mistake(
        "samples that are too small for the classifier",
        "evaluate.py",
        [],
        "evaluate.samples={root}/tiny/samples/other: images of 4 x 4 pixels, evaluate.features=classifier needs at "
        "least 8 pixels",
        samples("0.png", "1.png", sizes=(4, 4)),
    ),
    Mistake(
        "a sample with a text that fills the memory",
        "evaluate.py",
        [],
        "{root}/tiny/samples/other/0.png: not a readable image: ValueError: Decompressed data too large for …",
        both(samples("0.png", "1.png"), text_bomb),
    ),
    Mistake(
        "an encrypted reference",
        "evaluate.py",
        [REFERENCE, "evaluate.samples=[]"],
        "evaluate.reference=reference.npz: not an npz file of mu and sigma (RuntimeError: File 'mu.npy' is encrypted…",
        both(statistics(mu=np.zeros(2), sigma=np.eye(2)), encrypted),
    ),
    Mistake(
        "a reference of texts",
        "evaluate.py",
        [REFERENCE, "evaluate.samples=[]"],
        "evaluate.reference=reference.npz: mu of shape (2,) and sigma of shape (2, 2) are no statistics: …",
        statistics(mu=np.array(["a", "b"]), sigma=np.eye(2)),
    ),
    Mistake(
        "a reference of other features",
        "evaluate.py",
        [REFERENCE],
        "evaluate.reference=reference.npz: holds statistics of 2 features, classifier has 128",
        two_features,
    ),
]
ROWS = (Path(__file__).parent / "mistakes.txt").read_text().split("\n$ ")[1:]
for row in ROWS:
    command, message = row.strip().split("\n")
    script, *arguments = shlex.split(command)
    MISTAKES.append(Mistake(command, script, arguments, message))
NAMES = [mistake.name for mistake in MISTAKES]
assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("mistake", MISTAKES, ids=NAMES)
def test_a_mistake_is_answered_in_one_line_and_loses_nothing(start, config_file, pretrained, mistake):
    root = config_file.parent
    mistake.prepare(root, pretrained)
    before = content(root)
    assert_refused(start, root, mistake.script, mistake.arguments, mistake.message)
    made = {name for name in content(root) if not name.startswith("tiny/stats")}  # the reference that all scores share
    assert made == {name for name in before if not name.startswith("tiny/stats")}
    assert all(content(root)[name] == data for name, data in before.items())
    assert not (root / "executed").exists()


# in the middle of a search, whose folder stands: the same command goes on once it is mended
SEARCH_MISTAKES = {
    "an unknown database": (
        ["search.method=optuna", "search.storage=nosuch://x"],
        "search.storage=nosuch://x: no Optuna storage can be opened there: …",
    ),
    "a database in a folder that does not exist": (
        ["search.method=optuna", "search.storage=sqlite:///absent/study.db"],
        "search.storage=sqlite:///absent/study.db: no Optuna storage can be opened there: …unable to open database …",
    ),
    "a grid of fewer than two values": (
        ["search.method=optuna", "search.sampler=grid", "search.trials=3"],
        "search.trials=3: a grid of 2 coefficients has at least 2 ** 2 candidates",
    ),
    "a schedule of an unknown sampler": (
        ["search.schedules=[{steps: 2}, {steps: 2, scheduler: nosuch}]"],
        "search.schedules=nosuch-2: must be one of ddim, pndm, …",
    ),
    "the same schedule under two names": (
        ["search.schedules=[{scheduler: euler}, {scheduler: EulerDiscreteScheduler}]"],
        "search.schedules=EulerDiscreteScheduler-3: is listed before, under another name",
    ),
    "a schedule of an unknown sampler in the report": (
        ["search.report_schedules=[{steps: 2, scheduler: nosuch}]"],
        "search.report_schedules=nosuch-2: must be one of ddim, pndm, …",
    ),
    "a classifier without labels": (
        ["search.method=optuna", "search.objective=fd", "data.label_column=null"],
        "data.label_column=null: evaluate.features=classifier needs labels",
    ),
    "images that leave bins of the loss empty": (
        ["search.method=closed_form", "search.objective=loss", "search.images=8"],
        "search.images=8: no image falls into bin … of 16 bins of timesteps",
    ),
    "images of an unknown sampler": (
        ["sample.scheduler=foo"],
        "sample.scheduler=foo: must be one of ddim, …",
    ),
    "a file for the folder of the search": (
        ["search.output=tiny.yaml"],
        "search.output: cannot create the folder tiny.yaml: File exists",
    ),
}


@pytest.mark.parametrize("name", SEARCH_MISTAKES)
def test_a_mistake_in_the_middle_of_a_search_is_answered_in_one_line(start, config_file, pretrained, name):
    root = config_file.parent
    different_experts(root, pretrained)
    before = content(root)
    arguments, message = SEARCH_MISTAKES[name]
    small = ["search.images=32", "search.num_images=2", "search.finalists=1", "search.report_images=0"]
    assert_refused(start, root, "search.py", [*small, *arguments], message)
    assert all(content(root)[name] == data for name, data in before.items())
    assert not [name for name in content(root) if name.endswith("best.yaml")]


def test_a_search_is_not_mixed_with_another_one(start, config_file, pretrained):
    """In the folder of one: what differs is named, also networks behind the same paths; more trials go on."""
    root = config_file.parent
    different_experts(root, pretrained)
    closed = ["search.method=closed_form", "search.images=32", "search.report_images=0"]
    assert start("search.py", *closed)[0] == 0
    before = content(root / "tiny")
    message = (
        "search.output={root}/tiny/search: holds a search of other settings: search.ridge=0.5 (was 0.001), seed=1 (was "
        "0); set them back, name another folder, or delete this one"
    )
    assert_refused(start, root, "search.py", [*closed, "search.ridge=0.5", "seed=1"], message)
    assert content(root / "tiny") == before
    assert start("search.py", *closed, "search.trials=99")[0] == 0
    edit_weights(root / "tiny" / "finetuned" / "0500-1000" / "unet", lambda tensors: tensors["conv_in.bias"].add_(1))
    status, errors = start("search.py", *closed)
    assert status == 2
    assert "holds a search of other settings: finetuned; set them back" in errors
    status, errors = start("merge.py", "merge.coefficients=search")
    assert status == 2
    assert "merge.coefficients=search: found for other networks; search again" in errors


def test_two_experts_that_are_one_are_told(start, config_file, pretrained):
    """A copy that was not trained has nothing to match."""
    root = config_file.parent
    experts(root, pretrained)
    same = ["search.method=closed_form", "search.images=32"]
    message = "search.objective=match: the expert of range 0 predicts what the pretrained network does"
    assert_refused(start, root, "search.py", same, message)


def test_an_image_that_can_not_be_decoded_on_the_fly_stops_the_run(start, config_file):
    """It is found after the run has begun: the run's folder stands, but no weights are written and nothing is lost."""
    root = config_file.parent
    unreadable_image(root, root)
    before = content(root)
    message = (
        "data.name=data: row 2 ({root}/data/train/kind/c.png): not a readable image: UnidentifiedImageError: cannot "
        "identify image file …; data.skip_unreadable=true leaves such images out"
    )
    assert_refused(start, root, "finetune.py", [*OWN_DATA, "data.cache_gb=0", "data.cache_disk_gb=0"], message)
    made = set(content(root)) - set(before)
    assert all(name.startswith("tiny/finetuned/0000-0500/") and not name.endswith(".safetensors") for name in made)
    assert all(content(root)[name] == data for name, data in before.items())


def test_an_unknown_path_is_answered_with_the_known_ones(start, config_file):
    message = "argument --path: invalid choice: 'nothing' (choose from …finetuned…results…)"
    assert_refused(start, config_file.parent, "sample_ddp.py", ["--path", "nothing"], message)


def test_damaged_results_are_named(start, config_file, pretrained):
    """merge.py reads the scores that evaluate.py found."""
    root = config_file.parent
    experts(root, pretrained)
    for text, reason in {
        "": "JSONDecodeError: Expecting value: line 1 column 1 …",
        "[]": "not a JSON object",
        '{"rows": [1]}': "not the results of evaluate.py: features is missing",
    }.items():
        (root / "tiny" / "results.json").write_text(text)
        assert_refused(start, root, "merge.py", [], "{root}/tiny/results.json: " + reason)


def test_a_resume_under_other_settings_names_them_and_those_that_may_change(start, config_file):
    """Some of the settings may change in the middle of a run; both kinds are told apart."""
    root = config_file.parent
    assert start("finetune.py", "finetune.range=0", "finetune.max_steps=2")[0] == 0
    before = content(root)
    options = ["finetune.range=0", "finetune.max_steps=3", "finetune.log_every=7"]
    message = (
        "{root}/tiny/finetuned/0000-0500: holds a run of other settings: finetune.max_steps=3 (was 2); set this back, "
        "or give the run another name; finetune.log_every=7 (was 1) may change"
    )
    assert_refused(start, root, "finetune.py", options, message)
    assert content(root) == before
    assert start("finetune.py", "finetune.range=0", "finetune.max_steps=2", "finetune.log_every=7")[0] == 0


def test_samples_of_another_sampler_are_refused_by_the_names_of_both(start, config_file):
    """Whichever of them is the default."""
    root = config_file.parent
    options = [PRETRAINED, "sample.num_images=1"]
    for before, now in (("ddim", "euler"), ("euler", "ddim")):
        assert start("sample_ddp.py", *options, f"sample.scheduler={before}", "sample.overwrite=true")[0] == 0
        message = (
            "sample.output={root}/tiny/samples/pretrained: holds samples of other settings: "
            f"sample.scheduler={now} (was {before}); choose another folder or set sample.overwrite=true"
        )
        assert_refused(start, root, "sample_ddp.py", [*options, f"sample.scheduler={now}"], message)


def test_a_run_that_ended_before_its_first_checkpoint_starts_again_under_other_settings(start, config_file, capfd):
    """After a learning rate that gives NaN, or too little memory, the remedy is not refused."""
    root = config_file.parent
    wild = ["finetune.range=0", "finetune.learning_rate=1e30", "finetune.max_grad_norm=1e30"]
    assert start("finetune.py", *wild)[0] == 1
    assert start("finetune.py", "finetune.range=0", "finetune.max_steps=2")[0] == 0
    record = yaml.safe_load((root / "tiny" / "finetuned" / "0000-0500" / "config.yaml").read_text())
    assert record["trained_from"]["finetune.learning_rate"] == 1e-3
    lines = (root / "tiny" / "finetuned" / "0000-0500" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


CHANGES = {
    "noise schedule": lambda root: edit_json("scheduler/scheduler_config.json", beta_end=0.04)(root / "copy"),
    "architecture": lambda root: edit_json("unet/config.json", dropout=0.5)(root / "copy"),
    "data": lambda root: Image.effect_noise((16, 16), 90).save(root / "data" / "train" / "kind" / "b.png"),
}


@pytest.mark.parametrize("is_complete", [False, True])
@pytest.mark.parametrize("changed", CHANGES)
def test_a_run_does_not_go_on_from_other_inputs_behind_the_same_path(
    start, config_file, pretrained, changed, is_complete
):
    """What determines the weights is what is read; nor is one called complete that was trained on something else."""
    root = config_file.parent
    copied_pretrained(lambda folder: None)(root, pretrained)
    images(lambda kind: None)(root, pretrained)
    options = ["model.pretrained=copy", *OWN_DATA, "finetune.range=0", "finetune.checkpoint_every=1"]
    limit = ["finetune.max_steps=1"] if is_complete else ["finetune.max_minutes=0.0001"]
    options += limit if is_complete else []
    assert start("finetune.py", *options, *limit)[0] == 0
    CHANGES[changed](root)
    status, errors = start("finetune.py", *options)
    assert status == 2
    assert f"0000-0500: holds a run of other settings: {changed} (SHA-256); set this back" in errors


def test_merged_weights_that_are_no_longer_those_are_merged_again(start, config_file, pretrained):
    """Complete means that weights, architecture and noise schedule are there and are those that were merged."""
    experts(config_file.parent, pretrained)
    output = config_file.parent / "tiny" / "merged"
    assert start("merge.py")[0] == 0
    whole = content(output)
    damages = [
        lambda: (output / "unet" / WEIGHTS).unlink(),
        lambda: edit_weights(output / "unet", lambda tensors: tensors["conv_in.bias"].fill_(7)),
        lambda: edit_json("scheduler/scheduler_config.json", beta_end=0.5)(output),
        lambda: edit_json("unet/config.json", flip_sin_to_cos=False)(output),
    ]
    for damage in damages:
        damage()
        assert start("merge.py")[0] == 0
        assert content(output) == whole


RACES = {  # what reads the file that another program writes meanwhile
    "merge.py": ("deme.models.merging.load_tensors", WEIGHTS),
    "finetune.py": ("deme.models.adapters.load_denoiser", WEIGHTS),
    "sample_ddp.py": ("deme.models.adapters.load_denoiser", WEIGHTS),
    "evaluate.py": ("deme.data.samples.read_images", "000001.png"),
}


@pytest.mark.parametrize("script", RACES)
def test_what_is_written_while_it_is_read_gets_into_no_record(start, config_file, pretrained, monkeypatch, script):
    """Hash and content come from two readings: where another program writes in between, there is no output."""
    root = config_file.parent
    experts(root, pretrained)
    copied_pretrained(lambda folder: None)(root, pretrained)
    assert start("sample_ddp.py", PRETRAINED, "sample.output=drawn")[0] == 0
    before = content(root)
    reader, name = RACES[script]
    module, function = reader.rsplit(".", 1)
    original = getattr(importlib.import_module(module), function)

    def read_and_replace(first, *others):
        found = original(first, *others)
        for path in root.rglob(name):
            shutil.copy(path, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
        return found

    monkeypatch.setattr(reader, read_and_replace)
    status, errors = start(script, COPY, PRETRAINED, "finetune.range=continued", "evaluate.samples=[drawn]")
    assert status == 1, errors
    assert re.search(rf"{script}: \S*{name}: was written while it was read; start the same command again\n$", errors)
    assert {path for path in content(root) if "stats" not in path} == set(before)


def test_a_port_in_use_is_named(start, config_file, monkeypatch):
    """As a process of a job that meets there; the launcher itself looks for a free one with --main_process_port 0."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in job.items():
            monkeypatch.setenv(name, value)
        message = f"MASTER_PORT={port}: the processes can't meet there: DistNetworkError: …EADDRINUSE…"
        assert_refused(start, config_file.parent, "finetune.py", [], message)


def test_paths_with_spaces_and_unicode_work(start, config_file):
    """The output folder, the data and the sample folder; every script."""
    root = config_file.parent
    images(lambda kind: None)(root, root)
    (root / "data").rename(root / "Bilder für 模型")
    options = ["output_dir=läufe 1", "name=模型 a", "data.name=Bilder für 模型", "data.image_column=image"]
    options += ["data.label_column=null"]
    options += ["finetune.max_steps=1", "evaluate.classifier_epochs=1", "data.cache_gb=0", "sample.output=läufe 1/ö ü"]
    for script in ("finetune.py", "merge.py", "sample_ddp.py", "pretrain.py"):
        status, errors = start(script, *options)
        assert status == 0, errors
    assert len(list((root / "läufe 1" / "ö ü").glob("*.png"))) == 6
    assert (root / "läufe 1" / "模型 a" / "pretrained" / "unet" / WEIGHTS).exists()
