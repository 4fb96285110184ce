"""The reports of all benchmarks: results/NAME.json, and a table in README.md."""

import json
import os
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path

from deme.job.records import processor

FOLDER = Path(__file__).resolve().parent


def machine(device: str) -> str:
    """One line with the hardware and the relevant versions."""
    import torch

    versions = f"torch {torch.__version__}, diffusers {metadata.version('diffusers')}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {versions}"
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' * (threads > 1)}, {versions}"


def save(name: str, device: str, rows: list[dict], table: str, ceiling: dict[str, float] | None = None) -> None:
    """Print the table; unless --quick is given, write results/NAME-DEVICE.json and the benchmark's part of README.md.

    Args:
        ceiling: the machine's limits, where they were measured in this run already; empty where no speed is measured.
    """
    if "--quick" in sys.argv:
        print(table)
        return
    from benchmarks import measure

    ceiling = measure.ceiling(device) if ceiling is None else ceiling
    if ceiling:
        table = f"{table}\n\n{measure.ceiling_line(ceiling)}"
    print(table)
    limits = [f"{variable}={os.environ[variable]}" for variable in measure.INSTRUCTION_LIMITS if variable in os.environ]
    command = shlex.join([*limits, "python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    place = "-".join([name, device, *(["avx2"] if limits else [])])
    content = {"command": command, "machine": machine(device), "ceiling": ceiling, "rows": rows}
    write_results(place, content)
    put(FOLDER / "README.md", place, f"`{command}` on {content['machine']}:\n\n{table}")


def write_results(place: str, content: dict) -> None:
    """Write results/PLACE.json."""
    (FOLDER / "results").mkdir(exist_ok=True)
    (FOLDER / "results" / f"{place}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def put(page: Path, place: str, content: str) -> None:
    """Replace the text between the markers of a place in a Markdown page; without markers, append both."""
    part = f"<!-- {place} -->\n{content}\n<!-- end of {place} -->"
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(f"<!-- {place} -->.*<!-- end of {place} -->", re.DOTALL)
    text = pattern.sub(lambda _: part, text) if pattern.search(text) else f"{text.rstrip()}\n\n{part}\n"
    page.write_text(text, encoding="utf-8")
