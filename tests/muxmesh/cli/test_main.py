"""The parser, and how errors of any command become messages and exit codes."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest

from muxmesh import __version__
from muxmesh.cli.main import main
from muxmesh.errors import InvalidRequest, MeshError, Overloaded, Unavailable

UNREACHABLE = "127.0.0.1:1"


def command_that_raises(error: BaseException) -> Callable[[str], SimpleNamespace]:
    """In place of `importlib.import_module`: a command that ends with ``error``."""

    def run(arguments: argparse.Namespace) -> int:
        raise error

    return lambda name: SimpleNamespace(run=run)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"muxmesh {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["generate"],
        ["generate", "--temperature", "warm", "x"],
        ["generate", "--logit-bias", "42:1", "x"],
        ["model"],
        ["model", "pull"],
        ["predictor"],
        ["simulate"],
        ["simulate", "-c", "mesh.yaml", "--workload", "x", "--policy", "lifo"],
    ],
)
def test_wrong_arguments_end_with_2_and_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: muxmesh" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["up", "status", "generate", "chat", "model list", "model pull", "model inspect", "loadtest", "loadtest compare",
     "simulate", "predictor eval"],
)  # fmt: skip
def test_every_command_has_a_help_text(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
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


@pytest.mark.parametrize(("module", "extra"), [("aiohttp", "loadtest"), ("torch", "serve")])
def test_a_missing_package_is_reported_with_the_extra_that_installs_it(
    module: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def import_module(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr("muxmesh.cli.main.importlib.import_module", import_module)
    assert main(["status"]) == 1
    assert f"its extra `{extra}`" in capsys.readouterr().err


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


@pytest.mark.parametrize("arguments", [["model", "list"], ["model", "list", "--json"]])
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
