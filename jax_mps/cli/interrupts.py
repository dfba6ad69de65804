"""Ctrl-C ends a command at once, without a traceback, and also while XLA compiles."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

__all__ = ["end_at_once"]

STATUS = 130
"""What a shell says of a program that Ctrl-C has ended: 128 and the number of SIGINT."""

PATIENCE = 0.5
"""Seconds for Python to raise `KeyboardInterrupt`, and to clean up."""


@contextlib.contextmanager
def end_at_once() -> Iterator[None]:
    """While this is entered, Ctrl-C ends the process with `STATUS`.

    Python raises `KeyboardInterrupt` when the main thread is back from C++, where it may compile for seconds.
    Another thread waits no longer than `PATIENCE` for that. It has nothing to clean up but the terminal:
    files are whole at any moment.
    """
    if threading.current_thread() is not threading.main_thread():  # it alone receives signals
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    threading.Thread(target=_end_late, args=(reader,), daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(STATUS) from None
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def _end_late(reader: int) -> None:
    """Ends the process a little after SIGINT; without it, ends with the pipe."""
    # Each signal that Python handles writes its number.
    while (number := os.read(reader, 1)) not in (b"", bytes([signal.SIGINT])):
        pass
    os.close(reader)
    if number:
        time.sleep(PATIENCE)
        if sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)  # the cursor, which a progress bar hides
        os._exit(STATUS)
