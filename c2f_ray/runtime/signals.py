"""Signals that end a command without losing a step that was done.

`ray job stop` and Slurm send SIGTERM, Ctrl-C sends SIGINT, and a terminal that is closed sends SIGHUP.
"""

import signal
import threading
from types import FrameType, TracebackType

from c2f_ray.errors import StoppedError


class Stopping:
    """Within this context the first signal ends the run: at once, or after `hold` when `release` is reached.

    At once means a KeyboardInterrupt in the main thread, the only exception that Ray's waits let through. A second
    SIGINT does not wait for `release`. The context ends with StoppedError. Outside the main thread no signal is seen.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._held = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyrefly: ignore
        if self.received and kind is KeyboardInterrupt:
            raise StoppedError(self.received) from None

    def hold(self) -> None:
        """From here to `release` a signal waits: what is under way cannot be taken back."""
        self._held = True

    def release(self) -> None:
        """Raises KeyboardInterrupt if a signal waited."""
        self._held = False
        if self.received:
            raise KeyboardInterrupt

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            if not self._held:
                raise KeyboardInterrupt
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
