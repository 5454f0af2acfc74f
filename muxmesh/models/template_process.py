"""A process that renders one chat template. `muxmesh.models.chat_template` starts it and talks to it over a socket.

The environment of templates is that of transformers' `apply_chat_template` (transformers 5), so that a template renders
the same text. A template comes from a stranger: the sandbox keeps it from the machine, this process from the router.
Its memory is limited, and the kernel ends it when it has computed for too long, whatever it is doing.

Each message is its length in 4 bytes, then JSON. The first one has the template and the limits; the response to
it is sent when the template is compiled. A response is a byte, `t` (text) or `e` (error), then UTF-8.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from muxmesh.parent_death import die_with_parent

LENGTH_BYTES = 4
_PAGE_BYTES = resource.getpagesize()
_MAX_ERROR = 300
"""Characters of an error that are returned."""


class RefusedError(Exception):
    """The template, or what it renders, is refused. The text says why."""


class _Generation(Extension):
    """The tag `generation` around the text of assistants, which transformers uses for training. It renders its body."""

    tags = {"generation"}  # noqa: RUF012 - as in the base class

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("render_body"), [], [], body).set_lineno(line)

    def render_body(self, caller: Any) -> Any:
        """Called by the compiled tag."""
        return caller()


class _Dict:
    """`dict` in a template: a function with `fromkeys`, not a class whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As that of a dict."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """A namespace of a template, without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    attributes = dict(*args, **kwargs)
    for name in attributes:
        _check_name(name)
    return _Namespace(attributes)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no name that begins with an underscore: {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike jinja2's own filter it escapes no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Renderer:
    """A compiled template. ``now_unix_s`` is what `strftime_now` takes for now; set it before each rendering."""

    def __init__(self, template: str) -> None:
        self.now_unix_s = 0.0
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": self._strftime_now,
            "dict": _Dict(),
            "namespace": _namespace,
        }
        self._template = environment.from_string(template)

    def render(self, variables: dict[str, Any], max_bytes: int) -> str:
        """Renders the template. Raises RefusedError for a text of more than ``max_bytes`` or that is no Unicode."""
        parts, length = [], 0
        for part in self._template.generate(**variables):
            parts.append(part)
            length += len(part)
            if length > max_bytes:
                break
        text = "".join(parts)
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise RefusedError("renders a text with a surrogate code point, which is no Unicode") from error
        if size > max_bytes:
            raise RefusedError(f"renders more than {max_bytes} bytes")
        return text

    def _strftime_now(self, form: str) -> str:
        return datetime.fromtimestamp(self.now_unix_s).strftime(form)  # noqa: DTZ006 - local time, as in transformers


def main() -> None:
    """Serves until the other end closes the socket. The arguments are its number and the id of the parent process."""
    connection_number, parent_pid = map(int, sys.argv[1:])
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the router
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # what the parent ignores or blocks, is inherited
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    with socket.socket(fileno=connection_number) as connection:
        start = _receive(connection)
        if start is None:
            return
        _limit(resource.RLIMIT_AS, _address_space_bytes() + start["memory_bytes"])
        _limit(resource.RLIMIT_CORE, 0)
        renderer: Renderer | None = None
        try:
            with _CpuLimit(start["cpu_s"]):
                renderer = Renderer(start["template"])
            response = b"t"
        except Exception as error:
            response = b"e" + _message(error)
        connection.sendall(len(response).to_bytes(LENGTH_BYTES) + response)
        while renderer is not None and (request := _receive(connection)) is not None:
            response = _rendered(renderer, request, start["cpu_s"])
            connection.sendall(len(response).to_bytes(LENGTH_BYTES) + response)


def _rendered(renderer: Renderer, request: dict[str, Any], cpu_s: float) -> bytes:
    renderer.now_unix_s = request["now_unix_s"]
    try:
        with _CpuLimit(cpu_s):
            return b"t" + renderer.render(request["variables"], request["max_bytes"]).encode()
    except Exception as error:
        return b"e" + _message(error)


class _CpuLimit:
    """Lets the kernel end this process when a block has used ``cpu_s`` seconds of CPU time."""

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s = cpu_s

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, self._cpu_s)

    def __exit__(self, *error: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def _message(error: Exception) -> bytes:
    """The text of an error of the template or of jinja2. The other end shows it in one line."""
    if isinstance(error, MemoryError):
        return b"needs too much memory"
    if isinstance(error, jinja2.TemplateSyntaxError):
        text = f"line {error.lineno}: {error.message}"
    elif isinstance(error, jinja2.TemplateError | RefusedError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    return text[:_MAX_ERROR].encode(errors="replace")


def _receive(connection: socket.socket) -> Any:
    """The next message; None at the end of the stream."""
    head = connection.recv(LENGTH_BYTES, socket.MSG_WAITALL)
    if len(head) < LENGTH_BYTES:
        return None
    body = connection.recv(int.from_bytes(head), socket.MSG_WAITALL)
    return json.loads(body)


def _limit(kind: int, limit: int) -> None:
    _, hard = resource.getrlimit(kind)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, limit))


def _address_space_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * _PAGE_BYTES


if __name__ == "__main__":
    main()
