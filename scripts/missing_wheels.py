"""Print the packages that the scripts need and a Python lacks, with their dependencies, one per line.

    python scripts/missing_wheels.py               # this Python
    python scripts/missing_wheels.py --has FILE    # another, where `python3 -m pip list --format=freeze` printed FILE

What a package needs is known where it is installed: --has is for a Python with all of requirements.txt, whose versions
are named. A package counts as missing if pyproject.toml does not take its version; a name without a version is present.
"""

import argparse
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
DEVELOPMENT = "# development"


def pinned() -> list[Requirement]:
    """requirements.txt without what only development needs."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split(DEVELOPMENT)[0].splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@cache
def installed() -> dict[str, str]:
    """This Python's packages: name → version."""
    return {canonicalize_name(package.name): package.version for package in metadata.distributions()}


def listed(file: Path) -> dict[str, str]:
    """The packages in a file of `name==version`, or of names alone, whose versions are empty."""
    lines = [line.partition("==") for line in file.read_text(encoding="utf-8").split() if line[:1].isalpha()]
    return {canonicalize_name(name): version for name, _, version in lines}


def usable(present: dict[str, str]) -> set[str]:
    """The names of the packages whose versions pyproject.toml takes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    taken = {canonicalize_name(each.name): each.specifier for each in map(Requirement, project["dependencies"])}
    return {
        name
        for name, version in present.items()
        if not version or name not in taken or Version(version).base_version in taken[name]  # also of own builds
    }


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
    for line in missing(pinned(), usable(installed() if here else listed(arguments.has)), here):
        print(line)
