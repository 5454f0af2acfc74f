"""A Docker engine of the tests' own, in namespaces of its own: nothing of it outlives it, and it changes nothing.

dockerd, containerd and all containers live in one pid, network and mount namespace, whose first process dies with the
one that started it; with it the kernel ends the others, their mounts and their network. slirp4netns gives builds a way
out. Ports are published inside the namespace, so a client outside the containers runs by `command_inside`.

`python -m tests.compose.docker_engine FOLDER` runs one for as long as the command is not interrupted, and prints how to
use it. Tests use it if MUXMESH_TEST_ENGINE names the folder; its images and volumes are kept for the next run.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.compose.engine_parts import FOLDER, PYTHON_IMAGE, SERVICES_IMAGE, problem, search_path

_START = """
rm -rf "$1/dockerd.pid" "$1/exec"  # of an engine in the same folder that was killed
mount --bind "$1/resolv.conf" /etc/resolv.conf
ip link set lo up
exec dockerd --data-root "$1/data" --exec-root "$1/exec" --pidfile "$1/dockerd.pid" --host "unix://$1/docker.sock" \
    --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent "$2"
"""
_NAMESPACES = ("--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL", "--net", "--mount", "--propagation=private")
_DNS = "10.0.2.3"
"""Where slirp4netns answers."""
_IMPORTED = {
    "python:3.11-slim": (PYTHON_IMAGE, ('CMD ["python"]',)),
    "redis:7-bookworm": (SERVICES_IMAGE, ('CMD ["redis-server"]',)),
    "prom/prometheus:v3.5.0": (SERVICES_IMAGE, ('ENTRYPOINT ["/usr/bin/prometheus"]', "USER 65534:65534")),
}


class DockerEngine:
    """An engine that runs: ``folder`` has its socket, ``pid`` is a process of its namespaces, as seen from here."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.folder = folder
        self.pid = pid

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which `docker` and `docker compose` talk to this engine."""
        return {
            "PATH": search_path(),
            "DOCKER_HOST": f"unix://{self.folder}/docker.sock",
            "DOCKER_CONFIG": str(FOLDER / "config"),
            "DOCKER_BUILDKIT": "1",
        }

    def docker(self, *arguments: str, timeout_s: float = 60) -> str:
        """What `docker ARGUMENTS` prints. Raises AssertionError, with its words, if it fails."""
        done = subprocess.run(
            ("docker", *arguments),
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            raise AssertionError(f"docker {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def command_inside(self, *command: str) -> list[str]:
        """The command, run in the network where ports are published, with this machine's files."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--", *command]

    def kill(self, container: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Signals the first process of a container, which for the engine is no `docker kill`."""
        pid = self.docker("inspect", "--format", "{{.State.Pid}}", container).strip()
        assert pid != "0", f"{container} does not run"
        subprocess.run(["nsenter", f"--pid=/proc/{self.pid}/ns/pid", "--", "kill", f"-{int(number)}", pid], check=True)


@contextlib.contextmanager
def running_engine(folder: Path) -> Iterator[DockerEngine]:
    """Starts an engine whose files are in ``folder``, with the base images in it. At the end nothing of it is left.

    Raises AssertionError with the engine's log if it does not start.
    """
    assert (why := problem()) is None, why
    (folder / "resolv.conf").write_text(f"nameserver {_DNS}\n")
    cgroup = f"muxmesh-test-{os.getpid()}"
    start = ["unshare", *_NAMESPACES, "docker-init", "-s", "--", "bash", "-ec", _START, "dockerd", str(folder), cgroup]
    with open(folder / "dockerd.log", "w") as log, _dying_with_us(start, log.fileno()) as dockerd:
        try:
            engine = DockerEngine(folder, _first_child(dockerd))
            network = ["slirp4netns", "--configure", "--mtu=65520", "--disable-host-loopback", str(engine.pid), "tap0"]
            with _dying_with_us(network, log.fileno()):
                try:
                    _wait_until_it_answers(engine, dockerd)
                    _import_images(engine)
                    yield engine
                finally:
                    _stop(engine)
        finally:
            dockerd.kill()
            dockerd.wait()
            _remove_cgroups(cgroup)


def _stop(engine: DockerEngine) -> None:
    """Ends containers and engine in order, so that nothing half written is in a data folder that is kept."""
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
        if containers := engine.docker("ps", "--all", "--quiet").split():
            engine.docker("rm", "--force", *containers)
    with contextlib.suppress(FileNotFoundError, subprocess.SubprocessError):
        pid = (engine.folder / "dockerd.pid").read_text()
        end = f"kill {pid} && for _ in $(seq 100); do kill -0 {pid} 2>/dev/null || exit 0; sleep 0.1; done"
        subprocess.run(["nsenter", f"--pid=/proc/{engine.pid}/ns/pid", "--", "bash", "-c", end], check=True, timeout=20)


@contextlib.contextmanager
def _dying_with_us(command: list[str], log: int) -> Iterator[subprocess.Popen[bytes]]:
    guard = [sys.executable, "-m", "muxmesh.supervisor.exec_with_parent", str(os.getpid())]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PATH": search_path(), "PYTHONPATH": str(root)}
    with subprocess.Popen([*guard, *command], env=environment, stdout=log, stderr=log) as process:
        try:
            yield process
        finally:
            process.kill()


def _first_child(process: subprocess.Popen[bytes]) -> int:
    """The first process in the new namespaces. Waits until it is there."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        if found := children.read_text().split():
            program = Path(f"/proc/{found[0]}/comm").read_text().strip()
            if program == "docker-init":
                return int(found[0])
        subprocess.run(["sleep", "0.05"], check=True)
    raise AssertionError("the namespaces of the engine could not be made; its log is beside the socket")


def _wait_until_it_answers(engine: DockerEngine, dockerd: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert dockerd.poll() is None, f"the engine ended:\n{_log_end(engine.folder)}"
        with contextlib.suppress(AssertionError):
            engine.docker("version")
            return
        subprocess.run(["sleep", "0.1"], check=True)
    raise AssertionError(f"the engine does not answer:\n{_log_end(engine.folder)}")


def _log_end(folder: Path) -> str:
    return (folder / "dockerd.log").read_text()[-3000:]


def _import_images(engine: DockerEngine) -> None:
    there = set(engine.docker("images", "--format", "{{.Repository}}:{{.Tag}}").split())
    for image, (content, changes) in _IMPORTED.items():
        if image not in there:
            options = [word for change in changes for word in ("--change", change)]
            engine.docker("import", *options, str(content), image, timeout_s=120)


def _remove_cgroups(name: str) -> None:
    """Removes the empty groups that an engine leaves in each hierarchy, from the leaves up."""
    for top in (*Path("/sys/fs/cgroup").glob(f"*/{name}"), Path("/sys/fs/cgroup") / name):
        for group, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(group)


def main() -> None:
    """Runs an engine in the folder of the command line until SIGINT or SIGTERM."""
    if (why := problem()) is not None:
        sys.exit(why)
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with running_engine(folder) as engine:
        for name, value in engine.environment.items():
            print(f"export {name}={value}")
        print(f"# clients of published ports: {' '.join(engine.command_inside())}", flush=True)
        (folder / "engine.json").write_text(json.dumps({"pid": engine.pid}))
        try:
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
        finally:
            (folder / "engine.json").unlink()


def kept_engine(folder: Path) -> DockerEngine:
    """The engine that `main` runs in this folder."""
    return DockerEngine(folder, json.loads((folder / "engine.json").read_text())["pid"])


if __name__ == "__main__":
    main()
