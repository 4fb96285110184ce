"""DiT: labels, a learned variance, latents or pixels."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import REPOSITORY, tiny_unet
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    UNet2DModel,
)
from text_to_image import tiny_vae

from deme.analysis.activation_change import changes, projection_distance, squared_change
from deme.analysis.task_vectors import names_by_block
from deme.config.reading import load_config
from deme.config.sections import Data, Sample
from deme.config.trainings import Finetune
from deme.data.crops import CroppedImages
from deme.data.decoding import Images, Source
from deme.data.examples import labels_for
from deme.data.samples import conditions_of, in_turn
from deme.errors import UserError
from deme.measure.noisy import Batch
from deme.method.process import process_of
from deme.method.projection import PROJECTION_SUFFIX, blocks_of, with_identity_projections
from deme.method.task_vectors import Moved, patterns_of
from deme.models.denoisers import (
    load_denoiser,
    load_scheduler,
    make_denoiser,
    new_transformer,
    settings_of,
    with_projections,
)
from deme.models.drawing import Drawing
from deme.models.encoder_loading import load_encoder, pixels_of, try_out
from deme.models.encoders import LabelledLatents
from deme.models.kinds import DIT, SD3
from deme.models.pipelines import find_pipeline, labels_of, latent_factor
from deme.models.variants import ModelFiles, write_denoiser, write_pipeline_files
from deme.projection import ProjectedDiTTransformer2DModel
from scripts.estimate import passes_through

TINY = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "patch_size": 2}
CLASSES = 1000  # DiTPipeline takes 1000 for no label


def tiny_dit(seed: int = 0, **settings) -> DiTTransformer2DModel:
    torch.manual_seed(seed)
    return DiTTransformer2DModel(**(TINY | {"sample_size": 4, "in_channels": 4, "out_channels": 8} | settings)).eval()


@pytest.fixture(scope="module")
def latent_dit(tmp_path_factory) -> Path:
    """A DiT's folder with a VAE, whose images are 8×8."""
    folder = tmp_path_factory.mktemp("dit") / "pipeline"
    DiTPipeline(tiny_dit(), tiny_vae(), DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": {"7": "owl, barn owl"}}))
    return folder


def test_networks_of_other_families_are_refused_by_name(latent_dit, tmp_path):
    folder = shutil.copytree(latent_dit, tmp_path / "copy")
    (folder / "model_index.json").unlink()
    file = folder / "transformer" / "config.json"
    settings = json.loads(file.read_text())
    for name in ("FluxTransformer2DModel", "QwenImageTransformer2DModel", "PixArtTransformer2DModel"):
        file.write_text(json.dumps(settings | {"_class_name": name}))
        with pytest.raises(UserError, match=f"config.json: _class_name={name}: not one of .*{DIT}, {SD3}"):
            find_pipeline(str(folder))
    file.write_text(json.dumps(settings | {"norm_type": "ada_norm_single"}))
    with pytest.raises(UserError, match="norm_type=ada_norm_single: not ada_norm_zero"):
        find_pipeline(str(folder))
    file.write_text(json.dumps(settings | {"_class_name": "Transformer2DModel"}))  # as it was published
    assert isinstance(load_denoiser(find_pipeline(str(folder)) / "transformer"), DiTTransformer2DModel)


def test_latents_are_not_clipped(latent_dit):
    config = load_config(REPOSITORY / "configs" / "digits.yaml", ["sample.clip=true"])
    with pytest.raises(UserError, match=r"sample\.clip=true: latents have no bounds"):
        ModelFiles(latent_dit, [latent_dit / "transformer"]).check_fits(config)


def test_latents_are_clipped_only_by_schedules_that_say_so(latent_dit, tmp_path):
    """A sampler's class that can't clip does not stand for one that does."""
    folder = shutil.copytree(latent_dit, tmp_path / "copy")
    for schedule, clips in ((EulerDiscreteScheduler(), False), (DDIMScheduler(), True)):
        schedule.save_pretrained(folder / "scheduler")
        assert load_scheduler(folder).config.clip_sample is clips
        recorded = {} if clips else {"scheduler.clip_sample": False}  # images of older versions were clipped
        assert ModelFiles(folder, [folder / "transformer"]).sampling() == recorded


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_images_are_those_of_diffusers_pipeline(latent_dit, scale):
    """From the same latents, labels and guidance; its own pixels are rounded down, ours to the nearest."""
    pipeline = find_pipeline(str(latent_dit))
    network = load_denoiser(pipeline / "transformer")
    encoder = load_encoder(pipeline, network)
    assert isinstance(encoder, LabelledLatents)
    assert (labels_of(pipeline), latent_factor(pipeline)) == (CLASSES, 2)
    settings = Sample(num_inference_steps=4, guidance_scale=scale, labels=[3, 7])
    drawing = Drawing(load_scheduler(pipeline), encoder, settings, (4, 4, 4), torch.device("cpu"))
    assert drawing.passes == (4 if scale == 1 else 8)
    higher_order = replace(drawing, settings=replace(settings, scheduler="HeunDiscreteScheduler"))
    assert higher_order.passes == passes_through(pipeline)(higher_order.settings) == (7 if scale == 1 else 14)
    labels = in_turn(conditions_of(settings, False, CLASSES), range(5, 8))
    assert labels == {5: 7, 6: 3, 7: 7}
    found = drawing.images(lambda _: network, list(labels), list(labels.values()))
    theirs = DiTPipeline.from_pretrained(pipeline)
    theirs.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in labels]
    drawn = theirs([*labels.values()], scale, generators, 4, output_type="np").images
    expected = (255 * drawn).round().transpose(0, 3, 1, 2).astype(int)
    assert np.abs(found.numpy().astype(int) - expected).max() <= 1
    assert len({image.tobytes() for image in found.numpy()}) == 3


def test_labels_count_and_the_network_drops_none_by_itself():
    """diffusers' module draws whether to drop a label in each block anew, in train mode."""
    network = make_denoiser(settings_of(tiny_dit(num_embeds_ada_norm=3))).train()
    images, timesteps = torch.randn(64, 4, 4, 4), torch.full((64,), 9)
    first, again, other, none = (
        network(images, timesteps, class_labels=torch.full((64,), label)).sample for label in (0, 0, 1, 3)
    )
    assert torch.equal(first, again)
    assert not (first == other).all(dim=3).any()
    assert not (first == none).all(dim=3).any()


def test_the_first_half_of_a_learned_variance_is_the_prediction():
    """Of a tuple and of an output with names, and at one timestep for all images."""
    plain = tiny_dit()
    network = make_denoiser(settings_of(plain))
    network.load_state_dict(plain.state_dict())
    images, labels = torch.randn(2, 4, 4, 4), torch.tensor([1, 2])
    expected = plain(images, torch.tensor([5, 5]), labels).sample
    assert expected.shape == (2, 8, 4, 4)
    for given in (torch.tensor(5), torch.tensor([5, 5])):
        assert torch.equal(network(images, given, class_labels=labels).sample, expected[:, :4])
        assert torch.equal(network(images, given, class_labels=labels, return_dict=False)[0], expected[:, :4])


def test_a_unet_with_a_learned_variance_is_drawn_from_by_its_prediction(tmp_path):
    """DDPM's sampler, which its schedule has made for such a variance, takes the fixed one."""
    schedule = DDPMScheduler(variance_type="learned_range", num_train_timesteps=10)
    DDPMPipeline(tiny_unet(out_channels=2), schedule).save_pretrained(tmp_path)
    network, encoder = load_denoiser(tmp_path / "unet"), pixels_of(tiny_unet())
    process = process_of(load_scheduler(find_pipeline(str(tmp_path))))
    try_out(network, process, encoder)
    settings = Sample(num_inference_steps=3, scheduler="DDPMScheduler")
    drawing = Drawing(process.scheduler, encoder, settings, (1, 8, 8), torch.device("cpu"))
    assert drawing.images(lambda _: network, [0, 1], []).shape == (2, 1, 8, 8)
    whole = UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([3, 7])
    assert torch.equal(network(*inputs).sample, whole(*inputs).sample[:, :1])


def test_a_new_network_predicts_zero_and_its_blocks_are_identities():
    network = new_transformer(sample_size=8, in_channels=1, num_embeds_ada_norm=10, **TINY)
    passed = []
    for block in network.transformer_blocks:
        block.register_forward_hook(lambda _, given, output: passed.append(torch.equal(given[0], output)))
    prediction = network(torch.randn(2, 1, 8, 8), torch.tensor(3), class_labels=torch.tensor([0, 10])).sample
    assert prediction.shape == (2, 1, 8, 8)
    assert not prediction.any()
    assert passed == [True, True]
    with pytest.raises(TypeError, match="layers"):
        new_transformer(sample_size=8, layers=3)


def source(labels: list | None) -> Source:
    return Source(Data(label_column="kind"), range(len(labels or [])), labels, None, "")


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [([2, 0, 1, 2], [2, 0, 1, 2]), (["dog", "cat", "eel", "cat"], [1, 0, 2, 0]), (["2", "00"], [2, 0])],
    ids=["numbers", "names", "names that are numbers"],
)
def test_labels_are_numbers_or_names_in_their_order(labels, numbers):
    assert labels_for(source(labels), 3) == numbers


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 3], "row 2 has the label 3, and the model 3 classes"),
        ([0, -1], "row 1 has the label -1, and the model 3 classes"),
        (["0", "-1", "1"], "row 1 has the label -1, and the model 3 classes"),
        ([0, None], "row 1 has the label null, and the model 3 classes"),
        (["a", "b", "d", "c"], "holds 4 names, and the model has 3 classes: give their numbers"),
        (["a", "b"], "holds 2 names, and the model has 3 classes: give their numbers"),
        ([0, "a"], "row 1 has the label a, and the model 3 classes"),
        (None, "the model takes labels"),
    ],
)
def test_labels_that_the_model_does_not_know_are_refused(labels, message):
    with pytest.raises(UserError, match=f"^data.label_column=kind: {message}"):
        labels_for(source(labels), 3)


IMAGENET = {"0": "tench, Tinca tinca", "1": "crane", "2": "Golden retriever", "3": "crane"}


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        (["golden_retriever", "tench"], [2, 0]),  # a part of the classes
        (["Tinca tinca", "golden retriever", "tinca tinca"], [0, 2, 0]),
        (["n01440764", "n02012849", "n02099601", "n03126707"], [0, 1, 2, 3]),  # no name is known
        (["a tench", "crane", "golden retriever", "the other crane"], [0, 1, 2, 3]),  # those that are known stand there
        (["3", "0"], [3, 0]),
    ],
)
def test_names_of_classes_are_those_of_the_model(labels, numbers):
    """As model_index.json gives them; with names of others, as ImageNet's folders have, the alphabet's order counts."""
    assert labels_for(source(labels), 4, IMAGENET) == numbers


@pytest.mark.parametrize("labels", [["crane", "tench"], ["dog", "tench"]], ids=["twice", "unknown"])
def test_a_name_that_the_model_does_not_know_among_its_own_is_refused(labels):
    message = f"kind: {labels[0]} names no class, or several, in id2label of the model's model_index.json: give numbers"
    with pytest.raises(UserError, match=message):
        labels_for(source(labels), 4, IMAGENET)


def test_the_encoder_of_a_network_that_takes_labels_knows_their_names(latent_dit, tmp_path):
    network = load_denoiser(latent_dit / "transformer")
    assert load_encoder(latent_dit, network).id2label == {"7": "owl, barn owl"}
    folder = shutil.copytree(latent_dit, tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": ["tench"]}))
    with pytest.raises(UserError, match=r"model_index.json: id2label=.*: must map numbers of classes to names"):
        load_encoder(folder, network)
    (folder / "model_index.json").unlink()
    assert load_encoder(folder, network).id2label is None


@pytest.mark.parametrize(
    ("settings", "classes", "message"),
    [
        ({"labels": [0, 3]}, 3, r"sample\.labels=\[0, 3\]: must be of 0 … 2, which the model knows"),
        ({"labels": [-1]}, 3, r"sample\.labels=\[-1\]: must be of 0 … 2"),
        ({"labels": [0]}, 0, r"sample\.labels=\[0\]: sample\.model=merged takes none"),
        ({"prompts": ["a cat"]}, 3, r"sample\.prompts=.*: sample\.model=merged takes none"),
        ({"negative_prompt": "ugly"}, 3, r"sample\.negative_prompt=ugly: sample\.model=merged takes no text"),
    ],
)
def test_labels_and_prompts_that_a_model_does_not_take_are_refused(settings, classes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        conditions_of(Sample(**settings), False, classes)


def test_without_a_list_all_labels_take_turns():
    assert in_turn(conditions_of(Sample(), False, 3), range(4, 8)) == {4: 1, 5: 2, 6: 0, 7: 1}
    assert in_turn(conditions_of(Sample(), False, 0), range(4, 8)) == {}


def test_some_labels_are_dropped_from_a_batch_and_stand_for_none():
    images = Images(lambda _: np.zeros((8, 8, 1), np.uint8), np.arange(400))
    data = CroppedImages(images, 8, True, False, None, [[row % 3] for row in range(400)], Finetune().label_dropout)
    batch = data.batch(range(400), np.random.default_rng(0))
    encoder = pixels_of(make_denoiser(settings_of(tiny_dit(in_channels=1, num_embeds_ada_norm=3))))
    clean, condition = encoder.encode(batch)
    assert clean.shape == (400, 1, 8, 8)
    labels, given = condition["class_labels"], torch.arange(400) % 3
    assert ((labels == given) | (labels == 3)).all()
    assert 20 < (labels == 3).sum() < 60
    assert torch.equal(encoder.encode(data.batch(range(400)))[1]["class_labels"], given)


# --- blocks and projections


def test_blocks_of_a_transformer_are_told_apart_in_the_order_of_the_forward_pass():
    network = tiny_dit(num_layers=11)
    assert list(blocks_of(network)) == [f"transformer_blocks.{number}" for number in range(11)]
    names = [*network.state_dict()]
    assert patterns_of("block", names) == [*(f"transformer_blocks.{number}.*" for number in range(11)), "*"]
    assert list(names_by_block(names)) == [*blocks_of(network), "rest"]
    moved = Moved()
    for name in reversed(names):
        moved.add(name, [1.0], [1.0])
    assert list(moved.by_block) == [*blocks_of(network), "rest"]


def test_projections_of_a_transformer_are_identities_on_each_token_and_are_trained_saved_and_loaded(tmp_path):
    plain = make_denoiser(settings_of(tiny_dit()))
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([5, 900])
    labels = {"class_labels": torch.tensor([1, 2]), "return_dict": False}
    projected = with_projections(plain)
    assert torch.equal(projected(*inputs, **labels)[0], plain(*inputs, **labels)[0])
    weights = {name: weight for name, weight in projected.named_parameters() if name.endswith(PROJECTION_SUFFIX)}
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        f"transformer_blocks.{number}{PROJECTION_SUFFIX}": (16, 16) for number in range(2)
    }
    projected(*inputs, **labels)[0].square().mean().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in weights.values())
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(0.5)
    changed = projected(*inputs, **labels)[0]
    assert not torch.allclose(changed, plain(*inputs, **labels)[0])
    projected.save_pretrained(tmp_path / "transformer")
    assert torch.equal(load_denoiser(tmp_path / "transformer")(*inputs, **labels)[0], changed)
    base = with_identity_projections(plain.state_dict(), projected.state_dict())
    assert all(torch.equal(base[name], torch.eye(16)) for name in weights)
    assert projection_distance(projected.state_dict(), "transformer_blocks.0") == pytest.approx(0.5)


def test_a_projected_dit_is_loaded_by_diffusers(latent_dit, tmp_path):
    network = with_projections(load_denoiser(latent_dit / "transformer"))
    write_denoiser(tmp_path, network.state_dict(), settings_of(network))
    write_pipeline_files(tmp_path, latent_dit)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.transformer, ProjectedDiTTransformer2DModel)
    assert loaded.labels == DiTPipeline.from_pretrained(latent_dit).labels == {"barn owl": 7, "owl": 7}
    assert find_pipeline(str(tmp_path)) == tmp_path


def test_channels_of_tokens_and_their_places_are_the_two_factors_of_a_change():
    """A bias after a block changes the channels alike at every place."""
    before = make_denoiser(settings_of(tiny_dit(num_layers=1)))
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.transformer_blocks[0].ff.net[2].bias.add_(torch.arange(16.0))
        for network in (before, after):  # the gate of the feed-forward layers
            network.transformer_blocks[0].norm1.linear.bias[-16:] = 1.0
            network.transformer_blocks[0].norm1.linear.weight[-16:] = 0.0
    noisy, condition = torch.randn(3, 4, 4, 4), {"class_labels": torch.tensor([0, 1, 2])}
    times = torch.tensor([1, 500, 999])
    batch = Batch(noisy, times, condition, torch.zeros(3), noisy, torch.ones(3))
    squares, shapes = squared_change(before, after, [batch], Accelerator(cpu=True))
    assert shapes.tolist() == [[16, 4]]
    shares = changes(squares)[1][0]
    assert shares[:2].sum() == pytest.approx(1)
    assert shares[1] > 0.2
