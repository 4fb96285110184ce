"""The analyses of a run, on the tiny pipeline and experts that were made without training."""

import signal

import numpy as np
import pytest
from conftest import run, tiny_unet
from diffusers import UNet2DConditionModel
from PIL import Image
from robustness.forked import Run
from test_search import disturbed, root  # noqa: F401  a fixture
from test_text_to_image import text_config, text_to_image  # noqa: F401  fixtures

from deme.config.sections import ANALYSES
from deme.models.denoisers import with_projections

SMALL = ["analyze.timesteps=6", "analyze.images=8", "analyze.batch_size=4", "analyze.sketch=1000"]
SMALL += ["analyze.landscape_points=3", "analyze.landscape_images=8"]
PICTURES = ["activation-change", "activation-shares", "gradient-blocks", "gradient-conflict", "gradient-densities"]
PICTURES += ["landscape", "loss-by-timestep", "projections", "task-cosines", "task-values", "task-vectors"]
LARGEST_PICTURE = 300_000  # bytes


def results(folder) -> dict[str, np.ndarray]:
    """FILE/NAME → array."""
    return {
        f"{file.stem}/{name}": array for file in sorted(folder.glob("*.npz")) for name, array in np.load(file).items()
    }


def test_all_analyses_are_made_once(config_file, root):  # noqa: F811
    """What is missing is named, and measured once it is there; the rest is kept."""
    first = run("analyze.py", config_file, *SMALL).stdout
    folder = root / "tiny" / "analysis"
    assert "left out: continued, which finetune.py finetune.range=continued makes" in first
    assert "left out: merged, which merge.py makes" in first
    assert "landscape: 96 UNet passes" in first
    assert first.index("landscape: 96") < first.index("### Gradient conflict")
    tables = {file.stem: file.read_text() for file in folder.glob("*.md")}
    assert tables.keys() == set(ANALYSES)
    assert "| pretrained | 1.0000 ± 0.0000 | 1.0000 ± 0.0000 | 1.0000 ± 0.0000 |" in tables["loss_by_timestep"]
    assert all(table in first for table in tables.values())
    files = {file.stem: file for file in folder.iterdir() if file.suffix == ".npz"}
    assert {path for path in folder.iterdir() if path.is_dir()} == set()  # parts, which the whole replaces
    for name in PICTURES:
        file = root / "tiny" / "plots" / f"analysis-{name}.png"
        assert file.stat().st_size < LARGEST_PICTURE
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            picture.load()
    found = results(folder)
    names = ["loss_by_timestep-0000-0500", "loss_by_timestep-0500-1000", "loss_by_timestep-pretrained"]
    assert sorted(files) == ["activation_change", "gradient_conflict", "landscape", *names, "task_vectors"]
    assert all(array.dtype.kind != "f" or np.isfinite(array).all() for array in found.values())

    stamps = {name: file.stat().st_mtime_ns for name, file in files.items()}
    run("analyze.py", config_file, *SMALL)
    assert {name: file.stat().st_mtime_ns for name, file in files.items()} == stamps
    assert {file.stem: file.read_text() for file in folder.glob("*.md")} == tables
    run("merge.py", config_file)
    again = run("analyze.py", config_file, *SMALL, "analyze.analyses=[loss_by_timestep,task_vectors]").stdout
    assert "| merged | " in again
    changed = [name for name, file in files.items() if file.stat().st_mtime_ns != stamps[name]]
    assert changed == ["task_vectors"]


@pytest.mark.long
def test_two_processes_find_what_one_finds(config_file, root):  # noqa: F811
    """Up to float error, whatever the batch."""
    options = [*SMALL, "analyze.images=6", "analyze.timesteps=4", "analyze.landscape_points=2"]
    run("analyze.py", config_file, *options)
    run("analyze.py", config_file, *options, "analyze.output=both", "analyze.batch_size=3", processes=2)
    one, both = results(root / "tiny" / "analysis"), results(root / "both")
    assert one.keys() == both.keys()
    for name, array in one.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(both[name], array, rtol=1e-3, atol=1e-5 * np.abs(array).max(), err_msg=name)


@pytest.mark.long
def test_a_killed_analysis_goes_on(config_file, root):  # noqa: F811
    """With the rows of the landscape that it has; the result is that of an uninterrupted one."""
    options = [*SMALL, "analyze.analyses=[landscape]", "analyze.landscape_points=9"]
    run("analyze.py", config_file, *options, "analyze.output=whole")
    row = root / "tiny" / "analysis" / "landscape" / "row-001.npz"
    job = Run("analyze.py", ["--config", str(config_file), *options], root)
    while job.wait(0.01) is None and not row.exists():
        pass
    job.send(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    before = row.read_bytes()
    assert before
    run("analyze.py", config_file, *options)
    assert not row.exists()
    whole = results(root / "whole")
    for name, array in results(root / "tiny" / "analysis").items():
        assert np.array_equal(array, whole[name]), name


def test_gradient_conflict_needs_the_pretrained_network_alone(config_file, tmp_path):
    output = run("analyze.py", config_file, *SMALL, "analyze.analyses=[gradient_conflict]").stdout
    assert "| same range | " in output
    assert [file.name for file in (tmp_path / "tiny" / "analysis").glob("*.npz")] == ["gradient_conflict.npz"]


def test_one_range_has_no_plane(config_file, tmp_path):
    """And held-out images are those that losses are measured on."""
    disturbed(with_projections(tiny_unet()), 1).save_pretrained(tmp_path / "tiny" / "finetuned" / "0000-1000" / "unet")
    options = ["timesteps.num_ranges=1", "merge.coefficients=[0.5]", "data.held_out_images=5"]
    output = run("analyze.py", config_file, *SMALL, *options).stdout
    assert "Left out: a plane needs two experts" in output
    assert "6 timesteps × 4 held-out images" in output
    assert "6 timesteps × 8 training images" in output


@pytest.mark.parametrize("options", [[], ["data.cache_latents=true"]])
def test_text_to_image(options, text_config, text_to_image, tmp_path):  # noqa: F811
    """Noisy latents with captions, encoded once or before."""
    for index, name in enumerate(["0000-0500", "0500-1000"]):
        unet = with_projections(UNet2DConditionModel.from_pretrained(text_to_image / "unet"))
        disturbed(unet, index + 1).save_pretrained(tmp_path / "tiny" / "finetuned" / name / "unet")
    output = run("analyze.py", text_config, *SMALL, *options).stdout
    assert "| ensemble | " in output
    assert len(list((tmp_path / "tiny" / "plots").glob("analysis-*.png"))) == len(PICTURES)
