import os
import subprocess

import numpy as np
import pytest
import yaml

from deme.config.experiment import Config
from deme.config.sections import Search
from deme.errors import UserError
from deme.job import records
from deme.job.records import MERGED, PROVENANCE, RUN, SAMPLES, Record, digest_of, provenance, read_record

MADE_FROM = {"weights": "a" * 64, "steps": 50}
BESIDE = {RUN: {"free": {"log_every": 1}}, SAMPLES: {"num_images": 4}, MERGED: {}}


@pytest.mark.parametrize("kind", BESIDE, ids=lambda kind: kind.name)
def test_records_are_read_as_they_were_written(tmp_path, kind):
    written = Record(kind, MADE_FROM, BESIDE[kind] | provenance(Config()))
    written.write(tmp_path)
    found = read_record(kind, tmp_path)
    assert found == written
    assert found.fits(Record(kind, MADE_FROM), tmp_path)
    assert read_record(kind, tmp_path / "absent") is None


def test_other_settings_are_refused_or_replaced_by_kind(tmp_path, capsys):
    """Refused by name of what differs, with its values where they are short; replaced, saying so."""
    other = {"weights": "b" * 64, "steps": 20}
    with pytest.raises(UserError, match=r"^holds samples of other settings: steps=20 \(was 50\), weights; go away$"):
        Record(SAMPLES, MADE_FROM).fits(Record(SAMPLES, other), tmp_path, "go away")
    assert not Record(SAMPLES, MADE_FROM).fits(Record(SAMPLES, other), tmp_path, overwrite=True)
    assert not Record(MERGED, MADE_FROM).fits(Record(MERGED, other), tmp_path)
    assert capsys.readouterr().out == 2 * f"{tmp_path} was made from something else: replacing it\n"


def test_a_setting_that_only_one_of_two_has_is_a_difference(tmp_path):
    for before, now in (({"a": 1}, {"a": 1, "b": 2}), ({"a": 1, "b": 2}, {"a": 1})):
        with pytest.raises(UserError, match="b="):
            Record(RUN, before).fits(Record(RUN, now), tmp_path)


@pytest.mark.parametrize("content", ["identity: null\nnum_images: 4\n", "identity: {}\n", "num_images: 4\n"])
def test_damaged_records_are_named(tmp_path, content):
    (tmp_path / SAMPLES.file).write_text(content)
    with pytest.raises(UserError, match=r"samples\.yaml: not the record of samples: (identity|num_images) is missing"):
        read_record(SAMPLES, tmp_path)


@pytest.mark.parametrize("value", ["true", "[1]", "a"])
def test_what_stands_beside_a_record_has_its_type(tmp_path, value):
    (tmp_path / SAMPLES.file).write_text(f"identity: {{}}\nnum_images: {value}\n")
    with pytest.raises(UserError, match=r"not the record of samples: num_images is "):
        read_record(SAMPLES, tmp_path)


def test_caches_keep_their_names():
    """Decoded images of 30 GB are found again: the name is that of the values alone, in their order."""
    values = {"fingerprint": "abc", "image_column": "image", "resolution": 256, "channels": 3, "skip_unreadable": False}
    assert digest_of(values) == "345348b062a618ab"
    assert digest_of(values | {"resolution": 128}) != digest_of(values)


def test_provenance_is_plain_yaml():
    record = provenance(Config())
    assert yaml.safe_load(yaml.safe_dump(record)) == record
    assert tuple(record) == PROVENANCE
    assert record["versions"]["numpy"] == np.__version__
    assert record["processor"]
    assert record["config"]["finetune"]["range"] is None
    secret = provenance(Config(search=Search(storage="postgresql://me:secret@host/db")))
    assert "secret" not in str(secret)


def test_the_commit_is_read_without_writing_into_the_repository(tmp_path, monkeypatch):
    """`git describe --dirty` would rewrite the index, and a kill in between leaves its lock behind for good."""

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    git("init", "--quiet")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "--quiet", "--message=a")
    monkeypatch.setattr(records, "REPOSITORY", tmp_path)
    commit = git("rev-parse", "HEAD").strip()
    index = tmp_path / ".git" / "index"
    os.utime(tmp_path / "file")
    os.utime(index, (1, 1))
    assert records._git_commit.__wrapped__() == commit
    assert index.stat().st_mtime == 1
    (tmp_path / "file").write_text("b")
    assert records._git_commit.__wrapped__() == f"{commit}-dirty"
