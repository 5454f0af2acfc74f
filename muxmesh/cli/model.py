"""`muxmesh model list|pull`."""

from __future__ import annotations

import argparse

from muxmesh.cli.common import ProgressBar, cache_dir, print_json
from muxmesh.config.schema import ModelConfig
from muxmesh.models.catalog import CATALOG, find_catalog_model
from muxmesh.models.prepare import prepare_model
from muxmesh.models.pull import model_folder


def run(arguments: argparse.Namespace) -> int:
    """See `muxmesh model --help`."""
    return _list(arguments) if arguments.action == "list" else _pull(arguments)


def _list(arguments: argparse.Namespace) -> int:
    rows = [
        {
            "name": model.name,
            "description": model.description,
            "license": model.license,
            "download_bytes": model.download_bytes,
            "present": model_folder(model, cache_dir()).is_dir(),
        }
        for model in CATALOG.values()
    ]
    if arguments.json:
        print_json(rows)
    else:
        for row in rows:
            here = "here" if row["present"] else f"{int(str(row['download_bytes'])) / 1e6:.0f} MB"
            print(f"{row['name']}  [{here}]  {row['description']}; {row['license']}")
    return 0


def _pull(arguments: argparse.Namespace) -> int:
    model = ModelConfig(name=find_catalog_model(arguments.name).name)
    prepared = prepare_model(model, cache_dir(), cache_dir(), ProgressBar(arguments.name))
    if arguments.json:
        print_json({"name": arguments.name, "folder": str(prepared.folder), "image": str(prepared.image)})
    else:
        print(f"{arguments.name} is in {prepared.folder}")
    return 0
