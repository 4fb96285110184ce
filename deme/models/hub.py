"""Pipelines on the Hub: what is read of them is downloaded, or taken from the Hub's cache, and nothing else."""

from collections.abc import Callable
from pathlib import Path

from deme.errors import UserError, one_line
from deme.models.weights import STEM, is_whole, weights_files

SETTINGS = [
    *("model_index.json", "config.json", "scheduler_config.json", "unet/config.json", "vae/config.json"),
    *("scheduler/scheduler_config.json", "text_encoder/config.json", "tokenizer/*.json", "tokenizer/*.txt"),
]
WITH_WEIGHTS = {"unet": STEM, "vae": STEM, "text_encoder": "model"}  # how the names of their weights' files begin
FORMS = (  # in the order in which weights are asked for, until there are some: patterns that follow the name
    (".safetensors", "-*-of-*.safetensors", ".safetensors.index.json"),
    (".fp16.safetensors", ".fp16-*-of-*.safetensors", "-*-of-*.fp16.safetensors", ".safetensors.index.fp16.json"),
    (".bin",),
)


def download(name: str, revision: str | None, check: Callable[[Path], object]) -> Path:
    """The folder in the Hub's cache of a pipeline, with all that is read of it. Offline that is enough, whatever else
    the Hub has.

    Args:
        name: owner/name.
        revision: a branch, a tag or a commit; None: the newest.
        check: raises where a folder of settings is no pipeline's; called before the weights are downloaded.
    """
    from huggingface_hub import snapshot_download

    reasons = []  # why the cache has to do

    def fetch(revision: str | None, patterns: list[str]) -> Path:
        wanted = {"repo_id": name, "revision": revision, "allow_patterns": patterns}
        if not reasons:
            try:
                return Path(snapshot_download(**wanted))
            except Exception as error:  # network, name and permission errors have no common class
                reasons.append(one_line(error))
        try:
            return Path(snapshot_download(**wanted, local_files_only=True))
        except Exception as error:
            # that of a folder which lacks some of the files, but perhaps none that is read
            if not hasattr(error, "snapshot_path"):
                raise UserError(f"neither a pipeline folder nor a reachable Hub id: {reasons[0]}") from None
            return Path(error.snapshot_path)

    folder = fetch(revision, SETTINGS)
    try:
        check(folder)
        parts = [part for part in WITH_WEIGHTS if (folder / part).is_dir()]
        for part in parts if "unet" in parts else [""]:
            stem = WITH_WEIGHTS.get(part, STEM)
            begin = f"{part}/" if part else ""
            for form in FORMS if part in ("unet", "") else FORMS[:-1]:
                # the same commit; config.json, as the Hub's client warns of patterns that fit nothing
                fetch(folder.name, [f"{begin}config.json", *(f"{begin}{stem}{end}" for end in form)])
                if is_whole(folder / part, stem):
                    break
            weights_files(folder / part, stem)  # says what is missing
    except UserError as error:
        why = f"; the Hub's cache does not hold all of it, and the rest cannot be had: {reasons[0]}" if reasons else ""
        raise UserError(f"{error}{why}") from None
    return folder
