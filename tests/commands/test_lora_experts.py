"""LoRAs by every script: trained, merged, searched, distilled and drawn from."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY, SMALL_SEARCH, run
from safetensors import safe_open
from safetensors.torch import load_file
from test_text_to_image import images, losses, text_config, text_to_image  # noqa: F401  fixtures

from deme.compare.comparison import Stages, load_comparison
from deme.config.paths import LORA
from deme.config.reading import load_config
from deme.job.files import sha256
from deme.models.weights import WEIGHTS
from scripts.estimate import Size, disk_space, operations

RANGES = ("0000-0500", "0500-1000")


@pytest.fixture
def lora_config(text_config) -> Path:  # noqa: F811
    config = yaml.safe_load(text_config.read_text())
    config["model"]["projection"] = False
    config["finetune"] |= {"lora_rank": 2, "learning_rate": 1e-2}
    text_config.write_text(yaml.safe_dump(config))
    return text_config


def header(file: Path) -> dict:
    with safe_open(file, "pt") as opened:
        return {key: yaml.safe_load(value) for key, value in opened.metadata().items()}


def test_the_whole_recipe(lora_config, text_to_image, tmp_path):  # noqa: F811
    """finetune, merge, search by match, distil, sample: the files of a run are LoRAs, and the base is whole."""
    base, finetuned = sha256(text_to_image / "unet" / WEIGHTS), tmp_path / "tiny" / "finetuned"
    run("finetune.py", lora_config, "finetune.preview_every=4", "finetune.preview_prompts=[a,b]")
    assert "complete" in run("finetune.py", lora_config).stdout
    for name, edges in zip(RANGES, ([0, 500], [500, 1000]), strict=True):
        written = header(finetuned / name / LORA)
        assert (written["timesteps"], written["pretrained"]["sha256"]) == ([edges], base)
        assert all(key.startswith("unet.") for key in load_file(finetuned / name / LORA))
        assert not (finetuned / name / "unet").exists()
    first, second = (load_file(finetuned / name / LORA) for name in RANGES)
    assert all((first[key] != second[key]).any() for key in first)
    refused = run("finetune.py", lora_config, "finetune.lora_rank=3", status=2).stderr
    assert "finetune.lora_rank=3 (was 2)" in refused

    run("merge.py", lora_config)
    merged = tmp_path / "tiny" / "merged"
    assert {file.name for file in merged.iterdir()} == {LORA, "merge.yaml"}
    assert {len(value) for key, value in load_file(merged / LORA).items() if "lora_A" in key} == {4}
    for name in ("continued", "min_snr"):
        run("finetune.py", lora_config, f"finetune.range={name}", processes=2 if name == "continued" else 1)
        assert set(load_file(finetuned / name / LORA)) == set(first)
    run("finetune.py", lora_config, "finetune.range=distilled", "distill.max_steps=2")
    assert all(loss > 0 for loss in losses(tmp_path, "distilled"))
    assert header(finetuned / "distilled" / LORA)["pretrained"]["sha256"] == base
    for model in ("continued", "ensemble", "merged", "distilled", RANGES[0], str(finetuned / RANGES[1])):
        output = tmp_path / "drawn" / Path(model).name
        run("sample_ddp.py", lora_config, f"sample.model={model}", f"sample.output={output}")
        record = yaml.safe_load((output / "samples.yaml").read_text())
        assert record["identity"]["base of LoRAs (SHA-256)"] == base

    run("merge.py", lora_config, "merge.into=model", f"merge.output={tmp_path / 'model'}")
    run("sample_ddp.py", lora_config, f"sample.model={tmp_path / 'model'}", f"sample.output={tmp_path / 'of-model'}")
    mixed = ["finetune.range=distilled", f"merge.output={tmp_path / 'model'}"]
    assert "a LoRA is distilled from LoRAs" in run("finetune.py", lora_config, *mixed, status=2).stderr
    drawn, whole = images(tmp_path / "drawn" / "merged"), images(tmp_path / "of-model")
    assert all(abs(drawn[name] - whole[name]).max() <= 1 for name in whole)


def test_loras_are_searched_and_analysed_as_the_same_networks(lora_config, tmp_path):
    """Match finds the coefficients that it finds for the experts when each is merged into the pipeline."""
    run("finetune.py", lora_config)
    networks = []
    for name, edges in zip(RANGES, ([0, 500], [500, 1000]), strict=True):
        file, output = tmp_path / "tiny" / "finetuned" / name / LORA, tmp_path / f"whole-{name}"
        given = [f"merge.experts=[{file}]", "merge.coefficients=[1]", "merge.into=model", f"merge.output={output}"]
        run("merge.py", lora_config, *given)
        networks.append(f"{{path: {output / 'unet'}, timesteps: {edges}}}")
    search = ["search.method=closed_form", *SMALL_SEARCH, "search.report_images=0"]
    found, measured = [], []
    for output, given in (("loras", []), ("networks", [f"merge.experts=[{','.join(networks)}]"])):
        run("search.py", lora_config, *search, *given, f"search.output={tmp_path / output}")
        found.append(yaml.safe_load((tmp_path / output / "best.yaml").read_text())["coefficients"]["*"])
        analyses = ["analyze.analyses=[task_vectors,loss_by_timestep]", f"analyze.output={tmp_path / output}-analysis"]
        run("analyze.py", lora_config, *analyses, "analyze.timesteps=4", "analyze.images=8", *given)
        measured.append(np.load(tmp_path / f"{output}-analysis" / "task_vectors.npz"))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    names = [name for name in measured[0].files if measured[0][name].dtype.kind == "f"]
    assert all(np.allclose(measured[0][name], measured[1][name], rtol=1e-3, equal_nan=True) for name in names)
    assert len(names) > 0
    run("merge.py", lora_config, f"merge.coefficients={tmp_path / 'loras' / 'best.yaml'}")


@pytest.mark.parametrize(
    ("script", "overrides", "message"),
    [
        ("finetune.py", ["model.projection=true"], "finetune.lora_rank=2: projections need all weights to be trained"),
        (
            "finetune.py",
            ["finetune.lora_rank=17"],
            "finetune.lora_rank=17: above 8, the smallest side of down_blocks.0",
        ),
        ("finetune.py", ["finetune.lora_targets=[none]"], "none fits no linear layer and no convolution"),
        ("merge.py", [], f"finetuned/0000-0500/{LORA}: missing; train it with finetune.py finetune.range=0"),
        ("merge.py", ["merge.experts=[ranges,random]"], "LoRAs and whole networks can't be merged together"),
        ("merge.py", ["merge.ema_width=0.1"], "merge.ema_width=0.1: LoRAs have no snapshots"),
        ("sample_ddp.py", ["sample.model=ensemble"], f"{LORA} is missing; finetune.py makes it"),
    ],
)
def test_mistakes_are_one_line(lora_config, tmp_path, script, overrides, message):
    error = run(script, lora_config, "merge.coefficients=null", *overrides, status=2).stderr
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "tiny" / "finetuned").exists()


def test_the_estimate_counts_the_lora_alone():
    """And a backward pass through frozen weights as one pass, not two."""
    loras = ["finetune.lora_rank=2", "model.projection=false", "finetune.checkpoints_kept=1"]
    found = []
    for overrides, trained in (([], 1_000_000), (loras, 10_000)):
        config = load_config(REPOSITORY / "configs" / "digits.yaml", [*overrides, "merge.coefficients=null"])
        size = Size(1_000_000, trained, 0, 1e9, 1, 0.0, 0, 0, lambda _: 1, 1797, ["pretrained", "merged"])
        found.append((disk_space(config, size), operations(config, size)))
    (whole, slow), (small, fast) = found
    assert whole["finetuned networks"] == 4 * 4 * 1_000_000
    assert small["finetuned networks"] == small["merged networks"] == 4 * 4 * 10_000
    assert small["their checkpoints"] == 5 * 4 * 4 * 10_000  # student, EMA, two moments; one more while it is written
    assert whole["merged networks"] == 4 * 1_000_000
    name = next(key for key in slow if key.startswith("finetuning"))
    assert fast[name] == slow[name] * 3 / 4  # with the teacher


def test_a_comparison_of_loras_needs_no_pipeline():
    """A merged LoRA has no card; the run with another rank merges the LoRAs of the first."""
    comparison, runs = load_comparison(REPOSITORY / "configs" / "comparison" / "lora.yaml", [])
    jobs = {job.name: job for job in Stages(comparison, runs).jobs}
    merges = [job for job in jobs.values() if job.stage == "merge"]
    assert [[path.name for path in job.parts] for job in merges] == [["merge.yaml", LORA]] * 2
    assert not any(job.stage == "card" for job in jobs.values())
    trained = [path.name for job in jobs.values() if job.stage == "train" for path in job.parts]
    assert trained == [LORA] * 5
