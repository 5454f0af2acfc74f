"""The files of the section `tls`, checked before a mesh starts."""

from pathlib import Path

import pytest

from muxmesh.config.tls_config import TlsConfig
from muxmesh.rpc.server_certificates import certificate_problems, read_server_certificates, unchecked_contents
from tests.support.tls import NOW_S, Authority, PairFiles


def section(files: PairFiles, client_ca: Path | None = None) -> TlsConfig:
    return TlsConfig(cert=str(files.cert), key=str(files.key), client_ca=client_ca and str(client_ca))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def test_files_that_fit_have_no_problem(authority: Authority) -> None:
    files = authority.issue("a")
    for tls, client_ca in ((section(files), None), (section(files, authority.pem), authority.pem.read_bytes())):
        assert list(certificate_problems(tls, NOW_S)) == []
        served = read_server_certificates(tls)
        assert (served.pair.cert, served.client_ca) == (files.cert.read_bytes(), client_ca)


def test_a_problem_is_at_the_field_of_its_file(authority: Authority, tmp_path: Path) -> None:
    files, other, missing = authority.issue("a"), authority.issue("b"), tmp_path / "none.pem"
    absent = f"{missing}: cannot be read: No such file or directory"
    for tls, expected in (
        (section(PairFiles(missing, files.key)), ("cert", absent)),
        (section(PairFiles(files.cert, missing)), ("key", absent)),
        (section(files, missing), ("client_ca", absent)),
        (
            section(PairFiles(files.cert, other.key)),
            ("key", f"{other.key}: is not the key of the certificate in {files.cert}"),
        ),
    ):
        assert list(certificate_problems(tls, NOW_S)) == [expected]


def test_a_certificate_with_which_no_client_could_connect_is_a_problem(authority: Authority) -> None:
    files = authority.issue_expired("old")
    assert list(certificate_problems(section(files), NOW_S)) == [
        ("cert", f"{files.cert}: has expired on 2020-01-06 00:00 UTC; renew it")
    ]


def test_unchecked_contents_are_those_of_all_files_that_are_named(authority: Authority) -> None:
    files = authority.issue("a")
    pair = (files.cert.read_bytes(), files.key.read_bytes())
    assert unchecked_contents(section(files)) == pair
    assert unchecked_contents(section(files, authority.pem)) == (*pair, authority.pem.read_bytes())
