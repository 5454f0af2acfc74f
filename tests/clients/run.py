"""Programs in other languages and with other libraries against a running mesh: `make test-clients`.

Starts a mesh of sim engines and a tiny real model, sets the clients up under build/clients, and prints one line for
each client and check, then the counts. Exit code 1 if a check failed or did not run. Without node, its clients are
skipped, which is a failure too unless `--without-node` is given.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.mesh_process import up
from tests.clients import environments
from tests.clients.grpcurl import Grpcurl
from tests.support.tiny import TinyShape, write_tiny_model

CHECKS = (
    "list models", "generate", "stream", "chat", "seed", "log-probabilities", "tokenize", "refusal", "cancel",
    "deadline",
)  # fmt: skip
_TIMEOUT_S = 300
_CONFIG = """
units:
  - name: unit0
    kv_pool: 64MiB
    slab: 256KiB
    models:
      - {{name: sim, engine: sim}}
      - {{name: slow, engine: sim, sim: {{base_s: 0.02, per_token_s: 0.0005}}}}
      - {{name: tiny, engine: native, source: {folder}, max_model_len: 256}}
"""

Line = tuple[str, str]
"""Name of a check and its result: `ok`, or `FAILED: ...`."""
Client = Callable[[str], list[Line]]
"""Runs all checks against an address."""


def main() -> int:
    """Runs all clients; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without-node", action="store_true", help="the clients for Node may be left out")
    return asyncio.run(_run(parser.parse_args().without_node))


async def _run(without_node: bool) -> int:
    counts: Counter[str] = Counter()
    clients = dict(_clients(without_node))
    with tempfile.TemporaryDirectory(prefix="mm-clients-") as scratch:
        folder = write_tiny_model(Path(scratch) / "tiny", TinyShape())
        config = Path(scratch) / "mesh.yaml"
        config.write_text(_CONFIG.format(folder=folder))
        async with up("--config", str(config)) as mesh:
            for client, run in clients.items():
                for name, result in await asyncio.to_thread(_complete, run, mesh.address):
                    counts[result.partition(":")[0]] += 1
                    print(f"{client}: {name}: {result}", flush=True)
    print(f"{counts['ok']} ok, {counts['FAILED']} failed, {counts['skipped']} skipped", flush=True)
    return 1 if counts["FAILED"] or (counts["skipped"] and not without_node) else 0


def _clients(without_node: bool) -> Iterator[tuple[str, Client]]:
    """Name and function of each client, which is set up."""
    if shutil.which("node") and shutil.which("npm"):
        folder = environments.node_client()
        yield "grpc-js, proto-loader", partial(_process, ["node", "grpc_js.mjs"], folder)
        yield "grpc-js, ts-proto", partial(_process, ["node", "ts_proto.js"], folder)
    else:
        hint = "" if without_node else "; --without-node leaves its clients out"
        yield "node", lambda _: [(name, f"skipped: node or npm is not installed{hint}") for name in CHECKS]
    for name, stubs in (("grpclib", environments.grpclib_stubs), ("betterproto", environments.betterproto_stubs)):
        python = environments.python_environment(name)
        script = environments.HERE / "python" / f"{name}_client.py"
        yield name, partial(_process, [str(python), str(script)], stubs(python))
    binary = environments.python_environment("grpcurl").parent / "grpcurl"
    for name, files in (("grpcurl, reflection", None), ("grpcurl, proto files", environments.PROTOS)):
        yield name, partial(_grpcurl, binary, files)


def _process(command: list[str], folder: Path, address: str) -> list[Line]:
    """The lines that a client prints. It finds its stubs in ``folder``."""
    done = subprocess.run(
        [*command, address, str(environments.PROTOS)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=_TIMEOUT_S,
    )
    parts = [line.partition(": ") for line in done.stdout.splitlines()]
    return [(name, result) for name, _, result in parts]


def _grpcurl(binary: Path, protos: Path | None, address: str) -> list[Line]:
    lines = []
    for name, check in Grpcurl(binary, address, protos).checks().items():
        try:
            check()
            lines.append((name, "ok"))
        except (AssertionError, KeyError, subprocess.SubprocessError, ValueError) as error:
            lines.append((name, f"FAILED: {type(error).__name__} {' '.join(str(error).split())[:300]}"))
    return lines


def _complete(run: Client, address: str) -> list[Line]:
    """The lines of a client, with a failure for each check that it did not run."""
    found = run(address)
    names = [name for name, _ in found]
    return [*found, *((name, "FAILED: did not run") for name in CHECKS if name not in names)]


if __name__ == "__main__":
    sys.exit(main())
