"""The parser of all commands and their options. It imports little, because it is built for every command."""

from __future__ import annotations

import argparse
import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_args

from muxmesh import __version__
from muxmesh.cli import argument_types, loadtest_options, tenant_options
from muxmesh.cli.runtime_options import add_runtime_options
from muxmesh.cli.tls_options import add_tls
from muxmesh.quoting import cut_to_bytes
from muxmesh.scheduling_policy import PolicyName
from muxmesh.types import DEFAULT_ADDRESS, ArbiterMode, Dtype

_MAX_MESSAGE_BYTES = 500
"""Of an error about arguments, which lists what is possible."""
_OPTIONS_ELSEWHERE = {"--num-predict": "--max-new-tokens", "--port": "--listen", "--host": "--listen"}
"""Options of vLLM and Ollama that have quite another name here."""
_EXIT_CODES = (
    "exit codes: 0; 1 for an error of the mesh, a file or a model (with --json as {error, field, message} on standard "
    "output); 2 for wrong arguments; 130 after Ctrl-C"
)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, without the usage of the whole command."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuses unknown arguments, so that the error is that of the command that they follow."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._hint(unknown[0])}")
        return known, unknown

    def _hint(self, unknown: str) -> str:
        if unknown.startswith("-"):
            option = unknown.partition("=")[0]
            close = [_OPTIONS_ELSEWHERE[option]] if option in _OPTIONS_ELSEWHERE else []
            close = close or get_close_matches(option, self._option_string_actions, n=1, cutoff=0.7)
            return f"; did you mean {close[0]}?" if close and close[0] in self._option_string_actions else ""
        takes_text = any(action.dest in ("prompt", "text") for action in self._actions)
        return "; a text of several words needs quotation marks" if takes_text else ""

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
    _add_prepare(commands)
    _add_health(commands)
    _add_status(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_tokenize(commands)
    _add_model(commands)
    tenant_options.add_to(_group(commands, "tenant", tenant_options.DESCRIPTION), _add_json)
    load = _command(commands, "loadtest", loadtest_options.DESCRIPTION)
    _add_address(load)
    _add_json(load)
    _add_json(loadtest_options.add_to(load))
    _add_profile(commands)
    _add_plan(commands)
    _add_simulate(commands)
    _add_predictor(commands)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, module: str | None = None
) -> argparse.ArgumentParser:
    """Adds a command that ``module`` of this package runs, by default the one of its name."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(module=module or name)
    return parser


def _group(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str
) -> argparse.ArgumentParser:
    """Adds a command with actions of its own."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    return parser


def _add_address(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        type=argument_types.address,
        default=os.environ.get("MUXMESH_ADDRESS") or DEFAULT_ADDRESS,
        metavar="HOST:PORT",
        help="address of the mesh (default: MUXMESH_ADDRESS, else %(default)s); an API key, where one is needed, is "
        "read from MUXMESH_API_KEY",
    )
    add_tls(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print JSON for programs; an error is {error, field, message}"
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c",
        "--config",
        type=Path,
        metavar="mesh.yaml",
        help="the units and models to serve (default: one small model on the CPU)",
    )


def _add_up(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    up = _command(commands, "up", "Start a mesh on this machine and serve until Ctrl-C.")
    _add_config(up)
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


def _add_prepare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    prepare = _command(
        commands,
        "prepare",
        "Check a mesh, download and convert its models, and write the runtime file with which its services start: "
        "without `muxmesh up`, by a service manager or in containers. Starts nothing.",
    )
    _add_config(prepare)
    prepare.add_argument(
        "--run-dir", type=Path, metavar="DIR", required=True,
        help="folder for runtime.json and the sockets, of one mesh; it is created for this user alone",
    )  # fmt: skip
    prepare.add_argument("--redis-url", metavar="URL", help="the Redis of the mesh (default: redis_url of mesh.yaml)")
    part = prepare.add_mutually_exclusive_group()
    part.add_argument(
        "--router", action="store_true",
        help="prepare routers only: tokenizers without weights, no device (default: the whole mesh)",
    )  # fmt: skip
    part.add_argument(
        "--unit", metavar="NAME", help="prepare the processes of this unit only, each in a container of its own"
    )
    prepare.add_argument(
        "--published-at", metavar="HOST:PORT",
        help="where the listen address of a container is published; prepare warns if other machines may reach that "
        "(default: the listen address itself)",
    )  # fmt: skip
    prepare.add_argument("--quiet", action="store_true", help="show no progress")


def _add_health(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    health = _command(commands, "health", "Check that a service serves: exit code 0, or 1 and why not.")
    health.add_argument(
        "service",
        metavar="ADDRESS",
        help="HOST:PORT or unix:PATH; with --runtime the name of a process, as `muxmesh status` shows it",
    )
    health.add_argument("--runtime", type=Path, metavar="FILE", help="the runtime file of a mesh on this machine")
    health.add_argument("--timeout", type=argument_types.seconds, default=2.0, metavar="SECONDS", help="default: 2")
    add_tls(health)


_STATUS_COLUMNS = """\
columns:
  WAITING, RUNNING  sequences now; WAITING of a unit: requests that wait for admission
  FINISHED ... OUTPUT TOKENS  since the router started; RESTARTS: further attempts after a worker was lost
  PREDICTED TAU     rank correlation of predicted and true output lengths (Kendall's; 1 is perfect), of the last 256
                    outputs; "-": there are fewer than 100; "not used": predictions rank too badly to set the order
  SLO MET           share of the requests that met the SLO of their model since the router started; RECENTLY: in the
                    last 60 s. Failed and refused requests missed it; those that a client cancelled do not count
  STATE             awake, falling_asleep, asleep or waking; requests wake a model
  QUOTA MIB         part of the KV pool that the model can claim; it uses more while others use less
  BLOCKS LEASED, CACHED, FREE  token blocks of sequences, of the prefix cache, and to allocate (cached ones included)
  PREFIX HITS       share of the prompt tokens that were in the prefix cache
  SERVICE S         of a tenant: seconds of the device since it last had no requests
  BANDS AHEAD       of the least served tenant, by their weights; from 1 on others precede it
  HAND-OFFS         sequences that passed from prefill to decode since the unit started; BYTES COPIED: KV that the
                    present workers have written and not computed, 0 as long as hand-offs copy nothing
  LEASES            sequences whose KV a worker writes
  STEPS, TOKENS     computed since the worker started
  BUSY S            seconds for which the worker held the grant to compute"""


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = _command(commands, "status", "Show the models, workers, memory and processes of a mesh.")
    status.formatter_class = argparse.RawDescriptionHelpFormatter
    status.epilog = _STATUS_COLUMNS
    _add_address(status)
    _add_json(status)


def _add_model_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="M", help="model name; optional if the mesh serves only one")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    _add_model_name(parser)
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
    generate = _command(commands, "generate", "Send one prompt and stream the output.")
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
        "Hold a conversation with a model. Without a terminal, each line of standard input is a message.",
    )
    _add_address(chat)
    _add_sampling(chat)
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument(
        "--no-history", dest="history", action="store_false",
        help="keep what is typed out of the history of later chats (chat_history in MUXMESH_STATE_DIR, "
        "else in ~/.local/state/muxmesh; only you can read it)",
    )  # fmt: skip


def _add_tokenize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    tokenize = _command(commands, "tokenize", "Show the tokens of a text, or the text of token ids.")
    _add_address(tokenize)
    _add_model_name(tokenize)
    _add_json(tokenize)
    tokenize.add_argument("--chat", action="store_true", help="the text is a user message for the chat template")
    tokenize.add_argument("--no-special-tokens", action="store_true", help="without the tokenizer's own, such as a BOS")
    tokenize.add_argument("--decode", action="store_true", help="the text is token ids, such as 12,345")
    tokenize.add_argument("text", metavar="TEXT", help="`-` reads it from standard input")


def _add_profile(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    profile = _command(
        commands,
        "profile",
        "Measure the step times of models on this machine into a file: prefill and decode by batch, length and share "
        "of the device, and how much workers slow each other down. An existing file is continued.",
    )
    profile.add_argument(
        "models", nargs="*", metavar="MODEL",
        help="a catalog name, a folder in Hugging Face style or a GGUF file (default: the models of --config, "
        "else the default model)",
    )  # fmt: skip
    profile.add_argument("-c", "--config", type=Path, metavar="mesh.yaml", help="measure the models of this file")
    profile.add_argument("--unit", metavar="NAME", help="only the models of this unit of --config")
    profile.add_argument(
        "-o", "--output", type=Path, default=Path("profile.yaml"), metavar="FILE",
        help="the file to write or to continue (default: %(default)s)",
    )  # fmt: skip
    profile.add_argument(
        "--restart", action="store_true", help="measure all again; what FILE holds is lost with the first measurement"
    )
    profile.add_argument("--show", type=Path, metavar="FILE", help="print a profile as a table, and measure nothing")
    profile.add_argument(
        "--device", type=argument_types.device, metavar="cpu|cuda:N", help="where MODELs are measured (default: cpu)"
    )
    _add_dtype(profile, "data type of MODELs on a GPU (default: float32)")
    counts = argument_types.counts
    profile.add_argument(
        "--shares", type=counts(100), metavar="LIST",
        help="percent of the device (default: 25,50,75,100; 100 if nothing limits a worker)",
    )  # fmt: skip
    profile.add_argument(
        "--batches", type=counts(), metavar="LIST", help="sequences (default: 1,2,4,... up to max_num_seqs)"
    )
    profile.add_argument(
        "--lengths", type=counts(), metavar="LIST",
        help="tokens of a prompt, or of context (default: 64,256,1024,4096 as far as they fit)",
    )  # fmt: skip
    profile.add_argument(
        "--max-prefill-tokens", type=argument_types.count, metavar="N",
        help="leave out prefills of more tokens over all prompts (default: 2048, on a GPU 16384)",
    )  # fmt: skip
    profile.add_argument(
        "--repeats", type=argument_types.count, default=5, metavar="N",
        help="measure each cell at least N times, unless that takes long (default: %(default)s)",
    )  # fmt: skip
    profile.add_argument(
        "--cell-seconds", type=argument_types.seconds, default=2.0, metavar="S",
        help="begin no further repetition of a cell after S seconds (default: %(default)g)",
    )  # fmt: skip
    profile.add_argument(
        "--budget", type=argument_types.seconds, metavar="S",
        help="begin no measurement after S seconds; the same command continues later",
    )  # fmt: skip
    profile.add_argument("--no-interference", action="store_true", help="measure no workers side by side")
    profile.add_argument("--quiet", action="store_true", help="show no progress")
    _add_json(profile)


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = _command(
        commands,
        "plan",
        "Choose which models share which devices, their shares and batch caps, and write them as mesh.yaml with the "
        "reasons and the estimate beside them.",
    )
    plan.add_argument(
        "--profile", type=Path, required=True, metavar="FILE",
        help="step times of `muxmesh profile`, or MuxServe's profile (.json, .json.gz)",
    )  # fmt: skip
    source = plan.add_mutually_exclusive_group()
    source.add_argument(
        "--workload", type=Path, metavar="workload.yaml", help="the models with rates, mean lengths and SLOs"
    )
    source.add_argument("--muxserve", type=Path, metavar="FILE", help="a placement input of MuxServe instead")
    plan.add_argument(
        "--load", metavar="SPEC",
        help="rates and lengths of the workload's models from a load, as in `muxmesh loadtest --help`",
    )  # fmt: skip
    plan.add_argument(
        "--cluster", metavar="SPEC",
        help="NODESxDEVICESxMEMORY like 4x8x80GiB, or a file (default: the workload's, else the profiled machine)",
    )  # fmt: skip
    plan.add_argument("-o", "--output", type=Path, metavar="mesh.yaml", help="write the plan (default: print it)")
    plan.add_argument("--explain", action="store_true", help="for each model its next best place and what it costs")
    plan.add_argument(
        "--compare", type=Path, metavar="PLAN", help="estimate this mesh.yaml, or MuxServe's published plan, beside it"
    )
    plan.add_argument(
        "--live", metavar="ADDRESS",
        help="plan for the rates and lengths of the mesh at ADDRESS, whose mesh.yaml is --compare, and print the moves "
        "with their costs; nothing is changed",
    )  # fmt: skip
    plan.add_argument(
        "--seconds", type=argument_types.seconds, default=10.0, metavar="S",
        help="how long --live watches (default: %(default)g)",
    )  # fmt: skip
    plan.add_argument(
        "--threshold", type=argument_types.fraction(0, 1), default=0.05, metavar="F",
        help="gain in throughput or SLO attainment from which moves are worth it (default: %(default)g)",
    )  # fmt: skip
    plan.add_argument(
        "--objective", choices=("corrected", "reference", "both"), default="corrected",
        help="the estimator that decides: the corrected one, MuxServe's, or their sum (default: %(default)s)",
    )  # fmt: skip
    plan.add_argument(
        "--simulate", type=argument_types.seconds, metavar="S",
        help="choose among the three best plans by simulating S seconds of requests in virtual time",
    )  # fmt: skip
    plan.add_argument(
        "--max-tensor-parallel", type=argument_types.count, metavar="N",
        help="devices of a unit at most (default: as profiled). `muxmesh up` runs 1 only",
    )  # fmt: skip
    plan.add_argument(
        "--contention", type=argument_types.fraction(0, 10), metavar="F", help="instead of that of the profile"
    )
    plan.add_argument(
        "--moves", type=argument_types.count, default=20_000, metavar="N",
        help="moves of the local search (default: %(default)s)",
    )  # fmt: skip
    plan.add_argument(
        "--budget", type=argument_types.seconds, default=600.0, metavar="S",
        help="end the search after S seconds; only a search that ends before is repeatable (default: %(default)g)",
    )  # fmt: skip
    plan.add_argument("--seed", type=int, default=0, metavar="N", help="of the search (default: %(default)s)")
    add_tls(plan)
    _add_json(plan)


def _add_simulate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    simulate = _command(
        commands,
        "simulate",
        "Run a workload in virtual time: scheduling without computing. The workload sets the output lengths.",
    )
    simulate.add_argument(
        "-c", "--config", type=Path, metavar="mesh.yaml", required=True,
        help="every model needs `engine: sim`, or step times in --profile",
    )  # fmt: skip
    simulate.add_argument(
        "--profile", type=Path, metavar="FILE",
        help="step times and contention that `muxmesh profile` measured, for models that are not of `engine: sim`",
    )  # fmt: skip
    simulate.add_argument("--workload", required=True, metavar="SPEC", help="as in `muxmesh loadtest --help`")
    simulate.add_argument("--policy", choices=get_args(PolicyName), help="scheduling policy (default: as configured)")
    simulate.add_argument(
        "--arbiter", choices=get_args(ArbiterMode), help="mode of the arbiter of every unit (default: as configured)"
    )
    simulate.add_argument(
        "--contention", type=argument_types.fraction(0, 10), metavar="F",
        help="a step takes 1 + F x S times as long beside workers whose shares of the device sum to S "
        "(default: that of --profile, else 0)",
    )  # fmt: skip
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
        actions.add_subparsers(required=True, metavar="ACTION"), "eval",
        "Replay a file of outputs: each length is predicted before the predictor learns it.", "predictor",
    )  # fmt: skip
    evaluate.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help='a .jsonl file, optionally gzipped; required keys: "prompt", "n_out"; optional: "model", "task" and '
        '"censored", true if the output was cut off',
    )
    _add_json(evaluate)


_PS_COLUMNS = """\
columns:
  STATE           awake, falling_asleep (its sequences finish), asleep or waking; "pinned": only by command
  FOR             how long it has been in this state
  LAST USED       since its last request
  LEASES, QUEUED  sequences with KV memory, and requests that wait
  KV MIB          leased and cached KV memory
  WORKERS MIB     own memory of its workers, without weights that they map from a file
  WEIGHTS         mapped, kept (asleep, but mapped) or dropped
  WAKES           since the unit started; with the seconds that the last one took"""


def _add_model(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    model = commands.add_parser(
        "model", help="List, download and inspect models; load, unload, wake and put to sleep those of a running mesh."
    ).add_subparsers(required=True, metavar="ACTION")
    listing = _command(model, "list", "List the models of the catalog.", "model")
    listing.set_defaults(action="list")
    _add_json(listing)
    pull = _command(model, "pull", "Download and prepare a catalog model, unless it is present.", "model")
    pull.set_defaults(action="pull")
    pull.add_argument("name", metavar="NAME", help="a name that `muxmesh model list` shows")
    _add_dtype(pull, "prepare the weights for a GPU in this data type (default: for a CPU, in float32)")
    _add_json(pull)
    _add_running_models(model)
    inspect = _command(
        model, "inspect", "Show what an engine would load from a model, or why it cannot load it.", "model"
    )
    inspect.set_defaults(action="inspect")
    inspect.add_argument(
        "path",
        metavar="PATH",
        help="a folder in Hugging Face style, a GGUF file, or the name of a downloaded catalog model",
    )
    _add_dtype(inspect, "sizes on a GPU with this `dtype` (default: on a CPU, in float32)")
    _add_json(inspect)


def _add_running_models(model: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The commands for a mesh that runs. They find it by its folder, and reach it over its private sockets."""

    def command(name: str, text: str) -> argparse.ArgumentParser:
        parser = _command(model, name, text, "running_model")
        parser.set_defaults(action=name)
        add_runtime_options(parser)
        _add_json(parser)
        return parser

    def with_timeout(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--timeout", type=argument_types.seconds, default=600.0, metavar="SECONDS",
            help="how long to wait until it is done (default 600); the mesh goes on with it afterwards",
        )  # fmt: skip

    ps = command("ps", "Show which models of a running mesh are awake, and their memory.")
    ps.formatter_class = argparse.RawDescriptionHelpFormatter
    ps.epilog = _PS_COLUMNS
    for name, text in (
        ("sleep", "Let a model fall asleep: it returns its KV memory, and the next request wakes it."),
        ("wake", "Wake a model before a request does."),
    ):
        parser = command(name, text)
        parser.add_argument("name", metavar="NAME", help="a name that `muxmesh model ps` shows")
        parser.add_argument("--unit", default="", metavar="UNIT", help="only on this unit (default: wherever it is)")
        with_timeout(parser)
        if name == "sleep":
            parser.add_argument(
                "--drop-weights", action="store_true",
                help="also free the memory of the weights, which are read from the disk when it wakes; not on a GPU",
            )  # fmt: skip
    load = command("load", "Add a model to a mesh that `muxmesh up` runs, until it stops; mesh.yaml stays as it is.")
    load.add_argument("source", metavar="SOURCE", help="as `source` in mesh.yaml: a catalog name, a folder or a file")
    load.add_argument("--name", metavar="NAME", help="its name in the mesh (default: that of the source)")
    load.add_argument("--unit", default="", metavar="UNIT", help="needed if the mesh has several")
    load.add_argument(
        "--set", action="append", default=[], type=argument_types.setting, metavar="FIELD=VALUE", dest="settings",
        help="a field of the model as in mesh.yaml, such as max_num_seqs=4; repeatable",
    )  # fmt: skip
    with_timeout(load)
    unload = command("unload", "Remove a model from a mesh that `muxmesh up` runs, when its sequences have finished.")
    unload.add_argument("name", metavar="NAME", help="a name that `muxmesh model ps` shows")
    with_timeout(unload)


def _add_dtype(command: argparse.ArgumentParser, meaning: str) -> None:
    command.add_argument("--dtype", choices=get_args(Dtype), help=meaning)
