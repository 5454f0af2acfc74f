"""Runs the Pods of rendered manifests in a Docker engine as kubelet would: namespaces, users, volumes, limits, order.

A Pod is an idle container that owns the network, the IPC and, if the Pod shares it, the process namespace. Its init
containers run one after the other, the others are started again whenever they end. NetworkPolicies are not applied.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from muxmesh.clock import SystemClock
from tests.compose.docker_engine import DockerEngine
from tests.support.kubernetes_objects import Object, Objects, containers, ports_of, quantity

METRICS_PORT = 9464
_GET = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=5)
try:
    connection.request("GET", sys.argv[2])
    response = connection.getresponse()
    print(response.status, response.read().decode(), sep="\\n")
except OSError:
    print(0)
"""
_PAUSE = "muxmesh-control:dev"
_IDLE = (_PAUSE, "sleep", "infinity")
_NETWORK, _SUBNET = "pods", "172.30.7.0/24"


class Pods:
    """The first Pod of each workload, by name: `router-0`, `unit-0`, `redis-0`."""

    def __init__(self, engine: DockerEngine, objects: Objects, folder: Path, *settings: str) -> None:
        """``folder``: for the content of ConfigMaps. ``settings``: options of `docker run` for all containers."""
        self._engine, self._objects, self._folder, self._own = engine, objects, folder, settings
        self._started: list[str] = []
        self._volumes: list[str] = []
        self._claims: set[str] = set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Starts all Pods in the order of the manifests; removes them at the end."""
        self._engine.docker("network", "create", "--subnet", _SUBNET, _NETWORK)
        try:
            for workload in self._objects.workloads:
                self._start(workload)
            yield
        finally:
            if self._started:
                self._engine.docker("rm", "--force", *reversed(self._started))
            if self._volumes:
                self._engine.docker("volume", "rm", "--force", *self._volumes)
            self._engine.docker("network", "rm", _NETWORK)

    def replace(self, pod: str) -> None:
        """Starts a Pod again on another address, with nothing but its claims, as after the loss of its host."""
        gone = [name for name in self._started if name.startswith(f"{pod}.")]
        (workload,) = [one for one in self._objects.workloads if f"{one['metadata']['name']}-0" == pod]
        before = self._address(f"{pod}.pause")
        self._engine.docker("rm", "--force", *reversed(gone))
        self._started = [name for name in self._started if name not in gone]
        lost = [name for name in self._volumes if name.startswith(f"{pod}.") and name not in self._claims]
        self._engine.docker("volume", "rm", *lost)
        self._volumes = [name for name in self._volumes if name not in lost]
        self._run("holds-the-old-address", "--detach", "--network", _NETWORK, "--ip", before, *_IDLE)
        self._start(workload)
        assert self._address(f"{pod}.pause") != before

    def until_ready(self, within_s: float) -> None:
        """Waits until every readiness probe over HTTP succeeds. Raises AssertionError with the logs."""
        clock = SystemClock()
        end_s = clock.monotonic_s() + within_s
        probes = list(self._readiness())
        while not all(self.http_get(*probe)[0] == HTTPStatus.OK for probe in probes):
            assert clock.monotonic_s() < end_s, self.logs()

    def num_running(self, model: str) -> float:
        """Requests of the router that workers compute."""
        _, body = self.http_get("router-0", METRICS_PORT, "/metrics")
        (value,) = re.findall(rf'^vllm:num_requests_running{{model_name="{model}"}} (\S+)$', body, re.MULTILINE)
        return float(value)

    def _readiness(self) -> Iterator[tuple[str, int, str]]:
        """Pod, port and path of each readiness probe over HTTP."""
        for workload in self._objects.workloads:
            for container in containers(workload):
                probe = container.get("readinessProbe", {}).get("httpGet")
                if probe is not None:
                    port = ports_of(container).get(probe["port"], probe["port"])
                    yield f"{workload['metadata']['name']}-0", port, probe["path"]

    def http_get(self, pod: str, port: int, path: str) -> tuple[int, str]:
        """Status and body that a container of a Pod answers on a port; (0, "") if nothing listens."""
        answer = self._engine.docker("exec", f"{pod}.pause", "python", "-c", _GET, str(port), path)
        status, _, body = answer.partition("\n")
        return int(status), body

    def logs(self) -> str:
        """The ends of the logs of all containers."""
        return "\n".join(f"== {name}\n{self._engine.docker('logs', '--tail', '20', name)}" for name in self._started)

    def _start(self, workload: Object) -> None:
        pod, spec = f"{workload['metadata']['name']}-0", workload["spec"]["template"]["spec"]
        aliases = [workload["metadata"]["name"]]
        if "serviceName" in workload["spec"]:
            aliases.append(f"{pod}.{workload['spec']['serviceName']}")
        pause = f"{pod}.pause"
        self._run(
            pause, "--init", "--detach", "--network", _NETWORK, "--ipc", "shareable",
            *(text for alias in aliases for text in ("--network-alias", alias)),
            *_IDLE,
        )  # fmt: skip
        volumes = {volume["name"]: self._volume(pod, volume) for volume in spec.get("volumes", [])}
        for claim in workload["spec"].get("volumeClaimTemplates", []):
            volumes[claim["metadata"]["name"]] = self._volume(pod, {"name": claim["metadata"]["name"]})
            self._claims.add(volumes[claim["metadata"]["name"]])
        for name in {source for source in volumes.values() if not source.startswith("/")}:
            group = str(spec["securityContext"].get("fsGroup", spec["securityContext"]["runAsGroup"]))
            self._engine.docker(
                "run", "--rm", "--user", "0", "--volume", f"{name}:/v", _PAUSE,
                "sh", "-c", f"chgrp {group} /v && chmod 2777 /v",
            )  # fmt: skip
        namespaces = [f"--network=container:{pause}", f"--ipc=container:{pause}"]
        if spec.get("shareProcessNamespace"):
            namespaces.append(f"--pid=container:{pause}")
        init = spec.get("initContainers", [])
        for container in containers(workload):
            once = container in init and container.get("restartPolicy") != "Always"
            self._run(
                f"{pod}.{container['name']}", *namespaces, *(() if once else ("--detach", "--restart=always")),
                *self._settings(spec, container, volumes, pod), *self._own, container["image"],
                *container.get("command", []), *(text.replace("$(POD_NAME)", pod) for text in container["args"]),
            )  # fmt: skip

    def _run(self, name: str, *arguments: str) -> None:
        self._started.append(name)
        self._engine.docker("run", "--name", name, *arguments, timeout_s=300)

    def _volume(self, pod: str, volume: Object) -> str:
        """The name of a new volume, or the folder of a ConfigMap."""
        if "configMap" in volume:
            folder = self._folder / volume["configMap"]["name"]
            folder.mkdir(exist_ok=True)
            for name, text in self._objects.one("ConfigMap", volume["configMap"]["name"])["data"].items():
                (folder / name).write_text(text)
            return str(folder)
        name = f"{pod}.{volume['name']}"
        if name not in self._volumes:
            self._engine.docker("volume", "create", name)
            self._volumes.append(name)
        return name

    def _address(self, container: str) -> str:
        networks = json.loads(self._engine.docker("inspect", container))[0]["NetworkSettings"]["Networks"]
        return str(networks[_NETWORK]["IPAddress"])

    @staticmethod
    def _settings(spec: Object, container: Object, volumes: dict[str, str], pod: str) -> Sequence[str]:
        context, own = spec["securityContext"], container["securityContext"]
        settings = [f"--user={context['runAsUser']}:{context['runAsGroup']}", f"--group-add={context['runAsGroup']}"]
        if own["readOnlyRootFilesystem"]:
            settings.append("--read-only")
        if not own["allowPrivilegeEscalation"]:
            settings.append("--security-opt=no-new-privileges:true")
        settings += [f"--cap-drop={name}" for name in own["capabilities"]["drop"]]
        settings.append(f"--memory={quantity(container['resources']['limits']['memory'])}")
        for variable in container.get("env", []):
            source: dict[str, Any] = variable.get("valueFrom", {})
            if "value" in variable or "fieldRef" in source:
                settings.append(f"--env={variable['name']}={variable.get('value', pod)}")
        for mount in container.get("volumeMounts", []):
            mode = ":ro" if mount.get("readOnly") else ""
            settings.append(f"--volume={volumes[mount['name']]}:{mount['mountPath']}{mode}")
        return settings
