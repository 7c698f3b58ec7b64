"""A large file written once and read back, past the page cache (O_DIRECT) where the file system has that.

Through the page cache the kernel spends more time on a checkpoint's pages than SHA-256 does, and a file read back from
it shows what is in memory. Read past it, it shows what is on the disk.
"""

import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

_ALIGNMENT = 4096  # of addresses, offsets and lengths, for O_DIRECT
_BLOCK_BYTES = 8 << 20
_BUFFERS = 4  # being filled, written, read back, and one to spare


class VerificationError(RuntimeError):
    """A file does not hold what was written into it: a fault of the disk, the memory or of t2r, not of the input."""


class VerifiedWriter:
    """A new file, written from start to end.

    While the caller makes the next bytes, three threads hash the last ones, write them, and read back and compare what
    is written. Use as a context; `finish` ends the file and returns its SHA-256.

    Raises:
        VerificationError: by any method: what was read back is not what was written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = _open_new(path)
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="compare")
        # mappings begin at a page, as O_DIRECT needs
        self._buffers = [memoryview(mmap.mmap(-1, _BLOCK_BYTES)) for _ in range(_BUFFERS)]
        self._read_back = memoryview(mmap.mmap(-1, _BLOCK_BYTES))
        self._busy: list[list[Future[None]]] = [[] for _ in range(_BUFFERS)]
        self._current = self._filled = self._size = 0

    def write(self, data: memoryview) -> None:
        """Append bytes; they are copied before the call returns."""
        while len(data):
            count = min(len(data), _BLOCK_BYTES - self._filled)
            self._buffers[self._current][self._filled : self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == _BLOCK_BYTES:
                self._send()

    def finish(self) -> str:
        """Write what is left, sync, and return the SHA-256 of everything, hex."""
        self._send()
        for buffer in range(_BUFFERS):
            self._wait(buffer)
        os.ftruncate(self._descriptor, self._size)
        os.fsync(self._descriptor)
        return self._digest.hexdigest()

    def _send(self) -> None:
        buffer = self._buffers[self._current]
        # an unaligned end is written with what the buffer holds behind it, and cut off by `finish`
        length = -(-self._filled // _ALIGNMENT) * _ALIGNMENT
        hashed = self._hasher.submit(self._digest.update, buffer[: self._filled])
        written = self._writer.submit(self._write_all, buffer[:length], self._size)
        checked = self._checker.submit(self._compare, written, buffer[:length], self._size)
        self._busy[self._current] = [hashed, checked]
        self._size += self._filled
        self._filled = 0
        self._current = (self._current + 1) % _BUFFERS
        self._wait(self._current)

    def _wait(self, buffer: int) -> None:
        for future in self._busy[buffer]:
            future.result()
        self._busy[buffer] = []

    def _write_all(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], offset + done)

    def _compare(self, written: Future[None], data: memoryview, offset: int) -> None:
        written.result()
        found = self._read_back[: len(data)]
        done = 0
        while done < len(data):
            count = os.preadv(self._descriptor, [found[done:]], offset + done)
            if count == 0:
                raise VerificationError(f"{self._path}: ends at byte {offset + done}, more was written")
            done += count
        if len(data) and not torch.equal(*(torch.frombuffer(x, dtype=torch.int64) for x in (data, found))):
            raise VerificationError(f"{self._path}: bytes from {offset} on read back otherwise than they were written")

    def __enter__(self) -> "VerifiedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._hasher, self._writer, self._checker):
            pool.shutdown()
        os.close(self._descriptor)


def _open_new(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError:
        path.unlink(missing_ok=True)  # some file systems refuse O_DIRECT only after they made the file
        return os.open(path, flags, 0o666)
