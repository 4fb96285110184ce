"""Files of a folder, in archives too: which of them are images, how they are opened, and whether they changed."""

import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from posixpath import splitext
from typing import Any

from deme.data.tables import TABLES
from deme.errors import UserError, one_line

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
DATA_SETS = (".arrow", ".parquet", ".tar")  # files that hold whole data sets
NO_IMAGES = (".h5", ".hdf", ".mpg", ".mpeg")  # suffixes of formats that PIL knows but can't draw


@dataclass(frozen=True)
class File:
    """A file of a folder, or of a zip archive in it.

    Args:
        name: from the folder on, with /; that of a file in an archive is as if it were unpacked there.
        path: as `open_file` takes it.
    """

    name: str
    path: str

    @property
    def suffix(self) -> str:
        """In lower case, with the dot."""
        return splitext(self.name)[1].lower()

    @property
    def is_hidden(self) -> bool:
        """Whether programs keep it for themselves: .name, or in a folder .name or __name."""
        *folders, name = self.name.split("/")
        return name.startswith(".") or any(folder.startswith((".", "__")) for folder in folders)

    @property
    def is_image(self) -> bool:
        """Whether PIL reads files of this suffix."""
        return self.suffix in image_suffixes() and not self.is_hidden

    @property
    def is_metadata(self) -> bool:
        """Whether it says what is known of the images beside it and below."""
        return self.name.rpartition("/")[2].lower() in METADATA and not self.is_hidden


@cache
def image_suffixes() -> frozenset[str]:
    """Those of the formats that PIL reads, in lower case."""
    from PIL import Image

    Image.init()
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name in Image.OPEN) - {*NO_IMAGES}


def open_file(path: str) -> Any:
    """A file, opened to read bytes: of this host, or at an address that `datasets` opens, such as zip://a.png::b.zip."""
    if "://" not in path or os.path.isabs(path):
        return open(path, "rb")
    member, _, archive = path.removeprefix("zip://").partition("::")
    if path.startswith("zip://") and os.path.isfile(archive):  # datasets would read its table of contents each time
        return _archive(archive, os.stat(archive).st_ctime_ns).open(member)
    from datasets.utils.file_utils import xopen

    return xopen(path, "rb")


@lru_cache(maxsize=16)
def _archive(path: str, _: int) -> zipfile.ZipFile:
    """An archive that stays open, which threads may read at once."""
    return zipfile.ZipFile(path)


def list_files(folder: Path) -> list[File]:
    """All files of a folder, of those that links lead to, and of zip archives, sorted by name."""
    files = sorted(_walk(os.path.realpath(folder), "", ()), key=lambda file: file.name)
    if len({file.name for file in files}) < len(files):
        [(name, _)] = Counter(file.name for file in files).most_common(1)
        raise UserError(f"holds {name} twice, in archives or beside them")
    return files


def _walk(folder: str, prefix: str, above: tuple[str, ...]) -> Iterator[File]:
    """The files of a folder whose names begin with `prefix`; `above` are the folders around it, links resolved."""
    real = os.path.realpath(folder)
    if real in above:
        raise UserError(f"{prefix}: a link that leads back to {real}")
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except OSError as error:
        raise UserError(f"{folder}: {one_line(error)}") from None
    for entry in found:
        if entry.is_dir():
            yield from _walk(entry.path, f"{prefix}{entry.name}/", (*above, real))
        elif entry.name.lower().endswith(".zip") and not entry.name.startswith("."):
            yield from _members(entry.path, prefix)
        elif entry.is_file() or entry.is_symlink():  # a link to nothing is named when it is opened
            yield File(prefix + entry.name, entry.path)


def _members(archive: str, prefix: str) -> Iterator[File]:
    try:
        with zipfile.ZipFile(archive) as opened:
            names = [member.filename for member in opened.infolist() if not member.is_dir()]
    except Exception as error:  # zipfile raises whatever a damaged archive leads to
        raise UserError(f"{archive}: cannot be read: {one_line(error)}") from None
    for name in names:
        if "::" in f"{name}{archive}":
            raise UserError(f"{archive}: {name} cannot be read from an archive, as :: stands in the names")
        yield File(prefix + name, f"zip://{name}::{archive}")


def holds_images(files: list[File]) -> bool:
    """Whether a folder is one of images, rather than of tables that a few pictures stand beside.

    Tables that are called as images are, such as 0.json beside 0.png, do not count.
    """
    images = [file for file in files if file.is_image]
    stems = {splitext(file.name)[0] for file in images}
    others = [file for file in files if file.suffix in (*DATA_SETS, *TABLES) and not file.is_metadata]
    others = [file for file in others if splitext(file.name)[0] not in stems and not file.is_hidden]
    whole = [file for file in others if file.suffix in DATA_SETS]
    if whole and len(images) > len(whole):
        names = f"{whole[0].name} beside {images[0].name}"
        raise UserError(f"holds {names}: which are the data? Name the folder of one of them, or move the others")
    most = max(Counter(file.suffix for file in others).values(), default=0)
    return len(images) > 0 and not whole and len(images) >= most


def stamp(paths: Iterable[str]) -> str:
    """A SHA-256 that changes when one of these files may have changed: of its size, inode and change time.

    The last two can't be set by programs that keep time stamps. An address is taken to name the same for ever.
    """
    digest = hashlib.sha256()
    seen = {}
    for path in paths:
        file = path if os.path.isabs(path) else path.rpartition("::")[2].removeprefix("file://")
        if file not in seen:
            try:
                status = os.stat(file)
                seen[file] = f"{status.st_size} {status.st_ino} {status.st_ctime_ns}"
            except (OSError, ValueError):
                seen[file] = "-"
        digest.update(f"{path}\0{seen[file]}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
