"""`muxmesh up`: prepares the models, starts the mesh and serves until Ctrl-C.

It reports every error of the configuration before it downloads or starts anything. `MeshSupervisor` owns the processes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

from muxmesh.background_task import background
from muxmesh.cli.call_hint import call_hint
from muxmesh.cli.common import api_key, cache_dir, state_dir_of
from muxmesh.cli.console import Console
from muxmesh.cli.operator_messages import OperatorMessages
from muxmesh.cli.preparation import MeshPreparation
from muxmesh.cli.streamed_output import StreamedOutput
from muxmesh.client import MeshClient, Message
from muxmesh.clock import SystemClock
from muxmesh.config.runtime import SUPERVISOR, MeshRuntime
from muxmesh.errors import ConfigError, MeshError, Unauthenticated
from muxmesh.lifecycle import raise_file_limit
from muxmesh.machine_limits import memory_limit
from muxmesh.service_manager import ServiceManager
from muxmesh.supervisor.admin_service import serving_commands
from muxmesh.supervisor.mesh_supervisor import MeshSupervisor, free_listen_address, make_runtime, state_lock
from muxmesh.supervisor.model_loading import ModelLoading

_HELLO_TOKENS = 64
_MIN_OPEN_FILES = 256
"""A supervisor needs about six for each process, a router at least 16 for clients besides its own."""


def run(arguments: argparse.Namespace) -> int:
    """Serves until SIGINT, SIGTERM or SIGHUP; returns the exit code. Raises ConfigError before any process starts."""
    if (limit := raise_file_limit()) < _MIN_OPEN_FILES:
        raise ConfigError(f"the limit on open files is {limit}; a mesh needs {_MIN_OPEN_FILES} or more (`ulimit -n`)")
    with _consoles():
        messages = OperatorMessages("supervisor", SystemClock(), shows_lines=not arguments.quiet)
        return messages.run(lambda: _run(arguments, messages))


def _run(arguments: argparse.Namespace, messages: OperatorMessages) -> int:
    started_at_s = SystemClock().monotonic_s()
    preparation = MeshPreparation(arguments.config, messages, memory_limit(), arguments.listen)
    if preparation.config.metrics is not None:
        free_listen_address(preparation.config.metrics.listen)  # refused before models are prepared
    chosen = {"listen": free_listen_address(preparation.config.listen), "log_format": messages.log_format}
    state_dir = state_dir_of(arguments.state_dir)
    with state_lock(state_dir):
        mesh = preparation.prepare()
        config = mesh.config.model_copy(update=chosen)
        runtime = make_runtime(config, mesh.prepared, state_dir, cache_dir(), mesh.device_uuids, mesh.mps_program)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(runtime, state_dir, messages, arguments.hello, started_at_s))


@contextlib.contextmanager
def _consoles() -> Iterator[None]:
    """Lets no reader of stdout or stderr stop the event loop, nor the processes that print through it."""
    out, err = Console(1), Console(2)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield
    finally:
        for console in (out, err):
            console.close()


async def _serve(
    runtime: MeshRuntime, state_dir: Path, messages: OperatorMessages, hello: str | None, started_at_s: float
) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
    manager = ServiceManager(os.environ)
    mesh = MeshSupervisor(runtime, state_dir, messages.show_line, SystemClock())
    stopped = asyncio.create_task(stop.wait())
    commands = AsyncExitStack()
    starting = asyncio.create_task(_start(mesh, commands, messages, manager, hello, started_at_s))
    async with background(manager.keep_alive(), "watchdog"):
        try:
            await asyncio.wait({stopped, starting}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting  # raises the error of a failed start
                await stopped
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            messages.progress("stopping")
            manager.stopping()
            await commands.aclose()
            await mesh.stop()
    return 0


async def _start(
    mesh: MeshSupervisor,
    commands: AsyncExitStack,
    messages: OperatorMessages,
    manager: ServiceManager,
    hello: str | None,
    started_at_s: float,
) -> None:
    await mesh.start()
    await commands.enter_async_context(serving_commands(ModelLoading(mesh), mesh.runtime.admin_address(SUPERVISOR)))
    manager.report("")
    listen = mesh.runtime.config.listen
    messages.result(f"muxmesh ready on {listen}")
    if mesh.metrics_address:
        messages.progress(f"metrics on http://{mesh.metrics_address}/metrics")
    messages.progress(f"started in {SystemClock().monotonic_s() - started_at_s:.1f} s")
    if hello is not None:
        needs_keys = mesh.runtime.config.access.mode == "keys"
        try:
            if needs_keys and not api_key():
                raise Unauthenticated("no prompt is sent: access.mode is keys, and MUXMESH_API_KEY is not set")
            await _send_hello(_own_address(mesh.runtime), next(iter(mesh.runtime.config.models())), hello)
        except MeshError as error:  # a failed greeting does not stop the mesh
            messages.notice(str(error))
        print(f"\n{call_hint(listen, mesh.runtime.config.tls, _programs(), needs_keys)}", flush=True)


def _own_address(runtime: MeshRuntime) -> str:
    """Where this process calls a router: with TLS at its unix socket, for which it needs no certificate."""
    if runtime.config.tls is None:
        return runtime.config.listen
    return next(endpoint.address for key, endpoint in runtime.endpoints().items() if key.role == "router")


async def _send_hello(address: str, model: str, prompt: str) -> None:
    print(f"\n> {prompt}\n", flush=True)
    async with MeshClient(address, api_key=api_key()) as client:
        messages = [Message("user", prompt)]
        await StreamedOutput().stream(client, messages, model=model, temperature=0.0, max_new_tokens=_HELLO_TOKENS)


def _programs() -> str:
    """The folder of this environment's programs as a command names it: empty if the environment is activated."""
    on_path = Path(shutil.which("python") or "").parent == Path(sys.executable).parent
    return "" if on_path else f"{os.path.relpath(Path(sys.executable).parent)}/"
