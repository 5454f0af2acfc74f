"""TLS of the client: its settings, and what it reports when there is no connection."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from muxmesh.client import NO_RETRIES, MeshClient, SyncMeshClient, Tls
from muxmesh.client.tls import read_credentials
from muxmesh.clock import SystemClock
from muxmesh.config.tls_config import TlsConfig
from muxmesh.errors import InvalidRequest, TlsFailed, Unavailable
from muxmesh.rpc.server_credentials import ReloadedCredentials
from tests.support.fake_mesh import FakeMesh, fake_mesh
from tests.support.tls import Authority, PairFiles


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@asynccontextmanager
async def tls_mesh(files: PairFiles, client_ca: Path | None = None) -> AsyncIterator[FakeMesh]:
    section = TlsConfig(cert=str(files.cert), key=str(files.key), client_ca=client_ca and str(client_ca))
    async with fake_mesh("127.0.0.1:0", credentials=ReloadedCredentials(section, SystemClock()).credentials) as mesh:
        yield mesh


async def failure(address: str, tls: Tls | bool) -> Unavailable:
    async with MeshClient(address, retries=NO_RETRIES, tls=tls) as client:
        with pytest.raises(Unavailable) as caught:
            await client.list_models()
    return caught.value


async def tls_failure(address: str, tls: Tls | bool) -> str:
    """The message of a failure that is certainly one of TLS."""
    error = await failure(address, tls)
    assert type(error) is TlsFailed
    beginning = f"no TLS connection to {address}: "
    assert str(error).startswith(beginning)
    return str(error).removeprefix(beginning)


async def test_a_client_that_trusts_the_ca_is_served(ca: Authority) -> None:
    async with tls_mesh(ca.issue("a")) as mesh:
        async with MeshClient(mesh.address, tls=Tls(ca=ca.pem)) as client:
            assert (await client.generate("x", model="m")).text == "abc"
        with SyncMeshClient(mesh.address, tls=Tls(ca=str(ca.pem))) as sync:
            assert len(await asyncio.to_thread(sync.list_models)) == 1


async def test_a_client_with_a_certificate_is_served_where_one_is_asked_for(ca: Authority) -> None:
    mine = ca.issue("me")
    async with (
        tls_mesh(ca.issue("a"), ca.pem) as mesh,
        MeshClient(mesh.address, tls=Tls(ca=ca.pem, cert=mine.cert, key=mine.key)) as client,
    ):
        assert len(await client.list_models()) == 1


async def test_a_server_name_stands_in_for_the_host_of_the_address(ca: Authority) -> None:
    async with (
        tls_mesh(ca.issue("a", "mesh.example.org")) as mesh,
        MeshClient(mesh.address, tls=Tls(ca=ca.pem, server_name="mesh.example.org")) as client,
    ):
        assert len(await client.list_models()) == 1


async def test_a_client_may_trust_one_certificate_alone(ca: Authority) -> None:
    trusted, other = ca.issue("a"), ca.issue("b")
    async with tls_mesh(trusted) as mesh:
        async with MeshClient(mesh.address, tls=Tls(ca=trusted.cert)) as client:
            assert len(await client.list_models()) == 1
        assert "not signed by a CA" in await tls_failure(mesh.address, Tls(ca=other.cert))


async def test_a_certificate_of_another_ca_is_reported_with_the_remedy(ca: Authority, tmp_path: Path) -> None:
    expected = (
        "the server's certificate is not signed by a CA that this client trusts; name the CA's certificate as `ca` "
        "(--tls-ca)"
    )
    async with tls_mesh(ca.issue("a")) as mesh:
        assert await tls_failure(mesh.address, Tls(ca=Authority(tmp_path, "other").pem)) == expected
        assert await tls_failure(mesh.address, True) == expected


async def test_a_client_with_a_certificate_and_no_ca_trusts_the_system_and_shows_its_certificate(
    ca: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = ca.issue("me")
    async with tls_mesh(ca.issue("a"), ca.pem) as mesh:
        assert "not signed by a CA" in await tls_failure(mesh.address, Tls(cert=mine.cert, key=mine.key))
        monkeypatch.delenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", raising=False)
        monkeypatch.setenv("SSL_CERT_FILE", str(ca.pem))
        async with MeshClient(mesh.address, tls=Tls(cert=mine.cert, key=mine.key)) as client:
            assert len(await client.list_models()) == 1


async def test_a_certificate_that_has_expired_is_reported(ca: Authority) -> None:
    async with tls_mesh(ca.issue_expired("a")) as mesh:
        assert (await tls_failure(mesh.address, Tls(ca=ca.pem))).startswith(
            "the server's certificate has expired; renew"
        )


async def test_a_certificate_for_another_name_is_reported(ca: Authority) -> None:
    async with tls_mesh(ca.issue("a", "mesh.example.org")) as mesh:
        assert await tls_failure(mesh.address, Tls(ca=ca.pem)) == (
            "the server's certificate is for another name; use one of its names in the address, or set server_name "
            "(--tls-server-name)"
        )


async def test_tls_on_a_plain_port_is_reported(ca: Authority) -> None:
    async with fake_mesh("127.0.0.1:0") as mesh:
        assert await tls_failure(mesh.address, Tls(ca=ca.pem)) == (
            "that server speaks no TLS; call it without TLS, or set `tls` in its mesh.yaml"
        )


async def test_a_failure_of_tls_is_not_tried_again(ca: Authority) -> None:
    """With retries the call would take seconds: the first one fails at once, and so would the others."""
    async with fake_mesh("127.0.0.1:0") as mesh, MeshClient(mesh.address, tls=Tls(ca=ca.pem)) as client:
        with pytest.raises(TlsFailed):
            await client.list_models(timeout_s=None)


async def test_plain_text_on_a_tls_port_leads_to_the_option(ca: Authority) -> None:
    async with tls_mesh(ca.issue("a")) as mesh:
        error = await failure(mesh.address, False)
    assert type(error) is Unavailable
    assert str(error) == (
        f"no mesh answers at {mesh.address} (Socket closed); if that server serves TLS, call it with `tls` (--tls or "
        "--tls-ca)"
    )


async def test_a_client_without_a_certificate_is_told_which_options_it_needs(ca: Authority) -> None:
    async with tls_mesh(ca.issue("a"), ca.pem) as mesh:
        assert str(await failure(mesh.address, Tls(ca=ca.pem))) == (
            f"no mesh answers at {mesh.address} (Socket closed); if that server asks for a certificate of the client, "
            "set `cert` and `key` (--tls-cert, --tls-key)"
        )


async def test_a_client_whose_certificate_is_not_accepted_sees_until_when_it_is_valid(
    ca: Authority, tmp_path: Path
) -> None:
    foreign, late = Authority(tmp_path, "other").issue("me"), ca.issue_expired("late")
    async with tls_mesh(ca.issue("a"), ca.pem) as mesh:
        for mine, until in ((foreign, "3000-01-01 00:00 UTC"), (late, "2020-01-06 00:00 UTC")):
            assert str(await failure(mesh.address, Tls(ca=ca.pem, cert=mine.cert, key=mine.key))) == (
                f"no mesh answers at {mesh.address} (Socket closed); if that server has not accepted the client's "
                f"certificate, which is valid until {until}, use one of the CA in its `tls.client_ca`"
            )


def test_a_certificate_and_its_key_are_given_together(ca: Authority) -> None:
    for arguments, field, problem in (
        ({"cert": "a.pem"}, "tls.key", "is missing beside cert: a certificate and its key are used together"),
        ({"key": "a.key"}, "tls.cert", "is missing beside key: a certificate and its key are used together"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            Tls(ca=ca.pem, **arguments)
        assert (caught.value.field, caught.value.problem) == (field, problem)


def test_a_file_that_cannot_be_used_is_named_when_the_client_is_made(ca: Authority, tmp_path: Path) -> None:
    mine, missing = ca.issue("me"), tmp_path / "none.pem"
    absent = f"{missing}: cannot be read: No such file or directory"
    for tls, field, problem in (
        (Tls(ca=missing), "tls.ca", absent),
        (Tls(cert=missing, key=mine.key), "tls.cert", absent),
        (Tls(cert=mine.cert, key=missing), "tls.key", absent),
    ):
        for make in (MeshClient, SyncMeshClient):
            with pytest.raises(InvalidRequest) as caught:
                make("127.0.0.1:1", tls=tls)
            assert (caught.value.field, caught.value.problem) == (field, problem)


def test_what_is_no_tls_setting_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^tls: is of the type str; Tls\(\.\.\.\), True or False is needed$"):
        MeshClient(tls="ca.pem")  # type: ignore[arg-type]


def test_without_tls_there_are_no_credentials() -> None:
    assert read_credentials(False) is None


def test_the_environment_names_the_files(ca: Authority) -> None:
    names = {"MUXMESH_TLS_CA": "ca.pem", "MUXMESH_TLS_CERT": "a.pem", "MUXMESH_TLS_KEY": "a.key", "OTHER": "x"}
    assert Tls.from_environment(names) == Tls("ca.pem", "a.pem", "a.key")
    assert Tls.from_environment({**names, "MUXMESH_TLS_CA": ""}) == Tls(None, "a.pem", "a.key")
    assert Tls.from_environment({"MUXMESH_TLS_CA": "", "OTHER": "x"}) is None
    with pytest.raises(InvalidRequest, match=r"^tls\.key: is missing beside cert"):
        Tls.from_environment({"MUXMESH_TLS_CERT": "a.pem"})
