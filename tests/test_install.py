"""`pip install .`: the command `deme` and `import deme` from any folder."""

import shutil
import subprocess
import sys
import tomllib

import pytest
from conftest import REPOSITORY


def test_every_package_is_named():
    """A package that pyproject.toml forgets would be missing where it is installed alone."""
    named = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        str(path.parent.relative_to(REPOSITORY)).replace("/", ".") for path in REPOSITORY.glob("deme/**/__init__.py")
    }
    assert set(named) == {"deme.scripts", *found}


@pytest.mark.long
def test_what_is_installed_runs_from_any_folder(tmp_path):
    """Configurations, assets and the page's templates are there: merge.py and report.py work on the digits."""
    source, target, folder = (tmp_path / name for name in ("source", "target", "elsewhere"))
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    for name in listed.splitlines():
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, source / name)
    folder.mkdir()
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, source], check=True)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(target)}

    def deme(*arguments: str) -> str:
        command = [sys.executable, str(target / "bin/deme"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    assert "finetune, merge" in deme("--help")
    own = ["finetune.max_steps=1", "finetune.preview_every=null", "timesteps.num_ranges=2"]
    deme("finetune", *own)
    deme("merge", *own, "merge.coefficients=null")
    deme("report", *own)
    assert (folder / "runs/digits/merged/unet/config.json").is_file()
    assert "digits" in (folder / "runs/digits/report.html").read_text()
    assert "digits search" in deme("compare", "--config", "configs/comparison/ablations.yaml", "--dry-run", *own)
    program = "import deme.projection; from diffusers import DDIMPipeline; "
    program += "print(type(DDIMPipeline.from_pretrained('runs/digits/merged').unet).__name__)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert loaded.stdout.strip() == "ProjectedUNet2DModel", loaded.stderr
    unknown = subprocess.run([sys.executable, str(target / "bin/deme"), "merg"], capture_output=True, env=environment)
    assert unknown.returncode == 2
