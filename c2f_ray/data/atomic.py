"""Files and folders that are complete or not there: written under another name beside their place, then renamed.

Nothing here imports torch.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


@contextmanager
def replacing(path: Path, *, suffix: str = PARTIAL, durable: bool = False) -> Iterator[Path]:
    """Yields a free path beside ``path`` to write a file, folder or link at, and renames it to ``path`` at the end.

    Replaces what is at ``path``. If the block raises, that stays, and so does what was written beside it.
    ``durable``: returns when the rename is on the disk; the block must sync a folder's files itself.
    """
    partial = path.with_name(path.name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    yield partial
    if durable:
        sync(partial)
    if partial.is_dir() and not partial.is_symlink():
        _remove(path)  # a folder cannot be renamed onto another
    partial.rename(path)
    if durable:
        sync(path.parent)


def write_text(path: Path, text: str, *, suffix: str = PARTIAL) -> None:
    """Writes a text file in UTF-8."""
    with replacing(path, suffix=suffix) as partial:
        partial.write_text(text, encoding="utf-8")


def remove_folder(folder: Path) -> None:
    """Renames a folder, and then removes it, so that it is complete for as long as it has its name."""
    partial = folder.with_name(folder.name + PARTIAL)
    folder.rename(partial)
    shutil.rmtree(partial)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sha256(path: Path) -> str:
    """Returns the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
