"""merge.experts: which networks it lists, what they are called, and what is refused."""

from pathlib import Path

import pytest

from deme.config.networks import path_of, short_names
from deme.config.reading import load_config, override
from deme.errors import UserError


def config(*overrides: str):
    return load_config("configs/digits.yaml", ["merge.coefficients=null", *overrides])


def listed(experts, *overrides: str) -> list[tuple[str, str]]:
    networks = config(override("merge.experts", experts), *overrides).merged_networks
    return [(network.name, str(network.folder)) for network in networks]


def test_words_stand_for_their_networks_and_folders_for_themselves():
    given = ["finetune.max_steps=500", "finetune.snapshot_every=700", "timesteps.num_ranges=3"]
    here = "runs/digits/finetuned"
    assert listed(["soup"], *given) == [(f"soup-{k}", f"{here}/soup-{k}/unet") for k in range(3)]
    names = ["0000-0333", "0333-0666", "0666-1000"]
    assert listed(["random"], *given) == [(f"random-{name}", f"{here}/random-{name}/unet") for name in names]
    snapshots = [(f"continued-{step}", f"{here}/continued/snapshots/{step:08d}/unet") for step in (700, 1400)]
    assert listed(["trajectory"], *given) == snapshots
    assert listed(["continued", "p2"]) == [(name, f"{here}/{name}/unet") for name in ("continued", "p2")]
    assert config(override("merge.experts", ["continued"])).usual_coefficients == [1.0]
    mixed = listed([{"path": "other/a/unet"}, "trajectory", "./b"], *given, "merge.finetuned=elsewhere")
    assert mixed[0] == ("a", "other/a/unet")
    assert mixed[1] == ("continued-700", "elsewhere/continued/snapshots/00000700/unet")
    assert mixed[3] == ("b", "b")
    assert listed(["~/a/unet"]) == [("a", str(Path.home() / "a" / "unet"))]


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_model.safetensors"])
def test_a_folder_without_the_weights_of_a_network_stands_for_the_lora_in_it(tmp_path, name):
    folder = tmp_path / "style"
    folder.mkdir()
    (folder / name).touch()
    assert listed([str(folder)], "model.projection=false") == [("style", str(folder / name))]
    (folder / "config.json").touch()  # of PEFT, or of a network without weights
    assert path_of(str(folder)) == folder / name
    (folder / "diffusion_pytorch_model.fp16.safetensors").touch()
    assert listed([str(folder)]) == [("style", str(folder))]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/a/finetuned/x/unet", "runs/b/y/unet"], ["x", "y"]),
        (["runs/a/finetuned/x/unet", "runs/b/finetuned/x/unet"], ["a-x", "b-x"]),
        (["a/x", "b/a/x/unet"], ["a-x", "b-a-x"]),
        (["a/adapter_model.safetensors", "b/adapter_model.safetensors"], ["a", "b"]),
        (["/x/merged/unet"], ["x-merged"]),  # a model of the run is called so
        (["merged"], ["merged"]),  # nothing else to call it by
        (["x/unet", "x"], ["x-unet", "x"]),
    ],
)
def test_names_are_the_last_parts_that_tell_folders_apart(folders, names):
    assert short_names(list(map(Path, folders)), {"merged"}) == names


def test_usual_coefficients_are_a_mean_of_each_word_s_networks_and_of_the_folders():
    given = ["soup", "./a", "self", "./b"]
    assert config(override("merge.experts", given)).usual_coefficients == [0.25] * 4 + [0.5, -1.0, 0.5]
    assert config(override("merge.experts", given)).intervals == [(0.0, 1.5)] * 5 + [(-3.0, 0.5), (0.0, 1.5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["merge.method=slerp"], "merge.method=slerp: can't be searched: its coefficients are 1 − t and t"),
        (["merge.experts=[a/b.safetensors]"], "merge.method=ties: can't be searched for LoRAs, only task_arithmetic"),
        (["search.method=gradient"], "search.method=gradient: match and loss need .* and merge.method=task_arithmetic"),
        (["search.ema_widths=[0.1]"], r"search.ema_widths=\[0.1\]: can't be used with merge.method=ties"),
        (["merge.method=fisher", "search.bounds=[-1,1]"], r"search.bounds=\[-1.0, 1.0\]: must not begin below 0"),
        (
            ["merge.method=fisher", "merge.experts=[self]"],
            r"merge.experts=\['self'\]: can't be searched",
        ),
        (["merge.method=regmean", "search.grow_bounds=true"], "search.grow_bounds=true: can't be used with"),
    ],
)
def test_what_a_search_of_another_method_can_not_do_is_refused(options, message):
    config("merge.method=ties").check_search()
    with pytest.raises(UserError, match=f"^{message}"):
        config("merge.method=ties", *options).check_search()


def test_folders_with_the_timesteps_of_the_ranges_are_their_experts():
    edges = [(0, 250), (250, 500), (500, 750), (750, 1000)]
    given = [{"path": f"x/{low}", "timesteps": [low, high]} for low, high in edges]
    ranged = config(override("merge.experts", given))
    assert [str(folder) for folder in ranged.paths.experts] == ["x/0", "x/250", "x/500", "x/750"]
    for others in (given[::-1], [*given[::-1], "self"]):
        other = config(override("merge.experts", others))
        assert other.paths.experts == ranged.paths.experts
        analyzed = {name: network.folder for name, network in other.analyzed_experts.items()}
        assert analyzed == dict(zip(other.timesteps.names, other.paths.experts, strict=True))
    for others in (["./a"], ["ranges", given[0]]):  # the experts are not those that are given
        other = config(override("merge.experts", others))
        assert str(other.paths.experts[0]) == "runs/digits/finetuned/0000-0250/unet"
    for wrong in (given[:3], given[::-1], [*given[:3], {"path": "x/750"}]):
        with pytest.raises(UserError, match=r"^search.method=closed_form: match and loss need .* for each of"):
            config(override("merge.experts", wrong), "search.method=closed_form").check_search()


def test_experts_of_other_timesteps_than_the_ranges_are_merged_but_stand_for_no_experts():
    """The trained ones would be drawn instead, without a word."""
    given = [{"path": "x/a", "timesteps": [0, 400]}, {"path": "x/b", "timesteps": [600, 1000]}]
    ranged = config(override("merge.experts", given), "timesteps.num_ranges=2")
    assert list(map(str, ranged.paths.finetuned)) == ["x/a", "x/b"]
    with pytest.raises(
        UserError, match=r"^merge.experts=.*: their timesteps are not those of timesteps.ranges, \[\(0, 500"
    ):
        _ = ranged.paths.experts


def test_a_pipeline_s_folder_stands_for_its_network(tmp_path):
    """But one with two experts for neither of them."""
    for part in ("a/unet", "b/transformer", "two/transformer", "two/transformer_2"):
        (tmp_path / part).mkdir(parents=True)
    found = [(name, str(tmp_path / part)) for name, part in (("a", "a/unet"), ("b", "b/transformer"), ("two", "two"))]
    assert listed([f"{tmp_path}/{name}" for name in ("a", "b", "two")]) == found
    (tmp_path / "a" / "config.json").touch()
    assert listed([f"{tmp_path}/a"]) == [("a", f"{tmp_path}/a")]


@pytest.mark.parametrize(
    "options",
    [(["./styel"], "merge.into=model"), (["./styel"], "merge.lora_rank=4"), (["./styel", "./b.safetensors"], "seed=0")],
)
def test_a_mistyped_folder_of_a_lora_is_missing(options):
    with pytest.raises(UserError, match=r"LoRAs.*; styel is missing$"):
        config(override("merge.experts", options[0]), options[1], "model.projection=false")


def test_a_network_is_not_added_twice_under_different_paths(tmp_path):
    (tmp_path / "a" / "unet").mkdir(parents=True)
    (tmp_path / "link").symlink_to("a/unet")
    for other in ("link", "a/unet/../unet", "a"):
        with pytest.raises(UserError, match=r"^merge.experts=.*: must be a list of different networks"):
            listed([f"{tmp_path}/a/unet", f"{tmp_path}/{other}"])
    (tmp_path / "loop").symlink_to("loop")
    assert listed([f"{tmp_path}/loop"]) == [("loop", f"{tmp_path}/loop")]  # which is missing


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (["suop"], "'suop': must be one of .*; did you mean soup.; a folder is written ./NAME"),
        ([], "must be a list of different networks"),
        (["self", "self"], "must be a list of different networks"),
        (["a/unet", "./a/unet"], "must be a list of different networks"),
        ([3], r"3: must be a word, a folder, a LoRA's file, or \{path: FOLDER, timesteps"),
        ([{"paht": "a/b"}], "must be a word, a folder, a LoRA's file, or"),
        ([{"path": ""}], "must be a word, a folder, a LoRA's file, or"),
        (["a/\nb"], "must be a word, a folder, a LoRA's file, or"),
        ([{"path": "a/b", "timesteps": [5, 5]}], r"timesteps=\[5, 5\]: must be \[low, high\)"),
        ([{"path": "a/b", "timesteps": [0, 1e3]}], r"timesteps=\[0, 1000.0\]: must be"),
        ([{"path": "a/b", "timesteps": [0, 1001]}], "1001: above timesteps.num_train_timesteps=1000"),
        (["trajectory"], "are snapshots of continued, which needs finetune.snapshot_every of at most its 4000 steps"),
    ],
)
def test_what_names_no_network_is_refused_by_name(experts, message):
    with pytest.raises(UserError, match=f"^merge.experts=.*{message}"):
        config(override("merge.experts", experts), "finetune.snapshot_every=4001")
