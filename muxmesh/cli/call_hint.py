"""The commands with which `muxmesh up` shows how to call a mesh."""

from __future__ import annotations

from muxmesh.config.tls_config import TlsConfig


def call_hint(listen: str, tls: TlsConfig | None, programs: str, needs_keys: bool = False) -> str:
    """Example commands. ``programs``: the folder before the names of programs, with a / at its end, or empty.

    With TLS they name files that the reader has to have; a line says which. ``needs_keys``: the first command makes an
    API key.
    """
    if tls is not None and listen.rpartition(":")[0].strip("[]") in ("0.0.0.0", "::"):
        listen = f"localhost:{listen.rpartition(':')[2]}"  # no certificate is for an address that means all
    options, files, note = "", "", ""
    if tls is not None:
        options, files, note = " --tls-ca ca.pem", 'ca="ca.pem"', f"ca.pem: the CA that signed {tls.cert}"
    if tls is not None and tls.client_ca is not None:
        options += " --tls-cert my.pem --tls-key my.key"
        files += ', cert="my.pem", key="my.key"'
        note += f"; my.pem: a certificate that {tls.client_ca} has signed"
    imported, argument = ("SyncMeshClient, Tls", f", tls=Tls({files})") if files else ("SyncMeshClient", "")
    add_key = []
    if needs_keys:
        argument += ', api_key="mm-..."'
        add_key = [f"  export MUXMESH_API_KEY=$({programs}muxmesh tenant add NAME)"]
    script = f'SyncMeshClient("{listen}"{argument}).generate("Hello", max_new_tokens=16, temperature=0).text'
    lines = [
        "Call it:",
        *add_key,
        f'  {programs}muxmesh generate --address {listen}{options} --chat "Name three colours."',
        f"  {programs}muxmesh chat --address {listen}{options}",
        f"  {programs}python -c 'from muxmesh.client import {imported}; print({script})'",
        *filter(None, [note]),
        "or generate stubs for any language from protos/muxmesh/v1. Ctrl-C stops the mesh.",
    ]
    return "\n".join(lines)
