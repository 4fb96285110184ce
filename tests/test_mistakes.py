"""Bad input to every script: one line that names the key or file and its value, status 2, nothing written or lost.

The script files run in this process, as `python SCRIPT` would run them: sixty starts of Python would take minutes.
"""

import json
import re
import runpy
import shutil
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import REPOSITORY, tiny_unet
from PIL import Image
from pytorch_fid import inception
from safetensors.torch import load_file, save_file

from deme.pipelines import WEIGHTS
from deme.projection import ProjectedUNet2DModel
from deme.signals import SIGNALS

MODEL = "sample.model=pretrained"


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


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def experts(root: Path, pretrained: Path) -> None:
    """Two finetuned UNets, made without training."""
    for index, name in enumerate(["0000-0500", "0500-1000"]):
        ProjectedUNet2DModel.from_unet(tiny_unet(index)).save_pretrained(root / "tiny" / "finetuned" / name / "unet")


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


def another_architecture(root: Path, pretrained: Path) -> None:
    experts(root, pretrained)
    wider = ProjectedUNet2DModel.from_unet(tiny_unet(block_out_channels=[8, 32]))
    wider.save_pretrained(root / "tiny" / "finetuned" / "0500-1000" / "unet")


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


OWN_DATA = "data.name=data data.image_column=image data.label_column=null"
REFERENCE = "evaluate.reference=reference.npz"
OBJECTS = np.array([{"a": 1}], dtype=object)
CASES = [
    # the configuration: (script, arguments, what the line says, what is made before)
    ("finetune.py", "fintune.max_steps=1", "fintune={'max_steps': 1}: .* Did you mean: 'finetune'", nothing),
    ("finetune.py", "finetune.lerning_rate=1", "finetune.lerning_rate=1: .* Did you mean: 'learning_rate'", nothing),
    ("sample_ddp.py", "sample.colour=red", "sample.colour=red: Key 'colour' not in 'Sample'", nothing),
    ("finetune.py", "finetune.max_steps=many", "finetune.max_steps=many: Value 'many' of type 'str'", nothing),
    ("finetune.py", "finetune.max_steps", "finetune.max_steps: overrides are written section.key=value", nothing),
    ("finetune.py", "timesteps.edges=[0,600,300,1000]", r"timesteps.edges=\[0, 600, 300, 1000\]: must rise", nothing),
    ("finetune.py", "timesteps.edges=[0,500]", r"timesteps.edges=\[0, 500\]: must rise from 0 to T = 1000", nothing),
    ("finetune.py", "finetune.global_probability=1.5", r"finetune.global_probability=1.5: must lie in \[0, 1", nothing),
    ("finetune.py", "finetune.batch_size=9", "finetune.batch_size=9: must be a multiple of finetune.micro_b", nothing),
    ("finetune.py", "finetune.range=2", "finetune.range=2: must be null, continued, or one of 0 … 1", nothing),
    ("finetune.py", "finetune.mixed_precision=fp16", "finetune.mixed_precision=fp16: needs a GPU", nothing),
    ("sample_ddp.py", f"{MODEL} sample.mixed_precision=fp16", "sample.mixed_precision=fp16: needs a GPU", nothing),
    ("merge.py", "merge.coefficients=[1,1,1]", r"merge.coefficients=\[1, 1, 1\]: 3 coefficients for 2 times", nothing),
    ("merge.py", "merge.coefficients=[.nan,1]", r"merge.coefficients=\[nan, 1\]: must be a list of finite nu", nothing),
    ("merge.py", "merge.push_to_hub=alone", "merge.push_to_hub=alone: must be a Hub id, owner/name", nothing),
    ("pretrain.py", "pretrain.unet.block_out_channels=[8]", "pretrain.unet=.*block_out_channels", nothing),
    ("evaluate.py", "name=a/b", "name=a/b: must be a plain folder name", nothing),
    # YAML files
    ("merge.py", "--config absent.yaml", "--config absent.yaml: .*No such file", nothing),
    ("merge.py", "--config bad.yaml", "--config bad.yaml: .*line 3", yaml_file("name: a\nmerge:\n  - [1\nb: 2\n")),
    ("merge.py", "--config bad.yaml", "--config bad.yaml: .*duplicate key name.*line 2", yaml_file("name: a\nname: b")),
    ("merge.py", "--config bad.yaml", "--config bad.yaml: not a YAML mapping", yaml_file("- 1\n- 2\n")),
    ("merge.py", "--config bad.yaml", "name=None: Interpolation key 'foo' not found", yaml_file("name: ${foo}")),
    ("merge.py", "--config bad.yaml", "merge.coefficients={1: ", yaml_file("merge: {coefficients: {1: [1, 1]}}")),
    ("merge.py", "name=2020-13-45", "name=2020-13-45: not YAML: month must be", nothing),
    ("merge.py", f"name={'a' * 300}", "a{300}/.*: File name too long", nothing),
    ("merge.py", "merge.coefficients.a=1", "merge.coefficients.a=1: ", nothing),
    ("merge.py", f"seed={2**63}", rf"seed={2**63}: must lie in \[0, 2\*\*63\)", nothing),
    (
        "merge.py",
        "--config bad.yaml",
        "--config bad.yaml: could not determine a constructor for the tag .*os.mkdir.*line 1",
        yaml_file("name: !!python/object/apply:os.mkdir [executed]\n"),
    ),
    ("merge.py", "name=!!python/object/apply:os.mkdir[executed]", "name=!!python.*: not YAML: could not det", nothing),
    ("merge.py", "merge.coefficients=[1,", r"merge.coefficients=\[1,: not YAML: ", nothing),
    # the pretrained pipeline
    ("finetune.py", "model.pretrained=nowhere/at/all", "model.pretrained=nowhere/at/all: no such folder", nothing),
    ("finetune.py", "model.pretrained=nobody/nothing", "model.pretrained=nobody/nothing: neither a pipeline", nothing),
    ("finetune.py", "data.resolution=16", "data.resolution=16: the UNet in .* has sample_size=8", nothing),
    ("finetune.py", "timesteps.num_train_timesteps=500", "timesteps.num_train_timesteps=500: the scheduler", nothing),
    (
        "finetune.py",
        "model.pretrained=copy",
        "model.pretrained=copy: not a pipeline folder: .*scheduler_config.json is missing",
        copied_pretrained(lambda folder: shutil.rmtree(folder / "scheduler")),
    ),
    (
        "finetune.py",
        "model.pretrained=copy",
        f"copy/unet/{WEIGHTS}: tensor conv_in.bias holds NaN or infinite values",
        copied_pretrained(lambda folder: edit_weights(folder / "unet", lambda t: t["conv_in.bias"].fill_(torch.nan))),
    ),
    (
        "sample_ddp.py",
        f"{MODEL} model.pretrained=copy",
        f"copy/unet/{WEIGHTS}: tensor conv_in.bias holds NaN or infinite values",
        copied_pretrained(lambda folder: edit_weights(folder / "unet", lambda t: t["conv_in.bias"].fill_(torch.inf))),
    ),
    (
        "sample_ddp.py",
        f"{MODEL} model.pretrained=copy",
        "copy/unet: .*",
        copied_pretrained(lambda folder: (folder / "unet" / WEIGHTS).write_bytes(b"short")),
    ),
    (
        "sample_ddp.py",
        f"{MODEL} model.pretrained=copy",
        "copy/unet/config.json: ",
        copied_pretrained(lambda folder: (folder / "unet" / "config.json").write_text("{")),
    ),
    (
        "finetune.py",
        "model.pretrained=copy",
        "model.pretrained=copy: ValueError: unknown prediction_type 'foo'",
        copied_pretrained(edit_json("scheduler/scheduler_config.json", prediction_type="foo")),
    ),
    (
        "sample_ddp.py",
        f"{MODEL} model.pretrained=copy",
        "copy/scheduler/scheduler_config.json: NotImplementedError: foo is not implemented",
        copied_pretrained(edit_json("scheduler/scheduler_config.json", beta_schedule="foo")),
    ),
    (
        "finetune.py",
        "model.pretrained=copy",
        "copy/unet: AttributeError: ",
        copied_pretrained(edit_json("unet/config.json", act_fn=3)),
    ),
    (
        "finetune.py",
        "model.pretrained=copy",
        "model.pretrained=copy: ValueError: in_channels=4: images have 1 or 3 channels",
        copied_pretrained(lambda folder: tiny_unet(in_channels=4, out_channels=4).save_pretrained(folder / "unet")),
    ),
    (
        "sample_ddp.py",
        f"{MODEL} model.pretrained=copy",
        "copy/unet: ValueError: .*class_labels",
        copied_pretrained(lambda folder: tiny_unet(num_class_embeds=10).save_pretrained(folder / "unet")),
    ),
    # finetuned models
    ("merge.py", "", f"finetuned/0000-0500/unet/{WEIGHTS}: missing; train it with finetune.py finetun", nothing),
    ("merge.py", "", r"0500-1000/unet: tensor \S+ has the shape \(32,\), in the", another_architecture),
    ("merge.py", "", "0500-1000/unet: .* conv_out.bias is missing", damaged_expert(lambda t: t.pop("conv_out.bias"))),
    ("merge.py", "", "0500-1000/unet: tensor more is not in", damaged_expert(lambda t: t.update(more=torch.ones(1)))),
    (
        "merge.py",
        "",
        "0500-1000/unet: tensor conv_out.bias holds NaN or infinite values",
        damaged_expert(lambda t: t["conv_out.bias"].fill_(torch.nan)),
    ),
    (
        "merge.py",
        "",
        "0500-1000/unet: tensor conv_in.bias holds NaN or infinite values",
        damaged_expert(lambda t: t["conv_in.bias"].fill_(torch.inf)),
    ),
    ("merge.py", "", f"1000/unet/{WEIGHTS}: ", replaced_expert(lambda file: file.write_bytes(file.read_bytes()[:-9]))),
    ("merge.py", "", f"1000/unet/{WEIGHTS}: ", replaced_expert(lambda file: torch.save({"a": torch.ones(1)}, file))),
    (
        "merge.py",
        "merge.coefficients=[3e38,3e38]",
        r"merge.coefficients=\[3e\+38, 3e\+38\]: too large for tensor conv_in.bias, which overflows",
        damaged_expert(lambda t: t["conv_in.bias"].fill_(9)),
    ),
    ("merge.py", "merge.output=tiny/finetuned", "merge.output=tiny/finetuned: exists without a merge.yaml", experts),
    # networks to pretrain
    ("pretrain.py", "data.resolution=7", "pretrain.unet=.*, data.resolution=7: RuntimeError: ", nothing),
    ("pretrain.py", "pretrain.unet.out_channels=3", r"pretrain.unet=.*the network maps \(1, 1, 8, 8\) to", nothing),
    ("pretrain.py", "pretrain.unet.in_channels=2", "pretrain.unet=.*in_channels=2: images have 1 or 3", nothing),
    ("pretrain.py", "pretrain.scheduler.prediction_type=foo", "pretrain.unet=.*unknown prediction_type 'foo'", nothing),
    ("pretrain.py", "pretrain.unet.act_fn=3", "pretrain.unet=.*'act_fn': 3.*: AttributeError: ", nothing),
    # data
    ("finetune.py", "data.name=nowhere", "data.name=nowhere .*: cannot be loaded: ", nothing),
    ("finetune.py", OWN_DATA, "data.name=data .*: cannot be loaded: ", images(lambda kind: shutil.rmtree(kind))),
    (
        "finetune.py",
        OWN_DATA,
        r"data.name=data: row 1 \(.*b.png\) is not a readable image: .*; data.skip_unreadable=true",
        images(lambda kind: (kind / "b.png").write_bytes((kind / "b.png").read_bytes()[:90])),
    ),
    (
        "finetune.py",
        OWN_DATA,
        r"data.name=data: row 2 \(.*c.png\) is not a readable image: ",
        images(lambda kind: (kind / "c.png").write_text("text")),
    ),
    (
        "finetune.py",
        f"{OWN_DATA} data.cache_gb=0",
        r"data.name=data: row 2 \(.*c.png\) is not a readable image: ",
        images(lambda kind: (kind / "c.png").write_text("text")),
    ),
    ("finetune.py", f"{OWN_DATA} data.image_column=img", "data.image_column=img: data has the columns image",
     images(lambda kind: None)),
    ("finetune.py", f"{OWN_DATA} data.split=test", "data.name=data .data.split=test.*", images(lambda kind: None)),
    ("finetune.py", "data.held_out_images=1797", "data.held_out_images=1797: digits has 1797 images", nothing),
    # what stands in the output folder
    ("sample_ddp.py", f"{MODEL} sample.output=tiny/samples/other",
     "sample.output=tiny/samples/other: holds samples of other weights, .*sample.overwrite=true", sampled_before),
    ("sample_ddp.py", f"{MODEL} sample.output=tiny/samples/other",
     "sample.output=tiny/samples/other: holds files but no samples.yaml", samples("a.png")),
    ("sample_ddp.py", "sample.model=nothing", "sample.model=nothing: not merged, pretrained, continued, ens", nothing),
    ("sample_ddp.py", "", "sample.model=merged: .*tiny/merged/unet is missing; merge.py makes it", nothing),
    ("sample_ddp.py", "sample.model=ensemble", "finetuned/0000-0500/unet is missing; finetune.py makes it", nothing),
    ("sample_ddp.py", f"{MODEL} sample.output=tiny/samples/other",
     "tiny/samples/other/samples.yaml: not a record of sample_ddp.py", damaged_record),
    ("finetune.py", "finetune.range=0", "0000-0500/config.yaml: not the record of a run", damaged_run),
    # places that can't be written
    ("sample_ddp.py", f"{MODEL} sample.output=tiny.yaml", "sample.output=tiny.yaml: is not a folder", nothing),
    ("merge.py", "merge.output=/", "merge.output=/: must be a file or folder below it", experts),
    ("evaluate.py", "evaluate.output=tiny", "evaluate.output=tiny: is a folder", samples("0.png")),
    ("finetune.py", "output_dir=tiny.yaml/below", "output_dir=tiny.yaml/below/tiny/finetuned: cannot create", nothing),
    ("pretrain.py", "output_dir=tiny.yaml/below", "output_dir=tiny.yaml/below/tiny: cannot create this fold", nothing),
    ("merge.py", "merge.output=tiny.yaml/below/a", "merge.output=tiny.yaml/below: cannot create this folder", experts),
    ("sample_ddp.py", f"{MODEL} sample.output=tiny.yaml/a", "sample.output=tiny.yaml: cannot create this fol", nothing),
    ("evaluate.py", "evaluate.samples=[] output_dir=tiny.yaml/below", "output_dir=tiny.yaml/below/tiny: can", nothing),
    # scores
    ("evaluate.py", "", "evaluate.samples=None: no sample folders in .*tiny/samples", nothing),
    ("evaluate.py", "evaluate.samples=[nowhere]", "evaluate.samples=nowhere: no such folder", nothing),
    ("evaluate.py", "", "evaluate.samples=.*other: holds 1 of 6 images; finish sample_ddp.py", sampled_before),
    ("evaluate.py", "evaluate.blocks=2", r"evaluate.blocks=2: .*other holds 3 image\(s\), which is not 2 equal block",
     samples("0.png", "1.png", "2.png")),
    ("evaluate.py", "", r"evaluate.blocks=1: .*other holds 1 image\(s\)", samples("0.png")),
    ("evaluate.py", "data.resolution=7", "data.resolution=7: evaluate.features=classifier needs at least 8", nothing),
    ("evaluate.py", "evaluate.features=inception", ".*pt_inception.*: not the Inception weights .*; delete it to downl",
     damaged_inception),
    ("evaluate.py", "", "1.png: is 9 x 9, 0.png is 8 x 8", samples("0.png", "1.png", sizes=(8, 9))),
    ("evaluate.py", "data.label_column=null", "data.label_column=None: evaluate.features=classifier needs labels",
     samples("0.png", "1.png")),
    ("evaluate.py", f"{REFERENCE} evaluate.samples=[]", "reference.npz: not an npz file of mu and sigma .*", nothing),
    ("evaluate.py", f"{REFERENCE} evaluate.samples=[]", "reference.npz: not an npz file of mu and sigma .*pickle",
     statistics(mu=OBJECTS, sigma=OBJECTS)),
    ("evaluate.py", f"{REFERENCE} evaluate.samples=[]", "reference.npz: a single array; an npz file of mu and sigma",
     single_array),
    ("evaluate.py", f"{REFERENCE}", "evaluate.reference=reference.npz: holds statistics of 2 features", two_features),
]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "arguments", "message", "prepare"),
    CASES,
    ids=[f"{n} {script} {arguments}" for n, (script, arguments, *_) in enumerate(CASES)],
)
def test_a_mistake_is_answered_in_one_line_and_loses_nothing(
    start, config_file, pretrained, script, arguments, message, prepare
):
    root = config_file.parent
    prepare(root, pretrained)
    before = content(root)
    status, errors = start(script, *arguments.split())
    lines = [line for line in errors.splitlines() if line.startswith(script)]
    assert status == 2, errors
    assert len(lines) == 1, errors
    assert errors.splitlines()[-1] == lines[0]
    assert re.match(f"{script}: error: (.*[/-])?{message}", lines[0]), lines[0]
    assert "Traceback" not in errors
    made = {name for name in content(root) if not name.startswith("tiny/stats")}  # the reference that all scores share
    assert made == {name for name in before if not name.startswith("tiny/stats")}
    assert all(content(root)[name] == data for name, data in before.items())
    assert not (root / "executed").exists()


def test_damaged_results_are_named(start, config_file, pretrained):
    """merge.py reads the scores that evaluate.py found."""
    experts(config_file.parent, pretrained)
    results = config_file.parent / "tiny" / "results.json"
    for text in ("", "[]", '{"rows": [1]}'):
        results.write_text(text)
        status, errors = start("merge.py")
        assert status == 2
        assert re.fullmatch(r"merge\.py: error: .*tiny/results\.json: .*\n", errors)


def test_a_resume_under_other_settings_names_them_and_those_that_may_change(start, config_file):
    """Some of the settings may change in the middle of a run; both kinds are told apart."""
    root = config_file.parent
    assert start("finetune.py", "finetune.range=0", "finetune.max_steps=2")[0] == 0
    before = content(root)
    options = ["finetune.range=0", "finetune.max_steps=3", "finetune.log_every=7"]
    status, errors = start("finetune.py", *options)
    assert status == 2
    assert re.search(
        r"0000-0500 holds a run of other settings: finetune.max_steps=3 \(was 2\); set it back, or give this run "
        r"another name; finetune.log_every=7 \(was 1\) may change",
        errors,
    )
    assert content(root) == before
    assert start("finetune.py", "finetune.range=0", "finetune.max_steps=2", "finetune.log_every=7")[0] == 0


def test_a_port_in_use_is_named(start, monkeypatch):
    """As a process of a job that meets there; the launcher itself looks for a free one with --main_process_port 0."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in job.items():
            monkeypatch.setenv(name, value)
        status, errors = start("finetune.py")
    assert status == 2, errors
    assert f"finetune.py: error: MASTER_PORT={port}: the processes can't meet there: " in errors
    assert "Traceback" not in errors


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
