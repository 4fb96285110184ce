import pytest
import torch

from deme.errors import RunError, UserError, blaming, naming, one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("data.name=x: no such folder"), "data.name=x: no such folder"),
        (RunError("disk\nfull"), "disk full"),
        (FileNotFoundError(2, "No such file or directory", "a"), "No such file or directory"),
        (OSError("cannot identify image"), "OSError: cannot identify image"),
        (KeyError("a"), "KeyError: 'a'"),
        (ValueError("one\n  two\tthree"), "ValueError: one two three"),
    ],
)
def test_every_error_becomes_one_line(error, line):
    assert one_line(error) == line


def test_the_reader_of_a_key_names_it():
    """A mistake gets the key in front; other errors pass as they are."""
    with pytest.raises(UserError, match=r"^sample\.model=a: b/unet: missing$"), naming("sample.model", "a"):
        raise UserError("b/unet: missing")
    with pytest.raises(UserError, match=r"^a/b: holds another run$"), naming("a/b"):
        raise UserError("holds another run")
    with pytest.raises(RunError, match=r"^full$"), naming("a"):
        raise RunError("full")


def test_a_full_memory_is_blamed_on_no_file():
    with pytest.raises(UserError, match=r"^a: ValueError: damaged$"), blaming("a"):
        raise ValueError("damaged")
    for full in (MemoryError("full"), torch.OutOfMemoryError("full")):
        with pytest.raises(type(full), match=r"^full$"), blaming("a"):
            raise full
