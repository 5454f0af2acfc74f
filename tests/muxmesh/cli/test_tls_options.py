"""The TLS options of the commands and their environment variables."""

import argparse
from pathlib import Path

import pytest

from muxmesh.cli.command_parser import command_parser
from muxmesh.cli.main import main
from muxmesh.cli.tls_options import given_tls_option, tls_of
from muxmesh.client import Tls
from muxmesh.errors import InvalidRequest

ADDRESS = "127.0.0.1:50051"
FILES = ("--tls-ca", "ca.pem", "--tls-cert", "a.pem", "--tls-key", "a.key")
COMMANDS = (
    ("generate", "x"),
    ("chat",),
    ("tokenize", "x"),
    ("status",),
    ("loadtest",),
    ("health", ADDRESS),
    ("plan", "--profile", "p", "--live", ADDRESS),
)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MUXMESH_TLS_CA", "MUXMESH_TLS_CERT", "MUXMESH_TLS_KEY"):
        monkeypatch.delenv(name, raising=False)


def parsed(*arguments: str) -> argparse.Namespace:
    return command_parser().parse_args(["status", *arguments])


def tls(*arguments: str, address: str = ADDRESS) -> Tls | bool:
    return tls_of(parsed(*arguments), address)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_that_takes_an_address_takes_the_files(command: tuple[str, ...]) -> None:
    arguments = command_parser().parse_args([*command, *FILES, "--tls-server-name", "n"])
    assert tls_of(arguments, ADDRESS) == Tls("ca.pem", "a.pem", "a.key", "n")
    assert tls_of(command_parser().parse_args([*command, "--tls"]), ADDRESS) is True
    assert tls_of(command_parser().parse_args(list(command)), ADDRESS) is False


def test_one_file_or_a_name_turns_tls_on() -> None:
    assert tls("--tls-ca", "ca.pem") == Tls(ca="ca.pem")
    assert tls("--tls-server-name", "n") == tls("--tls", "--tls-server-name", "n") == Tls(server_name="n")


def test_variables_stand_in_for_options_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUXMESH_TLS_CA", "ca.pem")
    assert tls() == Tls(ca="ca.pem")
    assert tls("--tls-ca", "other.pem") == Tls(ca="other.pem")
    monkeypatch.setenv("MUXMESH_TLS_CERT", "a.pem")
    monkeypatch.setenv("MUXMESH_TLS_KEY", "a.key")
    assert tls("--tls") == Tls("ca.pem", "a.pem", "a.key")
    monkeypatch.setenv("MUXMESH_TLS_CA", "")
    assert tls() == Tls(None, "a.pem", "a.key")


def test_variables_are_not_for_unix_sockets_but_options_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUXMESH_TLS_CA", "ca.pem")
    assert tls(address="unix:/run/muxmesh/router.sock") is False
    assert tls("--tls", address="unix:/run/muxmesh/router.sock") is True
    assert tls("--tls-ca", "b.pem", address="unix:/run/muxmesh/router.sock") == Tls(ca="b.pem")


def test_a_certificate_without_a_key_is_refused_by_the_name_of_the_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequest):
        tls("--tls-cert", "a.pem")
    assert main(["status", "--tls-cert", "a.pem"]) == 1
    expected = "is missing beside {}: a certificate and its key are used together\n"
    assert capsys.readouterr().err == "muxmesh: --tls-key: " + expected.format("cert")
    monkeypatch.setenv("MUXMESH_TLS_KEY", "a.key")
    assert main(["status"]) == 1
    assert capsys.readouterr().err == "muxmesh: --tls-cert: " + expected.format("key")


def test_a_file_that_cannot_be_read_is_named_with_its_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--tls-ca", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err == (
        f"muxmesh: --tls-ca: {tmp_path}/none: cannot be read: No such file or directory\n"
    )  # fmt: skip


def test_only_options_count_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUXMESH_TLS_CA", "ca.pem")
    assert given_tls_option(parsed()) is None
    assert given_tls_option(parsed("--tls")) == "--tls"
    assert given_tls_option(parsed(*FILES)) == "--tls-ca"
    assert given_tls_option(parsed("--tls-server-name", "n")) == "--tls-server-name"
