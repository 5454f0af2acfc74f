"""`muxmesh`: the command line. Each command lives in a module of its own and is imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import get_args

# Read when grpc is loaded: the supervisor starts processes while it watches health, and none of them uses its gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

from muxmesh import __version__
from muxmesh.cli import loadtest_options
from muxmesh.errors import InvalidRequest, MeshError, Unavailable
from muxmesh.scheduling_policy import PolicyName
from muxmesh.types import DEFAULT_ADDRESS

_EXTRAS = {"aiohttp": "loadtest"}
"""Which extra of this package has a module; the others are of the serving side."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 1 for an error of the mesh, 2 for wrong arguments, 130 for Ctrl-C."""
    parsed = _parser().parse_args(arguments)
    try:
        command = importlib.import_module(f"muxmesh.cli.{parsed.module}")
        code: int = command.run(parsed)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "", "serve")
        print(f"muxmesh: {error}; this needs muxmesh installed with its extra `{extra}`", file=sys.stderr)
        return 1
    except MeshError as error:
        if getattr(parsed, "json", False):
            field = error.field if isinstance(error, InvalidRequest) else None
            print(json.dumps({"error": type(error).__name__, "field": field, "message": str(error)}), flush=True)
        else:
            print(f"muxmesh: {_told(error, parsed)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a folder that cannot be made, a file that cannot be read
        print(f"muxmesh: {error}", file=sys.stderr)
        return 1
    return code


def _told(error: MeshError, parsed: argparse.Namespace) -> str:
    """The error, with what to do about it where gRPC's own words do not say."""
    address = getattr(parsed, "address", None)
    is_other_server = getattr(parsed, "openai", None) is not None
    if isinstance(error, Unavailable) and address is not None and not is_other_server:
        return f"no mesh answers at {address}; start one with `muxmesh up`, or give its --address ({error})"
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="muxmesh", description="Serves several LLMs from the same few devices.")
    parser.add_argument("--version", action="version", version=f"muxmesh {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_up(commands)
    _add_status(commands)
    _add_generate(commands)
    _add_chat(commands)
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
        help="of the mesh (default: MUXMESH_ADDRESS, else %(default)s)",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print JSON for programs; an error too, as {error, field, message}"
    )


def _add_up(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    up = _command(commands, "up", "up", "Start a mesh on this machine and serve until Ctrl-C.")
    up.add_argument("-c", "--config", type=Path, metavar="mesh.yaml", help="default: one small model on the CPU")
    up.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help=f"of the public API (default: the config, else {DEFAULT_ADDRESS}); port 0 takes a free one",
    )
    up.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="logs and sockets; one mesh for each (default: MUXMESH_STATE_DIR, else ~/.local/state/muxmesh)",
    )
    up.add_argument(
        "--hello",
        nargs="?",
        const="What is the capital of France, and what is it known for?",
        metavar="PROMPT",
        help="when ready, send one chat prompt and show its answer",
    )
    up.add_argument("--quiet", action="store_true", help="no log lines of the services on the terminal")


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = _command(commands, "status", "status", "Show models, workers, memory and processes of a mesh.")
    _add_address(status)
    _add_json(status)


def _bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=BIAS, such as 42=-100") from None


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="M", help="may be left out if the mesh serves only one")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: as the mesh is configured")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 is off (default)")
    parser.add_argument("--top-p", type=float, metavar="P", help="in (0, 1]; 1 is off (default)")
    parser.add_argument("--min-p", type=float, metavar="P", help="in [0, 1]; 0 is off (default)")
    parser.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="in [-2, 2]; 0 is off")
    parser.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="in [-2, 2]; 0 is off")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1 is off")
    parser.add_argument(
        "--logit-bias", type=_bias, action="append", default=[], metavar="ID=BIAS", help="may be given several times"
    )
    parser.add_argument(
        "--allowed-token-id",
        type=int,
        action="append",
        metavar="ID",
        dest="allowed_token_ids",
        help="no other token is drawn; may be given several times",
    )
    parser.add_argument("--seed", type=int, metavar="S", help="repeats an answer; default: drawn by the mesh")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--cache-salt", default="", metavar="TEXT", help="share cached prefixes only with requests of the same salt"
    )
    parser.add_argument("--priority", type=int, default=0, metavar="P", help="lower is sooner (default 0)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="deadline of the whole answer")


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = _command(commands, "generate", "generate", "Send one prompt and stream its answer.")
    _add_address(generate)
    _add_sampling(generate)
    _add_json(generate)
    generate.add_argument(
        "-n", "--num-sequences", type=int, default=1, metavar="N", help="so many answers; not greedy ones differ"
    )
    generate.add_argument("--logprobs", type=int, metavar="K", help="with K candidates each; shown with --json")
    generate.add_argument("--prompt-logprobs", type=int, metavar="K", help="the same for the prompt's tokens")
    generate.add_argument(
        "--expected-output-tokens", type=int, metavar="N",
        help="your estimate of the answer's length; counts as far as earlier ones with this --cache-salt were right",
    )  # fmt: skip
    generate.add_argument(
        "--explain", action="store_true", help="tell when the request was served and why; with --json as `scheduling`"
    )
    generate.add_argument("--chat", action="store_true", help="apply the model's chat template to the prompt")
    generate.add_argument("prompt", metavar="PROMPT", help="`-` reads it from standard input")


def _add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    chat = _command(commands, "chat", "chat", "Talk to a model; an empty line or Ctrl-D ends.")
    _add_address(chat)
    _add_sampling(chat)
    chat.add_argument("--system", metavar="TEXT", help="the system message")


def _add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    simulate = _command(
        commands,
        "simulate",
        "simulate",
        "Run a workload in virtual time: the policies, no computing. Answers get as long as the workload says.",
    )
    simulate.add_argument("-c", "--config", type=Path, metavar="mesh.yaml", required=True, help="models: engine: sim")
    simulate.add_argument(
        "--workload", required=True, metavar="SPEC", help="as for `muxmesh loadtest`, whose --help explains it"
    )
    simulate.add_argument("--policy", choices=get_args(PolicyName), help="default: as configured")
    simulate.add_argument(
        "--tau", type=float, metavar="T",
        help="answers that end by themselves are predicted with errors, so that they rank with Kendall's tau T in "
        "[0, 1]; default: by the mesh's own predictor, from the prompts' texts, else 0.5",
    )  # fmt: skip
    simulate.add_argument("--trace", type=Path, metavar="FILE", help="write each decision as a line of JSON")
    simulate.add_argument("--name", metavar="NAME", help="of this run, in reports")
    simulate.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the report as JSON")
    simulate.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    _add_json(simulate)


def _add_predictor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    actions = commands.add_parser("predictor", help="Judge the predictor of answer lengths.")
    evaluate = _command(
        actions.add_subparsers(required=True), "eval", "predictor",
        "Replay a file of answers: each length is predicted before it is learned.",
    )  # fmt: skip
    evaluate.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help='.jsonl, perhaps gzipped: "prompt", "n_out"; perhaps "model", "task", "censored": true if it was cut off',
    )
    _add_json(evaluate)


def _add_model(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    model = commands.add_parser("model", help="List, download and inspect models.").add_subparsers(required=True)
    listing = _command(model, "list", "model", "List the models that can be had by name.")
    listing.set_defaults(action="list")
    _add_json(listing)
    pull = _command(model, "pull", "model", "Download and prepare a model; does nothing if it is there.")
    pull.set_defaults(action="pull")
    pull.add_argument("name", metavar="NAME", help="as `muxmesh model list` shows it")
    _add_json(pull)
    inspect = _command(model, "inspect", "model", "Show what would be loaded, or why it would not be.")
    inspect.set_defaults(action="inspect")
    inspect.add_argument(
        "path", metavar="PATH", help="a folder in Hugging Face style, a GGUF file, or a catalog name that is here"
    )
    _add_json(inspect)


if __name__ == "__main__":
    sys.exit(main())
