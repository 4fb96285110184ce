import re
import subprocess
import sys
from dataclasses import fields, is_dataclass

import pytest
import yaml
from conftest import REPOSITORY
from hypothesis import example, given, settings
from hypothesis import strategies as some

import report
from deme.config.experiment import Config
from deme.config.reading import load_config, override, read_override
from deme.config.schedules import other_schedules
from deme.config.section import setting, tags_of
from deme.config.sections import Sample, Search
from deme.config.trainings import Finetune
from deme.errors import UserError

SCRIPTS = ["pretrain.py", "finetune.py", "search.py", "merge.py", "sample_ddp.py", "evaluate.py", "analyze.py"]


@pytest.fixture
def empty(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("name: empty\n")
    return file


def test_defaults_are_the_published_hyperparameters(empty):
    """AdamW (0.95, 0.999), 1e-6, 1e-8, clip 1, lr 5e-5 constant, EMA 0.9999 with power 3/4, p = 0.3, λ = 1."""
    finetune = load_config(empty, []).finetune
    assert (finetune.adam_beta1, finetune.adam_beta2) == (0.95, 0.999)
    assert (finetune.adam_weight_decay, finetune.adam_epsilon) == (1e-6, 1e-8)
    assert (finetune.learning_rate, finetune.lr_scheduler, finetune.lr_warmup_steps) == (5e-5, "constant", 0)
    assert (finetune.ema_decay, finetune.ema_inv_gamma, finetune.ema_power) == (0.9999, 1.0, 0.75)
    assert (finetune.max_grad_norm, finetune.global_probability, finetune.consistency_weight) == (1.0, 0.3, 1.0)


@pytest.mark.parametrize(("given", "steps"), [([], 30), (["search.num_inference_steps=7"], 7)])
def test_a_search_draws_with_the_steps_of_sampling_unless_told_otherwise(empty, given, steps):
    assert load_config(empty, ["sample.num_inference_steps=30", *given]).search_steps == steps


def test_a_schedule_has_what_it_leaves_out_from_its_section_and_from_sample(empty):
    """The item form of all lists of schedules; a list that is empty has one schedule, the section's own."""
    config = load_config(empty, ["sample.schedules=[{steps: 10}, {scheduler: euler}, {steps: 20, scheduler: unipc}]"])
    drawn = config.schedules_of(config.sample)
    assert [one.schedule for one in drawn] == ["ddim-10", "euler-50", "unipc-20"]
    assert [(one.scheduler, one.num_inference_steps) for one in drawn] == [("ddim", 10), ("euler", 50), ("unipc", 20)]
    assert [one.schedule for one in Config().schedules_of(Config().sample)] == ["ddim-50"]
    assert config.drawn_by(Search(num_inference_steps=7), {}).schedule == "ddim-7"
    assert Sample(scheduler="DDIMScheduler").schedule == "ddim-50"


def test_the_best_of_a_search_is_scored_with_other_schedules(empty):
    """Half of the fewest steps, twice the most and another sampler, none that was searched; or those that are named."""

    def others(*options: str) -> list[str]:
        return [one.schedule for one in other_schedules(load_config(empty, list(options)))]

    both = "search.schedules=[{steps: 20}, {steps: 50}, {steps: 20, scheduler: dpmsolver++}]"
    assert others() == []
    assert others(both) == ["ddim-10", "ddim-100", "dpmsolver++-50"]
    assert others(both, "sample.eta=0.5", both.replace(", scheduler: dpmsolver++", "0")) == ["ddim-10", "ddim-400"]
    assert others("search.schedules=[{steps: 800}]", "sample.scheduler=euler") == [
        "euler-400",
        "euler-1000",
        "ddim-800",
    ]
    assert others("search.report_schedules=[{steps: 7}, {steps: 50}]") == ["ddim-7"]


@pytest.mark.parametrize("benchmark", ["cifar10", "lsun_church", "lsun_bedroom"])
def test_published_benchmarks_train_as_long_as_the_paper(benchmark):
    """20,000 optimizer steps for each of four ranges, on all of the data."""
    config = load_config(REPOSITORY / "configs" / f"{benchmark}.yaml", [])
    assert config.finetune.max_steps == 20_000
    assert len(config.timesteps.ranges) == 4
    assert config.data.split == "train"
    assert config.sample.num_images == 50_000


def test_overrides_win_over_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("finetune: {max_steps: 5, learning_rate: 1.0e-3}\ntimesteps: {edges: [0, 100, 1000]}\n")
    config = load_config(file, ["finetune.max_steps=7", "merge.coefficients=[0, 1]"])
    assert (config.finetune.max_steps, config.finetune.learning_rate) == (7, 1e-3)
    assert config.timesteps.ranges == [(0, 100), (100, 1000)]
    assert config.merge.coefficients == [0, 1]


def test_precision_no_may_be_written_without_quotes(tmp_path):
    """YAML reads `no` as false."""
    file = tmp_path / "a.yaml"
    file.write_text("finetune: {mixed_precision: no}\nsample: {mixed_precision: bf16}\n")
    config = load_config(file, ["sample.mixed_precision=no"])
    assert (config.finetune.mixed_precision, config.sample.mixed_precision) == ("no", "no")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("finetune.lerning_rate=0.1", "finetune.lerning_rate=0.1: Key 'lerning_rate' not in 'Finetune'"),
        ("fintune.range=1", "fintune={'range': 1}: Key 'fintune' not in 'Config'. Did you mean: 'finetune'?"),
        ("finetune.max_steps=many", "finetune.max_steps=many: Value 'many' of type 'str' could not be converted"),
        ("finetune.max_steps=0", "finetune.max_steps=0: must be above 0 and at most 1,000,000,000"),
        ("finetune.global_probability=1.5", "finetune.global_probability=1.5: must be at least 0 and at most 1"),
        ("finetune.global_probability=.nan", "finetune.global_probability=nan: must be at least 0 and at most 1"),
        ("finetune.learning_rate=.inf", "finetune.learning_rate=inf: must be above 0 and finite"),
        ("finetune.range=4", "finetune.range=4: must be one of null, 0 … 3, continued, snr_plus_one"),
        ("finetune.range=first", "finetune.range=first: must be one of null, 0 … 3, continued, snr_plus_one"),
        ("finetune.micro_batch_size=7", "finetune.batch_size=64: must be a multiple of finetune.micro_batch_size=7"),
        ("finetune.mixed_precision=fp8", "finetune.mixed_precision=fp8: must be one of no, fp16, bf16"),
        ("finetune.lr_scheduler=cosin", "finetune.lr_scheduler=cosin: must be one of constant,"),
        ("timesteps.edges=[0,500,250,1000]", "timesteps.edges=[0, 500, 250, 1000]: must rise from 0 to T = 1000"),
        ("timesteps.edges=[0,250,500]", "timesteps.edges=[0, 250, 500]: must rise from 0 to T = 1000"),
        ("timesteps.edges=[10,1000]", "timesteps.edges=[10, 1000]: must rise from 0 to T = 1000"),
        ("timesteps.edges=[]", "timesteps.edges=[]: must rise from 0 to T = 1000"),
        ("timesteps.num_ranges=0", "timesteps.num_ranges=0: must be above 0 and"),
        ("merge.coefficients=[1,1]", "merge.coefficients=[1, 1]: 2 coefficients for 4 networks"),
        ("merge.coefficients=[.nan,0,0,0]", "merge.coefficients=[nan, 0, 0, 0]: must be a list of finite numbers"),
        ("merge.coefficients=0.5", "merge.coefficients=0.5: must be a list of finite numbers, a mapping"),
        ("merge.coefficients={}", "merge.coefficients={}: must be a list of finite numbers, a mapping"),
        ("merge.coefficients={'*': 1}", "merge.coefficients={'*': 1}: must be a list of finite numbers, a mapping"),
        ("merge.coefficients={'*': [1, 1]}", "merge.coefficients={'*': [1, 1]}: 2 coefficients for 4 networks"),
        ("evaluate.features=[classifier, clip]", "evaluate.features=['classifier', 'clip']: clip must be one of incep"),
        ("evaluate.features=[classifier, classifier]", "evaluate.features=['classifier', 'classifier']: must be a lis"),
        ("evaluate.features=[]", "evaluate.features=[]: must be a list of different judges"),
        ("evaluate.features=torchvision:resnet18", "evaluate.features=torchvision:resnet18: must be one of inception"),
        ("evaluate.features=null", "evaluate.features=null: must be one of inception, classifier, torchvision:NETW"),
        ("merge.method=average", "merge.method=average: must be one of breadcrumbs, dare_linear, dare_ties, della,"),
        ("finetune.lr_warmup_steps=5", "finetune.lr_warmup_steps=5: finetune.lr_scheduler=constant has no warm-up"),
        ("sample.num_inference_steps=2000", "sample.num_inference_steps=2000: must be at most timesteps.num_train"),
        ("search.num_inference_steps=1001", "search.num_inference_steps=1001: must be at most timesteps.num_train"),
        ("self_training.num_inference_steps=1001", "self_training.num_inference_steps=1001: must be at most timesteps"),
        ("search={start: [a.yaml], sampler: random}", "search.start=['a.yaml']: is read by search.sampler=tpe or gp"),
        ("search={start: [a.yaml], method: gradient}", "search.start=['a.yaml']: is read by search.sampler=tpe or gp"),
        ("sample.schedules=[{steps: 0}]", "sample.schedules[0]={'steps': 0}: steps must be 1 … timesteps.num_train"),
        ("sample.schedules=[{}, {steps: 1001}]", "sample.schedules[1]={'steps': 1001}: steps must be 1 … timesteps."),
        ("sample.schedules=[{steps: true}]", "sample.schedules[0]={'steps': True}: steps must be 1 … timesteps."),
        ("sample.schedules=[{steps: many}]", "sample.schedules[0]={'steps': 'many'}: steps must be 1 … timesteps."),
        ("sample.schedules=[{scheduler: 3}]", "sample.schedules[0]={'scheduler': 3}: scheduler must be a name, as "),
        ("sample.schedules=[{scheduler: a/b}]", "sample.schedules[0]={'scheduler': 'a/b'}: scheduler must be a name"),
        ("sample.schedules=[{step: 5}]", "sample.schedules[0]={'step': 5}: step must be one of steps, scheduler; did"),
        (
            "sample.schedules=[{}, {scheduler: DDIMScheduler}]",
            "{'scheduler': 'DDIMScheduler'}: ddim-50 is listed before",
        ),
        ("sample.schedules=[{}, {steps: 50}]", "sample.schedules[1]={'steps': 50}: ddim-50 is listed before"),
        ("sample.schedules=[20]", "sample.schedules[0]=20: must be a mapping of steps and scheduler"),
        ("sample.schedules={steps: 20}", "sample.schedules={'steps': 20}:"),
        ("sample={eta: 1, schedules: [{scheduler: euler}]}", "{'scheduler': 'euler'}: sample.eta=1.0: only sample.sch"),
        (
            "search={schedules: [{steps: 2}], num_inference_steps: 3}",
            "search.num_inference_steps=3: must be null, as sea",
        ),
        ("search={schedules: [{steps: 2}], method: gradient}", "are read by search.method=multi_fidelity, or optuna"),
        ("search={schedules: [{steps: 2}], method: optuna}", "are read by search.method=multi_fidelity, or optuna"),
        ("search.schedules=[{steps: 2}, {steps: 2}]", "search.schedules[1]={'steps': 2}: ddim-2 is listed before"),
        ("search.schedules=[{steps: 1001}]", "search.schedules[0]={'steps': 1001}: steps must be 1 … timesteps.num_"),
        ("search.report_schedules=[{step: 2}]", "search.report_schedules[0]={'step': 2}: step must be one of steps"),
        ("search={spread: 4, sampler: random}", "search.spread=4: is read by search.sampler=tpe or gp alone"),
        ("search={grow_bounds: true, sampler: grid}", "search.grow_bounds=true: is read by search.sampler=tpe or gp"),
        (
            "sample.prediction_scale=0",
            "sample.prediction_scale=0: must be a positive number, one for each of 4 timestep",
        ),
        ("sample.prediction_scale=true", "sample.prediction_scale=true: must be a positive number, one for each of 4"),
        (
            "sample.prediction_scale=[1, 1]",
            "sample.prediction_scale=[1, 1]: must be a positive number, one for each of",
        ),
        (
            "search={over: prediction_scale, bounds: [-1, 1]}",
            "search.over=prediction_scale: search.bounds must be above",
        ),
        (
            "search={over: prediction_scale, groups: block}",
            "search.over=prediction_scale: needs search.groups=range and",
        ),
        ("search.over=scales", "search.over=scales: must be one of coefficients, prediction_scale"),
        ("sample.eta=-1", "sample.eta=-1.0: must be at least 0 and at most 1"),
        ("finetune.snapshot_every=0", "finetune.snapshot_every=0: must be above 0 and at most 1,000,000,000"),
        ("finetune.ema_profiles=[0.05]", "finetune.ema_profiles=[0.05]: must be different widths, at least two"),
        (
            "finetune.ema_profiles=[0.1,0.10]",
            "finetune.ema_profiles=[0.1, 0.1]: must be different widths, at least two",
        ),
        ("finetune.ema_profiles=[0.1,0.3]", "finetune.ema_profiles=[0.1, 0.3]: each must lie in [0.01, 0.25] and have"),
        (
            "finetune.ema_profiles=[.nan,0.1]",
            "finetune.ema_profiles=[nan, 0.1]: each must lie in [0.01, 0.25] and have",
        ),
        ("finetune.ema_profiles=[0.1,0.0505]", "finetune.ema_profiles=[0.1, 0.0505]: each must lie in [0.01, 0.25]"),
        ("finetune.ema_profiles=[0.05,0.1]", "finetune.ema_profiles=[0.05, 0.1]: needs finetune.snapshot_every"),
        ("merge.ema_width=0.3", "merge.ema_width=0.3: must lie in [0.01, 0.25] and have at most three decimals"),
        ("merge.ema_width=0.0505", "merge.ema_width=0.0505: must lie in [0.01, 0.25] and have at most three decimals"),
        ("search.ema_widths=[0.3]", "search.ema_widths=[0.3]: each must lie in [0.01, 0.25] and have"),
        ("search.ema_widths=[0.1,0.1]", "search.ema_widths=[0.1, 0.1]: must be different widths"),
        ("finetune.max_grad_norm=.inf", "finetune.max_grad_norm=inf: must be above 0 and finite"),
        ("finetune.lr_warmup_steps=-1", "finetune.lr_warmup_steps=-1: must be at least 0 and at most"),
        ("timesteps.density=cosine", "timesteps.density=cosine: must be one of uniform, logit_normal"),
        ("timesteps.logit_mean=0.5", "timesteps.logit_mean=0.5: needs timesteps.density=logit_normal"),
        ("timesteps.shift=0", "timesteps.shift=0.0: must be above 0 and finite"),
        ("timesteps.edges=[0,250.5,1000]", "timesteps.edges[1]=250.5: Value '250.5' of type"),
        ("timesteps.edges=[0,250,1001]", "timesteps.edges=[0, 250, 1001]: must rise from 0 to T = 1000"),
        ("timesteps.edges={a: 1}", "timesteps.edges={'a': 1}: Cannot merge incompatible container types"),
        ("merge.coefficients=[1e300,0,0,0]", "merge.coefficients=[1e+300, 0, 0, 0]: must be a list of finite numbers"),
        ("evaluate.features=clip", "evaluate.features=clip: must be one of inception, classifier"),
        ("name=a/b", "name=a/b: must be a plain folder name"),
        ("seed", "seed: overrides are written section.key=value"),
    ],
)
def test_mistakes_name_key_and_value(empty, override, message):
    with pytest.raises(UserError) as error:
        load_config(empty, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["a: [1", "!!python/object/apply:os.system ['true']", "- 1\n- 2", "\x00"])
def test_broken_files_are_refused_in_one_line(tmp_path, content):
    file = tmp_path / "broken.yaml"
    file.write_text(content)
    with pytest.raises(UserError) as error:
        load_config(file, [])
    assert "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml", [])


def test_equal_ranges_cover_all_timesteps():
    assert Config().timesteps.ranges == [(0, 250), (250, 500), (500, 750), (750, 1000)]
    assert Config().timesteps.names == ["0000-0250", "0250-0500", "0500-0750", "0750-1000"]


def test_processes_must_share_the_micro_batches():
    with pytest.raises(UserError, match=r"finetune\.micro_batch_size=4: finetune\.batch_size=8 makes 2 micro-batches"):
        Finetune(batch_size=8, micro_batch_size=4).check_shares(3)
    with pytest.raises(UserError, match=r"3 processes can't share equally: set micro_batch_size=4 or a divisor"):
        Finetune(batch_size=12).check_shares(3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_answers_a_mistake_with_status_2_and_one_line(script, tmp_path):
    result = subprocess.run(
        [sys.executable, REPOSITORY / script, "timesteps.edges=[0,5]"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 2
    assert result.stderr == f"{script}: error: timesteps.edges=[0, 5]: must rise from 0 to T = 1000\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_prints_the_configuration_and_writes_nothing(script, tmp_path):
    result = subprocess.run(
        [sys.executable, REPOSITORY / script, "seed=7", "--dry-run"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "seed: 7" in result.stdout
    assert "runs/digits" in result.stdout
    assert not list(tmp_path.iterdir())


# lone surrogates are no characters, and ??? is how OmegaConf writes that there is no value
TEXTS = some.text(some.characters(exclude_categories=["Cs"])).filter(lambda text: text != "???")
TEXTS |= some.text("${}\\'\"# :\n~-[]&*!%@,0x1_e", max_size=8).filter(lambda text: text != "???")
VALUES = some.recursive(
    TEXTS | some.none() | some.booleans() | some.integers(-(10**9), 10**9) | some.floats(allow_nan=False),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=30)
@given(VALUES)
@example("model #2")
@example("0x10")
@example("1_000")
@example("on")
@example("0\n0")
@example("\U0001f600 'a' \"b\": {c} ${seed} \\${d} \\\\${e}")
def test_an_override_is_read_as_the_value_that_was_written(value):
    written = override("pretrain.unet.given", value)
    assert "\n" not in written
    assert load_config(REPOSITORY / "configs/digits.yaml", [written]).pretrain.unet["given"] == value


@settings(max_examples=30)
@given(TEXTS.filter(lambda text: "\0" not in text))
def test_a_text_is_read_as_the_one_that_was_written(value):
    assert load_config(REPOSITORY / "configs/digits.yaml", [override("data.split", value)]).data.split == value


@pytest.mark.parametrize("text", ["on", "0x10", "1_000", "007", "1e3", "no", ".5"])
def test_a_text_stands_for_itself_though_it_looks_like_a_number(tmp_path, text):
    """In the file and on the command line, alone, in a list and in a section."""
    file = tmp_path / "a.yaml"
    file.write_text(f"name: {text}\nevaluate: {{samples: [{text}, b]}}\n")
    config = load_config(file, [f"data.split={text}"])
    assert (config.name, config.data.split, config.evaluate.samples) == (text, text, [text, "b"])
    assert load_config(file, [f"data={{split: {text}}}"]).data.split == text


def test_an_override_holds_no_comments(empty):
    config = load_config(empty, ["model.pretrained=model #2", "sample.prompts=a # b.txt", "seed=3 # as before"])
    assert (config.model.pretrained, config.sample.prompts, config.seed) == ("model #2", "a # b.txt", 3)


def all_settings():
    """section.key → the dataclass field, of every setting."""
    for section in Config().all_sections:
        for part in fields(section):
            if not is_dataclass(part.type):
                yield f"{section.section}.{part.name}".removeprefix("."), part


OTHER_TEXTS = {"name", "model.license", "merge.push_to_hub", "search.storage", "finetune.range"}
OTHER_TEXTS |= {"search.groups", "sample.negative_prompt", "sample.prompt_column", "sample.scheduler"}


def test_every_key_that_is_a_path_takes_the_home_folder(empty, monkeypatch):
    """Tried with all that a text may be given to: those that are no paths are listed here, or are one of few words."""
    monkeypatch.setenv("HOME", "/home/somebody")
    tried = set()
    for key, part in all_settings():
        for value in ("~/a", ["~/a"]) if key not in OTHER_TEXTS else ():
            try:
                config = load_config(empty, [override(key, value)])
            except UserError:
                continue
            section, _, name = key.rpartition(".")
            found = getattr(getattr(config, section) if section else config, name)
            columns = section == "data" and (name.endswith("_column") or name == "split")
            if not columns and not (part.type in (list[str],) or (key == "sample.prompts" and value == ["~/a"])):
                tried.add(key)
                assert found == ("/home/somebody/a" if value == "~/a" else ["/home/somebody/a"]), key
    assert tried >= {"output_dir", "model.pretrained", "data.name", "merge.coefficients", "merge.output"}
    assert tried >= {"sample.model", "sample.prompts", "sample.output", "evaluate.samples", "evaluate.reference"}


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("output_dir", "~nobody-of-that-name/runs", "no such user"),
        ("evaluate.samples", ["~nobody-of-that-name/runs"], "no such user"),
        ("output_dir", "a\nb", "control character"),
        ("data.name", "a\u2028b", "control character"),
        ("name", "a\tb", "must be a plain folder name"),
        ("name", "a\nb", "must be a plain folder name"),
        ("name", "a\x85b", "must be a plain folder name"),
        ("name", "é" * 91, "at most 180 bytes"),
        ("name", "a\udc80", "not YAML"),
        ("data.split", "???", "has no value"),
        ("a" + ".a" * 2000, 1, "nested more than 40 deep"),
    ],
)
def test_names_that_would_fail_later_are_refused(empty, key, value, reason):
    with pytest.raises(UserError, match=reason) as error:
        load_config(empty, [override(key, value)])
    assert "\n" not in str(error.value)


BOMB = "a: &a [1, 1]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)}, ' * 3}]\n" for i in range(14))
BOMBS = {"deep": "a: " + "[" * 5000, "endless": "a: &a [*a]", "bomb": BOMB, "merged": "a: &a {<<: *a}"}


@pytest.mark.parametrize("kind", BOMBS)
def test_yaml_that_stands_for_more_than_it_says_is_refused(tmp_path, kind):
    file = tmp_path / "a.yaml"
    file.write_text(BOMBS[kind])
    with pytest.raises(UserError, match=r"nested more than 40 deep|aliases"):
        load_config(file, [])
    if kind in ("deep", "endless"):
        with pytest.raises(UserError, match="nested more than 40 deep"):
            read_override(BOMBS[kind].replace(": ", "=", 1))


def test_aliases_are_written_out(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("sample: {num_images: &count 12}\nsearch: {report_images: *count}\n")
    assert load_config(file, []).search.report_images == 12


@pytest.mark.parametrize(
    "url", ["postgresql://me:secret@host/db", "mysql://h/db?password=secret", "me:secret@h", "a://u:se?cr@et/@h"]
)
def test_a_password_is_written_nowhere(empty, url):
    config = load_config(empty, [override("search.storage", url)])
    assert config.search.storage == url
    shown = yaml.safe_dump(config.recorded) + report.command_line(["--config", "a.yaml", f"search.storage={url}"])
    assert not any(part in shown for part in ("secret", "se?cr", "et/"))
    with pytest.raises(UserError, match=r"^search\.storage: not YAML: [^@]*$"):
        load_config(empty, [f"search.storage=[{url}"])
    plain = load_config(empty, ["search.storage=sqlite:///a.db"])
    assert plain.recorded["search"]["storage"] == "sqlite:///a.db"


WHERE = {"path", "text", "omit_default"}  # tags that say when or how a setting counts, not what it influences


@pytest.mark.parametrize(("key", "part"), list(all_settings()))
def test_every_setting_says_what_it_influences(key, part):
    """A setting without tags would be in no record: a stale cache, or a run that goes on with other settings."""
    assert set(tags_of(part)) - WHERE, f"{key}: has no tags; see TAGS in deme/config/section.py"
    if key.partition(".")[0] in ("data", "pretrain", "finetune"):
        assert len({"weights", "free"} & set(tags_of(part))) == 1, "fixed for a training run, or not"


def test_a_tag_or_a_bound_that_there_is_not_is_refused():
    with pytest.raises(TypeError, match="no tag or bound: upto, wights"):
        setting(1, "wights", upto=2)


def test_settings_that_do_not_count_are_in_no_record():
    """Another weighting's parameters, a default that is left out, candidates where no grid is laid out for them."""
    plain, weighted = Finetune().tagged("weights"), Finetune(loss_weighting="p2").tagged("weights")
    assert weighted.keys() - plain.keys() == {"loss_weighting", "p2_k", "p2_gamma", "normalize_loss_weighting"}
    assert "antithetic" not in plain
    assert Finetune(antithetic=False).tagged("weights")["antithetic"] is False
    assert {"trials", "start"}.isdisjoint(Search().tagged("search"))
    assert Search(start=["best.yaml"]).tagged("search")["start"] == ["best.yaml"]
    assert Search(sampler="grid").tagged("search")["trials"] == 32
    assert Sample(timestep_spacing="trailing").tagged("search").keys() - Sample().tagged("search").keys() == {
        "timestep_spacing"
    }


@pytest.mark.parametrize(
    ("override_", "shown"),
    [
        ("timesteps.edges=[0000,0250,0500,0750,1000]", "0250: a number in base 8; write it in base 10"),
        ("sample.num_images=0100", "0100: a number in base 8; write it in base 10"),
        ("merge.coefficients={'*': [0.5, 1:30]}", "1:30: a number in base 60; write it in base 10"),
        ("search.ridge=-0_1_7", "-0_1_7: a number in base 8; write it in base 10"),
        ("merge.experts=[{path: a, timesteps: [0, 010]}]", "010: a number in base 8; write it in base 10"),
    ],
)
def test_numbers_of_another_base_are_refused(override_, shown, tmp_path):
    """YAML 1.1 reads 0250 as 168; in a text setting it stays a text, and in quotes it is the writer's."""
    with pytest.raises(UserError, match=f"^{re.escape(override_)}: {re.escape(shown)}$"):
        read_override(override_)
    section, _, rest = override_.partition(".")
    key, _, value = rest.partition("=")
    file = tmp_path / "a.yaml"
    file.write_text(f"{section}:\n  {key}: {value}\n")
    with pytest.raises(UserError, match=f"^--config {re.escape(str(file))}: {re.escape(shown)}$"):
        load_config(file, [])


def test_a_number_in_base_10_may_begin_with_zeros(empty):
    assert load_config(empty, ["timesteps.num_ranges=04", "name=0250"]).timesteps.num_ranges == 4
    assert load_config(empty, ["name=0250"]).name == "0250"
    assert load_config(empty, ["search.bounds=[0, 0.5]", "seed=0"]).search.bounds == [0, 0.5]
