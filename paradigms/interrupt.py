"""Stopping a run between chunks: SIGTERM and the first Ctrl-C ask for it, a second Ctrl-C leaves at once."""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """A signal stopped the run, which has saved what it had. Left uncaught it ends the process with the usual code.

    Attributes:
      signum: the signal.
      code: 128 + signum.
    """

    def __init__(self, signum: int, message: str = ""):
        super().__init__(128 + signum)
        self.signum, self.message = signum, message

    def __str__(self) -> str:
        return self.message


class Request:
    """Whether a signal has asked the run to stop.

    Attributes:
      signum: the first signal that asked, or None.
    """

    def __init__(self):
        self.signum: int | None = None

    def agreed(self) -> int | None:
        """The signal that any of the processes was sent; all of them must ask at the same place."""
        if jax.process_count() == 1:
            return self.signum
        from jax.experimental import multihost_utils

        asked = multihost_utils.process_allgather(np.int32(self.signum or 0))
        return int(np.max(asked)) or None


_active: list[Request] = []


@contextlib.contextmanager
def stopping(grace: float = 60.0) -> Iterator[Request]:
    """While it is open, signals ask instead of killing. `fit` opens one, unless the caller has.

    A thread of its own hears them, so that a second Ctrl-C works while the main thread compiles or waits for the device.
    Outside the main thread, where Python gives no signals, nothing is changed.

    Args:
      grace: seconds that a run may take to stop. After them the process leaves, with the checkpoints that it has.
    """
    if _active or threading.current_thread() is not threading.main_thread():
        yield _active[-1] if _active else Request()
        return
    request = Request()
    ears, mouth = os.pipe()
    os.set_blocking(mouth, False)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    wake = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    thread = threading.Thread(target=_listen, args=(ears, request, grace), daemon=True, name="stopping")
    thread.start()
    _active.append(request)
    try:
        yield request
    finally:
        _active.pop()
        signal.set_wakeup_fd(wake)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(mouth)
        thread.join()
        os.close(ears)


def _listen(ears: int, request: Request, grace: float) -> None:
    deadline = None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([ears], [], [], left)[0]:
            _say(f"not stopped after {grace:g} s: leaves with the checkpoints there are")
            os._exit(128 + (request.signum or 0))
        heard = os.read(ears, 1)
        if not heard:  # closed: the run is over
            return
        if heard[0] not in SIGNALS:
            continue
        if request.signum is None:
            request.signum, deadline = heard[0], time.monotonic() + grace
            _say(f"{signal.Signals(heard[0]).name}: stops and saves after this chunk of steps; Ctrl-C again leaves at once")
        elif heard[0] == signal.SIGINT:
            _say("leaves at once, with the checkpoints there are")
            os._exit(128 + signal.SIGINT)


def _say(text: str) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())
