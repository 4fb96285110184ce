"""Print the packages that the scripts need and a Python lacks, with their dependencies, one per line.

    python scripts/missing_wheels.py               # this Python
    python scripts/missing_wheels.py --has FILE    # another, where `python3 -m pip list --format=freeze` printed FILE

What a package needs is known where it is installed: --has is for a Python with all of requirements.txt, whose versions
are named. Another version than the pinned one will do.
"""

import argparse
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
DEVELOPMENT = "# development"


def pinned() -> list[Requirement]:
    """requirements.txt without what only development needs."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").split(DEVELOPMENT)[0].splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@cache
def installed() -> set[str]:
    """The names of this Python's packages."""
    return {canonicalize_name(package.name) for package in metadata.distributions()}


def listed(file: Path) -> set[str]:
    """The names in a file of `name==version`, or of names alone."""
    lines = file.read_text(encoding="utf-8").split()
    return {canonicalize_name(line.split("==")[0]) for line in lines if line[:1].isalpha()}


def missing(wanted: list[Requirement], present: set[str], here: bool) -> list[str]:
    """Missing packages and dependencies: `name==version`, or the requirement itself.

    Args:
        here: what is present is this Python's, so that its own needs are looked at too; not torch's, which depend on
            how it was built.
    """
    found: dict[str, str] = {}
    seen: set[str] = set()
    queue = list(wanted)
    while queue:
        requirement = queue.pop(0)
        name = canonicalize_name(requirement.name)
        holds = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not holds or name in seen:
            continue
        seen.add(name)
        is_installed = name in installed()
        if name not in present:
            found[name] = f"{name}=={metadata.version(name)}" if is_installed else f"{name}{requirement.specifier}"
        if is_installed and (here or name in found) and name != "torch":
            queue += map(Requirement, metadata.requires(name) or [])
    return sorted(found.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--has", type=Path, metavar="FILE", help="the packages of the other Python")
    arguments = parser.parse_args()
    here = arguments.has is None
    for line in missing(pinned(), installed() if here else listed(arguments.has), here):
        print(line)
