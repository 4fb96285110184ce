"""The formats that fuzz.py tries: each makes one damaged file in a folder, and yields what reads it."""

import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from conftest import PICKLED_WEIGHTS
from PIL import Image
from robustness.damaged_runs import run_files, storage
from robustness.mutations import VALUES, as_json, changed, damaged, with_other_chunks

from deme.config.experiment import Config
from deme.config.reading import load_config
from deme.config.sections import Data

Readers = Iterator[Callable[[], Any]]


def configuration(choose: random.Random, folder: Path) -> Readers:
    """A YAML file and two overrides."""
    values = asdict(Config())
    for _ in range(choose.randint(0, 2)):
        values = changed(choose, values)
    text = yaml.safe_dump(values)
    if choose.random() < 0.5:
        text = damaged(choose, text.encode()).decode(errors="replace")
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    overrides = []
    for _ in range(choose.randint(0, 2)):
        section = choose.choice([*values] if isinstance(values, dict) and values else ["data"])
        inside = values.get(section) if isinstance(values, dict) else None
        key = f"{section}.{choose.choice([*inside])}" if isinstance(inside, dict) and inside else section
        value = choose.choice([*map(str, VALUES), "{", "[1,", "${seed}", "${oc.env:HOME}", "!!python/name:os.system"])
        overrides.append(
            choose.choice(
                [f"{key}={value}", key, f"{key}[0]={value}", damaged(choose, key.encode()).decode(errors="replace")]
            )
        )

    def read() -> None:
        config = load_config(file, overrides)
        for name in vars(config.paths):
            config.paths.lines(name)

    yield read


def record(choose: random.Random, folder: Path) -> Readers:
    """The record of a run, of a merged network or of samples, and results."""
    from deme.job.records import MERGED, RUN, SAMPLES, Record, read_record
    from deme.measure.scores import Score, load_scores, save_scores
    from deme.report.tables import score_table

    kind = choose.choice([RUN, MERGED, SAMPLES])
    wanted = Record(kind, {"seed": 0, "weights": ["a"]}, {"free": {"cache_gb": 1.0}, "num_images": 2})
    wanted.write(folder)
    file = folder / kind.file
    content = changed(choose, yaml.safe_load(file.read_text()))
    text = yaml.safe_dump(content).encode(errors="replace")
    file.write_bytes(damaged(choose, text) if choose.random() < 0.5 else text)

    def read() -> None:
        found = read_record(kind, folder)
        if found is not None:
            found.fits(wanted, folder)

    yield read
    results = folder / "results.json"
    save_scores(results, "classifier", [Score("a", ["b"], 2, 1.0, [1.0, 2.0], 1.5, 0.5)], {})
    results.write_bytes(as_json(choose, changed(choose, json.loads(results.read_text()))))

    def show() -> None:
        features, rows = load_scores(results)
        str(score_table(rows, features))

    yield show


def pipeline(choose: random.Random, folder: Path) -> Readers:
    """The JSON files of a pipeline folder."""
    from deme.method.process import process_of
    from deme.method.sampling import make_sampler, try_sampler
    from deme.models.denoisers import load_denoiser, load_scheduler
    from deme.models.encoder_loading import load_encoder, try_out
    from deme.models.pipelines import find_pipeline
    from deme.models.variants import ModelFiles, write_pipeline_files

    make_pipeline(folder)
    file = folder / choose.choice(["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
    file.write_bytes(as_json(choose, changed(choose, json.loads(file.read_text()))))

    def read() -> None:
        found = find_pipeline(str(folder))
        ModelFiles(found, [found / "unet"]).check_fits(load_config("configs/digits.yaml", []))
        unet = load_denoiser(found / "unet")
        scheduler = load_scheduler(found)
        try_out(unet, process_of(scheduler), load_encoder(found, unet))
        sampler = make_sampler(scheduler, choose.choice(["ddim", "pndm", "dpmsolver++", "unipc", "euler"]))
        try_sampler(sampler, 10, (1, 8, 8))
        (folder / "copy").mkdir()
        write_pipeline_files(folder / "copy", found)

    yield read


def safetensors(choose: random.Random, folder: Path) -> Readers:
    """The weights of a pretrained network, a finetuned one, a checkpoint or a classifier."""
    from safetensors.torch import save_file

    from deme.measure.features import Classifier, load_classifier
    from deme.method.merging.task_arithmetic import TaskArithmetic
    from deme.method.task_vectors import merge_tensors
    from deme.models.denoisers import load_denoiser
    from deme.models.weights import WEIGHTS, load_tensors

    make_pipeline(folder)
    classifier = folder / "classifier.safetensors"
    wanted = {"seed": 0}
    metadata = {"made_from": json.dumps(wanted), "held_out_accuracy": "0.5"}
    save_file(Classifier(2, 3).state_dict(), classifier, metadata)
    base = load_tensors(folder / "unet")
    for file in (folder / "unet" / WEIGHTS, classifier):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        if choose.random() < 0.6:
            text = as_json(choose, changed(choose, header))
            content = len(text).to_bytes(8, "little") + text + content[8 + length :]
        else:
            place = choose.choice([8, 8 + length, len(content)])
            content = damaged(choose, content[:place]) + content[place:]
        file.write_bytes(content)

    def merge() -> None:
        tensors = load_tensors(folder / "unet")
        weights = {name: [0.5] for name in base}
        for _ in merge_tensors(base, {"unet": tensors}, weights, TaskArithmetic()):
            pass

    yield merge
    yield lambda: load_denoiser(folder / "unet")
    yield lambda: load_classifier(classifier, wanted)


def checkpoint(choose: random.Random, folder: Path) -> Readers:
    """A checkpoint's state and tensors."""
    from deme.config.trainings import Finetune
    from deme.training.state import CheckpointWriter, TrainingState, load_newest_checkpoint

    def state() -> TrainingState:
        student = torch.nn.Linear(2, 2)
        trained = TrainingState(student, Finetune())
        student(torch.ones(2)).sum().backward()
        trained.optimizer.step()
        trained.finish_step()
        return trained

    writer = CheckpointWriter(folder, keep=1)
    writer.write(state(), log=folder)
    writer.wait()
    writer.thread.shutdown()
    file = choose.choice(sorted((folder / "step-00000001").iterdir()))
    scalars = folder / "step-00000001" / "state.json"
    content = json.loads(scalars.read_text())
    if file == scalars:
        file.write_bytes(as_json(choose, changed(choose, content)))
    else:
        file.write_bytes(damaged(choose, file.read_bytes()))
    yield lambda: load_newest_checkpoint(folder, state(), 10)


def npz(choose: random.Random, folder: Path) -> Readers:
    """Reference statistics."""
    from deme.measure.reference import load_reference
    from deme.measure.scores import frechet_distance

    kinds = [np.float32, np.float16, np.int8, np.bool_, np.complex64, "U3", "S2", "M8[s]", [("a", "f8"), ("b", "i4")]]
    shapes = [(), (0,), (1,), (2,), (2, 2), (0, 0), (3, 2), (2, 2, 2)]
    arrays = {"mu": np.zeros(2), "sigma": np.eye(2), "features": np.zeros((3, 2)), "made_from": np.array("{}")}
    for _ in range(choose.randint(0, 2)):
        array = np.zeros(choose.choice(shapes), choose.choice(kinds))
        if choose.random() < 0.3:
            array = np.array(choose.choice([np.nan, 1e308, -1, "{", "[]", "null", '{"a": 1}', "[" * 100_000]))
        arrays[choose.choice([*arrays, "x"])] = array
    if choose.random() < 0.2:
        del arrays[choose.choice([*arrays])]
    file = folder / "reference.npz"
    with zipfile.ZipFile(file, "w", choose.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            text = buffer.getvalue()
            if choose.random() < 0.2:  # numpy reads this itself, with the checksum of the archive in order
                text = damaged(choose, text[:128]) + text[128:]
                text = text.replace(b"(2, 2)", choose.choice([b"(2, 2)", b"(9999999, 9999999)", b"(-2, 2)", b"(2,)"]))
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), text, archive.compression)  # without the time
    if choose.random() < 0.4:
        file.write_bytes(damaged(choose, file.read_bytes()))

    def read() -> None:
        found, _ = load_reference(file)
        frechet_distance(found.mu, found.sigma, np.zeros_like(found.mu), np.eye(len(found.mu)))

    yield read


def parquet(choose: random.Random, folder: Path) -> Readers:
    """A data set of images with labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from deme.data.examples import load_evaluation_images, load_training_images
    from deme.data.opening import data_hashes, open_source

    buffer = io.BytesIO()
    Image.effect_noise((9, 8), 50).save(buffer, "PNG")
    png = buffer.getvalue()
    count = 3
    whole = [{"bytes": png, "path": None}] * count
    images = {
        "whole": whole,
        "bytes": [png] * count,
        "damaged": [{"bytes": damaged(choose, png), "path": None}, *whole[1:]],
        "neither": [{"bytes": None, "path": None}, *whole[1:]],
        "missing": [None, *whole[1:]],
        "path": [
            {"bytes": None, "path": choose.choice(["x.png", "", "a\0b", "/", "https://0.0.0.0/a.png"])},
            *whole[1:],
        ],
        "other fields": [{"data": png}] * count,
        "bytes alone": [{"bytes": png}] * count,
        "path alone": [{"path": "x.png"}] * count,
        "text": ["x.png"] * count,
        "numbers": [1] * count,
        "lists": [[1, 2]] * count,
        "pixels": [[[0, 255], [255, 0]]] * count,
        "lists of images": [[{"bytes": png, "path": None}]] * count,
        "nothing": [None] * count,
    }
    labels = [[0, 1, 0], ["a", "b", "a"], [0.5, float("nan"), 1], [None] * 3, [0, None, 1], [[0], [1], [0]]]
    labels += [[{"a": 1}] * 3, [True, False, True], [b"a", b"b", b"a"], [2**63 - 1, 0, 1], ["a", "", "é"]]
    table = pa.table({"image": images[choose.choice([*images])], "label": choose.choice(labels)})
    file = folder / "data" / "train.parquet"
    file.parent.mkdir()
    pq.write_table(table, file)
    if choose.random() < 0.3:
        file.write_bytes(damaged(choose, file.read_bytes()))
    kinds = {"cache_gb": choose.choice([0, 1]), "cache_disk_gb": choose.choice([0, 1])}
    data = Data(name=str(folder / "data"), skip_unreadable=choose.random() < 0.5, **kinds)
    channels = choose.choice([1, 3])

    def train() -> None:
        images = load_training_images(open_source(data), channels, folder / "cache").training
        images.batch(range(len(images)), np.random.default_rng(0))

    yield train
    yield lambda: load_evaluation_images(open_source(data), folder / "cache")
    yield lambda: data_hashes(open_source(data), folder / "cache", with_labels=True)


def png(choose: random.Random, folder: Path) -> Readers:
    """An image among samples, and among the data."""
    from deme.data.examples import load_training_images
    from deme.data.opening import open_source
    from deme.data.samples import check_sizes, list_images, missing_seeds, read_images

    mode = choose.choice(["L", "RGB", "RGBA", "LA", "P", "1", "I;16", "I", "F", "CMYK"])
    size = choose.choice([(1, 1), (7, 7), (8, 8), (3, 9), (1, 2000), (64, 64)])
    image = Image.new(mode, size)
    kind = choose.choice(["PNG", "PNG", "PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP", "GIF"])
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind)
    except (OSError, KeyError, ValueError):  # not every format has every mode
        image.convert("RGB").save(buffer, kind := "PNG")
    content = buffer.getvalue()
    if kind == "PNG" and choose.random() < 0.6:
        content = with_other_chunks(choose, content)
    if choose.random() < 0.5:
        content = damaged(choose, content)
    samples = folder / "samples"
    (folder / "data" / "train" / "kind").mkdir(parents=True)
    samples.mkdir()
    for path in (samples / "000000.png", folder / "data" / "train" / "kind" / "a.png"):
        path.write_bytes(content)
    data = Data(name=str(folder / "data"), label_column=None, resolution=choose.choice([1, 8]))

    def score() -> None:
        paths = list_images(samples)
        check_sizes(paths)
        read_images(paths)

    yield score
    yield lambda: missing_seeds(samples, range(1))
    if choose.random() < 0.05:  # datasets takes a tenth of a second
        yield lambda: load_training_images(open_source(data), choose.choice([1, 3]), folder / "cache")


def pickles(choose: random.Random, folder: Path) -> Readers:
    """A published file, and pretrained weights that torch.save wrote."""
    from deme.models.weights import load_tensors
    from scripts.published import read_published, rename_projections

    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    state = network.state_dict() | {"adapter_list.0.weight": torch.ones(1)}
    buffer = io.BytesIO()
    torch.save(choose.choice([network, state]), buffer)
    file = folder / PICKLED_WEIGHTS
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            text = old.read(name)
            if name.endswith("data.pkl") or choose.random() < 0.05:
                text = damaged(choose, text)
            new.writestr(zipfile.ZipInfo(name), text)
    if choose.random() < 0.2:
        file.write_bytes(damaged(choose, file.read_bytes()))
    yield lambda: rename_projections(read_published(file), 1, 1)
    yield lambda: load_tensors(folder)


def make_pipeline(folder: Path) -> None:
    """A pipeline with a tiny UNet."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [4]}
    unet = UNet2DModel(8, 1, 1, layers_per_block=1, norm_num_groups=2, attention_head_dim=2, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)


FORMATS = {
    read.__name__: read
    for read in (
        configuration,
        record,
        pipeline,
        safetensors,
        checkpoint,
        npz,
        parquet,
        png,
        pickles,
        run_files,
        storage,
    )
}
