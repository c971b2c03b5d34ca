"""Safetensors files as streams: read and written front to back, each byte once and hashed on its way.

The library maps a file into memory, or wants all tensors of an output at once; neither bounds a merge's memory.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from xxhash import xxh3_128

from c2f_ray.data.shards import TORCH_DTYPES
from c2f_ray.errors import C2FError

WRITE_BACK = 1 << 22  # bytes of an output after which the disk is told to take them
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "files may not be so large",
}


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Raises C2FError when there is no room for what is written; ``folder`` is where the work is."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise C2FError(
            f"merge: {FULL[error.errno]}: not all could be written into {folder}. Make room and merge again: what is "
            "finished there is kept"
        ) from None


class InputFile:
    """A safetensors file that is read at given places, without mapping it into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("rb", buffering=0)
        os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # twice the readahead
        size = int.from_bytes(self.file.read(8), "little")
        header = json.loads(self.file.read(size))
        self.tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        self.start = 8 + size  # of the data

    def __enter__(self) -> "InputFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def read(self, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes from ``start`` on."""
        while view:
            got = os.preadv(self.file.fileno(), [view], start)
            if not got:
                raise C2FError(f"merge: {self.path} ends at byte {start}, before its tensors do: copy it again")
            start, view = start + got, view[got:]


class TensorReader:
    """One tensor of one model, read once, from its first element to its last."""

    def __init__(self, file: InputFile, name: str) -> None:
        entry = file.tensors[name]
        self.file = file
        self.dtype = TORCH_DTYPES[entry["dtype"]]
        self.shape = tuple(entry["shape"])
        self.next = file.start + entry["data_offsets"][0]
        self.digest = xxh3_128()

    def read(self, count: int, scratch: Tensor | None = None) -> Tensor:
        """The next ``count`` elements, in their own dtype; in ``scratch``, uint8, where it is given."""
        size = count * self.dtype.itemsize
        data = torch.empty(size, dtype=torch.uint8) if scratch is None else scratch[:size]
        view = data.numpy().data
        self.file.read(self.next, view)
        self.digest.update(view)
        self.next += size
        return data.view(self.dtype)


class OutputFile:
    """A file that is written front to back, hashed, and on its way to the disk all the while."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")
        self.digest = xxh3_128()
        self.size = self.sent = 0

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.file.write(data)
        self.size += len(data)
        if self.size - self.sent >= WRITE_BACK:  # begins to write what is not on the disk, and does not wait for it
            os.posix_fadvise(self.file.fileno(), self.sent, self.size - self.sent, os.POSIX_FADV_DONTNEED)
            self.sent = self.size

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
