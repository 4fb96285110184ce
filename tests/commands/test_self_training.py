"""Training on the pretrained network's own samples, and merging that subtracts what it learns (Neon)."""

import json
import re
import shutil
import subprocess
import sys

import optuna
import pytest
import torch
import yaml
from conftest import REPOSITORY, SMALL_SEARCH, environment, run, tiny_unet
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file
from test_text_to_image import text_config, text_to_image  # noqa: F401  fixtures

from deme.config.sections import Data
from deme.data.decoding import load_images
from deme.models.weights import WEIGHTS
from deme.training.self_training import as_data

OWN = ["finetune.range=self", "self_training.num_images=12"]


def weights(root, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / "tiny" / "finetuned" / name / "unet" / WEIGHTS)


@pytest.fixture
def root(config_file):
    """The folder of a run whose self-trained network is there."""
    run("finetune.py", config_file, *OWN)
    return config_file.parent


def test_it_trains_plainly_on_samples_of_the_pretrained_network(root, config_file):
    """The samples are those of sample_ddp.py, by their seeds; no image of the data is read."""
    own = root / "tiny" / "own-samples"
    seeds = ["sample.seed_offset=20000000", "sample.num_images=12"]
    run("sample_ddp.py", config_file, "sample.model=pretrained", *seeds)
    drawn = root / "tiny" / "samples" / "pretrained"
    names = sorted(path.name for path in own.glob("*.png"))
    assert names == [f"{20_000_000 + i}.png" for i in range(12)]
    assert all((own / name).read_bytes() == (drawn / name).read_bytes() for name in names)
    lines = [json.loads(line) for line in (root / "tiny/finetuned/self/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert {line["consistency_loss"] for line in lines} == {0.0}
    assert not any("projection" in name for name in weights(root, "self"))
    trained = weights(root, "self")
    assert "is complete" in run("finetune.py", config_file, *OWN).stdout
    shutil.rmtree(root / "tiny" / "finetuned")
    for name in names[:5]:  # as if it had been killed while it drew
        (own / name).unlink()
    again = run("finetune.py", config_file, *OWN, "data.name=absent")
    assert "5 of 12 images to draw" in again.stdout
    assert all(torch.equal(weight, trained[name]) for name, weight in weights(root, "self").items())
    assert len((root / "tiny" / "own-samples-seconds.txt").read_text().split()) == 3


def test_own_samples_have_their_labels_where_seeds_gain_a_digit(tmp_path):
    seeds = range(999_998, 1_000_003)
    for seed in seeds:
        Image.new("L", (8, 8), seed % 5).save(tmp_path / f"{seed:06d}.png")
    data = Data(name=str(tmp_path), image_column="image", label_column=None, caption_column=None, resolution=8)
    source = as_data(data, tmp_path, {seed: seed % 5 for seed in seeds})
    images = load_images(source, 1, tmp_path / "cache")
    assert [int(image[0, 0, 0]) for image in images] == source.labels


def test_a_network_for_each_range(config_file):
    run("finetune.py", config_file, *OWN, "self_training.ranges=true")
    first, second = (weights(config_file.parent, f"self-{edges}") for edges in ("0000-0500", "0500-1000"))
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("experts", "coefficients"), [(["self"], [-1.5]), (["self", "ranges"], [-1.5, 0.5, 0.25])])
def test_a_merge_subtracts_what_it_learned(root, config_file, pretrained, experts, coefficients):
    if "ranges" in experts:
        run("finetune.py", config_file, "model.projection=false")
    given = [f"merge.experts=[{', '.join(experts)}]", f"merge.coefficients={coefficients}"]
    run("merge.py", config_file, *given)
    names = ["self"] if experts == ["self"] else ["self", "0000-0500", "0500-1000"]
    base, merged = load_file(pretrained / "unet" / WEIGHTS), load_file(root / "tiny" / "merged" / "unet" / WEIGHTS)
    trained = [weights(root, name) for name in names]
    for name, weight in base.items():
        pairs = zip(coefficients, trained, strict=True)
        expected = weight + sum(w * (tensors[name] - weight) for w, tensors in pairs)
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)
    record = yaml.safe_load((root / "tiny" / "merged" / "merge.yaml").read_text())
    card = (root / "tiny" / "merged" / "README.md").read_text()
    assert re.findall(r"\[(Neon|Decouple-then-Merge)\]", card) == ["Neon", "Decouple-then-Merge"][: len(experts)]
    titles = {1: "| tensors | self |", 3: "| tensors | self | timesteps 0000-0500 | 0500-1000 |"}
    assert titles[len(names)] in card
    assert [part["timesteps"] for part in record["finetuned"]] == names


def test_a_search_goes_down_the_line_before_it_proposes(root, config_file):
    """From the pretrained network to the lower bound, then wherever the sampler looks within the bounds."""
    given = ["merge.experts=[self]", "merge.coefficients=search", *SMALL_SEARCH, "search.trials=11"]
    given.append("search.self_bounds=[-2, 0.25]")
    printed = run("search.py", config_file, *given).stdout
    places = [float(text.split(" at [")[1].split("]")[0]) for text in printed.splitlines() if "candidate" in text]
    assert places[:9] == pytest.approx([0, -0.25, -0.5, -0.75, -1, -1.25, -1.5, -1.75, -2])
    assert len(places) == 11
    folder = root / "tiny" / "search"
    with open(folder / "report.json") as file:
        rows = [row["samples"] for row in json.load(file)["rows"]]
    assert rows == ["pretrained", "without a search", "best"]
    [[coefficient]] = yaml.safe_load((folder / "best.yaml").read_text())["coefficients"].values()
    assert -2 <= coefficient <= 0.25
    run("merge.py", config_file, "merge.experts=[self]", "merge.coefficients=search")
    further = ["search.groups=block", f"search.start=[{folder / 'best.yaml'}]", "search.output=" + str(root / "blocks")]
    run("search.py", config_file, *given, *further, "search.trials=1", "search.report_images=0")
    storage = f"sqlite:///{root / 'blocks' / 'study.db'}"
    [name] = [name for name in optuna.get_all_study_names(storage) if "finalists" not in name]
    tried = optuna.load_study(study_name=name, storage=storage).trials[0].params
    assert len(tried) > 2
    assert set(tried.values()) == {coefficient}


def test_prompts_are_captions_of_the_data(text_config, tmp_path):  # noqa: F811
    run("finetune.py", text_config, "finetune.range=self", "self_training.num_images=8")
    [folder] = tmp_path.rglob("own-samples")
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 8
    assert len(set(prompts)) > 1
    assert all(prompt.startswith("a handwritten ") for prompt in prompts)


@pytest.mark.long
def test_the_benchmark_shows_every_coefficient(root, config_file):
    command = [sys.executable, "benchmarks/self_training.py", "name=tiny", "--config", str(config_file), "--quick"]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| 2 | ")]
    assert [float(row[1]) for row in rows] == 2 * [0, -0.5, -1, -1.5, -2, -3]
    assert {row[3] == "-" for row in rows[:2]} == {True, False}


MISTAKES = {
    "too few for a batch": (
        ["finetune.range=self", "self_training.num_images=4"],
        "finetune.py",
        "self_training.num_images=4: must be at least finetune.batch_size=8",
    ),
    "images that are scored": (
        [*OWN, "self_training.seed_offset=0"],
        "finetune.py",
        "self_training.seed_offset=0: sample_ddp.py draws the seeds 0 … 5",
    ),
    "only positive": (
        ["search.self_bounds=[0, 1]"],
        "search.py",
        "search.self_bounds=[0.0, 1.0]: self-trained networks are subtracted: must begin below 0",
    ),
    "nothing to match": (
        ["merge.experts=[self]", "search.method=closed_form", "merge.coefficients=null"],
        "search.py",
        "search.method=closed_form: match and loss need merge.experts=[ranges]",
    ),
    "not trained": (
        ["merge.experts=[self]", "merge.coefficients=null"],
        "merge.py",
        "missing; train it with finetune.py finetune.range=self",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_in_one_line(config_file, name):
    overrides, script, message = MISTAKES[name]
    result = run(script, config_file, *overrides, status=2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_samples_of_another_network_are_refused(root, config_file, tmp_path):
    DDPMPipeline(tiny_unet(1), DDPMScheduler(beta_end=0.03, clip_sample_range=1.5)).save_pretrained(tmp_path / "other")
    shutil.rmtree(root / "tiny" / "finetuned")
    result = run("finetune.py", config_file, *OWN, f"model.pretrained={tmp_path / 'other'}", status=2)
    assert "own-samples: holds samples of other settings: weights" in result.stderr
