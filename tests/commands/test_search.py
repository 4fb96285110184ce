"""The search for merging coefficients, on the tiny pipeline and experts that were made without training."""

import json
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import run, tiny_unet
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from robustness.forked import Run
from safetensors.torch import load_file
from test_text_to_image import text_config, text_to_image  # noqa: F401  fixtures

import merge
import search
from deme.config.reading import load_config
from deme.data.opening import open_source
from deme.errors import UserError
from deme.job.files import sha256, stamp
from deme.job.records import ARCHITECTURE, SEARCH, Record
from deme.method.lora import Factors
from deme.method.process import process_of
from deme.models.denoisers import with_projections
from deme.models.lora import layers_of, write_lora
from deme.models.variants import find_pretrained, seconds_in
from deme.models.weights import WEIGHTS, weights_hash
from deme.search.problem import Problem

SMALL = ["search.images=32", "search.batch_size=16", "search.num_images=8", "search.num_inference_steps=2"]
SMALL += ["search.finalists=2", "search.finalist_images=10", "search.report_images=10", "search.trials=4"]
SMALL += ["search.control_images=12"]
METHODS = {
    "closed_form": [],
    "gradient": ["search.groups=block", "search.gradient_steps=20"],
    "optuna": ["search.objective=match", "search.sampler=tpe"],
    "multi_fidelity": [],
}


def disturbed(network, seed: int):
    """The network with other weights."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return network


def problem_of(config_file: Path, *options: str) -> Problem:
    images = ["search.control_images=12", "search.num_images=8", "search.finalist_images=12"]
    config = load_config(config_file, [*images, *options])
    return Problem(config, Accelerator(cpu=True), find_pretrained(config.paths), open_source(config.data), {})


def test_a_search_of_an_older_version_learns_its_architecture(config_file):
    config = load_config(config_file, [])
    for architecture in ({}, {ARCHITECTURE: "a"}):
        search.claim(config, Record(SEARCH, {"seed": 0} | architecture))
        (config.paths.search / "study.db").touch()
    with pytest.raises(UserError, match="search of other settings"):
        search.claim(config, Record(SEARCH, {"seed": 0, ARCHITECTURE: "b"}))


@pytest.fixture
def root(config_file):
    """Two experts near the pretrained network."""
    for index, name in enumerate(["0000-0500", "0500-1000"]):
        folder = config_file.parent / "tiny" / "finetuned" / name / "unet"
        disturbed(with_projections(tiny_unet()), index + 1).save_pretrained(folder)
    return config_file.parent


def best(folder) -> dict:
    return yaml.safe_load((folder / "best.yaml").read_text())


def report(folder) -> list[dict]:
    return json.loads((folder / "report.json").read_text())["rows"]


def trials(folder) -> dict[str, list[tuple[dict, float]]]:
    """Name of a study, without what was searched → coefficients and values of its candidates, in order."""
    found = {}
    url = f"sqlite:///{folder / 'study.db'}"
    for name in optuna.get_all_study_names(url):
        complete = optuna.load_study(study_name=name, storage=url).get_trials(states=[optuna.trial.TrialState.COMPLETE])
        found[name.partition("-")[2]] = [(trial.params, trial.value) for trial in complete]
    return found


def given_up(folder) -> int:
    url = f"sqlite:///{folder / 'study.db'}"
    studies = [optuna.load_study(study_name=name, storage=url) for name in optuna.get_all_study_names(url)]
    return sum(len(study.get_trials(states=[optuna.trial.TrialState.FAIL])) for study in studies)


def test_another_merge_method_is_searched_by_its_own_candidates(config_file, root):
    options = ["merge.method=ties", "merge.settings={fraction: 0.5}", *SMALL]
    run("search.py", config_file, *options)
    found = best(root / "tiny" / "search")
    assert found["merged_by"] == {"method": "ties", "ties_fraction": 0.5, "ties_combine": "mean"}
    [tried] = [rows for name, rows in trials(root / "tiny" / "search").items() if name.startswith("fd")]
    assert len(tried) == 4
    problem = problem_of(config_file, *options[:2])
    problem.merged(np.array(found["coefficients"]["*"]))
    said = run("merge.py", config_file, *options, "merge.coefficients=search").stdout
    assert "found for" not in said
    merged = load_file(root / "tiny" / "merged" / "unet" / WEIGHTS)
    assert all(torch.equal(merged[name], tensor) for name, tensor in problem.network.state_dict().items())
    said = run("merge.py", config_file, "merge.coefficients=search").stdout
    told = "method=ties, ties_fraction=0.5, ties_combine=mean, used with method=task_arithmetic"
    assert f"best.yaml: found for {told}" in said


@pytest.mark.parametrize("method", METHODS)
def test_what_is_found_is_what_merge_py_merges(method, config_file, root):
    """By its name and by its file, bit for bit; the same command searches nothing again."""
    options = [f"search.method={method}", *METHODS[method], *SMALL]
    folder = root / "tiny" / "search"
    assert "Warning" not in run("search.py", config_file, *options).stderr
    found = best(folder)
    rows = report(folder)
    names = ["pretrained", "ensemble", "uniform 0.5", "best"]
    assert [row["samples"] for row in rows] == names
    assert all(np.isfinite(row["pooled"]) and row["images"] == 10 for row in rows)
    assert found["value"] <= found["value of the pretrained network"]
    for file in (root / "tiny" / "plots").glob("search-*.png"):
        with Image.open(file) as picture:
            assert picture.format == "PNG"
            picture.load()
    pictures = {file.stem for file in (root / "tiny" / "plots").glob("*.png")}
    assert pictures >= {"search-cost", "search-coefficients", "search-fresh"}
    assert ({"search-pairs", "search-importance"} <= pictures) == (folder / "study.db").exists()

    before = {file: file.read_bytes() for file in folder.glob("*.npz")}
    again = run("search.py", config_file, *options)
    assert "candidate" not in again.stdout
    assert best(folder) == found
    assert report(folder) == rows
    taken = [float(line) for line in (folder / "seconds.txt").read_text().split()]
    assert len(taken) == 2
    assert taken[0] > taken[1]
    assert seconds_in(folder / "seconds.txt") == sum(taken)
    assert {file: file.read_bytes() for file in folder.glob("*.npz")} == before
    if method == "multi_fidelity":  # a second judge is not even looked for
        candidates = trials(folder)
        run("search.py", config_file, *options, "evaluate.features=[classifier, torchvision:resnet18=not-there]")
        assert (best(folder), report(folder), trials(folder)) == (found, rows, candidates)

    run("merge.py", config_file, "merge.coefficients=search")
    merged = load_file(root / "tiny" / "merged" / "unet" / WEIGHTS)
    config = load_config(config_file, options)
    problem = Problem(config, Accelerator(cpu=True), find_pretrained(config.paths), open_source(config.data), {})
    problem.candidates.form(problem.network, list(found["coefficients"].values()))
    expected = problem.network.state_dict()
    assert merged.keys() == expected.keys()
    assert [name for name in merged if not torch.equal(merged[name], expected[name])] == []
    moved = root / "moved.yaml"
    shutil.copy(folder / "best.yaml", moved)
    assert "is complete" in run("merge.py", config_file, f"merge.coefficients={moved}").stdout


def test_the_objective_is_the_distance_that_evaluate_py_measures(config_file, root):
    """Of the same seeds and as many steps, drawn by sample_ddp.py into PNGs from the network that merge.py writes."""
    options = ["search.method=optuna", "search.objective=fd", "search.sampler=random", "search.trials=2", *SMALL[:5]]
    options += ["search.finalists=1", "search.report_images=0", "search.num_inference_steps=null"]
    options += ["sample.batch_size=3"]
    options += ["search.finalist_images=8", "search.control_images=8"]  # all of the control: nothing is corrected
    run("search.py", config_file, *options)
    run("merge.py", config_file, "merge.coefficients=search")
    drawn = ["sample.num_images=8", "sample.seed_offset=10000000", "search.seed_offset=0"]
    run("sample_ddp.py", config_file, *drawn)
    run("evaluate.py", config_file)
    [row] = json.loads((root / "tiny" / "results.json").read_text())["rows"]
    assert best(root / "tiny" / "search")["value"] == pytest.approx(row["pooled"], rel=1e-6)


def test_the_report_follows_what_it_is_drawn_with(config_file, root):
    """Other steps or blocks: scored again. Another control, or a distilled network: these rows alone. No new search."""
    options = ["search.method=closed_form", "search.images=32", "search.report_images=12"]
    continued = root / "tiny" / "finetuned" / "continued" / "unet"
    reports = []

    def search(*more: str) -> None:
        run("search.py", config_file, *options, *more)
        reports.append(report(root / "tiny" / "search"))

    search()
    solved = (root / "tiny" / "search" / "best.yaml").read_bytes()
    search("sample.num_inference_steps=5")
    assert all(one["pooled"] != other["pooled"] for one, other in zip(*reports, strict=True))
    for seed in (1, 2):
        disturbed(with_projections(tiny_unet()), 10 + seed).save_pretrained(continued)
        search("evaluate.blocks=2")
        assert [row["samples"] for row in reports[-1]][:3] == ["pretrained", "continued", "ensemble"]
        assert [len(row["blocks"]) for row in reports[-1]] == [2] * 5
    assert reports[-1][1]["pooled"] != reports[-2][1]["pooled"]
    assert reports[-1][2] == reports[-2][2]
    disturbed(with_projections(tiny_unet()), 20).save_pretrained(continued.parents[1] / "distilled" / "unet")
    search("evaluate.blocks=2")
    assert [row["samples"] for row in reports[-1]][2] == "distilled"
    assert [row for row in reports[-1] if row["samples"] != "distilled"] == reports[-2]
    assert (root / "tiny" / "search" / "best.yaml").read_bytes() == solved


def test_scales_of_the_predicted_noise_are_searched_and_sampled_with(config_file, root):
    """On the pretrained network, without experts; other scripts take the file of their kind alone."""
    shutil.rmtree(root / "tiny" / "finetuned")
    over = ["search.over=prediction_scale", "search.trials=11", "search.num_images=8"]
    small = [option for option in SMALL if not option.startswith(("search.trials", "search.num_images"))]
    refused = run("search.py", config_file, *small, *over, "sample.prediction_scale=1.1", status=2)
    assert "sample.prediction_scale=1.1: can't be used with search.over=prediction_scale" in refused.stderr
    found = run("search.py", config_file, *small, *over, "sample.prediction_scale=search")
    assert "finalist 1 of" in found.stdout
    folder = root / "tiny" / "search"
    answer, rows = best(folder), report(folder)
    assert (answer["over"], answer["timesteps"]) == ("prediction_scale", [[0, 500], [500, 1000]])
    assert [row["samples"] for row in rows] == ["pretrained", "best"]
    [lines] = [rows for name, rows in trials(folder).items() if "finalists" not in name]
    firsts = [[round(float(value), 6) for value in values.values()] for values, _ in lines[:9]]
    assert firsts == [[round(value, 6)] * 2 for value in (0.0, *np.linspace(-0.05, 0.05, 8))]
    given = ["sample.model=pretrained", "sample.num_images=10", "sample.num_inference_steps=3"]
    given += ["sample.seed_offset=10000012"]
    run("sample_ddp.py", config_file, *given, "sample.prediction_scale=search", "sample.output=best")
    run("sample_ddp.py", config_file, *given, "sample.output=plain")
    [values] = answer["coefficients"].values()
    scales = [[*edges, 1 + value] for edges, value in zip(answer["timesteps"], values, strict=True)]
    record = yaml.safe_load((root / "best" / "samples.yaml").read_text())
    assert record["identity"]["prediction_scale"] == scales
    assert "prediction_scale" not in yaml.safe_load((root / "plain" / "samples.yaml").read_text())["identity"]
    samples = ["evaluate.samples=[plain, best]", "evaluate.blocks=5"]
    run("evaluate.py", config_file, *samples)
    scored = json.loads((root / "tiny" / "results.json").read_text())["rows"]
    assert [row["pooled"] for row in scored] == pytest.approx([row["pooled"] for row in rows], rel=1e-3)
    refused = run("sample_ddp.py", config_file, *given, "sample.output=best", status=2)
    assert "holds samples of other settings: prediction_scale" in refused.stderr
    with pytest.raises(UserError, match=r"best\.yaml: found with search\.over=prediction_scale, not coefficients"):
        merge.find_searched(load_config(config_file, ["merge.coefficients=search"]))
    shutil.copy(folder / "best.yaml", root / "scales.yaml")
    options = ["sample.prediction_scale=scales.yaml", "timesteps.edges=[0, 400, 1000]", "sample.output=other"]
    refused = run("sample_ddp.py", config_file, *given, *options, status=2).stderr
    assert "scales.yaml: its scales are not positive numbers of the configured timestep ranges" in refused
    (root / "coefficients.yaml").write_text("coefficients: {'*': [0.1, 0.2]}\n")
    options = ["sample.prediction_scale=coefficients.yaml", "sample.output=other"]
    refused = run("sample_ddp.py", config_file, *given, *options, status=2).stderr
    assert "coefficients.yaml: found with search.over=coefficients, not prediction_scale" in refused
    assert not (root / "other").exists()


SCHEDULES = "search.schedules=[{steps: 2}, {steps: 4}, {steps: 2, scheduler: dpmsolver++}]"


def test_a_candidate_of_several_schedules_has_the_mean_of_its_relative_distances(config_file, root):
    """Each relative to the pretrained network's with the same schedule and the same control."""
    coefficients, ratios = np.array([[0.5, 1.0]]), []
    for steps, scheduler in ((2, "ddim"), (4, "ddim"), (2, "dpmsolver++")):
        own = [f"search.num_inference_steps={steps}", f"sample.scheduler={scheduler}"]
        alone = problem_of(config_file, *own)
        values = [alone.value("fd", one, 8) for one in (coefficients, np.zeros((1, 2)))]
        assert [passes for _, passes in values] == [8 * steps, 0]
        ratios.append(values[0][0] / values[1][0])
    controls = {file: stamp(file) for file in (root / "control-features").glob("*.npz")}
    assert len(controls) == 3
    together = problem_of(config_file, SCHEDULES)
    assert together.value("fd", np.zeros((1, 2)), 8) == (1, 0)
    assert together.value("fd", coefficients, 8) == (pytest.approx(np.mean(ratios), rel=1e-9), 8 * 8)
    assert len(set(ratios)) == 3
    assert {file: stamp(file) for file in (root / "control-features").glob("*.npz")} == controls


def test_a_control_is_drawn_once_for_the_searches_of_all_runs(config_file, root, pretrained, monkeypatch, capsys):
    """One at a time, and again if the file is damaged; anything that it depends on is another control."""
    drawn, draw = [], Problem._of_pretrained

    def drawing(*given) -> dict[str, np.ndarray]:
        drawn.append(1)
        time.sleep(0.5)  # the other thread comes to it
        return draw(*given)

    monkeypatch.setattr(Problem, "_of_pretrained", drawing)

    def control_of(*options: str) -> np.ndarray:
        [distance] = problem_of(config_file, "search.num_inference_steps=2", *options).distances
        return distance.control

    of_another_run = ["name=other", f"merge.finetuned={root / 'tiny' / 'finetuned'}", "search.seed_offset=10000000"]
    _ = problem_of(config_file).plain_distance  # trains the classifier, by torch's generator, which threads share
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(lambda options: control_of(*options), [[], ["search.trials=9"]])
    assert len(drawn) == 1
    assert np.array_equal(first, second)
    assert np.array_equal(first, control_of(*of_another_run))
    assert len(drawn) == 1
    [file] = (root / "control-features").glob("*.npz")
    file.write_bytes(file.read_bytes()[:-100])
    assert np.array_equal(first, control_of())
    assert f"{file}: unreadable, made anew" in capsys.readouterr().out

    other = root / "base"
    shutil.copytree(pretrained, other)
    disturbed(tiny_unet(), 5).save_pretrained(other / "unet")
    scheduler = root / "schedule"
    shutil.copytree(pretrained, scheduler)
    written = scheduler / "scheduler" / "scheduler_config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"beta_end": 0.01}))
    others = [f"model.pretrained={other}", f"model.pretrained={scheduler}", "search.seed_offset=20000000"]
    others += ["search.control_images=13", "sample.batch_size=5", "sample.eta=0.5", "sample.prediction_scale=1.1"]
    others += ["evaluate.classifier_width=8", "search.over=prediction_scale"]  # the last one without projections
    found = [control_of(option) for option in others]
    assert len(drawn) == 2 + len(others)
    assert len({control.tobytes() for control in (first, *found)}) == 1 + len(others) - 2  # rounding may be the same


def test_several_schedules_are_searched_and_reported_with_others(config_file, root):
    """The same command does nothing again; other schedules are another search, and others in the report are not."""
    options = [option for option in SMALL if "steps" not in option] + [SCHEDULES]
    told = run("search.py", config_file, *options).stdout
    folder, names = root / "tiny" / "search", ["pretrained", "ensemble", "uniform 0.5", "best"]
    found, rows = best(folder), report(folder)
    assert found["value of the pretrained network"] == 1
    assert found["value"] <= 1
    assert found["schedules"] == ["ddim-2", "ddim-4", "dpmsolver++-2"]
    with np.load(folder / "closed-form-match.npz") as cheap:
        spent = int(cheap["spent"])
    candidates, finalists = (sum(any(w.values()) for w, _ in tried) for tried in trials(folder).values())
    assert found["passes"] == spent + (2 + 4 + 2) * (12 + 8 * candidates + 10 * finalists)
    others = ["ddim-2", "ddim-4", "dpmsolver++-2", "ddim-1", "ddim-8", "dpmsolver++-4"]
    assert [row["samples"] for row in rows] == [*names, *(f"{n}@{o}" for o in others for n in ("pretrained", "best"))]
    assert [row["samples"] for row in rows if row["differences"]] == [
        row["samples"] for row in rows if not row["samples"].startswith("pretrained")
    ]
    for schedule in found["schedules"]:
        assert f"by {schedule}, searched: " in told
    for schedule in (*others[3:], "ddim-3"):
        assert f"by {schedule}, not searched: " in told
    words = json.loads((folder / "report.json").read_text())["in words"]
    assert "of 4 schedules that were not searched" in words[-1]
    assert "\n".join(words) in told

    again = run("search.py", config_file, *options, "search.report_schedules=[{steps: 5}]")
    assert "candidate" not in again.stdout
    assert best(folder) == found
    assert report(folder)[:-2] == rows[:10]
    assert [row["samples"] for row in report(folder)[-2:]] == ["pretrained@ddim-5", "best@ddim-5"]
    changed = run("search.py", config_file, *options, "search.schedules=[{steps: 2}]", status=2).stderr
    assert "holds a search of other settings: " in changed
    assert "search.schedules" in changed


def test_what_the_report_of_a_flow_leaves_out_is_told(config_file, root, capsys):
    """By default another kind of sampler is scored, which may be one that a flow does not have."""
    problem = problem_of(config_file, "search.schedules=[{steps: 2}]", "sample.scheduler=euler")
    problem.process = process_of(FlowMatchEulerDiscreteScheduler())
    assert [one.schedule for one in problem.reported] == ["euler-2", "euler-1", "euler-4"]
    line = "search.report_schedules=null: not ddim-2, which the noise schedule does not allow\n"
    assert capsys.readouterr().out == line


@pytest.mark.long
@pytest.mark.parametrize("schedules", ["search.schedules=[]", SCHEDULES])
def test_two_processes_find_what_one_finds(schedules, config_file, root):
    """Up to float error."""
    steps = ["search.num_inference_steps=null"] * (schedules == SCHEDULES)
    options = ["search.method=multi_fidelity", *SMALL, "search.trials=3", schedules, *steps]
    run("search.py", config_file, *options)
    run("search.py", config_file, *options, "search.output=both", processes=2)
    one, both = best(root / "tiny" / "search"), best(root / "both")
    assert both["value"] == pytest.approx(one["value"], rel=1e-3)
    for pattern, row in one["coefficients"].items():
        assert both["coefficients"][pattern] == pytest.approx(row, abs=1e-3)
    together, alone = trials(root / "both"), trials(root / "tiny" / "search")
    assert {name: len(rows) for name, rows in together.items()} == {name: len(rows) for name, rows in alone.items()}
    for alone, together in zip(report(root / "tiny" / "search"), report(root / "both"), strict=True):
        assert together["pooled"] == pytest.approx(alone["pooled"], rel=1e-2)


def test_two_jobs_at_once_share_the_candidates(config_file, root):
    """No candidate is tried twice, and together they are those of a single job."""
    options = ["search.method=optuna", "search.objective=match", "search.sampler=random", *SMALL, "search.trials=8"]
    options += ["search.report_images=0"]
    jobs = [Run("search.py", ["--config", str(config_file), *options], root) for _ in range(2)]
    for job in jobs:
        assert job.wait() == 0, job.stderr
    run("search.py", config_file, *options, "search.output=alone")
    [shared], [alone] = trials(root / "tiny" / "search").values(), trials(root / "alone").values()
    assert len(shared) == 8
    assert sorted(shared, key=str) == sorted(alone, key=str)
    assert (root / "alone" / "best.yaml").read_bytes() == (root / "tiny" / "search" / "best.yaml").read_bytes()


@pytest.mark.long
def test_ten_kills_lose_at_most_a_candidate_each(config_file, root):
    """While it starts, and after a random part of what it has to do: the same in the end as without them."""
    options = ["search.method=multi_fidelity", *SMALL, "search.trials=9", "search.report_images=0"]
    arguments = ["--config", str(config_file), *options]
    run("search.py", config_file, *options, "search.output=whole")
    rng = random.Random(0)
    kills = 0
    for number in range(10):
        job = Run("search.py", arguments, root)
        until = rng.uniform(0, 1)
        while number % 2 and job.wait(0.02) is None and "candidate" not in job.stdout:
            pass  # it goes on with the search
        if job.wait(until if number % 2 == 0 else until / 3) is None:
            job.send(signal.SIGKILL)
            assert job.wait() == -signal.SIGKILL
            kills += 1
    run("search.py", config_file, *options)
    assert kills >= 5
    folder = root / "tiny" / "search"
    assert given_up(folder) <= kills
    assert trials(folder) == trials(root / "whole")
    assert (folder / "best.yaml").read_bytes() == (root / "whole" / "best.yaml").read_bytes()
    assert not list(folder.glob(".*"))


def test_a_signal_ends_it_in_one_line_and_the_same_command_goes_on(config_file, root):
    options = ["search.method=optuna", "search.objective=match", "search.sampler=random", *SMALL, "search.trials=9"]
    job = Run("search.py", ["--config", str(config_file), *options], root)
    while "candidate 3" not in job.stdout:
        assert job.wait(0.02) is None
    job.send(signal.SIGTERM)
    assert job.wait() == 143
    assert job.stderr.splitlines()[-1] == "search.py: stopped by SIGTERM"
    assert "Traceback" not in job.stderr
    again = run("search.py", config_file, *options)
    assert "candidate 1 of" not in again.stdout
    assert "candidate 9 of 9" in again.stdout


def test_a_full_disk_stops_it_in_one_line(config_file, root):
    """While the storage's tables are made, and while candidates are tried."""
    options = ["search.method=optuna", "search.objective=match", *SMALL, "search.report_images=0"]
    arguments = ["--config", str(config_file), *options]
    folder = root / "tiny" / "search"
    job = Run("search.py", arguments, root, file_size_limit=60_000)
    assert job.wait() == 2
    assert "search.py: error: search.storage=" in job.stderr.splitlines()[-1]
    run("search.py", config_file, *options)
    full = (folder / "study.db").stat().st_size
    job = Run("search.py", [*arguments, "search.trials=99"], root, file_size_limit=full)
    assert job.wait() == 1
    assert job.stderr.splitlines()[-1].startswith("search.py: search.storage: ")
    assert sum(map(len, trials(folder).values())) < 99


@pytest.mark.parametrize("method", ["closed_form", "multi_fidelity"])
def test_text_to_image(method, text_config, text_to_image, tmp_path):  # noqa: F811
    """Noise and latents instead of pixels, with captions and prompts; merge.py takes what is found."""
    for index, name in enumerate(["0000-0500", "0500-1000"]):
        unet = with_projections(UNet2DConditionModel.from_pretrained(text_to_image / "unet"))
        disturbed(unet, index + 1).save_pretrained(tmp_path / "tiny" / "finetuned" / name / "unet")
    run("search.py", text_config, f"search.method={method}", *SMALL)
    assert len(report(tmp_path / "tiny" / "search")) == 4
    found = best(tmp_path / "tiny" / "search")
    assert found["value"] <= found["value of the pretrained network"]
    if method == "closed_form":
        assert found["value"] < 0.9
    else:  # candidates differ in their images, which need prompts
        refused = run("search.py", text_config, "sample.prompts=null", *SMALL, status=2)
        assert "sample.prompts=null: images are drawn for the search: needs some" in refused.stderr
        assert len({value for rows in trials(tmp_path / "tiny" / "search").values() for _, value in rows}) >= 4
    run("merge.py", text_config, "merge.coefficients=search")


def test_the_coefficients_of_loras_are_found(text_config, text_to_image, tmp_path):  # noqa: F811
    """By images; merge.py writes the LoRA of what was found."""
    layers, files = layers_of(text_to_image), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        names = [layer for layer in layers if layer.endswith((".to_q", ".to_v", ".to_k"))]
        lora = {name: Factors(torch.randn(2, layers[name][1]), 0.1 * torch.randn(layers[name][0], 2)) for name in names}
        files.append(tmp_path / f"{seed}.safetensors")
        write_lora(files[-1], lora, {})
    experts = f"merge.experts=[{files[0]},{files[1]}]"
    run("search.py", text_config, experts, "search.method=multi_fidelity", *SMALL)
    found = best(tmp_path / "tiny" / "search")
    assert found["finetuned"] == list(map(sha256, files))
    assert len({value for rows in trials(tmp_path / "tiny" / "search").values() for _, value in rows}) >= 3
    run("merge.py", text_config, experts, "merge.coefficients=search")
    record = yaml.safe_load((tmp_path / "tiny" / "merged" / "merge.yaml").read_text())
    assert record["coefficients"] == found["coefficients"]
    refused = run("search.py", text_config, experts, "search.method=closed_form", *SMALL, status=2).stderr
    assert "search.method=closed_form" in refused


def test_the_search_chooses_the_ema_width(config_file, monkeypatch):
    """A candidate is, bit for bit, the merge at its width, and merge.py takes the width that was found."""
    run("finetune.py", config_file, "finetune.snapshot_every=2", "finetune.ema_profiles=[0.05,0.1]")
    searched = [*SMALL, "search.ema_widths=[0.05,0.1]", "search.trials=6"]
    run("search.py", config_file, *searched)
    folder = config_file.parent / "tiny/search"
    first = next(rows for name, rows in trials(folder).items() if name.startswith("fd"))
    assert {int(parameters["ema_width"]) for parameters, _ in first} >= {0, 1, 2}

    monkeypatch.chdir(config_file.parent)
    config = load_config(config_file, searched)
    problem = Problem(config, Accelerator(cpu=True), find_pretrained(config.paths), open_source(config.data), {})
    found, merging = best(folder), ["merge.coefficients=search"]
    of_a_width = [problem.network_of(np.array([[1.0, 0.5, place]])).tolist() for place in (1.2, 1.9, 2.0, 3.0)]
    assert of_a_width == [[[1, 0.5, 1]], [[1, 0.5, 1]], [[1, 0.5, 2]], [[1, 0.5, 2]]]
    for place, width in enumerate([None, 0.05, 0.1]):
        networks = config.paths.finetuned if width is None else config.paths.averaged(width)
        answer = found | {"coefficients": {"*": [0.5, 0.25]}, "finetuned": list(map(weights_hash, networks))}
        answer = answer | {"ema_width": width}
        (folder / "best.yaml").write_text(yaml.safe_dump(answer))
        merge.main(load_config(config_file, [*merging, f"merge.output=merged-{place}"]))
        problem.merged(np.array([[0.5, 0.25, place + 0.7]]))
        expected = load_file(f"merged-{place}/unet/{WEIGHTS}")
        same = [torch.equal(tensor, expected[name]) for name, tensor in problem.network.state_dict().items()]
        assert all(same), width
        written = yaml.safe_load(Path(f"merged-{place}/merge.yaml").read_text())["finetuned"]
        assert [entry.get("ema_width") for entry in written] == [width, width]
    with pytest.raises(UserError, match=r"^merge\.ema_width=0\.05: .*/best\.yaml was found with its own$"):
        merge.main(load_config(config_file, [*merging, "merge.ema_width=0.05"]))
