"""Start, run and shutdown of a service process: command line, signals, event loop, death with the parent.

Knows no service: each ``__main__`` passes its own coroutine.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import uvloop

from muxmesh.background_task import background
from muxmesh.errors import MeshError
from muxmesh.log_format import LogFormat, format_of, formatter_of
from muxmesh.metrics.monitor import Monitor
from muxmesh.parent_death import die_with_parent
from muxmesh.service_manager import ServiceManager
from muxmesh.stderr_handler import StderrHandler

_log = logging.getLogger(__name__)

_SLOW_SHUTDOWN_S = 3.0
"""Shorter than the grace period of the supervisor, which ends with SIGKILL."""
_MAX_LOGGED_STACKS = 20
MAX_OPEN_FILES = 65_536


def service_arguments(
    description: str | None, *own: str, optional: Mapping[str, str] = MappingProxyType({})
) -> argparse.Namespace:
    """Parses ``--runtime``, ``--parent``, ``--metrics`` and the service's own options from the command line.

    ``own`` options are required; ``optional`` ones, each with its help text, are None if they are not given. Without
    ``--parent`` the process has no tie to the one that started it; with it, see `die_with_parent`. Without
    ``--metrics`` the variable MUXMESH_METRICS applies.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", type=Path, required=True, metavar="FILE", help="what `muxmesh prepare` wrote")
    for name in own:
        parser.add_argument(f"--{name}", required=True, metavar="NAME", help=f"the {name} to serve, as in mesh.yaml")
    for name, text in optional.items():
        parser.add_argument(f"--{name}", metavar=name.upper(), help=text)
    parser.add_argument(
        "--parent", type=int, metavar="PID", help="the supervisor, with which this process dies (default: it does not)"
    )
    parser.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        default=os.environ.get("MUXMESH_METRICS") or None,
        help="serves /metrics, /live and /ready there over HTTP (default: the variable MUXMESH_METRICS, else nowhere)",
    )
    arguments = parser.parse_args()
    if arguments.parent is not None:
        die_with_parent(arguments.parent)
    return arguments


def raise_file_limit() -> int:
    """Raises the soft limit on open files to the hard one, or to `MAX_OPEN_FILES`. Returns the new soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class Stop:
    """The request to stop a service.

    A service that is still starting is cancelled. A service that called `wait` shuts down by itself.
    """

    def __init__(self, slow_shutdown_s: float = _SLOW_SHUTDOWN_S) -> None:
        """A shutdown that takes longer than ``slow_shutdown_s`` logs the stacks of all pending tasks."""
        self.has_given_up = False
        self._slow_shutdown_s = slow_shutdown_s
        self._requested = asyncio.Event()
        self._serving = False
        self._starting: asyncio.Task[None] | None = None

    def allow(self, seconds: float) -> None:
        """A shutdown may take ``seconds``: only one that takes longer is slow."""
        self._slow_shutdown_s += seconds

    def set(self) -> None:
        """Requests the stop. Further calls have no effect."""
        if not self._requested.is_set():
            asyncio.get_running_loop().call_later(self._slow_shutdown_s, _log_pending_tasks)
        self._requested.set()
        if self._starting is not None and not self._serving:
            self._starting.cancel()

    def give_up(self, reason: str) -> None:
        """Logs the reason and requests the stop: this process cannot serve, and has to be started again."""
        _log.error("giving up: %s", reason)
        self.has_given_up = True
        self.set()

    async def wait(self) -> None:
        """Marks the service as started and waits until `set` is called."""
        self._serving = True
        await self._requested.wait()

    async def run(self, main: Callable[[Stop], Coroutine[Any, Any, None]]) -> bool:
        """Runs ``main(self)`` and raises its exceptions. Returns False if it was cancelled while starting."""
        self._starting = asyncio.create_task(main(self), name="service")
        await asyncio.wait({self._starting})
        if self._starting.cancelled():
            return False
        self._starting.result()
        return True


def _log_pending_tasks() -> None:
    stacks = Counter(map(_await_stack, asyncio.all_tasks()))
    listed = "\n".join(f"  {count} x {stack}" for stack, count in stacks.most_common(_MAX_LOGGED_STACKS))
    _log.warning("shutdown is slow; pending tasks:\n%s", listed)


def _await_stack(task: asyncio.Task[Any]) -> str:
    """File and line of each await, from the task's coroutine to the innermost one."""
    lines: list[str] = []
    awaited: object = task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        awaited = getattr(awaited, "cr_await", None)
    return " > ".join(lines)


def configure_logging(level: int, log_format: LogFormat | None, process: str) -> LogFormat:
    """Logs to stderr, a record in a line, with the name ``process``. A later call replaces an earlier one.

    ``log_format`` None: as the environment names. With json, warnings and uncaught exceptions are records too. Returns
    the format. Raises ConfigError if the environment names another one; then records are logged as text.
    """
    root, handler = logging.getLogger(), StderrHandler(sys.stderr)
    for earlier in [one for one in root.handlers if isinstance(one, StderrHandler)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(level)
    handler.setFormatter(formatter_of("text", process))
    chosen = log_format or format_of(os.environ)
    handler.setFormatter(formatter_of(chosen, process))
    logging.captureWarnings(chosen == "json")
    sys.excepthook = _log_uncaught if chosen == "json" else sys.__excepthook__
    threading.excepthook = _log_uncaught_in_thread if chosen == "json" else threading.__excepthook__
    return chosen


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _log.critical("uncaught exception: %s", error, exc_info=(kind, error, trace))


def _log_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None:
        _log_uncaught(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)


def run_service(
    main: Callable[[Stop], Coroutine[Any, Any, None]], process: str, monitor: Monitor | None = None
) -> None:
    """Configures logging and runs ``main(stop)`` on uvloop until it returns. SIGTERM and SIGINT set ``stop``.

    ``process``: its name in logs until ``main`` has read the runtime file and calls `configure_logging` itself. Serves
    ``monitor`` meanwhile, and reports its changes to the service manager. Raises the limit on open files before. The
    exit code is 0 after a signal; 1 if the service gave up, or ended with an error, which for a MeshError is one line.
    """
    try:
        configure_logging(logging.INFO, None, process)
    except MeshError as error:
        _log.error("cannot serve: %s", error)
        sys.exit(1)
    raise_file_limit()
    monitor = monitor or Monitor()
    manager = ServiceManager(os.environ)
    monitor.watch(manager.report)

    async def until_stopped() -> tuple[bool, int]:
        stop = Stop()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with monitor.serving(), background(manager.keep_alive(), "watchdog"):
            is_served = await stop.run(main)
        return is_served, int(stop.has_given_up)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            is_served, code = runner.run(until_stopped())
        except MeshError as error:
            _log.error("cannot serve: %s", error)
            sys.exit(1)
        if not is_served:
            os._exit(code)  # does not wait for threads that load a model or compile kernels
    sys.exit(code)
