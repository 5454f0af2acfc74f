"""The parser, and how errors of any command become messages and exit codes."""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from muxmesh import __version__
from muxmesh.cli.main import main
from muxmesh.errors import InvalidRequest, MeshError, Overloaded, Unavailable
from tests.support.fake_mesh import FakeMesh, output

UNREACHABLE = "127.0.0.1:1"


def command_that_raises(error: BaseException) -> Callable[[str], SimpleNamespace]:
    """In place of `importlib.import_module`: a command that ends with ``error``."""

    def run(arguments: argparse.Namespace) -> int:
        raise error

    return lambda name: SimpleNamespace(run=run)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"muxmesh {__version__}\n"


NUMBER = "is not a finite number"
WHOLE = "is not a whole number"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "muxmesh: the following arguments are required: COMMAND"),
        (["nothing"], "muxmesh: argument COMMAND: invalid choice: 'nothing'"),
        (["generate"], "muxmesh generate: the following arguments are required: PROMPT"),
        (
            ["generate", "x", "--seeds", "1"],
            "muxmesh generate: unrecognized arguments: --seeds 1; did you mean --seed?",
        ),
        (
            ["generate", "x", "--max-tokens=1"],
            "muxmesh generate: unrecognized arguments: --max-tokens=1; did you mean --max-new-tokens?",
        ),
        (
            ["generate", "--num-predict", "1"],
            "muxmesh generate: unrecognized arguments: --num-predict; did you mean --max-new-tokens?",
        ),
        (
            ["generate", "Why", "is", "it?"],
            "muxmesh generate: unrecognized arguments: is it?; a text of several words needs quotation marks",
        ),
        (["up", "--port", "1"], "muxmesh up: unrecognized arguments: --port 1; did you mean --listen?"),
        (["chat", "--port", "1"], "muxmesh chat: unrecognized arguments: --port 1; see"),
        (["loadtest", "compare", "a", "--htlm", "b"], "muxmesh loadtest compare: unrecognized arguments: --htlm"),
        (["generate", "--seed", "x", "x"], f"muxmesh generate: argument --seed: 'x' {WHOLE}"),
        (["generate", "--max-new-tokens", "1.5", "x"], f"muxmesh generate: argument --max-new-tokens: '1.5' {WHOLE}"),
        (["generate", "--top-p", "nan", "x"], f"muxmesh generate: argument --top-p: 'nan' {NUMBER}"),
        (
            ["generate", "--temperature", "warm", "x"],
            "muxmesh generate: argument --temperature: 'warm' is neither a finite number nor `model`",
        ),
        (
            ["generate", "--logit-bias", "42:1", "x"],
            "muxmesh generate: argument --logit-bias: '42:1' is not ID=BIAS, such as 42=-100",
        ),
        *(
            (
                ["chat", "--timeout", value],
                f"muxmesh chat: argument --timeout: {value!r} is not a number of seconds above 0",
            )
            for value in ("0", "-1", "0.0")
        ),
        (["chat", "--timeout", "inf"], f"muxmesh chat: argument --timeout: 'inf' {NUMBER}"),
        (
            ["status", "--address", "http://host:1"],
            "muxmesh status: argument --address: is 'http://host:1'; a URL does not fit, HOST:PORT is needed: host:1",
        ),
        (["model"], "muxmesh model: the following arguments are required: ACTION"),
        (["model", "pull"], "muxmesh model pull: the following arguments are required: NAME"),
        (["predictor"], "muxmesh predictor: the following arguments are required: ACTION"),
        (["simulate"], "muxmesh simulate: the following arguments are required: -c/--config, --workload"),
        (
            ["simulate", "-c", "mesh.yaml", "--workload", "x", "--policy", "lifo"],
            "muxmesh simulate: argument --policy: invalid choice: 'lifo'",
        ),
        (
            ["simulate", "-c", "mesh.yaml", "--workload", "x", "--tau", "2"],
            "muxmesh simulate: argument --tau: '2' is not a number from 0 to 1",
        ),
    ],
)
def test_wrong_arguments_end_with_2_and_one_line_that_names_the_option_and_what_it_takes(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(message) and printed.err.count("\n") == 1
    assert re.search(r"; see `muxmesh[a-z ]* --help`$", printed.err)


def test_a_wrong_address_of_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MUXMESH_ADDRESS", "host")
    assert main(["status"]) == 2
    assert "MUXMESH_ADDRESS" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["up", "status", "generate", "chat", "model list", "model pull", "model inspect", "loadtest", "loadtest compare",
     "simulate", "predictor eval"],
)  # fmt: skip
def test_every_command_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: muxmesh {command}")


def test_an_unreachable_mesh_is_reported_with_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--address", UNREACHABLE, "--timeout", "5", "hi"]) == 1
    assert (
        f"muxmesh: no mesh answers at {UNREACHABLE} (Connection refused); start one with `muxmesh up`"
        in capsys.readouterr().err
    )
    assert main(["status", "--address", UNREACHABLE, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "Unavailable"


def test_the_address_comes_from_the_environment_unless_an_option_sets_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MUXMESH_ADDRESS", "127.0.0.1:2")
    assert main(["status"]) == 1
    assert "answers at 127.0.0.1:2 (" in capsys.readouterr().err
    assert main(["status", "--address", UNREACHABLE]) == 1
    assert f"answers at {UNREACHABLE} (" in capsys.readouterr().err


def test_an_unreachable_openai_server_is_not_reported_as_a_mesh(capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--workload", "rate=2 lengths=D(5,5) requests=2"]
    assert main(["loadtest", "--openai", f"http://{UNREACHABLE}", *load]) == 1
    error = capsys.readouterr().err
    assert f"http://{UNREACHABLE}" in error and "muxmesh up" not in error


@pytest.mark.parametrize(("command", "extra"), [("loadtest", "loadtest"), ("chat", "chat"), ("model list", "serve")])
def test_a_missing_package_is_reported_with_the_extra_that_the_command_needs(
    command: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = ModuleNotFoundError("No module named 'x'", name="x")
    monkeypatch.setattr("muxmesh.cli.main.importlib.import_module", command_that_raises(error))
    assert main(command.split()) == 1
    assert capsys.readouterr().err == (
        f"muxmesh: No module named 'x'; this needs muxmesh installed with its extra `{extra}`\n"
    )


@pytest.mark.parametrize(("error", "field"), [(InvalidRequest("text", "is empty"), "text"), (Overloaded("full"), None)])
def test_an_error_is_a_line_on_stderr_or_one_json_object_on_stdout(
    error: MeshError, field: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("muxmesh.cli.main.importlib.import_module", command_that_raises(error))
    assert main(["status"]) == 1
    assert capsys.readouterr() == ("", f"muxmesh: {error}\n")
    assert main(["status", "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    assert json.loads(printed.out) == {"error": type(error).__name__, "field": field, "message": str(error)}


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, ""),
        (PermissionError(13, "Permission denied", "/state"), 1, "muxmesh: [Errno 13] Permission denied: '/state'\n"),
        (Unavailable("connection refused"), 1, "muxmesh: connection refused\n"),
    ],
)
def test_other_errors_have_their_exit_code_and_no_traceback(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("muxmesh.cli.main.importlib.import_module", command_that_raises(error))
    assert main(["up"]) == code, "`up` has no --address, so no address is named"
    assert capsys.readouterr() == ("", message)


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muxmesh.cli.main.importlib.import_module", command_that_raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["status"])


def run(*arguments: str, shell: str = '"$@"', **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Runs `muxmesh` as a process; ``shell`` may redirect its streams."""
    return subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-m", "muxmesh", *arguments],
        check=False,
        capture_output=True,
        timeout=120,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | environment,
    )


@pytest.mark.parametrize("arguments", [["model", "list"], ["model", "list", "--json"], ["--help"], ["up", "--help"]])
def test_a_reader_that_exits_early_ends_the_command_without_a_message(arguments: list[str]) -> None:
    """As in `muxmesh model list | head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "muxmesh", *arguments],
            check=False,
            stdout=writer,
            stderr=subprocess.PIPE,
            env=environment,
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, b"")


@pytest.mark.parametrize("arguments", [["model", "list"], ["model", "list", "--json"], ["--version"]])
def test_closed_streams_are_no_error(arguments: list[str]) -> None:
    for shell in ('"$@" >&-', '"$@" <&- >&- 2>&-', '"$@" 2>&-'):
        ended = run(*arguments, shell=shell)
        assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_full_disk_is_one_line() -> None:
    ended = run("model", "list", shell='"$@" >/dev/full')
    assert ended.returncode == 1
    assert ended.stderr == b"muxmesh: standard output: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed_in_any_encoding(mesh: FakeMesh, encoding: str) -> None:
    mesh.script = output("é🙂\x85")
    plain = run("generate", "hi", PYTHONIOENCODING=encoding, MUXMESH_ADDRESS=mesh.address)
    assert (plain.returncode, plain.stdout[-1:]) == (0, b"\n")
    assert plain.stdout.decode(encoding).rstrip("\n") in ("é🙂\x85", "é\\U0001f642\x85", "\\xe9\\U0001f642\\x85")
    as_json = run("generate", "--json", "hi", PYTHONIOENCODING=encoding, MUXMESH_ADDRESS=mesh.address)
    assert json.loads(as_json.stdout.decode(encoding))["text"] == "é🙂\x85"


def test_an_argument_that_is_no_text_is_refused_by_its_name() -> None:
    for arguments in (["--json"], []):
        ended = run("generate", *arguments, "--model", "m", os.fsdecode(b"\xff"))
        assert ended.returncode == 1 and b"Traceback" not in ended.stderr
        error = json.loads(ended.stdout)["message"] if arguments else ended.stderr.decode()
        assert "prompt: is " in error and "UTF-8" in error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InvalidRequest("sampling.top_p", "is 0.0; above 0"), "--top-p: is 0.0; above 0"),
        (InvalidRequest("max_new_tokens", "is -1; at least 1"), "--max-new-tokens: is -1; at least 1"),
        (InvalidRequest("stopping.stop_strings[0]", "is empty"), "--stop: is empty"),
        (InvalidRequest("decoding.logit_bias[1]", "is 500"), "--logit-bias: is 500"),
        (InvalidRequest("text", "is empty"), "text: is empty"),
    ],
)
def test_a_field_that_an_option_sets_is_called_by_the_option(
    error: InvalidRequest, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("muxmesh.cli.main.importlib.import_module", command_that_raises(error))
    assert main(["status"]) == 1
    assert capsys.readouterr().err == f"muxmesh: {message}\n"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ModuleNotFoundError("no x", name="x")])
def test_every_error_is_json_on_request(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("muxmesh.cli.main.importlib.import_module", command_that_raises(error))
    assert main(["status", "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    content = json.loads(printed.out)
    assert (content["error"], content["field"]) == (type(error).__name__, None)
    assert content["message"].startswith(str(error))


def test_ctrl_c_while_the_program_is_loading_ends_it_without_a_traceback() -> None:
    script = """
import sys
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == "muxmesh.cli.main":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from muxmesh.__main__ import main
sys.exit(main())
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, b"", b"")
