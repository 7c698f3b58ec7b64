"""Ctrl-C and SIGTERM end a run at the next step boundary, with a checkpoint."""

import logging
import os
import signal
from types import FrameType, TracebackType
from typing import Self

logger = logging.getLogger(__name__)


class StopSignal:
    """Catches SIGINT and SIGTERM inside a `with` block: the first sets `received`, a second one ends at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._process = os.getpid()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data worker, forked from us: Ctrl-C reaches it too, and it must go on serving until we end
        if self.received is not None:
            self.end()
        self.received = number
        logger.warning("%s: saving at the next step, then ending.", signal.Signals(number).name)

    def end(self) -> None:
        """Leave as the signal asked: KeyboardInterrupt (exit code 130), or SystemExit with 128 + its number."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)
