"""Where a pipeline comes from: a folder, or the Hub."""

import re
from pathlib import Path

from deme.config.networks import HUB_ID
from deme.config.paths import DENOISER
from deme.config.sections import SINGLE_FILE
from deme.errors import UserError, one_line
from deme.job.repository import found_path
from deme.models.pipelines import FORMS, SETTINGS_FILES, STEM, STEMS, check_pipeline, has_weights, weights_files


def find_folder(source: str) -> Path | None:
    """A folder relative to the working directory, or else to the repository; None if there is none."""
    folder = found_path(source)
    return folder if folder.is_dir() else None


def hub_name(source: str) -> str | None:
    """owner/name of a pipeline, model or data set on the Hub, without its @revision; None for a folder or file."""
    match = re.fullmatch(rf"({HUB_ID})(@.+)?", source)
    is_local = find_folder(source) is not None or source.endswith(SINGLE_FILE)
    return match[1] if match is not None and not is_local else None


def find_pipeline(source: str) -> Path:
    """The folder of a pipeline: a local one, or owner/name[@revision] in the Hub's cache.

    Only files that are read are downloaded, none without a connection.
    """
    if (folder := find_folder(source)) is not None:
        return check_pipeline(folder)
    if (name := hub_name(source)) is None:
        raise UserError("no such folder")
    from huggingface_hub import snapshot_download

    reasons = []  # why the Hub could not be reached

    def fetch(revision: str | None, patterns: list[str]) -> Path:
        offline = bool(reasons)
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=offline))
        except Exception as error:  # network, name and permission errors have no common class
            reasons.append(one_line(error))
            if not offline:
                return fetch(revision, patterns)  # from the cache
            if not hasattr(error, "snapshot_path"):  # the cache has nothing of it
                raise UserError(f"neither a pipeline folder nor a reachable Hub id: {reasons[0]}") from None
            return Path(error.snapshot_path)

    folder = fetch(source.removeprefix(name).removeprefix("@") or None, SETTINGS_FILES)
    try:
        check_pipeline(folder)
        parts = [part for part in STEMS if (folder / part).is_dir()]
        for part in parts if DENOISER in parts else [""]:
            stem = STEMS.get(part, STEM)
            for form in FORMS if part in (DENOISER, "") else FORMS[:-1]:
                # config.json is asked for too: the Hub's client warns where no file fits
                fetch(folder.name, [str(Path(part, file)) for file in ("config.json", *(stem + end for end in form))])
                if has_weights(folder / part, stem):
                    break
            weights_files(folder / part, stem)
    except UserError as error:
        why = f"; the Hub's cache does not hold all of it, and the rest cannot be had: {reasons[0]}" if reasons else ""
        raise UserError(f"{error}{why}") from None
    return folder
