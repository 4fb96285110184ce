"""Which of requirements.txt's packages this Python lacks, one a line; another version than the pinned one will do."""

from importlib import metadata
from pathlib import Path

DEVELOPMENT = "# development"

lines = (Path(__file__).resolve().parent.parent / "requirements.txt").read_text(encoding="utf-8").splitlines()
for line in lines:
    if line == DEVELOPMENT:
        break
    if line and not line.startswith("#"):
        try:
            metadata.version(line.split("==")[0])
        except metadata.PackageNotFoundError:
            print(line)
