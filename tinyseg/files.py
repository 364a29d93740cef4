"""Files that appear whole or not at all, folders that one process holds, and what is read of files
that anyone may have changed."""

from __future__ import annotations

import errno
import gzip
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from io import BufferedIOBase
from pathlib import Path

GZIP = b"\x1f\x8b"  # how a packed file begins
DEFLATE = 1032  # the most that deflate can shrink anything (zlib technical details)
LARGEST_JSON = 64 * 2**20  # bytes; Task07 lists 420 scans in 38 kB
STRANGERS = {  # what often stands in a file's place, by its beginning in lower case
    b"version https://git-lfs": "a pointer of Git LFS to the file; fetch that by `git lfs pull`",
    b"/annex/objects/": "a pointer of git-annex to the file; fetch that by `git annex get`",
    b"<!doctype html": "a web page; its site answered with a page, so fetch the file again",
    b"<html": "a web page; its site answered with a page, so fetch the file again",
    b"<?xml": "a web page; its site answered with a page, so fetch the file again",
    b"pk\x03\x04": "a zip archive; unpack it first",
}


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft beside `path` that takes its place at the end, or vanishes if the block fails.

    OSError names `path`, also where the system does not say which file it is about (a full disk).
    """
    draft = path.with_name(f".draft.{os.getpid()}.{path.name}")
    try:
        yield draft
        with open(draft, "r+b") as file:  # Windows flushes only what may be written
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        os.replace(draft, path)
        with suppress(OSError):  # where a folder can be flushed, the name survives a power cut too
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as fault:
        raise OSError(fault.errno or errno.EIO, f"cannot be written: {fault.strerror or fault}",
                      str(path)) from fault
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """`folder` for this process alone: RuntimeError, saying who holds it, where another one does.

    The lock is the system's, on the file run.lock, which stays; it dies with the process, however
    that ends.
    """
    from filelock import FileLock, Timeout  # takes as long to import as all of tinyseg

    lock, holder = FileLock(folder / "run.lock"), folder / "run.holder"
    try:
        lock.acquire(timeout=1)  # seconds, in which another one has said who it is
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise RuntimeError(f"{folder}: is in use by {who}; wait for its end, or take another "
                           "folder") from None
    try:
        with whole(holder) as draft:
            draft.write_text(f"process {os.getpid()} on {platform.node()}, since "
                             f"{datetime.now():%Y-%m-%d %H:%M}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def sweep(folder: Path) -> None:
    """Remove the drafts that killed processes left in `folder` and below."""
    for draft in folder.rglob(".draft.*"):
        draft.unlink(missing_ok=True)


def unpacked(path: Path) -> BufferedIOBase:
    """The file, open to be read, without gzip's packing if it has that, whatever its name says."""
    with open(path, "rb") as file:
        packed = file.read(len(GZIP)) == GZIP
    return gzip.open(path) if packed else open(path, "rb")


def identify(start: bytes) -> str:
    """What a file is, by its first hundred bytes, where those are no data, and what to do; else "".
    """
    if not start:
        return "empty; fetch it again"
    text = start.lstrip().lower()
    return next((told for begin, told in STRANGERS.items() if text.startswith(begin)), "")


def read_json(path: str | Path) -> dict:
    """The JSON object in a file, bounded before it is read; ValueError names the file."""
    path = Path(path)
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path}: found {size} bytes, expected at most {LARGEST_JSON}; this is no"
                         " description of a task or a run")
    try:
        text = path.read_bytes()
        content = json.loads(text)  # UTF-8 whatever the locale
    except (ValueError, RecursionError) as fault:
        told = identify(text[:128]) or f"{fault}; fetch the file again"
        raise ValueError(f"{path}: not valid JSON, {told}") from fault
    if type(content) is not dict:
        raise ValueError(f"{path}: found a {type(content).__name__}, expected an object")
    return content
