import subprocess
import sys

import pytest
from conftest import REPOSITORY

from deme.config.experiment import Config
from deme.config.networks import Merge
from deme.config.paths import is_made
from deme.config.sections import Evaluate, Model, Sample, Search
from deme.config.trainings import Distill, Finetune

SCRIPTS = ["pretrain.py", "finetune.py", "search.py", "merge.py", "sample_ddp.py", "evaluate.py", "analyze.py"]
SCRIPTS += ["report.py"]


def test_everything_of_a_run_lies_below_its_folder():
    """The layout that README promises; nothing but caches is shared between runs."""
    paths = Config(name="a", output_dir="out").paths
    expected = {
        "run_folder": "out/a",
        "image_cache": "out/image-cache",
        "latent_cache": "out/latent-cache",
        "control_features": "out/control-features",
        "single_files": "out/single-files",
        "pretraining": "out/a/pretraining",
        "pretrained_here": "out/a/pretrained",
        "pretrained": "out/a/pretrained",
        "continued": "out/a/finetuned/continued/unet",
        "distilled": "out/a/finetuned/distilled/unet",
        "finetuned": "\n".join(
            f"out/a/finetuned/{edges}/unet" for edges in ("0000-0250", "0250-0500", "0500-0750", "0750-1000")
        ),
        "searched": "\n".join(
            f"out/a/finetuned/{edges}/unet" for edges in ("0000-0250", "0250-0500", "0500-0750", "0750-1000")
        ),
        "experts": "\n".join(
            f"out/a/finetuned/{edges}/unet" for edges in ("0000-0250", "0250-0500", "0500-0750", "0750-1000")
        ),
        "merge_statistics": "out/a/finetuned/merge-statistics",
        "own_samples": "out/a/own-samples",
        "own_seconds": "out/a/own-samples-seconds.txt",
        "search": "out/a/search",
        "search_seconds": "out/a/search/seconds.txt",
        "best_coefficients": "out/a/search/best.yaml",
        "report": "out/a/report.html",
        "analysis": "out/a/analysis",
        "plots": "out/a/plots",
        "merged": "out/a/merged",
        "merged_file": "out/a/merged/a.safetensors",
        "two_experts": "out/a/two-experts",
        "neon": "out/a/neon",
        "all_samples": "out/a/samples",
        "samples": "out/a/samples/merged",
        "grid": "out/a/samples/grid-merged.png",
        "stats": "out/a/stats",
        "classifier": "out/a/stats/classifier.safetensors",
        "reference": "out/a/stats/inception.npz",
        "results": "out/a/results.json",
        "jobs": "out/a/jobs",
    }
    assert {name: paths.lines(name) for name in paths.names} == expected


def test_snapshots_lie_in_the_folder_of_their_training():
    """A range takes 250 steps, the control four times as many; null keeps none."""
    config = Config(name="a", output_dir="out", finetune=Finetune(max_steps=250, snapshot_every=300))
    assert config.snapshots("0000-0250") == []
    found = [str(path) for path in config.snapshots("continued")]
    assert found == [f"out/a/finetuned/continued/snapshots/{step:08d}/unet" for step in (300, 600, 900)]
    config = Config(finetune=Finetune(snapshot_every=500), distill=Distill(max_steps=1500))
    counts = {name: len(config.snapshots(name)) for name in ("0000-0250", "self", "distilled", "min_snr")}
    assert counts == {"0000-0250": 2, "self": 2, "distilled": 3, "min_snr": 8}
    assert Config().snapshots("continued") == []


def test_settings_move_what_they_name():
    config = Config(
        model=Model(pretrained="google/ddpm-cifar10-32"),
        merge=Merge(finetuned="experts", output="elsewhere/merged"),
        search=Search(output="elsewhere/search"),
        sample=Sample(model="/data/other/model"),
        evaluate=Evaluate(reference="a.npz", output="b.json"),
    )
    paths = config.paths
    assert paths.pretrained == "google/ddpm-cifar10-32"
    assert str(paths.finetuned[0]) == "experts/0000-0250/unet"
    assert str(paths.best_coefficients) == "elsewhere/search/best.yaml"
    assert str(paths.merged) == "elsewhere/merged"
    assert str(paths.samples) == "runs/digits/samples/data-other-model"
    assert (str(paths.reference), str(paths.results)) == ("a.npz", "b.json")


def test_a_transformers_copies_lie_in_transformer(tmp_path):
    """As soon as the pretrained pipeline is there; of a pipeline on the Hub, when one of them is written."""
    config = Config(output_dir=str(tmp_path))
    (tmp_path / "digits" / "pretrained" / "transformer").mkdir(parents=True)
    paths = [*config.paths.finetuned, config.paths.continued, *config.paths.averaged(0.1)]
    assert {path.name for path in paths} == {"transformer"}
    config = Config(output_dir=str(tmp_path), model=Model(pretrained="owner/name"))
    output = config.paths.continued
    assert output.name == "unet"
    assert not is_made(output)
    (output.parent / "transformer").mkdir(parents=True)
    assert is_made(output)
    assert config.paths.continued.name == "transformer"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_where_things_lie(script, tmp_path):
    options = ["--path", "finetuned", "name=x", "timesteps.num_ranges=2", "merge.coefficients=null"]
    command = [sys.executable, REPOSITORY / script, *options]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert found.stdout == "runs/x/finetuned/0000-0500/unet\nruns/x/finetuned/0500-1000/unet\n", found.stderr
    assert not list(tmp_path.iterdir())
