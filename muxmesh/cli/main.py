"""The command line `muxmesh`: it runs a command, and turns errors into messages and exit codes.

Each command has a module of its own, which is imported only when the command runs. This one therefore needs nothing of
the serving side.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from contextlib import suppress

# gRPC reads it when it is loaded. The supervisor forks while it watches health, and no child uses the parent's gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
# Otherwise gRPC itself prints a line for each TLS handshake that fails. Errors name the cause.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from muxmesh.cli import standard_streams
from muxmesh.cli.command_parser import command_parser
from muxmesh.cli.common import print_json
from muxmesh.cli.terminal_text import harmless
from muxmesh.errors import InvalidRequest, MeshError, Unauthenticated
from muxmesh.quoting import quoted

_EXTRAS = {"loadtest": "loadtest", "chat": "chat"}
"""The extra of this package that a command needs. All others need `serve`."""

_OPTIONS = {
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (
            "model", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "presence_penalty",
            "frequency_penalty", "repetition_penalty", "logit_bias", "seed", "cache_salt", "priority",
            "num_sequences", "logprobs", "prompt_logprobs", "expected_output_tokens", "explain",
        )
    },
    "allowed_token_ids": "--allowed-token-id",
    "stop_strings": "--stop",
    "output_candidates": "--logprobs",
    "output_logprobs": "--logprobs",
    "prompt_candidates": "--prompt-logprobs",
    "timeout_s": "--timeout",
    "api_key": "MUXMESH_API_KEY",
    "ca": "--tls-ca",
    "cert": "--tls-cert",
    "key": "--tls-key",
}  # fmt: skip
"""The option that sets a field of a request, by the field's name."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0; 1 for an error of the mesh, of a file or of a model, and if a reader of the output has exited; 2 for arguments
    that are wrong by themselves; 130 after Ctrl-C.
    """
    standard_streams.prepare()
    try:
        code = _run(arguments)
        standard_streams.flush()
    except BrokenPipeError:  # the reader of the output has exited, and wants to read no more
        code = 1
    except KeyboardInterrupt:
        code = 130
    except OSError as error:  # the disk is full, or what stdout leads to is gone
        with suppress(OSError):
            print(f"muxmesh: standard output: {error}", file=sys.stderr)
        code = 1
    standard_streams.drop()
    return code


def _run(arguments: list[str] | None) -> int:
    try:
        parsed = command_parser().parse_args(arguments)
    except SystemExit as ended:  # a help text, or wrong arguments
        return int(ended.code or 0)
    try:
        command = importlib.import_module(f"muxmesh.cli.{parsed.module}")
        code: int = command.run(parsed)
        return code
    except BrokenPipeError:
        raise
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(parsed.module, "serve")
        return _report(parsed, error, f"{error}; this needs muxmesh installed with its extra `{extra}`")
    except MeshError as error:
        return _report(parsed, error, _in_terms_of_options(error))
    except OSError as error:  # a folder cannot be created or a file cannot be read
        shown = (
            str(error)
            if error.filename is None
            else f"[Errno {error.errno}] {error.strerror}: {quoted(error.filename)}"
        )
        return _report(parsed, error, shown)


def _report(parsed: argparse.Namespace, error: Exception, message: str) -> int:
    """Prints an error, and returns the exit code."""
    if getattr(parsed, "json", False):
        field = error.field if isinstance(error, InvalidRequest) else None
        text = str(error) if isinstance(error, InvalidRequest) else message
        print_json({"error": type(error).__name__, "field": field, "message": text})
    else:
        print(f"muxmesh: {harmless(message, sys.stderr)}", file=sys.stderr)
    return 1


def _in_terms_of_options(error: MeshError) -> str:
    """The message of an error. A field of a request that an option sets is called by the option."""
    if isinstance(error, Unauthenticated):
        return f"{error} (commands read the API key from MUXMESH_API_KEY)"
    if not isinstance(error, InvalidRequest):
        return str(error)
    name = error.field.rpartition(".")[2].partition("[")[0]
    option = _OPTIONS.get(name)
    return str(error) if option is None else f"{option}: {error.problem}"


if __name__ == "__main__":
    sys.exit(main())
