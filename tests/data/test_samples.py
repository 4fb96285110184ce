import numpy as np
import pytest
import torch
from PIL import Image

from deme.config.paths import image_path
from deme.config.sections import Data, Sample
from deme.data.examples import load_evaluation_images
from deme.data.opening import open_source
from deme.data.samples import (
    check_sizes,
    claim_samples,
    drawn_by,
    list_images,
    missing_seeds,
    read_images,
    save_grid,
    write_image,
)
from deme.errors import UserError
from deme.job.files import TEMPORARY
from deme.job.records import SAMPLES, Record

IDENTITY = {"weights": ["abc"], "num_inference_steps": 50, "sample.scheduler": "ddim", "size_on_disk": None}


def claim(folder, identity=IDENTITY, seeds=range(4), overwrite=False):
    record = Record(SAMPLES, identity, {"num_images": len(seeds)})
    claim_samples(folder, record, Sample(num_images=len(seeds), overwrite=overwrite), seeds, {})


def fill(folder, seeds):
    for seed in seeds:
        write_image(folder, seed, torch.full((1, 8, 8), seed, dtype=torch.uint8))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "merged"
    claim(folder)
    fill(folder, range(4))
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_read_as_they_were_written(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 8, 8), dtype=torch.uint8)
    write_image(tmp_path, 7, image)
    assert [path.name for path in tmp_path.iterdir()] == ["000007.png"]
    assert torch.equal(read_images([image_path(tmp_path, 7)])[0], image.expand(3, 8, 8))


def test_only_what_is_missing_or_broken_is_drawn_again(folder):
    assert missing_seeds(folder, range(4)) == []
    image_path(folder, 1).unlink()
    image_path(folder, 2).write_bytes(image_path(folder, 3).read_bytes()[:-30])
    assert missing_seeds(folder, range(4)) == [1, 2]


def test_more_images_can_be_added(folder):
    claim(folder, seeds=range(6))
    assert missing_seeds(folder, range(6)) == [4, 5]


def test_another_model_is_refused_unless_overwritten(folder):
    with pytest.raises(UserError, match=r"holds samples of other settings: weights=\['def'\] \(was \['abc'\]\)"):
        claim(folder, IDENTITY | {"weights": ["def"]})
    assert len(list_images(folder)) == 4
    claim(folder, IDENTITY | {"weights": ["def"]}, overwrite=True)
    assert missing_seeds(folder, range(4)) == [0, 1, 2, 3]


def test_images_of_other_seeds_are_refused_unless_overwritten(folder):
    with pytest.raises(UserError, match="holds 2 images of other seeds than 0 … 1; choose another folder"):
        claim(folder, seeds=range(2))
    claim(folder, seeds=range(2), overwrite=True)
    assert [path.name for path in list_images(folder)] == ["000000.png", "000001.png"]


def test_what_other_jobs_are_writing_is_left_alone(folder):
    """A job that draws a block clears up after itself alone."""
    for seed in (0, 3):
        (folder / f"{TEMPORARY}{seed:06d}.png-0123abcd").touch()
    record = Record(SAMPLES, IDENTITY, {"num_images": 4})
    claim_samples(folder, record, Sample(num_images=4, blocks=2, block=1), range(2, 4), {})
    assert [path.name for path in folder.glob(f"{TEMPORARY}*")] == [f"{TEMPORARY}000000.png-0123abcd"]


def test_a_kill_before_the_record_is_written_does_no_harm(tmp_path):
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / f"{TEMPORARY}samples.yaml-0123abcd").touch()
    claim(folder)
    assert missing_seeds(folder, range(4)) == [0, 1, 2, 3]


def test_seeds_of_seven_digits_come_last(tmp_path):
    fill(tmp_path, range(1))
    for seed in (999_999, 1_000_000, 5):
        image_path(tmp_path, 0).with_name(f"{seed:06d}.png").write_bytes(image_path(tmp_path, 0).read_bytes())
    assert [path.stem for path in list_images(tmp_path)] == ["000000", "000005", "999999", "1000000"]


def test_foreign_folders_are_never_touched(tmp_path):
    (tmp_path / "photo.png").touch()
    with pytest.raises(UserError, match="holds files but no samples"):
        claim(tmp_path, overwrite=True)
    assert (tmp_path / "photo.png").exists()


def test_unfinished_folders_are_not_scored(folder):
    assert len(list_images(folder)) == 4
    image_path(folder, 0).unlink()
    with pytest.raises(UserError, match="holds 3 of 4 images"):
        list_images(folder)


def test_empty_and_missing_folders_are_named(tmp_path):
    for folder, message in ((tmp_path, "no images in this folder"), (tmp_path / "absent", "no such folder")):
        with pytest.raises(UserError, match=message):
            list_images(folder)


def test_mixed_sizes_and_text_files_are_named(tmp_path):
    write_image(tmp_path, 0, torch.zeros(1, 8, 8, dtype=torch.uint8))
    write_image(tmp_path, 1, torch.zeros(1, 8, 9, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"000001\.png: is 9 x 8, 000000\.png is 8 x 8"):
        check_sizes(list_images(tmp_path))
    image_path(tmp_path, 1).write_text("no image")
    for read in (check_sizes, read_images):
        with pytest.raises(UserError, match=r"000001\.png: not a readable image"):
            read(list_images(tmp_path))


def test_samples_are_read_as_data_is(tmp_path):
    """Turned by EXIF, transparent, 16 bits, and formats that pytorch_fid does not look for."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).convert("RGBA").save(tmp_path / "b.png")
    Image.fromarray(pixels.transpose(1, 0, 2)[..., 0].astype(np.uint16) * 257).save(tmp_path / "c.png")
    Image.new("L", (8, 12)).save(tmp_path / "d.tga")
    paths = list_images(tmp_path)
    assert [path.name for path in paths] == ["a.png", "b.png", "c.png", "d.tga"]
    assert check_sizes(paths) == (8, 12)
    data = Data(name=str(tmp_path), label_column=None, resolution=8)
    images = load_evaluation_images(open_source(data), tmp_path / "cache")[0].images
    assert np.array_equal(read_images(paths).permute(0, 2, 3, 1), np.stack(list(images)))


def test_files_that_were_not_drawn_are_named(folder):
    image_path(folder, 1).with_name("000001 (copy).png").write_bytes(image_path(folder, 1).read_bytes())
    with pytest.raises(UserError, match=r"holds 000001 \(copy\)\.png, which sample_ddp\.py did not draw"):
        list_images(folder)


def test_palette_and_grey_images_become_rgb(tmp_path):
    Image.fromarray(np.full((4, 4), 9, np.uint8)).convert("P").save(tmp_path / "a.png")
    assert read_images([tmp_path / "a.png"]).unique().tolist() == [9]


def test_grids_hold_every_image(tmp_path):
    save_grid(torch.full((5, 1, 8, 8), 200, dtype=torch.uint8), tmp_path / "grid.png")
    pixels = np.array(Image.open(tmp_path / "grid.png").convert("L"))
    assert pixels.shape == (2 * 34 + 2, 3 * 34 + 2)
    assert (pixels == 200).sum() == 5 * 32 * 32


def test_how_a_folder_was_drawn_is_told_by_its_record(tmp_path):
    assert drawn_by(tmp_path, {}) is None
    drawn = {"sample.scheduler": "dpmsolver++", "num_inference_steps": 20}
    assert drawn_by(tmp_path, drawn) == "dpmsolver++-20"
    scales = {"prediction_scale": [[0, 500, 1.01], [500, 1000, 1.0]]}
    assert drawn_by(tmp_path, drawn | scales) == "dpmsolver++-20, the predicted noise divided by 1.01, 1"
    with pytest.raises(UserError, match=r"samples\.yaml: "):
        drawn_by(tmp_path, {"prediction_scale": "x"})
