"""The commands that `muxmesh up` shows: complete, whatever the mesh asks of its clients."""

from muxmesh.cli.call_hint import call_hint
from muxmesh.config.tls_config import TlsConfig

TLS = TlsConfig(cert="/a.pem", key="/a.key")


def test_without_tls_a_command_needs_the_address_alone() -> None:
    assert call_hint("127.0.0.1:7", None, "bin/") == (
        "Call it:\n"
        '  bin/muxmesh generate --address 127.0.0.1:7 --chat "Name three colours."\n'
        "  bin/muxmesh chat --address 127.0.0.1:7\n"
        "  bin/python -c 'from muxmesh.client import SyncMeshClient; "
        'print(SyncMeshClient("127.0.0.1:7").generate("Hello", max_new_tokens=16, temperature=0).text)\'\n'
        "or generate stubs for any language from protos/muxmesh/v1. Ctrl-C stops the mesh."
    )


def test_with_tls_it_names_the_ca() -> None:
    lines = call_hint("127.0.0.1:7", TLS, "").splitlines()
    assert lines[2] == "  muxmesh chat --address 127.0.0.1:7 --tls-ca ca.pem"
    assert 'import SyncMeshClient, Tls; print(SyncMeshClient("127.0.0.1:7", tls=Tls(ca="ca.pem")).gen' in lines[3]
    assert lines[4] == "ca.pem: the CA that signed /a.pem"


def test_where_clients_need_a_certificate_it_names_that_too() -> None:
    lines = call_hint("127.0.0.1:7", TLS.model_copy(update={"client_ca": "/clients.pem"}), "").splitlines()
    assert lines[2] == "  muxmesh chat --address 127.0.0.1:7 --tls-ca ca.pem --tls-cert my.pem --tls-key my.key"
    assert 'tls=Tls(ca="ca.pem", cert="my.pem", key="my.key")' in lines[3]
    assert lines[4] == "ca.pem: the CA that signed /a.pem; my.pem: a certificate that /clients.pem has signed"


def test_where_callers_need_a_key_the_first_command_makes_one() -> None:
    lines = call_hint("127.0.0.1:7", None, "bin/", needs_keys=True).splitlines()
    assert lines[1] == "  export MUXMESH_API_KEY=$(bin/muxmesh tenant add NAME)"
    assert 'SyncMeshClient("127.0.0.1:7", api_key="mm-...").gen' in lines[4]


def test_a_certificate_is_for_no_address_that_means_all() -> None:
    assert "--address localhost:7 --tls-ca" in call_hint("0.0.0.0:7", TLS, "")
    assert "--address localhost:7 --tls-ca" in call_hint("[::]:7", TLS, "")
    assert "--address 0.0.0.0:7" in call_hint("0.0.0.0:7", None, "")
