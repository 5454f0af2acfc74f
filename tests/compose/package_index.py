"""The package index that pip of this machine uses, as files that an image build takes as secrets."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

_KEPT = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "default-timeout")


def index_secrets(folder: Path) -> dict[str, str]:
    """Writes pip.conf and the CA bundle into ``folder``, and returns the variables of .env that name them.

    Indexes in files of this machine are left out.
    """
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found: dict[str, str] = {}
    for line in listed.stdout.splitlines():
        name, separator, value = line.partition("=")
        if separator:
            words = str(ast.literal_eval(value)).split()
            found[name.rpartition(".")[2]] = " ".join(word for word in words if not word.startswith("file:"))
    lines = [f"{name.removeprefix('default-')} = {found[name]}" for name in _KEPT if found.get(name)]
    values = {"PIP_CONF": str(folder / "pip.conf")}
    if bundle := found.get("cert"):
        shutil.copyfile(bundle, folder / "ca_bundle")
        values["CA_BUNDLE"] = str(folder / "ca_bundle")
        lines.append("cert = /run/secrets/ca_bundle")
    (folder / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    return values
