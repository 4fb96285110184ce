"""Encoded images: what is read is what was written, of the images that are there."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from deme.config.sections import Data
from deme.data.examples import load_training_images
from deme.data.latents import EMPTY, INDEX, CachedLatents, write_latents
from deme.data.opening import contents_hash, open_source
from deme.errors import UserError

ENCODER = SimpleNamespace(
    dtype=torch.float32,
    moments=lambda pixels: pixels.float().mean((1, 2, 3))[:, None, None, None].expand(-1, 8, 2, 2),
    embed=lambda texts: torch.tensor([len(text) for text in texts]).float()[:, None, None].expand(-1, 3, 4),
    rest=lambda: None,
    takes_sizes=False,
)
ALONE = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1, wait_for_everyone=lambda: None)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The first 20 digits, 8 images in a part."""
    monkeypatch.setattr("deme.data.latents.PART", 8)
    data = Data(split="train", caption_column="caption")
    images = load_training_images(open_source(data), 1, tmp_path).training
    images.chosen = images.chosen[:20]
    (tmp_path / "cache").mkdir()
    write_latents(tmp_path / "cache", images, 1, ENCODER, ALONE)
    return tmp_path / "cache"


def read_all(folder):
    return CachedLatents(folder, 1.0, False).batch(range(20), np.random.default_rng(0))


def change(file, name, change):
    tensors = {key: value.clone() for key, value in load_file(file).items()}
    tensors[name] = change(tensors[name])
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)


def flip_a_bit(tensor):
    tensor.view(torch.uint8).view(-1)[0] ^= 4
    return tensor


def test_every_view_has_the_sizes_of_its_crop(tmp_path):
    """Those of the same draws, next to its moments; a flipped bit in them is found."""
    data = Data(split="train", caption_column="caption", random_flip=True)
    images = load_training_images(open_source(data), 1, tmp_path, takes_sizes=True).training
    images.chosen, images.resolution = images.chosen[:3], 6  # of 8 pixels
    write_latents(tmp_path, images, 2, SimpleNamespace(**vars(ENCODER) | {"takes_sizes": True}), ALONE)
    latents = CachedLatents(tmp_path, 0.0, True)
    expected = {
        (number, *images.crops([number], np.random.default_rng((number, view)))[1][0].tolist())
        for number in range(3)
        for view in range(2)
    }
    drawn = [latents.batch(range(3), np.random.default_rng(seed)) for seed in range(20)]
    assert {(number, *row) for batch in drawn for number, row in enumerate(batch.sizes.tolist())} == expected
    change(tmp_path / "part-000000.safetensors", "sizes", flip_a_bit)
    with pytest.raises(UserError, match="image 0 is not what was written"):
        CachedLatents(tmp_path, 0.0, True).batch([0])


@pytest.mark.parametrize("name", ["moments", "embeddings", "first", "crc32"])
@pytest.mark.parametrize("part", [0, 2])
def test_a_flipped_bit_is_found(folder, name, part):
    change(folder / f"part-00000{part}.safetensors", name, flip_a_bit)
    with pytest.raises(UserError, match=rf"part-00000{part}\.safetensors: .*; delete the folder, it is made again"):
        read_all(folder)


@pytest.mark.parametrize(
    ("file", "name", "change_of"),
    [
        (EMPTY, "embedding", flip_a_bit),
        (EMPTY, "embedding", lambda tensor: tensor[:, :2]),
        ("part-000002.safetensors", "embeddings", lambda tensor: tensor[:3]),
    ],
)
def test_other_tensors_are_found(folder, file, name, change_of):
    change(folder / file, name, change_of)
    with pytest.raises(UserError, match=f"{file}: .*; delete the folder, it is made again"):
        read_all(folder)


@pytest.mark.parametrize("count", [1, 16, 19, 21, 25])
def test_another_count_is_found(folder, count):
    (folder / INDEX).write_text(json.dumps({"images": count}))
    with pytest.raises(UserError, match="delete the folder, it is made again"):
        CachedLatents(folder, 0.0, False)


def test_the_images_that_were_encoded_are_told_by_their_content(tmp_path):
    """Touched files give the same hash; a changed one does not, though its time stamp was kept."""
    (tmp_path / "images").mkdir()
    for level in range(3):
        Image.new("L", (8, 8), level).save(tmp_path / "images" / f"{level}.png")

    def contents() -> str:
        data = Data(name=str(tmp_path / "images"), label_column=None)
        return contents_hash(open_source(data), tmp_path / "cache")

    before = contents()
    file = tmp_path / "images" / "1.png"
    os.chmod(file, 0o600)
    assert contents() == before
    stamp = file.stat()
    Image.new("L", (8, 8), 9).save(file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert contents() != before
