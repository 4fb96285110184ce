import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from deme.config import Data, UserError
from deme.data import TrainingImages, load_evaluation_images, load_training_images


def random_state():
    return np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
    """An image folder as datasets reads it: two classes, sizes 12×9 and 9×12, one grayscale."""
    for label, (name, size, mode) in enumerate([("cat", (12, 9), "RGB"), ("dog", (9, 12), "L")]):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        pixels = np.random.default_rng(label).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(tmp_path / "images" / "train" / name / "0.png")
    return str(tmp_path / "images")


def test_digits_are_all_there():
    images = load_training_images(Data(), channels=1)
    batch = images.batch(np.arange(len(images)), random_state())
    assert batch.shape == (1797, 1, 8, 8)
    assert batch.dtype == torch.uint8
    expected = torch.from_numpy(load_digits().images)
    torch.testing.assert_close(batch[:, 0].double() * 16 / 255, expected, rtol=0, atol=0.04)


def test_evaluation_images_are_rgb_with_labels():
    pixels, labels = load_evaluation_images(Data())
    assert pixels.shape == (1797, 3, 8, 8)
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    assert labels.tolist() == load_digits().target.tolist()


def test_an_image_folder_is_resized_to_its_shorter_side_and_cropped(folder):
    images = load_training_images(Data(name=folder, resolution=3), channels=3)
    assert sorted(tuple(image.shape) for image in images.images) == [(3, 3, 4), (3, 4, 3)]
    assert images.batch(np.array([0, 1]), random_state()).shape == (2, 3, 3, 3)
    pixels, labels = load_evaluation_images(Data(name=folder, resolution=3))
    assert pixels.shape == (2, 3, 3, 3)
    assert labels.tolist() == [0, 1]


def test_small_images_are_enlarged(folder):
    images = load_training_images(Data(name=folder, resolution=32), channels=1)
    assert images.batch(np.array([0]), random_state()).shape == (1, 1, 32, 32)


def test_crops_and_flips_follow_the_generator():
    image = torch.arange(2 * 5, dtype=torch.uint8).reshape(1, 2, 5)
    cropped = TrainingImages([image], 2, center_crop=False, random_flip=True)
    draws = {tuple(cropped.batch(np.array([0]), np.random.default_rng(seed)).flatten().tolist()) for seed in range(99)}
    windows = [image[..., left : left + 2] for left in range(4)]
    assert draws == {tuple(w.flatten().tolist()) for window in windows for w in (window, window.flip(-1))}
    again = [cropped.batch(np.array([0]), np.random.default_rng(3)) for _ in range(2)]
    assert torch.equal(*again)


def test_centre_crop_without_flip_ignores_the_generator():
    image = torch.arange(2 * 6, dtype=torch.uint8).reshape(1, 2, 6)
    centred = TrainingImages([image], 2, center_crop=True, random_flip=False)
    for seed in range(5):
        assert torch.equal(centred.batch(np.array([0]), np.random.default_rng(seed))[0], image[..., 2:4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "/nowhere/at/all"}, r"data\.name=/nowhere/at/all"),
        ({"image_column": "img"}, r"data\.image_column=img: .* has the columns image, label"),
        ({"label_column": "class"}, r"data\.label_column=class: .* has the columns image, label"),
        ({"split": "test"}, r"data\.split=test"),
    ],
)
def test_mistakes_name_the_key(folder, change, message):
    with pytest.raises(UserError, match=message):
        load_training_images(Data(**({"name": folder, "resolution": 8} | change)), channels=3)
