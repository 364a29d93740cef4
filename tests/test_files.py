"""Files that appear whole or not at all, and what is said of those that are no data."""

import os

import pytest

from tinyseg import files


def test_what_is_flushed_may_be_written(tmp_path, monkeypatch):
    """Windows flushes no file that was opened to be read."""
    fcntl = pytest.importorskip("fcntl")
    modes = []

    def note(descriptor):
        modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)

    monkeypatch.setattr(files.os, "fsync", note)
    with files.whole(tmp_path / "a.json") as draft:
        draft.write_text("content", encoding="utf-8")
    assert modes[0] == os.O_RDWR and (tmp_path / "a.json").read_text("utf-8") == "content"


def test_json_is_utf8_with_or_without_its_mark(tmp_path):
    for mark in ("utf-8", "utf-8-sig"):
        (tmp_path / "a.json").write_text('{"1": "胰腺"}', encoding=mark)
        assert files.read_json(tmp_path / "a.json") == {"1": "胰腺"}


@pytest.mark.parametrize(("content", "told"), [
    (b"", "empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    (b"/annex/objects/MD5E-s1--0.nii.gz", "git annex get"),
    (b"\r\n<!DOCTYPE html>\n<html><head>", "web page"),
    (b"<HTML>", "web page"),
    (b"PK\x03\x04\x14\x00", "unpack"),
])
def test_what_stands_in_a_files_place_is_told(content, told, tmp_path):
    assert told in files.identify(content)
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(ValueError, match="dataset.json: .*" + told):
        files.read_json(tmp_path / "dataset.json")


def test_what_may_be_data_is_not_told_apart():
    for content in (b"\x1f\x8b\x08", b'{"labels": {}}', b"\\\x01\x00\x00", b"\x00" * 348):
        assert files.identify(content) == ""
