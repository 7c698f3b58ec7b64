"""Progress of work that is measured in bytes: a bar on a terminal, a plain line every ten seconds elsewhere."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Use as a context; call `advance` with the bytes just done. Talks to standard error."""

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._start = self._last = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=label, unit="B", unit_scale=True) if terminal else None

    def advance(self, nbytes: int) -> None:
        """Count bytes done since the last call."""
        self._done += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)
        elif time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            rate = self._done / (self._last - self._start)
            left = (self._total - self._done) / rate
            line = f"{self._done / 1e9:.1f} of {self._total / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} s left"
            print(f"{self._label}: {line}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
