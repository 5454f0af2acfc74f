"""The command line `muxmesh`: the parser of all commands, and how errors become messages and exit codes.

Each command has a module of its own, which is imported only when the command runs. This one therefore needs nothing of
the serving side.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, get_args

# gRPC reads it when it is loaded. The supervisor forks while it watches health, and no child uses the parent's gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

from muxmesh import __version__
from muxmesh.cli import argument_types, loadtest_options, standard_streams
from muxmesh.cli.terminal_text import harmless
from muxmesh.errors import InvalidRequest, MeshError
from muxmesh.quoting import cut_to_bytes, quoted
from muxmesh.scheduling_policy import PolicyName
from muxmesh.types import DEFAULT_ADDRESS

_MAX_MESSAGE_BYTES = 500
"""Of an error about arguments, which lists what is possible."""
_EXTRAS = {"aiohttp": "loadtest", "prompt_toolkit": "chat"}
"""The extra of this package that installs a module. All other optional modules belong to the extra `serve`."""

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
        extra = _EXTRAS.get((error.name or "").partition(".")[0], "serve")
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
        from muxmesh.cli.common import print_json  # noqa: PLC0415 - loads protobuf, which not every command needs

        field = error.field if isinstance(error, InvalidRequest) else None
        print_json({"error": type(error).__name__, "field": field, "message": str(error)})
    else:
        print(f"muxmesh: {harmless(message, sys.stderr)}", file=sys.stderr)
    return 1


def _in_terms_of_options(error: MeshError) -> str:
    """The message of an error. A field of a request that an option sets is called by the option."""
    if not isinstance(error, InvalidRequest):
        return str(error)
    name = error.field.rpartition(".")[2].partition("[")[0]
    option = _OPTIONS.get(name)
    return str(error) if option is None else f"{option}: {error.problem}"


_EXIT_CODES = (
    "exit codes: 0; 1 for an error of the mesh, a file or a model (with --json as {error, field, message} on standard "
    "output); 2 for wrong arguments; 130 after Ctrl-C"
)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, without the usage of the whole command."""

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2."""
        self.exit(2, f"{self.prog}: {cut_to_bytes(message, _MAX_MESSAGE_BYTES)}; see `{self.prog} --help`\n")


def command_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser: argparse.ArgumentParser = _Parser(
        prog="muxmesh", description="Serve several LLMs from the same few devices.", epilog=_EXIT_CODES
    )
    parser.add_argument("--version", action="version", version=f"muxmesh {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_up(commands)
    _add_status(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_tokenize(commands)
    _add_model(commands)
    load = _command(commands, "loadtest", "loadtest", loadtest_options.DESCRIPTION)
    _add_address(load)
    _add_json(load)
    _add_json(loadtest_options.add_to(load))
    _add_simulate(commands)
    _add_predictor(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, module: str, text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(module=module)
    return parser


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        type=argument_types.address,
        default=os.environ.get("MUXMESH_ADDRESS") or DEFAULT_ADDRESS,
        metavar="HOST:PORT",
        help="address of the mesh (default: MUXMESH_ADDRESS, else %(default)s)",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print JSON for programs; an error is {error, field, message}"
    )


def _add_up(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    up = _command(commands, "up", "up", "Start a mesh on this machine and serve until Ctrl-C.")
    up.add_argument("-c", "--config", type=Path, metavar="mesh.yaml", help="default: one small model on the CPU")
    up.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help=f"address of the public API (default: the config, else {DEFAULT_ADDRESS}); port 0 picks a free port",
    )
    up.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="folder for logs and sockets, used by one mesh at a time (default: MUXMESH_STATE_DIR, "
        "else ~/.local/state/muxmesh)",
    )
    up.add_argument(
        "--hello",
        nargs="?",
        const="What is the capital of France, and what is it known for?",
        metavar="PROMPT",
        help="when the mesh is ready, send one chat prompt and print the output",
    )
    up.add_argument("--quiet", action="store_true", help="print no log lines of the services")


_STATUS_COLUMNS = """\
columns:
  WAITING, RUNNING  sequences now; WAITING of a unit: requests that wait for admission
  FINISHED ... OUTPUT TOKENS  since the router started; RESTARTS: further attempts after a worker was lost
  PREDICTED TAU     rank correlation of predicted and true output lengths (Kendall's; 1 is perfect), of the last 256
                    outputs; "-": there are fewer than 100
  QUOTA MIB         part of the KV pool that the model can claim; it uses more while others use less
  BLOCKS LEASED, CACHED, FREE  token blocks of sequences, of the prefix cache, and to allocate (cached ones included)
  PREFIX HITS       share of the prompt tokens that were in the prefix cache
  LEASES            sequences whose KV a worker writes
  STEPS, TOKENS     computed since the worker started
  BUSY S            seconds for which the worker held the grant to compute"""


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = _command(commands, "status", "status", "Show the models, workers, memory and processes of a mesh.")
    status.formatter_class = argparse.RawDescriptionHelpFormatter
    status.epilog = _STATUS_COLUMNS
    _add_address(status)
    _add_json(status)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="M", help="model name; optional if the mesh serves only one")
    parser.add_argument(
        "--max-new-tokens",
        type=argument_types.whole,
        metavar="N",
        help="longest output (default: as the mesh is configured)",
    )
    parser.add_argument(
        "--temperature", type=argument_types.temperature, default=0.0, metavar="T",
        help="0 is greedy (the default, so that outputs repeat); `model` is the model's own default, as in the Python "
        "clients",
    )  # fmt: skip
    parser.add_argument("--top-k", type=argument_types.whole, metavar="K", help="0 is off (default: the model's own)")
    parser.add_argument(
        "--top-p", type=argument_types.number, metavar="P", help="in (0, 1]; 1 is off (default: the model's own)"
    )
    parser.add_argument(
        "--min-p", type=argument_types.number, metavar="P", help="in [0, 1]; 0 is off (default: the model's own)"
    )
    parser.add_argument(
        "--presence-penalty", type=argument_types.number, default=0.0, metavar="X", help="in [-2, 2]; 0 is off"
    )
    parser.add_argument(
        "--frequency-penalty", type=argument_types.number, default=0.0, metavar="X", help="in [-2, 2]; 0 is off"
    )
    parser.add_argument(
        "--repetition-penalty", type=argument_types.number, metavar="X", help="1 is off (default: the model's own)"
    )
    parser.add_argument(
        "--logit-bias",
        type=argument_types.bias,
        action="append",
        default=[],
        metavar="ID=BIAS",
        help="added to the logit of a token; repeatable",
    )
    parser.add_argument(
        "--allowed-token-id",
        type=argument_types.whole,
        action="append",
        metavar="ID",
        dest="allowed_token_ids",
        help="sample only these tokens; repeatable",
    )
    parser.add_argument(
        "--seed", type=argument_types.whole, metavar="S", help="reproduces an output (default: chosen by the mesh)"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the output before this text; repeatable"
    )
    parser.add_argument(
        "--cache-salt", default="", metavar="TEXT", help="share cached prefixes only with requests of the same salt"
    )
    parser.add_argument(
        "--priority", type=argument_types.whole, default=0, metavar="P", help="lower is sooner (default 0)"
    )
    parser.add_argument(
        "--timeout", type=argument_types.seconds, metavar="SECONDS", help="deadline for the complete output"
    )


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = _command(commands, "generate", "generate", "Send one prompt and stream the output.")
    _add_address(generate)
    _add_sampling(generate)
    _add_json(generate)
    generate.add_argument(
        "-n",
        "--num-sequences",
        type=argument_types.whole,
        default=1,
        metavar="N",
        help="number of outputs; greedy outputs are all the same",
    )
    generate.add_argument(
        "--logprobs",
        type=argument_types.whole,
        metavar="K",
        help="log-probabilities with K candidates per output token; needs --json",
    )
    generate.add_argument(
        "--prompt-logprobs",
        type=argument_types.whole,
        metavar="K",
        help="the same for the tokens of the prompt; needs --json",
    )
    generate.add_argument(
        "--expected-output-tokens", type=argument_types.whole, metavar="N",
        help="your estimate of the output length; its weight depends on how accurate earlier estimates with the same "
        "--cache-salt were",
    )  # fmt: skip
    generate.add_argument(
        "--explain", action="store_true", help="print when the request was served and why; with --json as `scheduling`"
    )
    generate.add_argument("--chat", action="store_true", help="apply the model's chat template to the prompt")
    generate.add_argument("prompt", metavar="PROMPT", help="`-` reads it from standard input")


def _add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chat = _command(
        commands,
        "chat",
        "chat",
        "Hold a conversation with a model. Without a terminal, each line of standard input is a message.",
    )
    _add_address(chat)
    _add_sampling(chat)
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument(
        "--no-history", dest="history", action="store_false",
        help="keep what is typed out of the history of later chats (STATE_DIR/chat_history, which only you can read)",
    )  # fmt: skip


def _add_tokenize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    tokenize = _command(commands, "tokenize", "tokenize", "Show the tokens of a text, or the text of token ids.")
    _add_address(tokenize)
    tokenize.add_argument("--model", metavar="M", help="model name; optional if the mesh serves only one")
    _add_json(tokenize)
    tokenize.add_argument("--chat", action="store_true", help="the text is a user message for the chat template")
    tokenize.add_argument("--no-special-tokens", action="store_true", help="without the tokenizer's own, such as a BOS")
    tokenize.add_argument("--decode", action="store_true", help="the text is token ids, such as 12,345")
    tokenize.add_argument("text", metavar="TEXT", help="`-` reads it from standard input")


def _add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    simulate = _command(
        commands,
        "simulate",
        "simulate",
        "Run a workload in virtual time: scheduling without computing. The workload sets the output lengths.",
    )
    simulate.add_argument(
        "-c", "--config", type=Path, metavar="mesh.yaml", required=True, help="every model needs `engine: sim`"
    )
    simulate.add_argument("--workload", required=True, metavar="SPEC", help="as in `muxmesh loadtest --help`")
    simulate.add_argument("--policy", choices=get_args(PolicyName), help="scheduling policy (default: as configured)")
    simulate.add_argument(
        "--tau", type=argument_types.fraction(0, 1), metavar="T",
        help="for natural outputs: predict lengths with random errors, so that Kendall's tau between predicted and "
        "true lengths is T in [0, 1]; default: the mesh's own predictor if there are prompt texts, else 0.5",
    )  # fmt: skip
    simulate.add_argument("--trace", type=Path, metavar="FILE", help="write each scheduling decision as a line of JSON")
    simulate.add_argument("--name", metavar="NAME", help="name of this run in reports")
    simulate.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the report as JSON")
    simulate.add_argument("--html", type=Path, metavar="FILE", help="write an HTML page with plots")
    _add_json(simulate)


def _add_predictor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    actions = commands.add_parser("predictor", help="Evaluate the output length predictor.")
    evaluate = _command(
        actions.add_subparsers(required=True, metavar="ACTION"), "eval", "predictor",
        "Replay a file of outputs: each length is predicted before the predictor learns it.",
    )  # fmt: skip
    evaluate.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help='a .jsonl file, optionally gzipped; required keys: "prompt", "n_out"; optional: "model", "task" and '
        '"censored", true if the output was cut off',
    )
    _add_json(evaluate)


def _add_model(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    model = commands.add_parser("model", help="List, download and inspect models.").add_subparsers(
        required=True, metavar="ACTION"
    )
    listing = _command(model, "list", "model", "List the models of the catalog.")
    listing.set_defaults(action="list")
    _add_json(listing)
    pull = _command(model, "pull", "model", "Download and prepare a catalog model, unless it is present.")
    pull.set_defaults(action="pull")
    pull.add_argument("name", metavar="NAME", help="a name that `muxmesh model list` shows")
    _add_json(pull)
    inspect = _command(
        model, "inspect", "model", "Show what an engine would load from a model, or why it cannot load it."
    )
    inspect.set_defaults(action="inspect")
    inspect.add_argument(
        "path",
        metavar="PATH",
        help="a folder in Hugging Face style, a GGUF file, or the name of a downloaded catalog model",
    )
    _add_json(inspect)


if __name__ == "__main__":
    sys.exit(main())
