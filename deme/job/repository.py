"""Where the scripts lie, and the command `deme` of an installed package, which runs them."""

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
# the folder of the scripts, with configs/, assets/ and scripts/; an installed package holds a copy
REPOSITORY = PACKAGE / "scripts" if (PACKAGE / "scripts").is_dir() else PACKAGE.parent


def found_path(source: str | Path) -> Path:
    """A path in the working directory, or in the repository if there is something there alone."""
    return next((path for path in (Path(source), REPOSITORY / source) if path.exists()), Path(source))


def found_folder(source: str) -> Path | None:
    """The same if it is a folder."""
    folder = found_path(source)
    return folder if folder.is_dir() else None


def main() -> None:
    """Replace this process by the script that the first argument names, in NUM_PROCESSES processes."""
    names = sorted(path.stem for path in REPOSITORY.glob("*.py"))
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in names:
        usage = f"usage: deme SCRIPT [--help] [--config FILE] [section.key=value ...]\nscripts: {', '.join(names)}"
        print(usage, file=sys.stdout if name in ("-h", "--help") else sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 2)
    processes = "1" if name == "compare" else os.environ.get("NUM_PROCESSES", "1")  # compare.py starts others itself
    command = ["bash", str(REPOSITORY / "scripts/launch.sh"), processes, str(REPOSITORY / f"{name}.py"), *arguments]
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])  # this python first
    os.execvpe("bash", command, os.environ | {"PATH": path})
