"""Score folders of samples against the configured data: Fréchet distance, KID, precision and recall.

    accelerate launch evaluate.py
    accelerate launch evaluate.py "evaluate.samples=[runs/digits/samples/merged]" evaluate.features=inception
    accelerate launch evaluate.py "evaluate.samples=[]"      # only the reference statistics

evaluate.features=inception gives FID, as `python -m pytorch_fid SAMPLES STATISTICS` does; classifier gives the
classifier FD, in the features of a small network trained on the data's labels. The reference statistics, in
pytorch_fid's npz format, and the classifier are made once and kept in runs/<name>/stats/. Prints a table, writes
results.json.
"""

import json
from dataclasses import asdict
from pathlib import Path

from deme.command import provenance, run_script
from deme.config import CONTINUED, Config, Evaluate, UserError
from deme.files import markdown_table

REFERENCE_PART = 50_000  # images whose features are in memory at once
ROW_ORDER = ("pretrained", CONTINUED, "ensemble", "merged")  # then the others by name


def sample_folders(config: Config) -> list[Path]:
    if config.evaluate.samples is not None:
        return [Path(folder) for folder in config.evaluate.samples]
    folders = [folder for folder in (config.folder / "samples").glob("[!.]*") if folder.is_dir()]
    return sorted(folders, key=lambda f: (ROW_ORDER.index(f.name) if f.name in ROW_ORDER else len(ROW_ORDER), f.name))


def reference_file(config: Config) -> Path:
    if config.evaluate.reference is not None:
        return Path(config.evaluate.reference)
    return config.folder / "stats" / f"{config.evaluate.features}.npz"


def plan(config: Config) -> str:
    folders = "\n  ".join(map(str, sample_folders(config))) or "no sample folders yet"
    return f"score in {config.evaluate.features} features -> {config.results}\n  {folders}"


def main(config: Config) -> None:
    from deme.files import atomic_file, make_folder
    from deme.samples import check_sizes, list_images

    settings, output = config.evaluate, config.results

    # --- what is scored; torch is imported after what can be answered without it
    seen = settings.features != "classifier" or config.data.resolution >= 8  # it halves an image three times
    config.data.check("resolution", seen, "evaluate.features=classifier needs at least 8 pixels")
    if output.is_dir():
        raise UserError(f"evaluate.output={output}: is a folder; results are a JSON file")
    folders = sample_folders(config)
    if not folders and settings.samples is None:
        raise UserError(f"evaluate.samples={settings.samples}: no sample folders in {config.folder / 'samples'}")
    files = {folder: list_images(folder) for folder in folders}
    for folder, paths in files.items():
        size, rest = divmod(len(paths), settings.blocks)
        if rest or size < 2:
            least = f"which is not {settings.blocks} equal block(s) of at least 2"
            raise UserError(f"evaluate.blocks={settings.blocks}: {folder} holds {len(paths)} image(s), {least}")
        check_sizes(paths)

    # --- the feature network and the data's statistics
    from deme.devices import in_main_process, locked_by_all, make_accelerator

    accelerator = make_accelerator("no", "evaluate")
    with locked_by_all(accelerator, output, "output_dir" if settings.output is None else "evaluate.output"):
        with locked_by_all(accelerator, config.folder / "stats", "output_dir"):
            make_folder(config.folder / "stats", "output_dir")
            network, made_by = feature_network(config, accelerator)
            reference = reference_statistics(config, accelerator, network, made_by)
        if not folders:
            return

        # --- scores of all images together and of each block, in seed order
        rows = [score_folder(config, accelerator, network, reference, *item) for item in files.items()]

        # --- table and results.json
        def write() -> None:
            names = {str(folder): [path.name for path in paths] for folder, paths in files.items()}
            add_spread(rows, names)
            results = {"features": settings.features, **made_by, "rows": rows, **provenance(config)}
            with atomic_file(output) as temporary:
                temporary.write_text(json.dumps(results, indent=2), encoding="utf-8")
            print(table(rows, settings.features), output, sep="\n")

        in_main_process(accelerator, write)


def score_folder(config: Config, accelerator, network, reference, folder: Path, paths: list[Path]) -> dict | None:
    """The row of one sample folder; None in all processes but the main one."""
    from deme.samples import drawn_from, read_images

    settings = config.evaluate
    features = extract(accelerator, network, lambda part: read_images(paths[part]), len(paths), settings.batch_size)
    if features.shape[1] != len(reference.mu):
        size = f"{len(reference.mu)} features, {settings.features} has {features.shape[1]}"
        raise UserError(f"evaluate.reference={settings.reference}: holds statistics of {size}")
    if not accelerator.is_main_process:
        return None
    source = {"samples": str(folder), "weights": drawn_from(folder), "images": len(paths)}
    return source | scores(features, reference, settings)


def evaluated_data(config: Config) -> dict:
    """The settings that decide which images the reference is made of."""
    not_in_evaluation = ("center_crop", "random_flip", "held_out_images", "cache_gb")
    return {key: value for key, value in asdict(config.data).items() if key not in not_in_evaluation}


def feature_network(config: Config, accelerator) -> tuple:
    """The network whose features are compared, and what made it (for the classifier, its held-out accuracy too)."""
    from deme.classifier import load_classifier, save_classifier, train_classifier
    from deme.data import load_evaluation_images
    from deme.devices import in_main_process
    from deme.metrics import load_inception

    if config.evaluate.features == "inception":
        with accelerator.main_process_first():  # one process downloads the weights
            return load_inception().to(accelerator.device), {}

    cache = config.folder / "stats" / "classifier.safetensors"
    training = {
        "width": config.evaluate.classifier_width,
        "epochs": config.evaluate.classifier_epochs,
        "random_flip": config.data.random_flip,
        "precision": config.evaluate.classifier_precision,
        "seed": config.seed,
    }
    made_from = {"data": evaluated_data(config), **training}

    def train() -> None:
        if load_classifier(cache, made_from) is not None:
            return
        images, labels = load_evaluation_images(config.data, config.image_cache)
        if labels is None:
            raise UserError("data.label_column=None: evaluate.features=classifier needs labels")
        pixels = images.batch(range(len(images)))
        trained = train_classifier(pixels, labels, **training, device=accelerator.device)
        save_classifier(cache, *trained, made_from)

    in_main_process(accelerator, train)
    classifier, accuracy = load_classifier(cache, made_from)
    accelerator.print(f"classifier: held-out accuracy {accuracy:.1%}")
    return classifier.to(accelerator.device), {"held_out_accuracy": accuracy}


def reference_statistics(config: Config, accelerator, network, made_by: dict):
    """The `Reference`: from evaluate.reference, or made once from the data as training sees it."""
    from deme.data import load_evaluation_images
    from deme.files import sha256
    from deme.metrics import Reference, load_reference, save_reference

    file = reference_file(config)
    if config.evaluate.reference is not None:
        return load_reference(file)[0]
    made_from = {"data": evaluated_data(config), "features": config.evaluate.features}
    if made_by:
        made_from["classifier"] = sha256(config.folder / "stats" / "classifier.safetensors")
    if file.exists():
        saved, saved_from = load_reference(file)
        if saved_from == made_from and saved.features is not None:
            return saved
    images, _ = load_evaluation_images(config.data, config.image_cache)
    if len(images) < 2:
        raise UserError(f"data.name={config.data.name}: {len(images)} image, statistics need at least 2")
    parts = (
        extract(
            accelerator,
            network,
            lambda part, start=start: images.batch(range(start + part.start, start + part.stop)),
            min(REFERENCE_PART, len(images) - start),
            config.evaluate.batch_size,
        )
        for start in range(0, len(images), REFERENCE_PART)
    )
    if accelerator.is_main_process:
        save_reference(file, Reference.of(parts, len(images)), made_from)
        print(f"wrote {file}: statistics of {len(images):,} images")
    else:
        for _ in parts:  # its share of the work
            pass
    accelerator.wait_for_everyone()
    return load_reference(file)[0]


def extract(accelerator, network, read, count: int, batch_size: int):
    """The features of `count` images over all processes: float32 numpy array (count, D), the same in every process.

    Args:
        read: slice → uint8 RGB images (B, 3, H, W).
    """
    import torch
    from tqdm import tqdm

    edges = [count * rank // accelerator.num_processes for rank in range(accelerator.num_processes + 1)]
    first, last = edges[accelerator.process_index : accelerator.process_index + 2]
    last = max(first + 1, last)  # a process without a share takes part by an image that is dropped below
    starts = tqdm(range(first, last, batch_size), "features", disable=not accelerator.is_main_process, leave=False)
    with torch.inference_mode():
        parts = [
            network.features(read(slice(start, min(start + batch_size, last))).to(accelerator.device))
            for start in starts
        ]
    shares = accelerator.gather(accelerator.pad_across_processes(torch.cat(parts)))
    shares = shares.cpu().chunk(accelerator.num_processes)
    return torch.cat([share[: edges[i + 1] - edges[i]] for i, share in enumerate(shares)]).numpy()


def scores(features, reference, settings: Evaluate) -> dict:
    """The scores of one folder's features (N, D), in seed order: of all images, and of each of the equal blocks."""
    import numpy as np

    from deme.metrics import (
        NEIGHBORHOOD,
        frechet_distance,
        inception_frechet_distance,
        kernel_distances,
        kernel_subset_size,
        precision_and_recall,
        statistics,
    )

    distance = inception_frechet_distance if settings.features == "inception" else frechet_distance
    blocks = np.split(features, settings.blocks)
    row = {
        "pooled": distance(*statistics(features), reference.mu, reference.sigma),
    }
    row["blocks"] = [row["pooled"]]
    if settings.blocks > 1:
        row["blocks"] = [distance(*statistics(block), reference.mu, reference.sigma) for block in blocks]
    real = reference.features
    if real is None or min(len(real), len(features)) <= NEIGHBORHOOD:
        return row
    size = kernel_subset_size(len(blocks[0]), len(real))
    subsets = [kernel_distances(block, real, size) for block in blocks]
    count = np.size(subsets)
    row["kid"] = float(np.mean(subsets))
    row["kid_standard_error"] = float(np.std(subsets, ddof=1) / count**0.5) if count > 1 else None
    row["kid_blocks"] = [float(block.mean()) for block in subsets]
    row["precision"], row["recall"] = precision_and_recall(features, real)
    return row


def add_spread(rows: list[dict], names: dict[str, list[str]]) -> None:
    """Mean and standard deviation over the blocks; the paired difference to the pretrained row where seeds agree.

    The standard error is that of the mean of the blocks' differences: the same seeds cancel much of the spread.
    """
    import numpy as np

    baseline = next((row for row in rows if Path(row["samples"]).name == "pretrained"), None)
    for row in rows:
        count = len(row["blocks"])
        row["mean"] = float(np.mean(row["blocks"]))
        row["standard_deviation"] = float(np.std(row["blocks"], ddof=1)) if count > 1 else None
        if baseline is None or row is baseline or names[row["samples"]] != names[baseline["samples"]]:
            continue
        differences = np.subtract(row["blocks"], baseline["blocks"])
        row["difference"] = float(differences.mean())
        row["difference_standard_error"] = float(differences.std(ddof=1) / count**0.5) if count > 1 else None


def table(rows: list[dict], features: str) -> str:
    """The rows as a Markdown table."""

    def number(value: float | None, error: float | None = None, form: str = ".4f") -> str:
        if value is None:
            return "-"
        return f"{value:{form}}" + (f" ± {error:{form.lstrip('+')}}" if error is not None else "")

    distance, kernel = ("FID", "KID") if features == "inception" else ("classifier FD", "classifier KID")
    titles = ["model", "images", f"{distance}, all images", f"mean ± s.d. of {len(rows[0]['blocks'])} blocks"]
    titles += ["paired difference to pretrained ± s.e.", f"{kernel} × 10³ ± s.e.", "precision", "recall"]
    lines = []
    for row in rows:
        kid, kid_error = (None if row.get(key) is None else 1e3 * row[key] for key in ("kid", "kid_standard_error"))
        lines.append(
            [
                Path(row["samples"]).name,
                f"{row['images']:,}",
                number(row["pooled"]),
                number(row["mean"], row["standard_deviation"]),
                number(row.get("difference"), row.get("difference_standard_error"), "+.4f"),
                number(kid, kid_error, ".3f"),
                number(row.get("precision"), form=".3f"),
                number(row.get("recall"), form=".3f"),
            ]
        )
    return markdown_table(titles, lines)


if __name__ == "__main__":
    run_script(__doc__, plan, main)
