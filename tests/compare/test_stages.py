import os
from pathlib import Path

import pytest
import yaml

from deme.compare.comparison import Stages, load_comparison
from deme.compare.jobs import Ledger, state_outside
from deme.config.paths import image_path
from deme.config.reading import load_config, override
from deme.errors import UserError

MODELS = {"models": {"models": ["pretrained", "continued", "ensemble", "merged", "distilled", "neon"]}}


def stages(folder, *overrides, runs=MODELS, **options) -> dict:
    """Stage and own override → job."""
    file = folder / "comparison.yaml"
    file.write_text(yaml.safe_dump({"base": "configs/digits.yaml", "runs": runs}))
    comparison, runs = load_comparison(file, ["merge.coefficients=null", *overrides])
    jobs = Stages(comparison, runs, **options).jobs
    return {job.name.removeprefix("digits").strip(): job for job in jobs}


def names(jobs) -> set[str]:
    return {f"{job.stage} {job.own}".strip() for job in jobs}


def test_a_model_waits_for_what_it_is_made_from_alone(tmp_path):
    jobs = stages(tmp_path)
    experts = {f"train finetune.range={number}" for number in range(4)}
    assert names(jobs["sample-pretrained"].after) == set()
    assert names(jobs["sample-continued"].after) == {"train finetune.range=continued"}
    assert names(jobs["sample-ensemble"].after) == names(jobs["merge"].after) == experts
    assert names(jobs["sample-merged"].after) == names(jobs["distill finetune.range=distilled"].after) == {"merge"}
    assert names(jobs["sample-neon"].after) == {"merge-neon"}
    assert names(jobs["merge-neon"].after) == {"train finetune.range=self"}
    assert names(jobs["evaluate"].after) == {"statistics"}
    assert names(jobs["evaluate"].after_all) == {name for name in jobs if name.startswith("sample-")}


def test_a_merge_waits_for_the_networks_that_it_adds(tmp_path):
    """Self-trained ones, made of own samples, beside the ranges' or alone."""
    own = "train finetune.range=self"
    jobs = stages(tmp_path, "merge.experts=[self]", "self_training.ranges=true")
    assert names(jobs["merge"].after) == {own}
    assert [path.parent.name for path in jobs[own].parts][-1] == "self-0750-1000"
    assert names(jobs["sample-ensemble"].after) == {f"train finetune.range={number}" for number in range(4)}
    assert "merge.experts=[self]" in jobs["merge-neon"].arguments
    assert "merge.coefficients=null" in jobs["merge-neon"].arguments
    ties = stages(tmp_path, "merge.method=ties", "merge.settings.fraction=0.1")["merge-neon"].arguments
    merge = load_config("configs/digits.yaml", ties[2:]).merge
    assert (merge.method, merge.settings) == ("task_arithmetic", {})
    assert "merge.push_to_hub=null" in jobs["merge-neon"].arguments
    assert jobs["merge-neon"].output == Path("runs/digits/neon/merge.yaml")
    both = stages(tmp_path, "merge.experts=[ranges, self]")
    assert names(both["merge"].after) == {own} | names(both["sample-ensemble"].after)
    steps = stages(tmp_path, "merge.experts=[ranges, self]", "sample.num_inference_steps=7")
    assert steps[own].key != both[own].key
    assert steps["train finetune.range=0"].key == both["train finetune.range=0"].key


def what_gains(*overrides: str) -> list:
    comparison, runs = load_comparison("configs/comparison/what_gains.yaml", ["seeds=[0, 1]", *overrides])
    return Stages(comparison, runs, has_cache=True).jobs


def test_runs_with_equal_trainings_share_them(tmp_path):
    """Each seed trains once; merges and searches read the networks there, and wait for their jobs alone."""
    jobs = {job.name: job for job in what_gains()}
    trained = [name.split(" ", 1) for name in jobs if " train " in name or name.endswith(" random")]
    words = [f"train finetune.range={word}" for word in ("continued", 0, 1, 2, 3, "self", "soup")] + ["random"]
    assert sorted(trained) == sorted([run, word] for run in ("digits", "digits-seed1") for word in words)
    ranges = {f"digits-seed1 train finetune.range={k}" for k in range(4)}
    for run, made in {
        "by_block": ranges,
        "soup": {"digits-seed1 train finetune.range=soup"},
        "trajectory": {"digits-seed1 train finetune.range=continued"},
        "random": {"digits-seed1 random"},
    }.items():
        search = jobs[f"digits-{run}-seed1 search"]
        assert {job.name for job in search.after} == made | {"digits statistics"}
        assert "merge.finetuned=runs/digits-seed1/finetuned" in search.arguments
    assert {job.name for job in jobs["digits-random-uniform-seed1 merge"].after} == {"digits-seed1 random"}
    assert {job.name for job in jobs["digits-seed1 random"].after} == ranges
    snapshots = [path.parent.name for path in jobs["digits train finetune.range=continued"].parts[:-1]]
    assert snapshots == [f"{step:08d}" for step in range(50, 4001, 50)]  # of which the trajectory takes 4
    own = {job.name for job in what_gains("finetune.max_steps=1025")}  # no multiple of 50
    assert own - jobs.keys() == {f"digits-trajectory{seed} train finetune.range=continued" for seed in ("", "-seed1")}
    assert {job.name for job in what_gains("model.pretrained=null")} == {*jobs, "digits pretrain"}
    other = {job.name: job for job in what_gains("merge.settings={fraction: 0.1}", "search.trials=30")}
    changed = {name.split(" ")[1] for name in jobs if jobs[name].key != other[name].key}
    assert changed == {"statistics", "search", "merge", "merge-neon", "evaluate", "card", "report"}


def test_merges_by_statistics_share_their_job():
    comparison = load_comparison("configs/comparison/merge_methods.yaml", ["seeds=[0]"])
    jobs = {job.name: job for job in Stages(*comparison).jobs}
    [measured] = [name for name in jobs if "merge-statistics" in name]
    assert measured == 'digits merge-statistics merge.experts=["ranges"]'
    assert {job.name for job in jobs[measured].after} == {f"digits train finetune.range={k}" for k in range(4)}
    waiting = {job.run for job in jobs.values() if jobs[measured] in job.after}
    assert waiting == {f"digits-{method}{row}" for method in ("fisher", "regmean") for row in ("", "-uniform", "-ones")}
    assert jobs[measured] in jobs["digits-fisher search"].after


def test_jobs_of_an_array_wait_for_the_same_jobs(tmp_path):
    """Also where a later run adds a training to an earlier one's."""
    waits: dict = {}
    for job in what_gains():
        waits.setdefault((job.run, job.stage), set()).add((frozenset(job.after), frozenset(job.after_all)))
    assert {len(found) for found in waits.values()} == {1}


def test_a_run_with_other_trainings_or_own_samples_has_its_own(tmp_path):
    runs = {
        "models": {"models": ["pretrained", "merged", "neon"]},
        "slow": {"models": ["merged"], "overrides": ["finetune.learning_rate=1e-5"]},
        "slower": {"models": ["merged"], "overrides": ["finetune.learning_rate=1e-5", "merge.method=ties"]},
        "few": {"models": ["merged", "distilled"], "overrides": ["sample.scheduler=unipc", "distill.max_steps=3"]},
        "few own": {"models": ["merged"], "overrides": ["sample.scheduler=unipc", "merge.experts=[self, soup]"]},
    }
    jobs = stages(tmp_path, runs=runs)
    before = {name: {job.run for job in jobs[f"{name} merge"].after} for name in ("-slower", "-few", "-few_own")}
    assert before == {"-slower": {"digits-slow"}, "-few": {"digits"}, "-few_own": {"digits-few_own"}}
    assert jobs["-few distill finetune.range=distilled"].run == "digits-few"
    own = stages(tmp_path, "merge.experts=[soup]")["distill finetune.range=distilled"]  # its teachers are the ranges'
    assert names(own.after) == {"merge", *(f"train finetune.range={k}" for k in range(4))}


def test_folders_that_are_merged_count_for_the_jobs_that_read_them(tmp_path):
    folders = [tmp_path / name / "unet" for name in "ab"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    items = [f"{{path: {folder}, timesteps: [{k * 500}, {k * 500 + 500}]}}" for k, folder in enumerate(folders)]
    given = ["timesteps.num_ranges=2", f"merge.experts=[{', '.join(items)}]", "merge.coefficients=search"]
    before = stages(tmp_path, *given)
    assert names(before["search"].after) == {"statistics"}
    assert names(before["sample-ensemble"].after) == set()
    (folders[0] / "config.json").write_text("{ }")
    after = stages(tmp_path, *given)
    changed = {name for name in before if before[name].key != after[name].key}
    assert changed == {"search", "merge", "merge-neon", "card", "sample-ensemble"}


def test_no_job_comes_before_one_that_it_needs(tmp_path):
    options = ["merge.coefficients=search", "model.pretrained=null", "seeds=[0, 1]"]
    jobs = list(stages(tmp_path, *options, blocks=3, has_cache=True).values())
    assert len(jobs) == len({job.name for job in jobs}) > 50
    for place, job in enumerate(jobs):
        assert {jobs.index(before) for before in (*job.after, *job.after_all)} <= set(range(place))


def test_scores_are_those_of_the_models_whose_images_are_all_there(tmp_path):
    jobs = stages(tmp_path, blocks=2)
    drawn = [job for job in jobs["evaluate"].after_all if job.stage in ("sample-pretrained", "sample-merged")]
    arguments = jobs["evaluate"].arguments_after(drawn[:-1])
    assert 'evaluate.samples=["runs/digits/samples/pretrained"]' in arguments
    assert jobs["evaluate"].arguments_after([]) is None


def test_scales_of_the_predicted_noise_are_a_row_of_the_pretrained_network(tmp_path):
    """Which waits for their search alone; without such scales a variation has no such row."""
    scaled = ["search.over=prediction_scale", "sample.prediction_scale=search"]
    runs = {"models": {"models": ["pretrained"]}, "scaled": {"models": ["pretrained"], "overrides": scaled}}
    jobs = stages(tmp_path, runs=runs)
    assert names(jobs["-scaled sample-pretrained"].after) == {"search"}
    assert names(jobs["-scaled search"].after) == {"statistics"}
    with pytest.raises(UserError, match=r"search\.over=coefficients: a search over prediction_scale is needed"):
        stages(tmp_path, runs=runs | {"scaled": {"models": ["pretrained"], "overrides": scaled[1:]}})
    with pytest.raises(UserError, match=r"runs.other.models=pretrained: with sample.prediction_scale alone"):
        stages(tmp_path, runs=runs | {"other": {"models": ["pretrained"], "overrides": ["seed=3"]}})


def test_a_job_draws_a_model_with_all_schedules(tmp_path):
    """The images of every folder are its output, and every folder is scored."""
    given = ["sample.num_images=12", "sample.schedules=[{steps: 10, scheduler: ddim}, {steps: 20, scheduler: unipc}]"]
    jobs = stages(tmp_path, *given, runs={"models": {"models": ["pretrained", "continued"]}}, blocks=2)
    job = jobs["sample-continued sample.block=1"]
    folders = [Path(f"runs/digits/samples/continued@{name}") for name in ("ddim-10", "unipc-20")]
    assert job.parts == [image_path(folder, seed) for folder in folders for seed in range(6, 12)]
    arguments = jobs["evaluate"].arguments_after(jobs["evaluate"].after_all)
    models = ("pretrained", "continued")
    folders = [f"runs/digits/samples/{model}@{name}" for model in models for name in ("ddim-10", "unipc-20")]
    assert override("evaluate.samples", folders) in arguments


def test_a_setting_concerns_the_jobs_that_read_it(tmp_path):
    """What they are made from is followed by the ledger: their keys need not say it."""

    def changed_by(override: str) -> set[str]:
        before, after = stages(tmp_path), stages(tmp_path, override)
        return {name.split()[0] for name in before if before[name].key != after[name].key}

    everything = {name.split()[0] for name in stages(tmp_path)}
    made = {"train", "distill"}
    drawn = {name for name in everything if name.startswith("sample-")}
    assert changed_by("data.resolution=16") == everything
    assert changed_by("finetune.learning_rate=1") == everything - drawn
    assert changed_by("sample.num_images=8") == everything - made
    assert changed_by("evaluate.blocks=2") == changed_by("merge.method=ties") == everything - made - drawn


def test_images_may_be_compared_with_those_of_another_experiment(tmp_path):
    """Whose statistics are made by its own configuration, and used by all others."""
    reference = tmp_path / "other.yaml"
    reference.write_text("name: other\n")
    jobs = stages(tmp_path, f"reference={reference}", "merge.coefficients=search")
    job = jobs["other statistics"]
    assert job.arguments == ["--config", str(reference), "evaluate.samples=[]"]
    assert str(job.output) == "runs/other/stats/inception.npz"
    assert jobs["evaluate"].after == [job]
    for user in ("search", "evaluate"):
        assert f"evaluate.reference={job.output}" in jobs[user].arguments_after(jobs[user].after_all)
    several = stages(tmp_path, f"reference={reference}", "evaluate.features=[inception, classifier]")
    for name, features in (("statistics", "inception"), ("further-statistics", '["classifier"]')):
        assert several[f"other {name}"].arguments[2:] == [f"evaluate.features={features}", "evaluate.samples=[]"]


def test_a_second_judge_concerns_scores_alone(tmp_path):
    """Not the search, which sees the first; a change of its weights is a change, too."""
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"a")
    given = ["merge.coefficients=search"]
    before = stages(tmp_path, *given)
    given.append(f"evaluate.features=[classifier, torchvision:resnet18={file}]")
    after = stages(tmp_path, *given)
    changed = {name.split()[0] for name in before if before[name].key != after[name].key}
    assert changed == {"merge", "merge-neon", "evaluate", "card", "report"}
    assert names(after["search"].after) == names(before["search"].after)
    assert names(after["evaluate"].after) == {"statistics", "further-statistics"}
    assert [path.name for path in after["statistics"].parts] == ["classifier.npz", "classifier.safetensors"]
    assert [path.name.partition("-")[0] for path in after["further-statistics"].parts] == ["torchvision"]
    file.write_bytes(b"bb")
    again = stages(tmp_path, *given)
    assert {name for name in after if after[name].key != again[name].key} == {"further-statistics", "evaluate"}


def test_what_no_job_makes_counts_for_the_jobs_that_read_it(tmp_path):
    """Coefficients and prompts in a file, a flat pipeline, images: changed in place, their times kept, or replaced by
    older ones."""
    files = {name: tmp_path / name for name in ("best.yaml", "prompts.txt", "flat/weights", "data/a/0.png")}
    for file in files.values():
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text("before")
    given = [f"merge.coefficients={files['best.yaml']}", f"sample.prompts={files['prompts.txt']}"]
    given += [f"model.pretrained={tmp_path / 'flat'}", f"data.name={tmp_path / 'data'}", "timesteps.num_ranges=2"]

    def keys() -> dict[str, str]:
        runs = {"models": {"models": ["pretrained", "merged"]}}
        return {name: job.key for name, job in stages(tmp_path, *given, runs=runs).items()}

    def rewrite(file: Path) -> None:
        times = file.stat()
        file.write_text("after!")
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))

    def replace_by_older(file: Path) -> None:
        other = tmp_path / "older"
        other.write_text("after!")
        os.utime(other, (1, 1))
        other.rename(file)

    for change in (rewrite, replace_by_older):
        concerned = {}
        for name, file in files.items():
            before = keys()
            assert before == keys()
            change(file)
            concerned[name] = {job.split()[0] for job, key in keys().items() if key != before[job]}
        assert concerned["best.yaml"] == {"merge", "card"}
        assert concerned["prompts.txt"] == {name for name in concerned["flat/weights"] if name.startswith("sample-")}
        assert concerned["data/a/0.png"] == {"train", "statistics", "evaluate", "report"}
        assert concerned["flat/weights"] == {name.split()[0] for name in before}


@pytest.mark.parametrize("part", ["vae", "text_encoder", "text_encoder_3"])
def test_a_second_name_of_an_encoder_s_weights_is_no_change(tmp_path, part):
    file = tmp_path / "pipeline" / part / "a.safetensors"
    file.parent.mkdir(parents=True)
    file.write_text("before")
    before = state_outside(str(tmp_path / "pipeline"))
    os.link(file, tmp_path / "other")
    assert state_outside(str(tmp_path / "pipeline")) == before
    file.write_text("after!")
    assert state_outside(str(tmp_path / "pipeline")) != before


def test_the_configuration_beside_a_lora_is_part_of_it(tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    before = state_outside(str(tmp_path / "adapter_model.safetensors"))
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2}')
    assert state_outside(str(tmp_path / "adapter_model.safetensors")) != before


def test_what_pretraining_makes_is_no_input_from_elsewhere(tmp_path):
    """Its job's entry says what it made: keys are the same before and after it."""
    runs = MODELS | {"two": {"models": ["merged"], "overrides": ["timesteps.num_ranges=2"]}}
    given = ["model.pretrained=null", f"output_dir={tmp_path}", "seeds=[0, 1]"]
    before = {name: job.key for name, job in stages(tmp_path, *given, runs=runs).items()}
    (tmp_path / "digits" / "pretrained" / "unet").mkdir(parents=True)
    (tmp_path / "digits" / "pretrained" / "unet" / "config.json").touch()
    assert {name: job.key for name, job in stages(tmp_path, *given, runs=runs).items()} == before


def test_names_of_every_kind_reach_the_scripts(tmp_path):
    """Each job's arguments are read as the configuration that it was made for."""
    name = "-\U0001f600 #2: 'a'"
    jobs = stages(tmp_path, override("name", name), override("output_dir", "-o ${a}"), "seeds=[0, 1]", blocks=2)
    for job in jobs.values():
        arguments = job.arguments_after(job.after_all)
        config = load_config(arguments[1], [*arguments[2:], *([job.own] if job.own else [])])
        assert config.output_dir == "-o ${a}"
        assert config.name.removesuffix("-seed1") == name
        for folder in config.evaluate.samples or []:
            assert Path(folder).is_relative_to(Path("-o ${a}") / job.run / "samples")


def test_a_block_s_output_is_its_images(tmp_path):
    jobs = stages(tmp_path, f"output_dir={tmp_path}", "sample.num_images=4", blocks=2)
    folder = tmp_path / "digits" / "samples" / "pretrained"
    made = [jobs[f"sample-pretrained sample.block={block}"].made for block in (0, 1)]
    assert made == [[str(image_path(folder, seed)) for seed in seeds] for seeds in ((0, 1), (2, 3))]


def test_a_transformers_training_is_done_when_its_network_is_there(tmp_path):
    """What the Hub's pipeline is, and so what the folder of a copy is called, shows only then."""
    given = ["model.pretrained=owner/name", f"output_dir={tmp_path}", "seeds=[0]"]
    job = next(job for job in stages(tmp_path, *given, runs=MODELS).values() if job.stage == "train")
    ledger = Ledger(tmp_path / "ledger")
    ledger.note(job, ledger.made_of(job))
    assert not ledger.is_done(job)
    network = job.output.with_name("transformer") / "config.json"
    network.parent.mkdir(parents=True)
    network.write_text("{}")
    assert not ledger.is_done(job)  # it is another state than what was noted
    ledger.note(job, ledger.made_of(job))
    assert ledger.is_done(job)
    network.write_text("{ }")
    assert not ledger.is_done(job)
