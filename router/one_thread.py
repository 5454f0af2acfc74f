"""A thread that does one thing after the other and, unlike an executor's, is not waited for when the process ends."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_Result = TypeVar("_Result")


class OneThread:
    """Owns a daemon thread: work that hangs is left behind at the end of the process."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closed = False
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, function: Callable[[], _Result]) -> Future[_Result]:
        """Runs it after all that was submitted before; after `close` the future is cancelled at once."""
        future: Future[_Result] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function()
            except BaseException as error:  # it belongs to who waits for it
                future.set_exception(error)
            else:
                future.set_result(result)

        if self._closed:
            future.cancel()
        else:
            self._work.put(work)
        return future

    def close(self) -> None:
        """Nothing more is begun."""
        self._closed = True
        self._work.put(lambda: None)

    def _run(self) -> None:
        while not self._closed:
            self._work.get()()
