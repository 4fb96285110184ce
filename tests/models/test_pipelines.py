import json
import os
import shutil

import pytest
import torch
from conftest import PICKLED_WEIGHTS, REPOSITORY, old_name, run
from diffusers import DDIMPipeline, UNet2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deme.config.reading import load_config
from deme.errors import UserError
from deme.models.denoisers import load_denoiser, load_scheduler, with_projections
from deme.models.pipelines import denoiser_folder, find_pipeline
from deme.models.searched import prediction_scales
from deme.models.variants import find_model
from deme.models.weights import WEIGHTS, load_tensors, save_tensors
from deme.projection import ProjectedUNet2DModel


@pytest.fixture(params=["safetensors", "old names", "pickled", "pickled, old names", "without an index"])
def flat(request, pretrained, tmp_path):
    """The pretrained pipeline as the google/ddpm models lie on the Hub: everything at the top."""
    folder = tmp_path / "flat"
    folder.mkdir()
    shutil.copy(pretrained / "scheduler" / "scheduler_config.json", folder)
    shutil.copy(pretrained / "unet" / "config.json", folder)
    if request.param != "without an index":
        shutil.copy(pretrained / "model_index.json", folder)
    tensors = load_file(pretrained / "unet" / WEIGHTS)
    if "old names" in request.param:
        tensors = {old_name(name): tensor for name, tensor in tensors.items()}
        assert any("proj_attn" in name for name in tensors)
    if "pickled" in request.param:
        torch.save(tensors, folder / PICKLED_WEIGHTS)
    else:
        save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors", "diffusion_pytorch_model.bin"])
def test_a_file_in_place_of_a_pipeline_is_refused_with_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="a file; name its pipeline's folder: diffusers' from_single_file and save_pre"):
        find_pipeline(str(tmp_path / name))


def test_every_form_gives_the_same_network_and_schedule(flat, pretrained):
    pipeline = find_pipeline(str(flat))
    expected = load_file(pretrained / "unet" / WEIGHTS)
    found = load_denoiser(denoiser_folder(pipeline)).state_dict()
    for tensors in (found, load_tensors(denoiser_folder(pipeline))):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert load_scheduler(pipeline).config.beta_end == 0.03


@pytest.mark.parametrize("flat", ["pickled, old names"], indirect=True)
def test_the_whole_recipe_from_an_old_pickled_flat_folder(config_file, flat):
    """finetune, merge, sample: the merged pipeline has today's names and the pretrained schedule."""
    options = [f"model.pretrained={flat}", "finetune.max_steps=2"]
    run("finetune.py", config_file, *options)
    run("merge.py", config_file, *options)
    run("sample_ddp.py", config_file, *options)
    run("sample_ddp.py", config_file, *options, "sample.model=pretrained")
    pipeline = DDIMPipeline.from_pretrained(config_file.parent / "tiny" / "merged")
    assert isinstance(pipeline.unet, ProjectedUNet2DModel)
    assert pipeline.scheduler.config.beta_end == 0.03
    assert pipeline.scheduler.config.clip_sample_range == 1.5


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_hostile_pickle_is_refused_and_not_run(flat, tmp_path):
    for name in (WEIGHTS, PICKLED_WEIGHTS):
        (flat / name).unlink(missing_ok=True)
    torch.save({"conv_in.weight": Hostile(tmp_path / "executed")}, flat / PICKLED_WEIGHTS)
    with pytest.raises(UserError, match="flat"):
        load_denoiser(flat)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("flat", ["pickled"], indirect=True)
def test_parameters_in_a_pickle_are_tensors(flat):
    expected = load_denoiser(flat).state_dict()
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in expected.items()}, flat / PICKLED_WEIGHTS)
    found = load_denoiser(flat).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not any(tensor.requires_grad for tensor in load_tensors(flat).values())


@pytest.mark.parametrize("flat", ["pickled"], indirect=True)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"conv_in.weight": torch.ones(1), "epoch": 3}, "epoch: of the type int, not a tensor"),
        ({"state_dict": {"conv_in.weight": torch.ones(1)}}, "state_dict: of the type dict, not a tensor"),
        ([torch.ones(1)], "of the type list, not tensors by name"),
    ],
)
def test_a_pickle_of_other_things_is_refused_by_name(flat, content, message):
    torch.save(content, flat / PICKLED_WEIGHTS)
    with pytest.raises(UserError, match=rf"{PICKLED_WEIGHTS}: cannot be read: {message}"):
        load_denoiser(flat)


def test_projections_are_never_dropped(pretrained, tmp_path):
    """Weights with projections beside a configuration of plain UNet2DModel: refused, not loaded without them."""
    with_projections(UNet2DModel.from_pretrained(pretrained / "unet")).save_pretrained(tmp_path)
    shutil.copy(pretrained / "unet" / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"holds projections, but its config\.json does not name ProjectedUNet2DModel"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "unet" / WEIGHTS).unlink(), r"unet/.*safetensors: missing"),
        (
            lambda folder: (folder / "unet" / "config.json").unlink(),
            r"not a pipeline folder: .*config\.json is missing",
        ),
        (lambda folder: shutil.rmtree(folder / "scheduler"), r"scheduler_config\.json is missing"),
        (lambda folder: (folder / "unet" / "config.json").write_text("{"), r"unet/config\.json: "),
        (lambda folder: (folder / "unet" / WEIGHTS).write_bytes(b"short"), r"safetensors: cannot be read: "),
    ],
)
def test_incomplete_folders_are_named(pretrained, tmp_path, change, message):
    folder = tmp_path / "copy"
    shutil.copytree(pretrained, folder)
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        load_denoiser(denoiser_folder(find_pipeline(str(folder))))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_only_predicted_noise_is_scaled(pretrained, tmp_path, kind):
    """Where the schedule's file says what is predicted, and where it leaves it out, which means noise."""
    folder = tmp_path / "other"
    shutil.copytree(pretrained, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text())
    config = load_config(
        REPOSITORY / "configs/digits.yaml", [f"model.pretrained={folder}", "sample.prediction_scale=1.1"]
    )
    model = find_model("pretrained", config.paths)
    model.check_fits(config)
    file.write_text(json.dumps({key: value for key, value in settings.items() if key != "prediction_type"}))
    model.check_fits(config)
    file.write_text(json.dumps(settings | {"prediction_type": kind}))
    reason = rf"scales predicted noise, but .*scheduler_config\.json has prediction_type={kind}"
    with pytest.raises(UserError, match=rf"^sample\.prediction_scale=1\.1: {reason}$"):
        model.check_fits(config)
    with pytest.raises(UserError, match=rf"^search\.over=coefficients: {reason}$"):
        model.check_noise_is_predicted(config.search, "over")


@pytest.mark.parametrize("scales", ["[.nan, 0]", "[0, .inf]", "[-1, 0]", "[0.1]", "[]"])
def test_a_file_of_scales_must_hold_one_positive_number_of_each_range(tmp_path, scales):
    """Each is 1 + a coefficient; a number in the configuration holds for all timesteps."""
    file = tmp_path / "scales.yaml"
    given = [f"sample.prediction_scale={file}", "timesteps.num_ranges=2"]
    config = load_config(REPOSITORY / "configs/digits.yaml", given)
    ranges = "over: prediction_scale\ntimesteps: [[0, 500], [500, 1000]]\n"
    file.write_text(f"{ranges}coefficients: {{'*': {scales}}}\n")
    with pytest.raises(UserError, match=rf"^sample\.prediction_scale={file}: ") as error:
        prediction_scales(config)
    assert "\n" not in str(error.value)
    file.write_text(f"{ranges}coefficients: {{'*': [-0.5, 0.25]}}\n")
    assert prediction_scales(config) == [(0, 500, 0.5), (500, 1000, 1.25)]
    whole = load_config(REPOSITORY / "configs/digits.yaml", [given[1], "sample.prediction_scale=2"])
    assert prediction_scales(whole) == [(0, 1000, 2.0)]


@given(some.dictionaries(some.text(max_size=8), some.text(max_size=20), min_size=1, max_size=6))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equal_tensors_and_headers_give_equal_files(tmp_path, header):
    """Of any characters; safetensors reads what was written."""
    tensors = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.zeros((), dtype=torch.float16)}
    for name in ("one", "two"):
        save_tensors(tensors, tmp_path / name, header)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safe_open(tmp_path / "one", framework="pt") as file:
        assert file.metadata() == header
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
