"""Files and folders are replaced as a whole."""

from pathlib import Path

import pytest

from c2f_ray.data.atomic import remove_folder, replacing, sha256, write_text


def test_a_file_stays_as_it_was_until_the_new_one_is_complete(tmp_path: Path):
    path = tmp_path / "new" / "file.json"
    write_text(path, "before")
    with replacing(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert [each.name for each in path.parent.iterdir()] == ["file.json"]


def test_a_folder_is_replaced_with_all_that_was_in_it(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    (tmp_path / "model.partial").mkdir()  # of a process that was killed
    (tmp_path / "model.partial" / "half").touch()
    with replacing(tmp_path / "model", durable=True) as partial:
        partial.mkdir()
        (partial / "new").touch()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["model", "model/new"]


def test_an_error_leaves_what_was_there(tmp_path: Path):
    write_text(tmp_path / "file", "before")
    with pytest.raises(OSError, match="disk"), replacing(tmp_path / "file") as partial:
        partial.write_text("half")
        raise OSError("disk")
    assert (tmp_path / "file").read_text() == "before"


def test_a_link_to_a_folder_is_replaced_and_the_folder_stays(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "best").symlink_to("a")
    with replacing(tmp_path / "best") as link:
        link.symlink_to("b")
    assert (tmp_path / "best").resolve() == tmp_path / "b"
    remove_folder(tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "best"]


def test_the_digest_is_that_of_the_bytes(tmp_path: Path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
