import importlib
import multiprocessing
import os
import re
from contextlib import nullcontext
from pathlib import Path

import pytest

from deme.errors import RunError, UserError
from deme.job.files import (
    TEMPORARY,
    atomic_file,
    atomic_folder,
    check_apart,
    checkpoint_steps,
    locked,
    make_folder,
    read_yaml,
    remove_leftovers,
    sha256,
)


def test_a_file_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail():
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_small_file_is_replaced_whole_and_one_that_fails_leaves_nothing(tmp_path):
    def write(path: Path, text: str) -> None:
        with atomic_file(path, is_durable=False) as temporary:
            temporary.write_text(text)

    for text in ("first", "second"):
        write(tmp_path / "a", text)
        assert (tmp_path / "a").read_text() == text
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="folder: cannot be written: Is a directory"):
        write(tmp_path / "folder", "third")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    (path / "old").touch()

    def fail():
        with atomic_folder(path) as temporary:
            (temporary / "half").touch()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "a"
    for name in ("first", "second"):
        with atomic_folder(path) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / name).write_text(name)
    assert [file.name for file in path.rglob("*")] == ["sub", "second"]
    assert list(tmp_path.iterdir()) == [path]


def test_unfinished_files_are_no_images_to_pytorch_fid(tmp_path):
    with atomic_file(tmp_path / "000000.png") as temporary:
        temporary.touch()
        assert not list(tmp_path.glob("*.png"))


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    """Of the file or folder that is asked for, and of nobody else's."""
    for name in ("a-0123abcd", "a-b-0123abcd", "b.png-0123abcd", "b.txt-0123abcd", "[a]-0123abcd"):
        (tmp_path / f"{TEMPORARY}{name}").mkdir()
    (tmp_path / "kept").touch()
    remove_leftovers(tmp_path / "a")
    remove_leftovers(tmp_path / "[a]")
    remove_leftovers(tmp_path, "*.png")
    left = [path.name.removeprefix(TEMPORARY) for path in sorted(tmp_path.iterdir())]
    assert left == ["a-b-0123abcd", "b.txt-0123abcd", "kept"]


SYSTEM_CALLS = ("os.replace", "os.open", "os.fsync", "os.close", "shutil.rmtree", "tempfile.mkdtemp")


def replace_folder(path: Path) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "new").write_text("new")


@pytest.mark.parametrize("call", SYSTEM_CALLS)
def test_a_kill_between_any_two_calls_of_a_replacement_loses_nothing(tmp_path, call):
    """Before and after the nth of them: the next lock finds the old folder or the new one, whole, and nothing else."""
    for number in range(1, 9):
        for killed_before in (True, False):
            folder = tmp_path / f"{number}{killed_before}"
            (folder / "a").mkdir(parents=True)
            (folder / "a" / "old").write_text("old")
            ended = multiprocessing.get_context("fork").Process(
                target=kill_at, args=(call, number, killed_before, folder / "a")
            )
            ended.start()
            ended.join()
            with locked(folder / "a", "key"):
                assert [path.name for path in folder.iterdir() if path.suffix != ".lock"] == ["a"]
                [file] = (folder / "a").iterdir()
                assert file.name == file.read_text() in ("old", "new")


def kill_at(call: str, number: int, killed_before: bool, path: Path) -> None:
    """Replace a folder in this process, which dies at the nth call of a function."""
    module = importlib.import_module(call.split(".")[0])
    original = getattr(module, call.split(".")[1])
    count = 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == number and killed_before:
            os._exit(9)
        result = original(*args, **kwargs)
        if count == number:
            os._exit(9)
        return result

    setattr(module, call.split(".")[1], counted)
    replace_folder(path)
    os._exit(0)


def test_a_link_to_a_folder_elsewhere_is_kept_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "a")
    for _ in range(2):
        replace_folder(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "disk" / "a" / "new").exists()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("output", "apart"), [("in", False), ("in/side", False), ("", False), ("link/x", False), ("out", True)]
)
def test_an_output_must_lie_apart_from_its_inputs(tmp_path, output, apart):
    """Equal, inside, above, by a link; a folder beside it is fine."""
    (tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with (
        nullcontext()
        if apart
        else pytest.raises(UserError, match=r"^merge\.output=.*: is, holds or lies in .*in, which")
    ):
        check_apart("merge.output", tmp_path / output, [tmp_path / "in"])


def test_a_folder_below_a_file_is_refused_with_the_key(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^merge\.output: cannot create the folder .*file/a: Not a directory$"):
        make_folder(tmp_path / "file" / "a", "merge.output")


@pytest.mark.parametrize("content", ["- 1", "a: [", "!!python/object/apply:os.getcwd []"])
def test_yaml_that_is_no_plain_mapping_is_refused(tmp_path, content):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError, match=r"a\.yaml"):
        read_yaml(tmp_path / "a.yaml")


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 5000,
        "a: &a [*a]",
        "a: &a {<<: *a}",
        "a: &a [1, 1]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)}, ' * 9}]\n" for i in range(20)),
        "a: 2020-13-45",
        "a: " + "9" * 5000,
        "? [a]\n: 1",
        "a: \udc80",
    ],
)
def test_a_record_that_stands_for_more_than_it_says_or_for_nothing_is_named(tmp_path, text):
    file = tmp_path / "best.yaml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=re.escape(str(file))) as error:
        read_yaml(file)
    assert len(str(error.value).splitlines()) == 1


def test_checkpoints_are_those_that_have_such_a_name(tmp_path):
    for name in ("step-x", "step-00000005", "step-100000000", "step-7", "step-\u0661" * 8, "step-00000006 (copy)"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").touch()
    assert checkpoint_steps(tmp_path) == [5, 100_000_000]
    assert checkpoint_steps(tmp_path / "missing") == []


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(tmp_path, monkeypatch):
    """The run would begin anew, and delete them."""

    def refuse(_):
        raise PermissionError

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(PermissionError):
        checkpoint_steps(tmp_path)
