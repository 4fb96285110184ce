"""Score folders of samples: the Fréchet distance to the configured data, beside its spread over blocks of seeds.

    accelerate launch evaluate.py
    accelerate launch evaluate.py "evaluate.samples=[runs/digits/samples/merged]" evaluate.features=inception

evaluate.features=inception gives FID, as `python -m pytorch_fid SAMPLES STATISTICS` does; classifier gives the
classifier FD, in the features of a small network trained on the data's labels. The reference statistics, in
pytorch_fid's npz format, and the classifier are made once and kept in runs/<name>/stats/. Prints a table, writes
results.json.
"""

import json
from dataclasses import asdict
from pathlib import Path

from deme.command import provenance, run_script
from deme.config import CONTINUED, Config, UserError

ROW_ORDER = ("pretrained", CONTINUED, "ensemble", "merged")  # then the others by name


def sample_folders(config: Config) -> list[Path]:
    if config.evaluate.samples is not None:
        return [Path(folder) for folder in config.evaluate.samples]
    folders = [folder for folder in (config.folder / "samples").glob("[!.]*") if folder.is_dir()]
    return sorted(folders, key=lambda f: (ROW_ORDER.index(f.name) if f.name in ROW_ORDER else len(ROW_ORDER), f.name))


def results_file(config: Config) -> Path:
    return Path(config.evaluate.output) if config.evaluate.output is not None else config.folder / "results.json"


def plan(config: Config) -> str:
    folders = "\n  ".join(map(str, sample_folders(config))) or "no sample folders yet"
    return f"score in {config.evaluate.features} features -> {results_file(config)}\n  {folders}"


def main(config: Config) -> None:
    import numpy as np

    from deme.devices import make_accelerator
    from deme.files import atomic_file, make_folder
    from deme.metrics import frechet_distance, inception_frechet_distance, statistics
    from deme.samples import list_images, read_images

    settings, output = config.evaluate, results_file(config)
    accelerator = make_accelerator("no", "evaluate")

    # --- what is scored
    folders = sample_folders(config)
    if not folders:
        raise UserError(f"evaluate.samples={settings.samples}: no sample folders in {config.folder / 'samples'}")
    files = {folder: list_images(folder) for folder in folders}
    for folder, paths in files.items():
        size, rest = divmod(len(paths), settings.blocks)
        if rest or size < 2:
            raise UserError(f"evaluate.blocks={settings.blocks}: {folder} holds {len(paths)} images: no equal blocks")

    # --- the feature network and the data's statistics
    make_folder(config.folder / "stats", "output_dir")
    network, made_by = feature_network(config, accelerator)
    reference = reference_statistics(config, accelerator, network, made_by)
    distance = inception_frechet_distance if settings.features == "inception" else frechet_distance

    # --- scores of all images together and of each block, in seed order
    rows = []
    for folder, paths in files.items():
        features = extract(
            accelerator, network, lambda part, paths=paths: read_images(paths[part]), len(paths), settings.batch_size
        )
        if features.shape[1] != len(reference[0]):
            size = f"{len(reference[0])} features, {settings.features} has {features.shape[1]}"
            raise UserError(f"evaluate.reference={settings.reference}: holds statistics of {size}")
        if accelerator.is_main_process:
            blocks = [distance(*statistics(block), *reference) for block in np.split(features, settings.blocks)]
            pooled = distance(*statistics(features), *reference)
            rows.append({"samples": str(folder), "images": len(paths), "pooled": pooled, "blocks": blocks})

    # --- table and results.json
    if accelerator.is_main_process:
        names = {str(folder): [path.name for path in paths] for folder, paths in files.items()}
        add_spread(rows, names)
        make_folder(output.parent, "evaluate.output")
        results = {"features": settings.features, **made_by, "rows": rows, **provenance(config)}
        with atomic_file(output) as temporary:
            temporary.write_text(json.dumps(results, indent=2), encoding="utf-8")
        print(table(rows, "FID" if settings.features == "inception" else "classifier FD"), output, sep="\n")


def evaluated_data(config: Config) -> dict:
    """The settings that decide which images the reference is made of."""
    not_in_evaluation = ("center_crop", "random_flip", "cache_gb")
    return {key: value for key, value in asdict(config.data).items() if key not in not_in_evaluation}


def feature_network(config: Config, accelerator) -> tuple:
    """The network whose features are compared, and what made it (for the classifier, its held-out accuracy too)."""
    from deme.classifier import load_classifier, save_classifier, train_classifier
    from deme.data import load_evaluation_images
    from deme.metrics import load_inception

    if config.evaluate.features == "inception":
        with accelerator.main_process_first():  # one process downloads the weights
            return load_inception().to(accelerator.device), {}

    cache, epochs = config.folder / "stats" / "classifier.safetensors", config.evaluate.classifier_epochs
    made_from = {"seed": config.seed, "data": evaluated_data(config), "epochs": epochs}
    if accelerator.is_main_process and load_classifier(cache, made_from) is None:
        images, labels = load_evaluation_images(config.data, config.image_cache)
        if labels is None:
            raise UserError("data.label_column=None: evaluate.features=classifier needs labels")
        pixels = images.batch(range(len(images)))
        save_classifier(cache, *train_classifier(pixels, labels, epochs, config.seed, accelerator.device), made_from)
    accelerator.wait_for_everyone()
    classifier, accuracy = load_classifier(cache, made_from)
    accelerator.print(f"classifier: held-out accuracy {accuracy:.1%}")
    return classifier.to(accelerator.device), {"held_out_accuracy": accuracy}


def reference_statistics(config: Config, accelerator, network, made_by: dict) -> tuple:
    """μ and Σ of the data's features: from evaluate.reference, or made once from the data as training sees it."""
    from deme.data import load_evaluation_images
    from deme.files import sha256
    from deme.metrics import load_statistics, save_statistics, statistics

    if config.evaluate.reference is not None:
        return load_statistics(Path(config.evaluate.reference))[:2]
    file = config.folder / "stats" / f"{config.evaluate.features}.npz"
    made_from = {"data": evaluated_data(config), "features": config.evaluate.features}
    if made_by:
        made_from["classifier"] = sha256(config.folder / "stats" / "classifier.safetensors")
    if file.exists():
        *saved, saved_from = load_statistics(file)
        if saved_from == made_from:
            return tuple(saved)
    images, _ = load_evaluation_images(config.data, config.image_cache)
    features = extract(
        accelerator,
        network,
        lambda part: images.batch(range(part.start, part.stop)),
        len(images),
        config.evaluate.batch_size,
    )
    reference = statistics(features)
    if accelerator.is_main_process:
        save_statistics(file, *reference, made_from)
        print(f"wrote {file}: statistics of {len(images):,} images")
    accelerator.wait_for_everyone()
    return reference


def extract(accelerator, network, read, count: int, batch_size: int):
    """The features of `count` images over all processes: float32 numpy array (count, D), the same in every process.

    Args:
        read: slice → uint8 RGB images (B, 3, H, W).
    """
    import torch
    from tqdm import tqdm

    edges = [count * rank // accelerator.num_processes for rank in range(accelerator.num_processes + 1)]
    first, last = edges[accelerator.process_index], edges[accelerator.process_index + 1]
    starts = tqdm(range(first, last, batch_size), "features", disable=not accelerator.is_main_process, leave=False)
    with torch.inference_mode():
        parts = [
            network.features(read(slice(start, min(start + batch_size, last))).to(accelerator.device))
            for start in starts
        ]
    shares = accelerator.gather(accelerator.pad_across_processes(torch.cat(parts)))
    shares = shares.cpu().chunk(accelerator.num_processes)
    return torch.cat([share[: edges[i + 1] - edges[i]] for i, share in enumerate(shares)]).numpy()


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


def table(rows: list[dict], score: str) -> str:
    """The rows as a Markdown table."""

    def with_error(value: float | None, error: float | None, sign: str = "") -> str:
        if value is None:
            return "-"
        return f"{value:{sign}.4f}" + (f" ± {error:.4f}" if error is not None else "")

    spread_title = f"mean ± s.d. of {len(rows[0]['blocks'])} blocks"
    lines = [
        f"| model | images | {score}, all images | {spread_title} | paired difference to pretrained ± s.e. |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        spread = with_error(row["mean"], row["standard_deviation"])
        paired = with_error(row.get("difference"), row.get("difference_standard_error"), "+")
        lines.append(f"| {Path(row['samples']).name} | {row['images']:,} | {row['pooled']:.4f} | {spread} | {paired} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(__doc__, plan, main)
