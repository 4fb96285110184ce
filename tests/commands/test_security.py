"""Nothing that is downloaded or stands in a data folder is executed; YAML and weights are plain data."""

import re
import shutil
import stat
from pathlib import Path

import pytest
from conftest import REPOSITORY, run
from PIL import Image

from deme.job.files import atomic_file, atomic_folder

PROGRAM = "import pathlib\npathlib.Path({marker!r}).touch()\n"
DANGEROUS = [
    r"trust_remote_code",
    r"\byaml\.(unsafe_|full_)?load\(",
    r"\bpickle\.loads?\(",
    r"torch\.load\((?!.*weights_only=True)",
    r"allow_pickle=True",
    r"weights_only=False",
    r"shell=True",
    r"\bos\.system\(",
    r"(?<!\.)\b(eval|exec)\(",
    r"^\s*eval\s",
    r"python[\w.]* -c .*\$",
]


@pytest.mark.parametrize("pattern", DANGEROUS)
def test_no_source_opens_a_door(pattern):
    """The scripts and the package, in Python and in shell; tests make hostile files themselves."""
    folders = [REPOSITORY / name for name in ("deme", "scripts", "docs", "benchmarks", ".ci")]
    sources = [*REPOSITORY.glob("*.py"), *(path for folder in folders for path in folder.rglob("*"))]
    sources = [path for path in sources if path.suffix in (".py", ".sh") or path.parent.name == ".ci"]
    assert {"pretrain.py", "task_vectors.py", "setup.sh", "import_published.py", "run"} <= {
        path.name for path in sources
    }
    assert [source.name for source in sources if re.search(pattern, source.read_text(), re.MULTILINE)] == []


def test_programs_in_a_pipeline_or_data_folder_are_not_run(config_file, pretrained):
    """Custom code beside the weights, as the Hub allows it, and a loading script beside the images."""
    root = config_file.parent
    marker = str(root / "executed")
    shutil.copytree(pretrained, root / "copy")
    index = root / "copy" / "model_index.json"
    index.write_text(index.read_text().replace('"diffusers"', '"custom"'))
    programs = [root / "copy" / "custom.py", root / "copy" / "unet" / "custom.py", root / "copy" / "pipeline.py"]
    (root / "data" / "train").mkdir(parents=True)
    Image.effect_noise((8, 8), 50).save(root / "data" / "train" / "a.png")
    programs += [root / "data" / "data.py", root / "data" / "train" / "data.py"]
    for program in programs:
        program.write_text(PROGRAM.format(marker=marker))
    options = ["model.pretrained=copy", "data.name=data", "data.label_column=null", "finetune.max_steps=1"]
    assert "left out: 2 other files (data.py, train/data.py)" in run("finetune.py", config_file, *options).stdout
    for script in ("merge.py", "sample_ddp.py"):
        run(script, config_file, *options)
    assert not Path(marker).exists()


def test_unfinished_files_are_private_and_finished_ones_follow_the_umask(tmp_path):
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "file").touch()
    with atomic_file(tmp_path / "file") as temporary:
        assert mode(temporary) == 0o600
    with atomic_file(tmp_path / "small", is_durable=False) as temporary:
        assert mode(temporary) == 0o600
    assert mode(tmp_path / "file") == mode(tmp_path / "small") == mode(tmp_path / "usual" / "file")
    with atomic_folder(tmp_path / "folder") as temporary:
        assert mode(temporary) == 0o700
    assert mode(tmp_path / "folder") == mode(tmp_path / "usual")
