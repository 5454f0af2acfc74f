"""The command line `muxmesh`: the parser of all commands, and how errors become messages and exit codes.

Each command has a module of its own, which is imported only when the command runs. This one therefore needs nothing of
the serving side.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import get_args

from muxmesh.quoting import quoted

# gRPC reads it when it is loaded. The supervisor forks while it watches health, and no child uses the parent's gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

from muxmesh import __version__
from muxmesh.cli import loadtest_options
from muxmesh.errors import InvalidRequest, MeshError
from muxmesh.scheduling_policy import PolicyName
from muxmesh.types import DEFAULT_ADDRESS

_EXTRAS = {"aiohttp": "loadtest"}
"""The extra of this package that installs a module. All other optional modules belong to the extra `serve`."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 for an error of the mesh, or 130 for Ctrl-C.

    Raises SystemExit with code 2 for wrong arguments.
    """
    parsed = _parser().parse_args(arguments)
    try:
        command = importlib.import_module(f"muxmesh.cli.{parsed.module}")
        code: int = command.run(parsed)
        sys.stdout.flush()  # a broken pipe is reported here, not when the interpreter exits
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "", "serve")
        print(f"muxmesh: {error}; this needs muxmesh installed with its extra `{extra}`", file=sys.stderr)
        return 1
    except MeshError as error:
        if getattr(parsed, "json", False):
            field = error.field if isinstance(error, InvalidRequest) else None
            print(json.dumps({"error": type(error).__name__, "field": field, "message": str(error)}), flush=True)
        else:
            print(f"muxmesh: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a folder cannot be created or a file cannot be read
        shown = (
            str(error)
            if error.filename is None
            else f"[Errno {error.errno}] {error.strerror}: {quoted(error.filename)}"
        )
        print(f"muxmesh: {shown}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="muxmesh", description="Serve several LLMs from the same few devices.")
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
        default=os.environ.get("MUXMESH_ADDRESS", DEFAULT_ADDRESS),
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


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = _command(commands, "status", "status", "Show the models, workers, memory and processes of a mesh.")
    _add_address(status)
    _add_json(status)


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not ID=BIAS, such as 42=-100") from None


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="M", help="model name; optional if the mesh serves only one")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="longest output (default: as the mesh is configured)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, metavar="K", help="0 is off (default: the model's own)")
    parser.add_argument("--top-p", type=float, metavar="P", help="in (0, 1]; 1 is off (default: the model's own)")
    parser.add_argument("--min-p", type=float, metavar="P", help="in [0, 1]; 0 is off (default: the model's own)")
    parser.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="in [-2, 2]; 0 is off")
    parser.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="in [-2, 2]; 0 is off")
    parser.add_argument("--repetition-penalty", type=float, metavar="X", help="1 is off (default: the model's own)")
    parser.add_argument(
        "--logit-bias",
        type=_bias,
        action="append",
        default=[],
        metavar="ID=BIAS",
        help="added to the logit of a token; repeatable",
    )
    parser.add_argument(
        "--allowed-token-id",
        type=int,
        action="append",
        metavar="ID",
        dest="allowed_token_ids",
        help="sample only these tokens; repeatable",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="reproduces an output (default: chosen by the mesh)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the output before this text; repeatable"
    )
    parser.add_argument(
        "--cache-salt", default="", metavar="TEXT", help="share cached prefixes only with requests of the same salt"
    )
    parser.add_argument("--priority", type=int, default=0, metavar="P", help="lower is sooner (default 0)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="deadline for the complete output")


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = _command(commands, "generate", "generate", "Send one prompt and stream the output.")
    _add_address(generate)
    _add_sampling(generate)
    _add_json(generate)
    generate.add_argument(
        "-n",
        "--num-sequences",
        type=int,
        default=1,
        metavar="N",
        help="number of outputs; greedy outputs are all the same",
    )
    generate.add_argument(
        "--logprobs", type=int, metavar="K", help="log-probabilities with K candidates per output token; needs --json"
    )
    generate.add_argument(
        "--prompt-logprobs", type=int, metavar="K", help="the same for the tokens of the prompt; needs --json"
    )
    generate.add_argument(
        "--expected-output-tokens", type=int, metavar="N",
        help="your estimate of the output length; its weight depends on how accurate earlier estimates with the same "
        "--cache-salt were",
    )  # fmt: skip
    generate.add_argument(
        "--explain", action="store_true", help="print when the request was served and why; with --json as `scheduling`"
    )
    generate.add_argument("--chat", action="store_true", help="apply the model's chat template to the prompt")
    generate.add_argument("prompt", metavar="PROMPT", help="`-` reads it from standard input")


def _add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chat = _command(commands, "chat", "chat", "Hold a conversation with a model; an empty line or Ctrl-D ends it.")
    _add_address(chat)
    _add_sampling(chat)
    chat.add_argument("--system", metavar="TEXT", help="the system message")


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
        "--tau", type=float, metavar="T",
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
        actions.add_subparsers(required=True), "eval", "predictor",
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
    model = commands.add_parser("model", help="List, download and inspect models.").add_subparsers(required=True)
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
