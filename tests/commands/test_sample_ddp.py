import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import run
from PIL import Image
from robustness.forked import Run

from deme.data.samples import block_of
from deme.job.files import locked

MODEL = "sample.model=pretrained"


def images(folder) -> dict[str, np.ndarray]:
    return {path.name: np.array(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


@pytest.fixture
def output(config_file):
    return config_file.parent / "tiny" / "samples" / "pretrained"


def test_exactly_the_images_asked_for_and_only_once(config_file, output):
    """6 images in batches of 4; run again nothing is drawn; more images keep the first ones."""
    run("sample_ddp.py", config_file, MODEL)
    first = images(output)
    assert list(first) == [f"{seed:06d}.png" for seed in range(6)]
    assert {image.shape for image in first.values()} == {(8, 8)}
    assert output.with_name("grid-pretrained.png").exists()
    assert "0 of 6 images to draw" in run("sample_ddp.py", config_file, MODEL).stdout
    assert "3 of 9 images to draw" in run("sample_ddp.py", config_file, MODEL, "sample.num_images=9").stdout
    more = images(output)
    assert len(more) == 9
    assert all(np.array_equal(more[name], image) for name, image in first.items())


def test_processes_and_batches_do_not_change_the_images(config_file, output):
    """One process in batches of 4, two in batches of 3: equal to one grey level; also under an offset of the seeds."""
    run("sample_ddp.py", config_file, MODEL, "sample.num_images=7")
    expected = images(output)
    shutil.rmtree(output)
    result = run("sample_ddp.py", config_file, MODEL, "sample.num_images=7", "sample.batch_size=3", processes=2)
    assert "2 process(es) on cpu" in result.stdout
    found = images(output)
    assert found.keys() == expected.keys()
    assert all(np.abs(found[name] - image).max() <= 1 for name, image in expected.items())
    run("sample_ddp.py", config_file, MODEL, "sample.num_images=2", "sample.seed_offset=5", "sample.output=offset")
    offset = images(config_file.parent / "offset")
    assert list(offset) == ["000005.png", "000006.png"]
    assert all(np.abs(offset[name] - expected[name]).max() <= 1 for name in offset)


def test_another_model_is_refused_and_nothing_lost(config_file, output):
    run("sample_ddp.py", config_file, MODEL)
    refused = run("sample_ddp.py", config_file, MODEL, "sample.num_inference_steps=4", status=2)
    assert "holds samples of other settings: num_inference_steps=4 (was 3); choose another folder" in refused.stderr
    assert len(images(output)) == 6
    run("sample_ddp.py", config_file, MODEL, "sample.num_inference_steps=4", "sample.overwrite=true")
    assert len(images(output)) == 6


def test_several_schedules_of_a_model_are_drawn_into_folders_of_their_own(config_file, output):
    """The images and the record of one schedule alone; refused before any is drawn; scored, each beside its own."""
    schedules = "sample.schedules=[{}, {steps: 2, scheduler: dpmsolver++}]"
    names = ["pretrained@ddim-3", "pretrained@dpmsolver++-2"]
    folders = [output.with_name(name) for name in names]
    paths = run("sample_ddp.py", config_file, MODEL, schedules, "--path", "samples").stdout.splitlines()
    assert paths == list(map(str, folders))
    alone = [MODEL, "sample.num_inference_steps=2", "sample.scheduler=dpmsolver++", "sample.output=alone"]
    run("sample_ddp.py", config_file, *alone)
    run("sample_ddp.py", config_file, *alone, f"sample.output={folders[1]}", "sample.num_images=2")
    refused = run("sample_ddp.py", config_file, MODEL, schedules, "sample.eta=0.5", status=2)
    assert "sample.schedules[1]={'steps': 2, 'scheduler': 'dpmsolver++'}: sample.eta=0.5: only" in refused.stderr
    refused = run("sample_ddp.py", config_file, MODEL, schedules, "sample.size_on_disk=4", status=2)
    assert f"sample.output={folders[1]}: holds samples of other settings: size_on_disk=4" in refused.stderr
    assert images(folders[0]) == {}
    refused = run("sample_ddp.py", config_file, MODEL, "sample.schedules=[{}, {scheduler: heun}]", status=2)
    assert "sample.schedules=heun-3: must be one of ddim, pndm," in refused.stderr
    shutil.rmtree(folders[0])
    result = run("sample_ddp.py", config_file, MODEL, schedules)
    assert f"{folders[0]}: 6 of 6 images to draw" in result.stdout
    assert f"{folders[1]}: 4 of 6 images to draw" in result.stdout
    run("sample_ddp.py", config_file, MODEL)
    for expected, found in zip((output, config_file.parent / "alone"), folders, strict=True):
        twins = images(found)
        assert twins.keys() == images(expected).keys()
        assert all(np.array_equal(twins[name], image) for name, image in images(expected).items())
        one, other = (yaml.safe_load((folder / "samples.yaml").read_text()) for folder in (expected, found))
        assert one["identity"] == other["identity"]
        assert one["passes"] == other["passes"] == one["identity"]["num_inference_steps"]
        assert found.with_name(f"grid-{found.name}.png").is_file()
    shutil.copytree(folders[1], output.with_name("merged@dpmsolver++-2"))
    assert "6 of 6" not in run("sample_ddp.py", config_file, MODEL, schedules).stdout
    run("evaluate.py", config_file)
    rows = json.loads((output.parents[1] / "results.json").read_text())["rows"]
    order = [output.name, names[0], names[1], "merged@dpmsolver++-2"]
    assert [Path(row["samples"]).name for row in rows] == order
    assert [list(row["differences"]) for row in rows] == [[], [], [], ["pretrained"]]
    assert rows[3]["differences"]["pretrained"]["mean"] == 0


def test_every_model_of_a_run_can_be_sampled(config_file):
    """Unchanged copies, with projections or without: each way of using them draws the pretrained model's images."""
    unchanged = ["finetune.max_steps=1", "finetune.learning_rate=1e-30"]
    run("finetune.py", config_file, *unchanged)
    run("finetune.py", config_file, *unchanged, "finetune.range=continued")
    run("merge.py", config_file)
    run("finetune.py", config_file, "finetune.range=distilled", "distill.max_steps=1", *unchanged[1:])
    run("finetune.py", config_file, *unchanged, "name=plain", "model.projection=false")
    run("merge.py", config_file, "name=plain")
    samples = config_file.parent / "tiny" / "samples"
    paths = ("plain/merged", "tiny/finetuned/0000-0500/unet")
    for model in ("pretrained", "continued", "merged", "distilled", "ensemble", *paths):
        run("sample_ddp.py", config_file, f"sample.model={model}")
    names = {"pretrained", "continued", "merged", "distilled", "ensemble", *(path.replace("/", "-") for path in paths)}
    assert {folder.name for folder in samples.iterdir() if folder.is_dir()} == names
    expected = images(samples / "pretrained")
    for name in names:
        found = images(samples / name)
        assert all(np.abs(found[seed] - image).max() <= 1 for seed, image in expected.items()), name


def test_jobs_draw_blocks_of_seeds_into_one_folder_side_by_side(config_file, output):
    """Three at once: each draws its seeds, and who finds them all the contact sheet; the same images as one job's."""
    run("sample_ddp.py", config_file, MODEL, "name=whole", "sample.num_images=7")
    whole = output.parents[2] / "whole" / "samples"
    options = ["--config", str(config_file), MODEL, "sample.num_images=7", "sample.blocks=3"]
    jobs = [Run("sample_ddp.py", [*options, f"sample.block={block}"], config_file.parent) for block in range(3)]
    assert [job.wait() for job in jobs] == [0, 0, 0], [job.stderr for job in jobs]
    assert any("grid-pretrained.png" in job.stdout for job in jobs)
    expected, found = images(whole / "pretrained"), images(output)
    assert found.keys() == expected.keys()
    assert all(np.abs(found[name] - image).max() <= 1 for name, image in expected.items())
    assert not list(output.parent.glob(".*.lock*"))
    plan = run("sample_ddp.py", config_file, *options[2:], "--dry-run").stdout.splitlines()[-3:]
    assert [line.split(" from ")[0] for line in plan] == [f"draw seeds {s}" for s in ("0 ... 1", "2 ... 3", "4 ... 6")]
    assert all(line.endswith(f"{output}: complete") for line in plan)


def test_a_block_that_another_job_draws_is_refused(config_file, output):
    """By the same block's job, and by one whose seeds overlap; what that job is writing stays."""
    options = [MODEL, "sample.blocks=2", "sample.block=0"]
    with locked(block_of(output, range(3)), "sample.output"):
        assert "in use by process" in run("sample_ddp.py", config_file, *options, status=2).stderr
        other = run("sample_ddp.py", config_file, *options[:1], "sample.blocks=3", "sample.block=1", status=2)
        assert "another job draws the seeds 0 … 2; if that has ended, `rm " in other.stderr
        assert "another job draws the seeds 0 … 2" in run("sample_ddp.py", config_file, MODEL, status=2).stderr
        run("sample_ddp.py", config_file, MODEL, "sample.blocks=2", "sample.block=1")
    refused = run("sample_ddp.py", config_file, *options, "sample.overwrite=true", status=2)
    assert "sample.overwrite=true: other jobs may be drawing into the folder" in refused.stderr
    assert list(images(output)) == ["000003.png", "000004.png", "000005.png"]
