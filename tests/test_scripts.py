import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from conftest import REPOSITORY, environment


def test_the_digits_script_runs_from_pretrained_to_pictures_and_skips_what_is_complete(tmp_path):
    """The README's first command, made short by overrides: four rows, the pictures, and nothing done twice."""
    options = [f"output_dir={tmp_path / 'with space'}", "finetune.max_steps=2", "finetune.preview_every=2"]
    options += [
        "sample.num_images=24",
        "sample.num_inference_steps=2",
        "evaluate.blocks=2",
        "evaluate.classifier_epochs=1",
    ]
    settings = environment() | {
        "CONDA_DEFAULT_ENV": "deme",  # the environment that runs the tests
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }

    def run_script() -> str:
        result = subprocess.run(
            ["bash", REPOSITORY / "scripts" / "digits.sh", *options], env=settings, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    first, second = run_script(), run_script()
    rows = re.findall(r"^\| (\w+) \| 24 \| \d", first, flags=re.MULTILINE)
    assert rows == ["pretrained", "continued", "ensemble", "merged"]
    pictures = first.split("pictures:\n")[1].splitlines()
    assert len(pictures) == 4 + 4 + 4  # grids; previews of the ranges, and of the control, which trains 4 times as long
    assert all(Path(picture).exists() for picture in pictures)
    assert len(re.findall("is complete", second)) == 4 + 1 + 1  # ranges, control, merge
    assert second.count("0 of 24 images to draw") == 4
    assert first.split("| model |")[1] == second.split("| model |")[1]


def test_conda_gets_the_pinned_requirements():
    environment_file = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    assert environment_file["name"] == "deme"
    assert {"pip": ["-r requirements.txt"]} in environment_file["dependencies"]
