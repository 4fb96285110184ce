"""Networks that give features of images: pytorch_fid's Inception, a classifier of the data, and CLIP's score.

Inception features mean nothing on 8×8 digits and their weights are a download; the penultimate features of a small
network that was trained on the data's labels are the same idea, made here.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation
from tqdm import tqdm, trange

from deme.config.experiment import Config
from deme.config.sections import LEAST_CLASSIFIED
from deme.data.decoding import Source, ahead
from deme.data.examples import load_evaluation_images
from deme.data.opening import data_hashes
from deme.data.samples import read_images
from deme.errors import UserError, blaming, one_line
from deme.job.files import atomic_file
from deme.job.processes import Processes, in_main_process
from deme.job.repository import found_folder
from deme.models.encoder_loading import check_filled, check_tokenizer
from deme.models.pipelines import hub_name
from deme.models.weights import save_tensors

HELD_OUT_SHARE = 0.2  # of the data, on which the classifier's accuracy is measured
LARGEST = 32  # pixels: the sides of larger images are halved before the classifier's first stage
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
LABEL_SMOOTHING = 0.05


class Inception(nn.Module):
    """pytorch_fid's feature network, fed as pytorch_fid does; its weights are downloaded into torch hub's folder."""

    def __init__(self):
        from pytorch_fid import inception

        super().__init__()
        # pytorch_fid would unpickle the downloaded file; it holds plain tensors, so weights_only loads it
        inception.load_state_dict_from_url = functools.partial(torch.hub.load_state_dict_from_url, weights_only=True)
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(inception.FID_WEIGHTS_URL).name
        try:
            self.network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
        except OSError as error:
            remedy = f"put {inception.FID_WEIGHTS_URL} into {file.parent}"
            raise UserError(f"the Inception weights can't be downloaded ({one_line(error)}); {remedy}") from None
        except (RuntimeError, EOFError, UnpicklingError) as error:
            remedy = "delete it to download them again"
            raise UserError(f"{file}: not the Inception weights ({one_line(error)}); {remedy}") from None

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 3, H, W) → float32 (B, 2048)."""
        return self.network(pixels.float() / 255)[0].flatten(1)


class Classifier(nn.Module):
    """Residual network of three stages after a convolution to `width` channels; `features` is its pooled last stage.

    A stage is a convolution that doubles the channels, max pooling that halves the resolution, and torchvision's
    basic residual block.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        layers = [*Conv2dNormActivation(3, width)]
        for channels in (2 * width, 4 * width, 8 * width):
            layers += [*Conv2dNormActivation(channels // 2, channels), nn.MaxPool2d(2), BasicBlock(channels, channels)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(8 * width, num_classes)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 3, H, W), H and W ≥ 8 → float32 (B, 8 · width)."""
        images = pixels.float() / 127.5 - 1
        while images.shape[-1] > LARGEST:
            images = F.avg_pool2d(images, 2)
        return self.layers(images).mean((2, 3))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 3, H, W) → logits (B, classes)."""
        return self.head(self.features(pixels))


class ClipScores(nn.Module):
    """The CLIP score of single images, as a network that `extract` takes.

    It is 100 × the cosine between the embeddings of an image and of its prompt: the score of Hessel et al. 2021
    (https://arxiv.org/abs/2104.08718) without its clipping at 0 and with 100 in place of its factor of 2.5. The model
    is in float32; only safetensors are read. It is in a folder, relative to the working directory or else to the
    repository, or on the Hub.
    """

    def __init__(self, source: str):
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
        from transformers.utils import logging

        super().__init__()
        folder = found_folder(source)
        if folder is None and hub_name(source) is None:
            raise UserError("no such folder")
        if folder is not None and not (folder / "config.json").is_file():  # transformers would take OpenAI's settings
            raise UserError("not the folder of a CLIP model: config.json is missing")
        logging.set_verbosity_error()  # what does not fit is told below, in one line
        place = folder or source
        with blaming("no CLIP model can be loaded from it"):
            options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
            # sizes that differ are listed in the report, as what is missing
            model, report = CLIPModel.from_pretrained(place, ignore_mismatched_sizes=True, **options)
            self.tokenizer = CLIPTokenizer.from_pretrained(place)
            self.image_processor = CLIPImageProcessor.from_pretrained(place)
        check_filled(report)
        check_tokenizer(self.tokenizer, model.config.text_config.vocab_size)
        self.model = model.eval()

    def read(self, paths: Sequence[Path], prompts: Sequence[str], part: slice) -> Any:
        """A part of a folder's images as the model takes them, float32 (B, 3, S, S), and their prompts; thread-safe."""
        images = read_images(paths[part])
        batch = self.image_processor(images, input_data_format="channels_first", return_tensors="pt")
        batch["prompts"] = list(prompts[part])
        return batch

    def features(self, batch: Any) -> torch.Tensor:
        """B images with their prompts → the score of each, float32 (B, 1). Equal prompts are embedded once."""
        pixels, prompts = batch["pixel_values"], batch["prompts"]
        texts = list(dict.fromkeys(prompts))
        # here and not in `read`: the tokenizer is no two threads' at a time
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        embedded = self.model(**tokens.to(pixels.device), pixel_values=pixels)  # both of length 1
        own = embedded.text_embeds[[texts.index(prompt) for prompt in prompts]]
        return 100 * (embedded.image_embeds * own).sum(1, keepdim=True)


@torch.inference_mode()
def extract(
    processes: Processes, network: nn.Module, read: Callable, images: range, batch_size: int, threads: int = 0
) -> np.ndarray:
    """The features of images over all processes: float32, shape (len(images), D), the same in every process.

    `read` gives a slice of them, as uint8 RGB (B, 3, H, W) or what else the network's `features` takes and `to` moves.
    It is called ahead by so many threads.
    """
    count = processes.num_processes
    edges = [images.start + len(images) * rank // count for rank in range(count + 1)]
    first = edges[processes.process_index]
    last = max(first + 1, edges[processes.process_index + 1])  # one without a share takes part, and is dropped below
    batches = [slice(place, min(place + batch_size, last)) for place in range(first, last, batch_size)]
    is_quiet = not processes.is_main_process
    parts = tqdm(ahead(read, batches, threads), "features", len(batches), disable=is_quiet, leave=False, delay=5)
    share = torch.cat([network.features(part.to(processes.device)) for part in parts])
    shares = processes.gather(processes.pad_across_processes(share)).cpu().chunk(count)
    features = torch.cat([share[: edges[i + 1] - edges[i]] for i, share in enumerate(shares)]).numpy()
    if not np.isfinite(features).all():
        raise UserError("the feature network gives NaN or infinite values")
    return features


def check_classified(features: str, width: int, height: int) -> None:
    """Refuse images that are too small for the classifier, if `features` are its."""
    if features == "classifier" and min(width, height) < LEAST_CLASSIFIED:
        rule = f"evaluate.features=classifier needs at least {LEAST_CLASSIFIED} pixels"
        raise UserError(f"images of {width} x {height} pixels, {rule}")


def trained_classifier(config: Config, processes: Processes, source: Source) -> tuple[Classifier, float]:
    """The classifier of the data, trained once and kept, on the device; its held-out accuracy."""
    file, cache, settings = config.paths.classifier, config.paths.image_cache, config.evaluate
    record = {"data": source.data.tagged("statistics"), **data_hashes(source, cache, with_labels=True)}
    record |= {key: getattr(settings, f"classifier_{key}") for key in ("width", "epochs", "batch_size")}
    record |= {"random_flip": config.data.random_flip, "precision": settings.classifier_precision, "seed": config.seed}

    def train() -> None:
        if load_classifier(file, record) is not None:
            return
        images, labels = load_evaluation_images(source, cache)
        if labels is None:
            raise UserError("data.label_column=null: evaluate.features=classifier needs labels")
        if int(HELD_OUT_SHARE * len(images)) == 0:
            few = "too few for evaluate.features=classifier, which tests itself on a fifth"
            raise UserError(f"data.name={source.data.name}: holds {len(images)} image(s), {few}")
        classifier, accuracy = train_classifier(images.batch(range(len(images))), labels, config, processes.device)
        metadata = {"made_from": json.dumps(record), "held_out_accuracy": repr(accuracy)}
        with atomic_file(file) as temporary:
            save_tensors(classifier.state_dict(), temporary, metadata)

    in_main_process(processes, train)
    classifier, accuracy = load_classifier(file, record)
    return classifier.to(processes.device), accuracy


def train_classifier(
    pixels: torch.Tensor, labels: torch.Tensor, config: Config, device: torch.device
) -> tuple[Classifier, float]:
    """Train a classifier on four fifths of uint8 RGB images (N, 3, H, W) of int64 classes (N,), chosen by the seed.

    It is returned in eval mode, with its accuracy on the other fifth.
    """
    settings = config.evaluate
    torch.manual_seed(config.seed)
    order = torch.randperm(len(pixels))  # data sets come sorted: by class, or by writer as the digits
    held_out, kept = order.tensor_split([int(HELD_OUT_SHARE * len(order))])
    pixels, labels = pixels.to(device), labels.to(device)
    classifier = Classifier(settings.classifier_width, int(labels.max()) + 1)
    classifier.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=WEIGHT_DECAY)
    steps = settings.classifier_epochs * -(-len(kept) // settings.classifier_batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    in_bf16 = settings.classifier_precision == "bf16"
    for _ in trange(settings.classifier_epochs, desc="classifier", unit="epoch", mininterval=1):
        for batch in kept[torch.randperm(len(kept))].split(settings.classifier_batch_size):
            if len(batch) == 1:  # too few for batch normalization
                continue
            with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):  # features are always float32
                logits = classifier(_augment(pixels[batch], config.data.random_flip))
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    classifier.eval().to(memory_format=torch.contiguous_format)
    with torch.inference_mode():
        predictions = torch.cat([classifier(pixels[batch]).argmax(1) for batch in held_out.split(500)])
    return classifier, (predictions == labels[held_out]).float().mean().item()


def _augment(pixels: torch.Tensor, random_flip: bool) -> torch.Tensor:
    """Images (B, C, S, S), each moved by up to S / 8 pixels, the edge repeated, and mirrored at random if asked for."""
    count, _, _, size = pixels.shape
    margin = max(1, size // 8)
    places = torch.arange(size, device=pixels.device)
    shifts = torch.randint(-margin, margin + 1, (2, count, 1), device=pixels.device)
    rows, columns = (places + shifts).clamp(0, size - 1)
    if random_flip:
        columns = torch.where(torch.rand(count, 1, device=pixels.device) < 0.5, columns.flip(1), columns)
    # the two index arrays stand at the front of the result: (B, S, S, C)
    images = torch.arange(count, device=pixels.device)[:, None, None]
    return pixels.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def load_classifier(path: Path, made_from: dict[str, Any]) -> tuple[Classifier, float] | None:
    """The kept classifier and its held-out accuracy; None if it was made from something else or is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if json.loads(metadata["made_from"]) != made_from:
            return None
        weights = load_file(path)
        classifier = Classifier(len(weights["layers.1.bias"]), len(weights["head.bias"]))
        classifier.load_state_dict(weights)
        return classifier.eval(), float(metadata["held_out_accuracy"])
    except Exception as error:  # a damaged header or tensor leads to errors of safetensors, json and torch
        print(f"{path}: unreadable, training it again ({one_line(error)})")
        return None
