"""Folders that are whole or not there, also after a crash between two renames."""

import pytest

from toolkit.errors import UserError
from toolkit.files import new_folder, run_folder, write_text


def fill(out, text):
    with new_folder(out) as folder:
        (folder / "a").write_text(text)


def test_a_folder_is_replaced_whole_or_left_alone(tmp_path):
    out = tmp_path / "x" / "out"
    fill(out, "one")
    fill(out, "two")
    with pytest.raises(RuntimeError), new_folder(out) as folder:
        (folder / "a").write_text("three")
        raise RuntimeError
    assert (out / "a").read_text() == "two" and [p.name for p in out.parent.iterdir()] == ["out"]


def test_the_only_copy_survives_a_crash_between_the_renames(tmp_path):
    out = tmp_path / "out"
    fill(out, "one")
    out.rename(tmp_path / ".out.old")  # where a killed run may leave it
    with pytest.raises(RuntimeError), new_folder(out):
        raise RuntimeError
    assert (out / "a").read_text() == "one"


def test_places_that_cannot_be_written_name_the_argument(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out .* cannot be written"), new_folder(tmp_path / "file" / "out"):
        pass
    with pytest.raises(UserError, match="--output_dir .* cannot be written"):
        run_folder(tmp_path / "file")
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(UserError, match="--output_dir .* holds shards"):
        run_folder(tmp_path)


def test_write_text_leaves_one_file(tmp_path):
    write_text(tmp_path / "a", "Überleitung")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "Überleitung" and len(list(tmp_path.iterdir())) == 1
