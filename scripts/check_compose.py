"""Checks compose/ without an engine: the Dockerfile, the schema of the compose files, and what compose makes of them.

The last needs compose itself, of this machine or of ``build/docker-engine``; where there is none, it says so.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = ROOT / "compose"
PLUGIN = ROOT / "build" / "docker-engine" / "config" / "cli-plugins" / "docker-compose"
MAIN = "compose.yaml"
OTHERS = ("three-models.yaml", "two-routers.yaml", "external-redis.yaml", "tls.yaml")
"""Each is used together with MAIN."""


class _Loader(yaml.SafeLoader):
    """Takes compose's own tags, which say how files are merged, off their values."""


_Loader.add_multi_constructor("!", lambda loader, _, node: loader.construct_sequence(node, deep=True))


def commands(folder: Path) -> Iterator[list[str]]:
    """Commands that fail if something is wrong. Writes the compose files as JSON into ``folder``."""
    programs = Path(sys.executable).parent
    yield [str(programs / "hadolint"), "Dockerfile"]
    files = []
    for name in (MAIN, *OTHERS):
        files.append(folder / f"{name}.json")
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (COMPOSE / name).read_text())  # variables have their defaults
        files[-1].write_text(json.dumps(yaml.load(text, _Loader)))
    schema = [str(programs / "check-jsonschema"), "--quiet", "--builtin-schema", "vendor.compose-spec"]
    yield [*schema, *map(str, files)]
    compose = compose_command()
    if compose is None:
        print("docker compose is not here: its own check of compose/ is left out (`make compose-engine` fetches it)")
        return
    for others in ((), *((name,) for name in OTHERS)):
        for profile in ("cpu", "metrics", "gpu"):
            chosen = [word for name in (MAIN, *others) for word in ("--file", name)]
            yield [*compose, *chosen, "--profile", profile, "config", "--quiet"]


def compose_command() -> list[str] | None:
    """How to call compose on this machine, or None."""
    if PLUGIN.exists():
        return [str(PLUGIN)]
    if shutil.which("docker") and _succeeds(["docker", "compose", "version"], stdout=subprocess.DEVNULL):
        return ["docker", "compose"]
    return None


def _succeeds(command: list[str], stdout: int | None = None) -> bool:
    return subprocess.run(command, cwd=COMPOSE, check=False, stdout=stdout, stderr=stdout).returncode == 0


def main() -> int:
    """Runs all checks; returns 1 if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        failed = [command for command in commands(Path(folder)) if not _succeeds(command)]
    for command in failed:
        print(f"failed: {' '.join(command)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
