from pathlib import Path

import yaml

from deme.config.comparison import compared_runs, load_comparison
from deme.config.paths import image_path
from deme.job.stages import stages_of
from deme.models.variants import ORDER

MODELS = {"models": {"models": ["pretrained", "continued", "ensemble", "merged", "distilled"]}}


def stages(folder, *overrides, runs=MODELS, **options) -> dict:
    """Stage and own override → job."""
    file = folder / "comparison.yaml"
    file.write_text(yaml.safe_dump({"base": "configs/digits.yaml", "runs": runs}))
    comparison, others = load_comparison(file, ["merge.coefficients=null", *overrides], ORDER)
    jobs = stages_of(comparison, list(compared_runs(comparison, others)), **options)
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
    assert names(jobs["evaluate"].after) == {"statistics"}
    assert names(jobs["evaluate"].after_all) == {name for name in jobs if name.startswith("sample-")}


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


def test_what_is_read_from_elsewhere_is_looked_at(tmp_path):
    """Coefficients in a file, the pretrained pipeline's files, prompts."""
    coefficients, prompts = tmp_path / "best.yaml", tmp_path / "prompts.txt"
    for file in (coefficients, prompts):
        file.touch()
    jobs = stages(tmp_path, f"merge.coefficients={coefficients}", f"sample.prompts={prompts}")
    unet = Path("assets/digits/unet/config.json")
    assert unet.is_file()
    assert coefficients in jobs["merge"].inputs
    assert coefficients not in jobs["sample-merged"].inputs
    assert prompts in jobs["sample-merged"].inputs
    assert all(unet in jobs[name].inputs for name in ("train finetune.range=0", "sample-pretrained", "merge"))


def test_images_are_there_when_all_of_a_block_are(tmp_path):
    jobs = stages(tmp_path, f"output_dir={tmp_path}", "sample.num_images=4", blocks=2)
    folder = tmp_path / "digits" / "samples" / "pretrained"
    folder.mkdir(parents=True)
    for seed in (1, 2, 3):
        image_path(folder, seed).touch()
    assert [jobs[f"sample-pretrained sample.block={block}"].is_whole() for block in (0, 1)] == [False, True]
