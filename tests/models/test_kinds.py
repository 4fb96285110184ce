import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import REPOSITORY
from diffusers import DiffusionPipeline, UNet2DModel
from text_to_image import tiny_pipeline

from deme.config.reading import load_config
from deme.config.sections import Sample
from deme.errors import UserError
from deme.method.process import process_of
from deme.models import encoders
from deme.models.denoisers import load_denoiser, load_scheduler, with_projections
from deme.models.drawing import Drawing
from deme.models.encoder_loading import load_encoder, try_out
from deme.models.kinds import DENOISERS, PIPELINES, SETTINGS
from deme.models.pipelines import find_pipeline
from deme.models.schedules import FLOW_SCHEDULERS, SCHEDULERS, of_sampling
from deme.models.variants import ModelFiles, common_architecture, write_pipeline_files

NO_CLASSES = ("SchedulerMixin", "KarrasDiffusionSchedulers")


@pytest.fixture(scope="module")
def text_to_image(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(params=["with an index", "without an index"])
def copy(request, pretrained, tmp_path) -> Path:
    """A DDPM's pipeline folder, with or without model_index.json."""
    shutil.copytree(pretrained, tmp_path / "copy")
    if request.param == "without an index":
        (tmp_path / "copy" / "model_index.json").unlink()
    return tmp_path / "copy"


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        find_pipeline(str(folder))
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_every_scheduler_of_diffusers_is_known_or_refused_by_name(copy):
    """Also those of SDEs, of EDM and of consistency models, whatever diffusers adds."""
    names = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    known = {*SCHEDULERS, *FLOW_SCHEDULERS}
    assert known < names
    for name in sorted(names):
        edit(copy / "scheduler" / "scheduler_config.json", _class_name=name)
        if name in known:
            load_scheduler(find_pipeline(str(copy)))
        else:
            refused(copy, f"scheduler_config.json: _class_name={name}: not one of DDPMScheduler, DDIMScheduler")
            with pytest.raises(UserError, match=f"_class_name={name}: not one of"):
                load_scheduler(copy)


@pytest.mark.parametrize(
    "schedule",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500, shift=3.0),
        diffusers.FlowMatchHeunDiscreteScheduler(num_train_timesteps=500, shift=3.0),
        diffusers.UniPCMultistepScheduler(
            num_train_timesteps=500, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
        diffusers.DPMSolverMultistepScheduler(
            num_train_timesteps=500, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    ],
)
def test_flow_matching_is_known_by_the_scheduler_whatever_sampler_it_was_saved_with(copy, schedule):
    schedule.save_pretrained(copy / "scheduler")
    found = load_scheduler(find_pipeline(str(copy)))
    assert type(found) is diffusers.FlowMatchEulerDiscreteScheduler
    assert (found.config.num_train_timesteps, found.config.shift) == (500, 3.0)
    process = process_of(found)
    assert (process.total, process.predicts) == (500, "flow_prediction")


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_the_shift_of_a_flow_is_its_own_and_not_one_that_another_class_left_in_its_file(copy, name):
    """diffusers keeps the settings of the scheduler that it was made of."""
    other = diffusers.UniPCMultistepScheduler(
        num_train_timesteps=500, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0
    )
    getattr(diffusers, name).from_config(other.config, shift=2.0).save_pretrained(copy / "scheduler")
    assert json.loads((copy / "scheduler" / "scheduler_config.json").read_text())["flow_shift"] == 5.0
    assert load_scheduler(find_pipeline(str(copy))).config.shift == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained_betas": [0.01] * 250}, "trained_betas: must be a list of num_train_timesteps=500 numbers"),
        ({"trained_betas": [0.01] * 1000}, "trained_betas: must be a list of num_train_timesteps=500 numbers"),
        ({"predict_epsilon": False}, "predict_epsilon=false does not fit prediction_type=epsilon"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(copy, settings, message):
    edit(copy / "scheduler" / "scheduler_config.json", num_train_timesteps=500, **settings)
    refused(copy, f"scheduler_config.json: {message}")


def test_a_number_of_a_schedule_that_is_a_text_is_refused_by_its_key(copy):
    edit(copy / "scheduler" / "scheduler_config.json", steps_offset="1")
    with pytest.raises(UserError, match=r"scheduler_config.json: steps_offset='1': is a text, and must be as 0$"):
        load_scheduler(find_pipeline(str(copy)))


@pytest.mark.parametrize("name", ["DDPMPipeline", "DDIMPipeline", "PNDMPipeline"])
def test_a_flow_is_refused_where_diffusers_takes_its_velocities_for_noise(pretrained, tmp_path, name):
    """Only a pipeline that keeps the scheduler draws images from it."""
    shutil.copytree(pretrained, tmp_path / "copy")
    schedule = diffusers.FlowMatchEulerDiscreteScheduler()
    schedule.save_pretrained(tmp_path / "copy" / "scheduler")
    edit(tmp_path / "copy" / "model_index.json", _class_name=name, scheduler=["diffusers", type(schedule).__name__])
    if type(DiffusionPipeline.from_pretrained(tmp_path / "copy").scheduler) is type(schedule):
        find_pipeline(str(tmp_path / "copy"))
    else:
        refused(tmp_path / "copy", f"model_index.json: _class_name={name}: replaces the scheduler")


@pytest.mark.parametrize("key", ["use_flow_sigmas", "prediction_type"])
def test_a_scheduler_that_says_flow_and_noise_at_once_is_refused(copy, key):
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    edit(copy / "scheduler" / "scheduler_config.json", _class_name="UniPCMultistepScheduler", **{key: settings[key]})
    refused(copy, "prediction_type=", "does not fit use_flow_sigmas=")


@pytest.mark.parametrize(
    "settings", [{"use_dynamic_shifting": True}, {"invert_sigmas": True}, {"shift": 0}, {"flow_shift": -1.0}]
)
def test_a_flow_whose_timesteps_are_not_its_noise_levels_is_refused(copy, settings):
    edit(copy / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler", **settings)
    refused(copy, next(iter(settings)))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_noise_schedule_is_that_of_the_class_that_the_file_names(copy, name):
    """With all settings in the file, and with none, where the class's own defaults count."""
    kind = getattr(diffusers, name)
    file = copy / "scheduler" / "scheduler_config.json"
    for schedule in (kind(beta_schedule="scaled_linear", beta_end=0.015, prediction_type="v_prediction"), kind()):
        schedule.save_pretrained(file.parent)
        if schedule.config.prediction_type == "epsilon":
            file.write_text(json.dumps({"_class_name": name}))
        found = load_scheduler(copy)
        torch.testing.assert_close(found.betas, schedule.betas)
        defaults = schedule.config.get("clip_sample", False), schedule.config.get("steps_offset", 0)
        assert tuple(of_sampling({"_class_name": name}).values()) == defaults
        assert found.config.prediction_type == schedule.config.prediction_type


@pytest.mark.parametrize(("size", "fitting"), [(8, [8]), ([8, 8], [8]), (None, [6, 8, 16])])
def test_the_resolution_is_that_of_the_network(copy, size, fitting):
    """A pair of equal sizes is one size; a UNet that names none takes what its two blocks can halve."""
    edit(copy / "unet" / "config.json", sample_size=size)
    pipeline = find_pipeline(str(copy))
    unet, schedule = load_denoiser(copy / "unet"), load_scheduler(pipeline)
    try_out(unet, process_of(schedule), load_encoder(pipeline, unet))
    for resolution in (6, 7, 8, 16):
        config = load_config(REPOSITORY / "configs" / "digits.yaml", [f"data.resolution={resolution}"])
        fits = resolution in fitting
        rule = rf"data\.resolution={resolution}: must be {'a multiple of 2' if size is None else '8, as the network'}"
        with nullcontext() if fits else pytest.raises(UserError, match=rule):
            ModelFiles(pipeline, [copy / "unet"]).check_fits(config)
        if fits:
            images = torch.zeros(1, 1, resolution, resolution)
            assert unet(images, torch.tensor([1])).sample.shape == images.shape


@pytest.mark.parametrize("size", [[8, 4], [8], "8", 0, True])
def test_sizes_that_are_no_squares_are_refused_by_name(copy, size):
    edit(copy / "unet" / "config.json", sample_size=size)
    refused(copy, "config.json: sample_size=", "must be a whole number above 0, as images are squares")


@pytest.mark.parametrize("part", ["unet", *SETTINGS])
def test_settings_that_change_what_an_input_means_are_refused_by_name(text_to_image, tmp_path, part):
    """Labels, guidance, sizes, boxes; flow matching behind a known scheduler's name; latents that are normalised."""
    for key in DENOISERS["UNet2DConditionModel"].settings if part == "unet" else SETTINGS[part]:
        folder = shutil.copytree(text_to_image, tmp_path / key)
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        edit(file, **{key: "another"})
        refused(folder, f"{file}: {key}=another: not ")
        if part == "unet":
            with pytest.raises(UserError, match=f"{key}=another: not "):
                load_denoiser(folder / "unet")


def test_a_network_of_xl_in_another_pipeline_is_refused(text_to_image, tmp_path):
    folder = shutil.copytree(text_to_image, tmp_path / "copy")
    edit(folder / "unet" / "config.json", addition_embed_type="text_time")
    refused(folder, "_class_name=StableDiffusionPipeline: its network has addition_embed_type=text_time")


def test_latents_that_are_shifted_by_nothing_are_read(text_to_image, tmp_path):
    folder = shutil.copytree(text_to_image, tmp_path / "copy")
    edit(folder / "vae" / "config.json", shift_factor=0.0)
    assert find_pipeline(str(folder)) == folder


@pytest.mark.parametrize("value", [0, float("nan"), "large", None, True])
def test_latents_without_a_scale_are_refused(text_to_image, tmp_path, value):
    folder = shutil.copytree(text_to_image, tmp_path / "copy")
    edit(folder / "vae" / "config.json", scaling_factor=value)
    refused(folder, "vae/config.json: scaling_factor=", "must be a finite number other than 0")


@pytest.mark.parametrize(
    "name",
    [
        "LDMPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "SanaSprintPipeline",
        "FluxPipeline",
        "WanImageToVideoPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelPipeline",
    ],
)
def test_pipelines_of_other_kinds_are_refused_by_name(pretrained, tmp_path, name):
    """Before anything is missed that they do not have, as unet/."""
    folder = shutil.copytree(pretrained, tmp_path / "copy")
    shutil.rmtree(folder / "unet")
    edit(folder / "model_index.json", _class_name=name)
    refused(folder, f"model_index.json: _class_name={name}: not one of DDPMPipeline, ", "StableDiffusionPipeline")


@pytest.mark.parametrize("part", ["vqvae", "vae", "transformer", "text_encoder_2", "bert"])
def test_parts_between_images_and_the_network_are_refused(copy, part):
    """An autoencoder whose latents the network works on, listed in model_index.json or only there as a folder."""
    (copy / part).mkdir()
    (copy / part / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    if (copy / "model_index.json").exists():
        edit(copy / "model_index.json", **{part: ["diffusers", "AutoencoderKL"]})
    refused(copy, part)


def test_a_pipeline_is_refused_whose_network_is_another_ones(text_to_image, tmp_path):
    folder = shutil.copytree(text_to_image, tmp_path / "copy")
    edit(folder / "model_index.json", _class_name="DDPMPipeline")
    refused(folder, "_class_name=DDPMPipeline: its network is a UNet2DConditionModel")


@pytest.mark.parametrize("entry", [["os", "system"], ["my_module", "MyUNet"], ["diffusers", "ControlNetModel"]])
@pytest.mark.parametrize("part", ["unet", "scheduler", "extra"])
def test_programs_that_an_index_names_are_refused(pretrained, tmp_path, part, entry):
    folder = shutil.copytree(pretrained, tmp_path / "copy")
    edit(folder / "model_index.json", **{part: entry})
    refused(folder, part if part == "extra" else entry[1])


def test_the_index_that_is_written_names_known_classes_alone(text_to_image, tmp_path):
    """The safety checker of another module is not among them; diffusers loads what is written."""
    source = shutil.copytree(text_to_image, tmp_path / "copy")
    edit(source / "model_index.json", safety_checker=["os", "system"], requires_safety_checker=True, note=[None, None])
    shutil.copytree(source / "unet", tmp_path / "merged" / "unet")
    write_pipeline_files(tmp_path / "merged", find_pipeline(str(source)))
    assert "system" not in (tmp_path / "merged" / "model_index.json").read_text()
    diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "merged")


def test_a_text_to_image_folder_without_an_index_gets_one_of_its_kind(text_to_image, tmp_path):
    """With its encoders, for diffusers to load."""
    source = shutil.copytree(text_to_image, tmp_path / "copy")
    (source / "model_index.json").unlink()
    shutil.copytree(source / "unet", tmp_path / "merged" / "unet")
    write_pipeline_files(tmp_path / "merged", find_pipeline(str(source)))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert pipeline.text_encoder is not None


def test_the_tables_fit_each_other_and_diffusers():
    assert set(PIPELINES.values()) == set(DENOISERS)
    for name in (*PIPELINES, *DENOISERS):
        assert hasattr(diffusers, name)


# --- the parts of a text-to-image pipeline


@pytest.mark.parametrize(
    ("given", "expected"),
    [(..., 77), (10**30, 77), (1e30, 77), (100, 77), (20, 20), (0, None), (-1, None), ("many", None)],
    ids=str,
)
def test_the_length_of_texts_is_the_least_of_tokenizer_and_text_encoder(text_to_image, tmp_path, given, expected):
    """A tokenizer that names none, or an absurd one, has the text encoder's; one that leaves no room is refused."""
    folder = shutil.copytree(text_to_image, tmp_path / "copy")
    file = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("model_max_length")
    file.write_text(json.dumps(settings if given is ... else settings | {"model_max_length": given}))
    network = load_denoiser(folder / "unet")
    if expected is None:
        with pytest.raises(UserError, match=f"^{folder / 'tokenizer'}: "):
            load_encoder(folder, network)
        return
    encoder = load_encoder(folder, network)
    assert encoder.embed(["a text", "a " * 200]).shape[:2] == (2, expected)


@pytest.mark.parametrize(
    ("part", "message", "settings"),
    [
        ("text_encoder", "embeddings have 16 entries, the network's cross_attention_dim is 8", {}),
        ("vae", "", {"norm_num_groups": 3}),
        ("text_encoder", "", {"num_attention_heads": 3}),
        ("tokenizer", "", {"model_max_length": 2}),
    ],
)
def test_a_fault_is_named_after_the_part_that_has_it(text_to_image, tmp_path, part, message, settings):
    """And not after the network, which is tried with what the parts give."""
    folder = shutil.copytree(text_to_image, tmp_path / "copy")
    network = load_denoiser(folder / "unet")
    if settings:
        edit(folder / part / ("tokenizer_config.json" if part == "tokenizer" else "config.json"), **settings)
    else:
        network.register_to_config(cross_attention_dim=8)
    with pytest.raises(UserError, match=f"^{folder / part}: .*{message}") as error:
        load_encoder(folder, network)
    assert "unet" not in str(error.value)


def test_a_batch_is_decoded_in_parts_and_the_negative_prompt_embedded_once(text_to_image, monkeypatch):
    """So a batch takes the memory of a few images, and many batches take the negative prompt's time once."""
    network = load_denoiser(text_to_image / "unet")
    encoder = load_encoder(text_to_image, network)
    embedded, decoded = [], []
    embed, to_bytes = encoder.embed, encoders.to_bytes
    monkeypatch.setattr(encoder, "embed", lambda texts: embedded.extend(texts) or embed(texts))
    monkeypatch.setattr(encoders, "to_bytes", lambda images: decoded.append(len(images)) or to_bytes(images))
    settings = Sample(num_inference_steps=1, negative_prompt="grey")
    drawing = Drawing(load_scheduler(text_to_image), encoder, settings, (4, 4, 4), torch.device("cpu"))
    for seeds in (range(6), range(6, 8)):
        images = drawing.images(lambda _: network, seeds, ["a cat"] * len(seeds))
        assert images.shape == (len(seeds), 1, 8, 8)
    assert embedded.count("grey") == 1
    assert decoded == [4, 2, 2]


# --- experts


def plain_folder(pretrained: Path, folder: Path, **settings) -> Path:
    shutil.copytree(pretrained / "unet", folder)
    edit(folder / "config.json", **settings)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"act_fn": "relu"},
        {"norm_eps": 0.1},
        {"freq_shift": 1},
        {"mid_block_scale_factor": 2},
        {"flip_sin_to_cos": False},
    ],
    ids=str,
)
def test_networks_of_equal_shapes_that_compute_otherwise_are_told_by_the_setting(pretrained, tmp_path, settings):
    [key] = settings
    first = plain_folder(pretrained, tmp_path / "first")
    other = plain_folder(pretrained, tmp_path / "other", **settings)
    for order in ([first, other], [other, first], [first, first, other]):
        with pytest.raises(UserError, match=f"config.json: {key}=.*, but .* in "):
            common_architecture(order)


def test_what_a_file_leaves_out_is_the_default_and_dropout_is_of_training_alone(pretrained, tmp_path):
    short = plain_folder(pretrained, tmp_path / "short", dropout=0.5, _diffusers_version="0.0.4")
    settings = json.loads((short / "config.json").read_text())
    defaults = UNet2DModel().config
    kept = {key: value for key, value in settings.items() if value != defaults.get(key) and key != "_class_name"}
    (short / "config.json").write_text(json.dumps(kept))
    assert len(kept) < len(settings) / 2
    assert common_architecture([pretrained / "unet", short]) == short


def test_the_architecture_of_all_has_projections_where_any_has(pretrained, tmp_path):
    plain = plain_folder(pretrained, tmp_path / "plain")
    projected = tmp_path / "projected"
    with_projections(load_denoiser(plain)).save_pretrained(projected)
    assert common_architecture([plain, plain, projected]) == projected
    assert common_architecture([projected, plain]) == projected
    assert common_architecture([plain]) == plain
