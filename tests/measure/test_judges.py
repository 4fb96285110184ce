"""Judges from local weights: tiny or random networks in the real formats, loaded by the real code."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import models
from transformers import Dinov2Config, Dinov2Model

from deme.config.judges import read_judge
from deme.data.samples import read_images
from deme.errors import UserError
from deme.measure.features import extract
from deme.measure.judges import LocalNetwork

ROUNDING = 2.5 / 255 / 0.224  # of PIL's resizing to whole numbers, after the normalisation
HAS_TIMM = find_spec("timm") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("judges")


def original(name: str) -> torch.nn.Module:
    options = {"init_weights": False, "transform_input": True} if name == "googlenet" else {"num_classes": 10}
    return models.get_model(name, weights=None, **options).eval()


def weights_of(name: str, folder: Path, seed: int = 0, **changes: torch.Tensor | None) -> Path:
    """The random weights of a network of torchvision in a file; with `changes` of tensors, None takes them out."""
    torch.manual_seed(seed)
    file = folder / f"{name}-{seed}-{len(changes)}.safetensors"
    tensors = original(name).state_dict() | changes
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
    return file


@pytest.fixture(scope="module")
def dinov2(folder) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder / "dinov2")
    return folder / "dinov2"


@pytest.fixture(scope="module", params=[("L", 8), ("RGB", 16), ("L", 16), ("RGB", 300)])
def image(request, folder) -> Image.Image:
    """Of noise, grey or coloured, smaller or larger than the network's images."""
    mode, size = request.param
    shape = (size, size, 3) if mode == "RGB" else (size, size)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    picture.save(folder / f"{mode}-{size}.png")
    return Image.open(folder / f"{mode}-{size}.png")


def assert_prepared(network: LocalNetwork, image: Image.Image, expected: torch.Tensor) -> None:
    """As the library prepares an image itself, to the rounding of its pixels."""
    found = network.prepare(read_images([Path(image.filename)]))
    assert found.shape == (1, *expected.shape)
    assert (found[0] - expected).abs().max() < ROUNDING
    assert (found[0] - expected).abs().mean() < ROUNDING / 10


@pytest.mark.parametrize("name", ["efficientnet_b0", "shufflenet_v2_x0_5"])  # bicubic; bilinear
def test_images_are_prepared_as_torchvision_does(name, folder, image):
    network = LocalNetwork(read_judge(f"torchvision:{name}={weights_of(name, folder)}"))
    assert_prepared(network, image, models.get_model_weights(name).DEFAULT.transforms()(image.convert("RGB")))


def test_images_are_prepared_for_dinov2_as_transformers_does(dinov2, image):
    """By dgm-eval's settings: whole images of 224 pixels, bicubic, normalised as ImageNet."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    normal = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    size = {"height": 224, "width": 224}
    processor = BitImageProcessorPil(size=size, do_center_crop=False, resample=3, **normal)
    expected = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert_prepared(LocalNetwork(read_judge(f"dinov2={dinov2}")), image, expected)


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_small", "vit_b_32", "googlenet"])
def test_features_are_what_torchvision_gives_its_head(name, folder):
    """Of weights with another number of classes; in batches as alone."""
    file = weights_of(name, folder)
    network = LocalNetwork(read_judge(f"torchvision:{name}={file}"))
    whole = original(name)
    whole.load_state_dict(load_file(file))
    seen = []
    head = [module for module in whole.modules() if isinstance(module, torch.nn.Linear)][-1]
    head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    found = extract(Accelerator(cpu=True), network, lambda part: pixels[part], range(3), 2)
    with torch.no_grad():
        whole(network.prepare(pixels))
    assert found.shape == seen[0].shape
    np.testing.assert_allclose(found, seen[0], atol=1e-4 * seen[0].abs().max())


def test_features_of_dinov2_are_the_normalised_cls_token(dinov2):
    network = LocalNetwork(read_judge(f"dinov2={dinov2}"))
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2).eval()(network.prepare(pixels)).last_hidden_state[:, 0]
        assert torch.allclose(network.features(pixels), expected, atol=1e-5)
    assert expected.shape == (2, 32)


def test_a_space_is_named_after_the_network_and_the_content_of_its_weights(folder, dinov2):
    first, second = (weights_of("shufflenet_v2_x0_5", folder, seed) for seed in (0, 1))
    names = [read_judge(f"torchvision:shufflenet_v2_x0_5={file}").name for file in (first, second)]
    assert [name[:-8] for name in names] == ["torchvision-shufflenet_v2_x0_5-"] * 2
    assert names[0] != names[1]
    moved = first.rename(folder / "moved.safetensors")
    assert read_judge(f"torchvision:shufflenet_v2_x0_5={moved}").name == names[0]
    assert read_judge(f"dinov2={dinov2}").name.startswith("dinov2-32x2x14-")
    assert [read_judge(name).name for name in ("inception", "classifier")] == ["inception", "classifier"]


def test_dinov2_is_named_as_its_authors_do(tmp_path):
    """By the sizes in config.json: those of facebook/dinov2-large."""
    sizes = {"model_type": "dinov2", "hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert read_judge(f"dinov2={tmp_path}").name.startswith("dinov2-vitl14-")


@pytest.mark.parametrize(
    "text", ["clip", "torchvision", "torchvision:resnet18", "dinov2", "inception=a", "timm:a/b=c", 3]
)
def test_what_is_no_judge_is_none(text):
    assert read_judge(text) is None


def refusal(text: str) -> str:
    def load() -> None:
        judge = read_judge(text)
        assert judge.name
        LocalNetwork(judge)

    with pytest.raises(UserError) as error:
        load()
    message = str(error.value)
    assert message.startswith(f"evaluate.features={text}: ")
    assert "\n" not in message
    return message.removeprefix(f"evaluate.features={text}: ")


def test_pickled_weights_are_refused_with_the_line_that_converts_them(folder, tmp_path, monkeypatch):
    """Which does convert them."""
    tensors = load_file(weights_of("shufflenet_v2_x0_5", folder))
    torch.save(tensors, tmp_path / "w.pth")
    message = refusal(f"torchvision:shufflenet_v2_x0_5={tmp_path}/w.pth")
    assert message.startswith(f"{tmp_path}/w.pth is pickled, and never loaded; this converts it: python -c ")
    exec(message.partition('python -c "')[2].removesuffix('"'))
    LocalNetwork(read_judge(f"torchvision:shufflenet_v2_x0_5={tmp_path}/w.safetensors"))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert f"torch.load('{tmp_path}/pytorch_model.bin', weights_only=True)" in refusal(f"dinov2={tmp_path}")


def test_networks_that_are_no_judges_are_refused(folder):
    file = weights_of("shufflenet_v2_x0_5", folder)
    assert refusal(f"torchvision:resnet81={file}").startswith("torchvision has no classifier resnet81; it has resnet")
    several = "weights with different preprocessing were published: write one of "
    assert refusal(f"torchvision:resnet50={file}") == f"{several}resnet50.IMAGENET1K_V1, resnet50.IMAGENET1K_V2"
    assert refusal(f"torchvision:resnet50.V1={file}").startswith("V1: must be one of IMAGENET1K_V1, IMAGENET1K_V2")
    assert refusal(f"torchvision:squeezenet1_1={file}").startswith("squeezenet1_1 has no classifier head")


def test_weights_of_one_of_several_preprocessings_are_chosen_by_name(folder):
    file = weights_of("mobilenet_v3_large", folder)
    sides = {}
    for entry in ("IMAGENET1K_V1", "IMAGENET1K_V2"):
        judge = read_judge(f"torchvision:mobilenet_v3_large.{entry}={file}")
        assert judge.name.startswith(f"torchvision-mobilenet_v3_large.{entry}-")
        sides[entry] = LocalNetwork(judge).prepare.size
    assert sides == {"IMAGENET1K_V1": 256, "IMAGENET1K_V2": 232}


def test_files_that_do_not_fit_are_refused_by_the_tensor(folder, tmp_path, dinov2):
    name, tensor = "shufflenet_v2_x0_5", "conv5.0.weight"
    changes = {
        f"lacks the tensor {tensor}": {tensor: None},
        f"the tensor {tensor} has the shape (2,), the network's (1024, 192, 1, 1)": {tensor: torch.zeros(2)},
        "holds the tensor more, which the network lacks": {"more": torch.zeros(2)},
    }
    for reason, change in changes.items():
        file = weights_of(name, tmp_path, **change)
        assert refusal(f"torchvision:{name}={file}") == f"{file}: {reason}"
    counts = {key: None for key in load_file(weights_of(name, folder)) if key.endswith("num_batches_tracked")}
    LocalNetwork(read_judge(f"torchvision:{name}={weights_of(name, tmp_path, **counts)}"))  # of an old file
    (tmp_path / "a.safetensors").write_bytes(b"no")
    assert refusal(f"torchvision:{name}={tmp_path}/a.safetensors").startswith(f"{tmp_path}/a.safetensors: not a safe")
    assert refusal(f"torchvision:{name}={tmp_path}/b.safetensors") == f"{tmp_path}/b.safetensors: no such file"
    assert refusal(f"torchvision:{name}={dinov2}/config.json") == "not a .safetensors file"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "vit"}, "config.json: the model is of the type vit, not dinov2"),
        ({"hidden_size": None}, "config.json: not the config.json of a DINOv2 model (TypeError"),
        ({"num_hidden_layers": 1, "out_features": None, "out_indices": None}, "holds the tensor encoder.layer.1."),
        ({"num_hidden_layers": 3}, "weights and config.json do not fit each other (encoder.layer.2."),
        ({"hidden_size": 16}, "weights and config.json do not fit each other (embeddings.cls_token"),
        ({"hidden_act": "magic"}, "no DINOv2 model can be loaded from it: KeyError"),
    ],
)
def test_folders_that_hold_no_dinov2_are_refused(dinov2, tmp_path, change, reason):
    settings = json.loads((dinov2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | change))
    (tmp_path / "model.safetensors").write_bytes((dinov2 / "model.safetensors").read_bytes())
    assert reason in refusal(f"dinov2={tmp_path}")


def test_timm_is_named_if_it_is_not_installed(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    file = weights_of("shufflenet_v2_x0_5", folder)
    assert refusal(f"timm:tf_efficientnet_lite0={file}") == "timm is not installed: pip install timm"


@pytest.mark.skipif(not HAS_TIMM, reason="timm is optional: pip install timm")
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0.in1k", "test_vit.r160_in1k", "test_resnet"])
def test_classifiers_of_timm_are_judges(name, tmp_path, image):
    """Prepared as its own transforms do; the features are what its head takes."""
    import timm

    torch.manual_seed(0)
    original = timm.create_model(name, pretrained=False).eval()
    save_file(original.state_dict(), tmp_path / "w.safetensors")
    judge = read_judge(f"timm:{name}={tmp_path}/w.safetensors")
    assert judge.name.startswith(f"timm-{name}-")
    network = LocalNetwork(judge)
    settings = timm.data.resolve_model_data_config(original)
    assert_prepared(network, image, timm.data.create_transform(**settings, is_training=False)(image.convert("RGB")))
    pixels = network.prepare(read_images([Path(image.filename)]))
    with torch.no_grad():
        expected = original.forward_head(original.forward_features(pixels), pre_logits=True)
        assert torch.allclose(network.features(read_images([Path(image.filename)])), expected, atol=1e-5)
    tensors = load_file(tmp_path / "w.safetensors")
    left_out = next(iter(network.network.state_dict()))
    del tensors[left_out]
    save_file(tensors, tmp_path / "w.safetensors")
    assert refusal(f"timm:{name}={tmp_path}/w.safetensors").endswith(f"lacks the tensor {left_out}")


@pytest.mark.skipif(not HAS_TIMM, reason="timm is optional: pip install timm")
def test_networks_of_timm_that_are_no_judges_are_refused(folder):
    file = weights_of("shufflenet_v2_x0_5", folder)
    assert refusal(f"timm:tf_efficientnet_lite={file}").startswith(
        "timm has no classifier tf_efficientnet_lite; it has"
    )
    assert refusal(f"timm:tf_efficientnet_lite0.x={file}") == "Invalid pretrained tag (x) for tf_efficientnet_lite0."
    assert refusal(f"timm:resnet50={file}").startswith("weights with different preprocessing were published: write one")
    assert "has no classifier head" in refusal(f"timm:vit_small_patch14_dinov2.lvd142m={file}")
