"""Files that can be used, and what is said of those that cannot."""

import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from muxmesh.rpc import pem_files
from muxmesh.rpc.pem_files import PemFileError, Side, raw_contents, read_ca_certificates, read_key_pair, utc_date
from tests.support.tls import LONG_AGO, NOW_S, Authority, PairFiles

CERTIFICATE = "a PEM file with `-----BEGIN CERTIFICATE-----` is needed"
DAMAGED, TOO_LONG = (
    "has a certificate that is incomplete or damaged",
    "has more than 1048576 bytes; a PEM file is needed",
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def openssl(folder: Path, *arguments: str) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    subprocess.run(("openssl", *arguments), check=True, cwd=folder, capture_output=True)


def problem_of(files: PairFiles, side: Side = "server") -> tuple[str, str]:
    """What the error names as wrong: the kind of file, and the problem."""
    with pytest.raises(PemFileError) as caught:
        read_key_pair(files.cert, files.key, side)
    assert str(caught.value) == f"{caught.value.path}: {caught.value.problem}"
    assert caught.value.path == (files.cert if caught.value.kind == "cert" else files.key)
    return caught.value.kind, caught.value.problem


@pytest.mark.parametrize("side", ["server", "client"])
def test_a_pair_is_what_the_files_hold_and_when_it_is_valid(authority: Authority, side: Side) -> None:
    files = authority.issue("a", not_before=LONG_AGO, not_after=LONG_AGO + timedelta(days=3))
    pair = read_key_pair(files.cert, files.key, side)
    assert (pair.cert, pair.key) == (files.cert.read_bytes(), files.key.read_bytes())
    assert (pair.not_before_s, pair.not_after_s) == (1577836800, 1577836800 + 3 * 86400)
    assert "PRIVATE" not in repr(pair)


def test_certificate_and_key_may_be_in_one_file(authority: Authority, tmp_path: Path) -> None:
    files, both = authority.issue("a"), tmp_path / "both.pem"
    both.write_bytes(files.key.read_bytes() + files.cert.read_bytes())
    assert read_key_pair(both, both, "server").cert == both.read_bytes()


def test_a_pair_is_valid_from_its_first_to_its_last_second(authority: Authority) -> None:
    files = authority.issue("a", not_before=LONG_AGO, not_after=LONG_AGO + timedelta(days=3))
    pair, first_s = read_key_pair(files.cert, files.key, "server"), LONG_AGO.timestamp()
    last_s = first_s + 3 * 86400
    assert [pair.time_problem(now_s) for now_s in (first_s, last_s)] == [None, None]
    assert pair.time_problem(last_s + 1) == "has expired on 2020-01-04 00:00 UTC; renew it"
    assert pair.time_problem(first_s - 1) == (
        "is not valid before 2020-01-01 00:00 UTC; is the clock of this machine right?"
    )


def test_a_date_is_in_utc() -> None:
    assert utc_date(datetime(2026, 11, 28, 7, 5, 59, tzinfo=UTC).timestamp()) == "2026-11-28 07:05 UTC"


def _write(name: str, change: Callable[[bytes], bytes]) -> Callable[[PairFiles], None]:
    def apply(files: PairFiles) -> None:
        path: Path = getattr(files, name)
        path.write_bytes(change(path.read_bytes()))

    return apply


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda files: files.cert.unlink(), ("cert", "cannot be read: No such file or directory")),
        (lambda files: files.key.unlink(), ("key", "cannot be read: No such file or directory")),
        (lambda files: (files.key.unlink(), files.key.mkdir()), ("key", "cannot be read: Is a directory")),
        (_write("cert", lambda pem: b"hello"), ("cert", f"has no certificate; {CERTIFICATE}")),
        (_write("cert", lambda pem: b""), ("cert", f"has no certificate; {CERTIFICATE}")),
        (_write("cert", lambda pem: pem[:300]), ("cert", DAMAGED)),
        (_write("cert", lambda pem: pem[:40] + b"AAAA" + pem[44:]), ("cert", DAMAGED)),
        (_write("cert", lambda pem: pem + b"x" * (1 << 20)), ("cert", TOO_LONG)),
        (
            _write("key", lambda pem: b"hello"),
            ("key", "has no private key; a PEM file with `-----BEGIN PRIVATE KEY-----` is needed"),
        ),
        (_write("key", lambda pem: pem[:100]), ("key", "has a private key that is incomplete or damaged")),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_named_with_the_cause(
    authority: Authority, change: Callable[[PairFiles], None], expected: tuple[str, str]
) -> None:
    files = authority.issue("a")
    change(files)
    assert problem_of(files) == expected
    assert problem_of(files, "client") == expected


def test_exchanged_files_are_recognized(authority: Authority) -> None:
    files = authority.issue("a")
    expected = ("cert", "has a private key and no certificate; are cert and key exchanged?")
    assert problem_of(PairFiles(files.key, files.cert)) == expected


def test_a_key_of_another_certificate_is_named(authority: Authority) -> None:
    files, other = authority.issue("a"), authority.issue("b")
    assert problem_of(PairFiles(files.cert, other.key)) == (
        "key", f"is not the key of the certificate in {files.cert}"
    )  # fmt: skip


def test_a_key_of_another_kind_than_the_certificate_is_named(authority: Authority, tmp_path: Path) -> None:
    openssl(tmp_path, "genrsa", "-out", "rsa.key", "2048")
    files = PairFiles(authority.issue("a").cert, tmp_path / "rsa.key")
    assert problem_of(files) == ("key", f"is not the key of the certificate in {files.cert}")


@pytest.mark.parametrize("form", [(), ("-traditional",)])
def test_an_encrypted_key_asks_for_no_passphrase(authority: Authority, tmp_path: Path, form: tuple[str, ...]) -> None:
    files = authority.issue("a")
    arguments = ("-in", str(files.key), "-aes256", "-passout", "pass:secret", "-out", "locked.key", *form)
    openssl(tmp_path, "pkey", *arguments)
    locked = PairFiles(files.cert, tmp_path / "locked.key")
    assert problem_of(locked) == ("key", "is encrypted; a key without a passphrase is needed")


@pytest.mark.parametrize("algorithm", ["ed25519", "ed448"])
def test_keys_that_grpc_does_not_serve_are_refused(tmp_path: Path, algorithm: str) -> None:
    files = self_signed(tmp_path, algorithm)
    assert problem_of(files) == ("key", "is of Ed25519 or Ed448, which gRPC does not serve; use ECDSA or RSA")


def test_a_key_that_openssl_finds_too_small_is_refused_with_its_reason(tmp_path: Path) -> None:
    assert problem_of(self_signed(tmp_path, "rsa:512")) == ("cert", "is refused by OpenSSL: ee key too small")


@pytest.mark.parametrize(
    ("usage", "fits", "other"), [("serverAuth", "server", "client"), ("clientAuth", "client", "server")]
)
def test_a_certificate_has_to_be_for_its_side(tmp_path: Path, usage: str, fits: Side, other: Side) -> None:
    files = self_signed(tmp_path, "rsa:2048", "-addext", f"extendedKeyUsage={usage}")
    assert read_key_pair(files.cert, files.key, fits).time_problem(NOW_S + 10 * 365 * 86400) is not None
    kind, problem = problem_of(files, other)
    assert kind == "cert"
    assert problem.lower().startswith(f"cannot be that of a {other}: un")  # "unsupported" or "unsuitable" purpose


def test_files_that_change_while_they_are_read_are_no_pair(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL may then have checked others than those that were read."""
    files, other = authority.issue("a"), authority.issue("b")
    validity = pem_files._validity

    def replaced(cert: Path, key: Path, content: bytes, side: Side) -> tuple[int, int]:
        found = validity(cert, key, content, side)
        files.replace_by(other)
        return found

    monkeypatch.setattr(pem_files, "_validity", replaced)
    assert problem_of(files) == ("cert", "was replaced while it was read")


def test_a_file_of_another_user_is_named_with_this_one(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pem_files.os, "geteuid", lambda: 1234)  # type: ignore[attr-defined]
    denied = PermissionError(13, "Permission denied")
    assert pem_files._unreadable(denied) == "cannot be read by uid 1234: Permission denied"


def test_a_path_that_cannot_be_one_is_an_unreadable_file(tmp_path: Path) -> None:
    (content,) = raw_contents([tmp_path / "a\0b"])
    assert isinstance(content, str)
    assert content.startswith("cannot be read: ")


def test_raw_contents_are_bytes_or_reasons(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    found = raw_contents([tmp_path / "a", tmp_path / "none"])
    assert found == (b"abc", "cannot be read: No such file or directory")


def test_certificates_of_several_cas_are_one_file(tmp_path: Path) -> None:
    one, other = Authority(tmp_path, "one"), Authority(tmp_path, "other")
    both = tmp_path / "both.pem"
    both.write_bytes(b"# comment \xc3\xa9\n" + one.pem.read_bytes() + other.pem.read_bytes())
    assert read_ca_certificates(both) == both.read_bytes()


def test_the_certificate_of_a_peer_may_stand_for_its_ca(authority: Authority) -> None:
    cert = authority.issue("a").cert
    assert read_ca_certificates(cert) == cert.read_bytes()


def test_a_ca_file_without_a_certificate_is_refused(authority: Authority, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.pem"
    damaged.write_bytes(authority.pem.read_bytes()[:300])
    for path, problem in (
        (damaged, DAMAGED),
        (authority.issue("a").key, f"has no certificate; {CERTIFICATE}"),
        (tmp_path / "none", "cannot be read: No such file or directory"),
    ):
        with pytest.raises(PemFileError) as caught:
            read_ca_certificates(path)
        assert (caught.value.kind, caught.value.path, caught.value.problem) == ("ca", path, problem)


def self_signed(folder: Path, algorithm: str, *extensions: str) -> PairFiles:
    """A certificate of ten days, made with the OpenSSL of this machine."""
    openssl(
        folder, "req", "-x509", "-newkey", algorithm, "-nodes", "-keyout", "self.key", "-out", "self.pem",
        "-days", "10", "-subj", "/CN=localhost", *extensions,
    )  # fmt: skip
    return PairFiles(folder / "self.pem", folder / "self.key")
