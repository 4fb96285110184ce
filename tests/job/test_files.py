import pytest

from deme.errors import RunError, UserError
from deme.job.files import (
    TEMPORARY,
    atomic_file,
    atomic_folder,
    make_folder,
    read_yaml,
    remove_leftovers,
    sha256,
    write_small_file,
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
    for content in (b"first", b"second"):
        write_small_file(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == content
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="folder: cannot be written: Is a directory"):
        write_small_file(tmp_path / "folder", b"third")
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
    (tmp_path / f"{TEMPORARY}a-123").mkdir()
    (tmp_path / f"{TEMPORARY}b-123").touch()
    (tmp_path / "kept").touch()
    (tmp_path / f"{TEMPORARY}a-0123abcd").mkdir()
    (tmp_path / f"{TEMPORARY}a-b-0123abcd").mkdir()
    remove_leftovers(tmp_path, "a")
    assert not (tmp_path / f"{TEMPORARY}a-0123abcd").exists()
    assert (tmp_path / f"{TEMPORARY}a-b-0123abcd").exists()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


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
