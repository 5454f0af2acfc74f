"""The manifests in deploy/k8s as `kubectl kustomize` renders them: valid, consistent, and fitting the services."""

from __future__ import annotations

import copy
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from muxmesh.cli.command_parser import command_parser
from muxmesh.config.load import parse_mesh_config
from muxmesh.config.schema import MeshConfig
from muxmesh.machine_limits import MemoryLimit
from muxmesh.models.host_memory import kvstore_problem, worker_problem
from muxmesh.types import Role
from tests.support.kubernetes_objects import Object, Objects, containers, option, pod_ports, ports_of, quantity

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "k8s"
OVERLAYS = ["base", *sorted(f"overlays/{path.name}" for path in (FOLDER / "overlays").iterdir())]
OLDEST = {"overlays/gpu": "1.34"}
"""Kubernetes versions that the manifests are for: resource claims are in `v1` since this one."""
DEFAULT_OLDEST = "1.32"
DOCKERFILE = (ROOT / "compose" / "Dockerfile").read_text()
METRICS_PORT = 9464
POD_NAME = "$(POD_NAME)"
WEIGHTS_BYTES = {"smollm2-135m-instruct": 540 << 20}
"""Of the weight images in float32."""


@functools.cache
def documents(overlay: str) -> list[Object]:
    kubectl = Path(sys.executable).with_name("kubectl")
    rendered = subprocess.run(
        [kubectl, "kustomize", FOLDER / overlay], capture_output=True, text=True, check=False, timeout=60
    )
    assert rendered.returncode == 0, rendered.stderr
    return [one for one in yaml.safe_load_all(rendered.stdout) if one]


def render(overlay: str) -> Objects:
    return Objects(copy.deepcopy(documents(overlay)))


def mesh_of(objects: Objects, variables: dict[str, str] | None = None) -> MeshConfig:
    """The mesh.yaml of the ConfigMap, as `muxmesh prepare` reads it."""
    (config,) = objects.of_kind("ConfigMap")
    return parse_mesh_config(config["data"]["mesh.yaml"], "mesh.yaml", variables=variables or {}).config


every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@every_overlay
def test_every_object_is_valid_for_the_oldest_and_the_newest_version(overlay: str) -> None:
    for one in render(overlay).documents:
        if one["kind"] == "PodMonitor":  # of the Prometheus operator: its schema is not among those of Kubernetes
            continue
        for version in (OLDEST.get(overlay, DEFAULT_OLDEST), kubernetes_validate.latest_version()):
            kubernetes_validate.validate(one, version, strict=True)


def test_strict_validation_finds_a_misspelt_field() -> None:
    router = render("base").one("Deployment", "router")
    router["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(router, DEFAULT_OLDEST, strict=True)


@every_overlay
def test_the_objects_of_an_overlay_fit_each_other(overlay: str) -> None:
    assert render(overlay).problems() == []


def _in_pod(kind: str, name: str, change: Callable[[Any], Any]) -> Callable[[Objects], Any]:
    return lambda objects: change(objects.one(kind, name)["spec"]["template"]["spec"])


def _in_spec(kind: str, name: str, change: Callable[[Any], Any]) -> Callable[[Objects], Any]:
    return lambda objects: change(objects.one(kind, name)["spec"])


unit, router = functools.partial(_in_pod, "StatefulSet", "unit"), functools.partial(_in_pod, "Deployment", "router")
FAULTS: dict[str, Callable[[Objects], Any]] = {
    "Service unit: selects not exactly one workload": _in_spec(
        "Service", "unit", lambda spec: spec["selector"].update(x="y")
    ),
    "PodDisruptionBudget unit: selects no workload": _in_spec(
        "PodDisruptionBudget", "unit", lambda spec: spec["selector"]["matchLabels"].update(x="y")
    ),
    "NetworkPolicy unit: a selector matches no workload": _in_spec(
        "NetworkPolicy", "unit", lambda spec: spec["podSelector"]["matchLabels"].update(x="y")
    ),
    "NetworkPolicy router: no Pod has the port http": _in_spec(
        "NetworkPolicy", "router", lambda spec: spec["ingress"][0]["ports"][0].update(port="http")
    ),
    "Service router: no port http in Deployment router": _in_spec(
        "Service", "router", lambda spec: spec["ports"][0].update(targetPort="http")
    ),
    "StatefulSet unit: kvstore: no port 1 for a probe": unit(
        lambda pod: pod["containers"][0]["readinessProbe"]["httpGet"].update(port=1)
    ),
    "StatefulSet unit: two containers of a Pod have one port, or one name of a port": unit(
        lambda pod: pod["containers"][2]["ports"][1].update(containerPort=METRICS_PORT)
    ),
    "StatefulSet unit: kvstore: mounts x, which is no volume": unit(
        lambda pod: pod["containers"][0]["volumeMounts"][1].update(name="x")
    ),
    "Deployment router: no ConfigMap mesh": router(lambda pod: pod["volumes"][0]["configMap"].update(name="mesh")),
    "HorizontalPodAutoscaler router: no Deployment routers": _in_spec(
        "HorizontalPodAutoscaler", "router", lambda spec: spec["scaleTargetRef"].update(name="routers")
    ),
    "HorizontalPodAutoscaler router: its target has `replicas`, which each apply would reset": _in_spec(
        "Deployment", "router", lambda spec: spec.update(replicas=2)
    ),
    "Deployment router: no ServiceAccount x": router(lambda pod: pod.update(serviceAccountName="x")),
    "Deployment router: may run as root": router(lambda pod: pod["securityContext"].update(runAsUser=0)),
    "Deployment router: has no seccomp profile": router(lambda pod: pod["securityContext"].pop("seccompProfile")),
    "Deployment router: mounts a token of the Kubernetes API": router(
        lambda pod: pod.pop("automountServiceAccountToken")
    ),
    "Deployment router: shares a namespace of its host": router(lambda pod: pod.update(hostPID=True)),
    "Deployment router: router: its security context is not restricted": router(
        lambda pod: pod["containers"][0]["securityContext"].update(readOnlyRootFilesystem=False)
    ),
    "Deployment router: router: has no requests, or no limit of memory": router(
        lambda pod: pod["containers"][0]["resources"]["limits"].clear()
    ),
    "Deployment router: router: requests more memory than its limit": router(
        lambda pod: pod["containers"][0]["resources"]["limits"].update(memory="1Mi")
    ),
    "Deployment router: router: needs more than 65 s to end": router(
        lambda pod: pod.update(terminationGracePeriodSeconds=65)
    ),
}


@pytest.mark.parametrize("problem", FAULTS)
def test_a_fault_between_objects_is_found(problem: str) -> None:
    objects = render("base")
    FAULTS[problem](objects)
    assert problem in objects.problems()


@every_overlay
def test_each_pod_of_the_statefulset_is_a_unit_of_the_mesh_under_its_own_name(overlay: str) -> None:
    objects = render(overlay)
    stateful_set, mesh = objects.one("StatefulSet", "unit"), mesh_of(objects)
    names = [f"unit-{ordinal}" for ordinal in range(stateful_set["spec"]["replicas"])]
    assert [unit.name for unit in mesh.units] == names
    for config in mesh.units:
        assert config.network is not None
        assert config.network.host == f"{config.name}.{stateful_set['spec']['serviceName']}"


@every_overlay
def test_the_containers_of_a_unit_are_its_processes_in_the_order_of_their_ports(overlay: str) -> None:
    objects = render(overlay)
    stateful_set = objects.one("StatefulSet", "unit")
    processes: list[tuple[str, str, str | None]] = [("kvstore", "kvstore", None)]
    (config,) = mesh_of(objects).units
    processes += [(f"{role}-{model.name}", f"{role}_svc", model.name) for model in config.models for role in Role]
    found = containers(stateful_set, with_init=False)
    assert [(one["name"], one["command"][2], option(one, "--model"), option(one, "--unit")) for one in found] == [
        (*process, POD_NAME) for process in processes
    ]
    for container, port, metrics in zip(found, config.ports, count(METRICS_PORT), strict=False):
        assert sorted(ports_of(container).values()) == [metrics, port]
        assert option(container, "--metrics") == f"0.0.0.0:{metrics}"
    assert stateful_set["spec"]["template"]["spec"]["shareProcessNamespace"] is True


@every_overlay
def test_routers_can_reach_every_port_of_a_unit_and_prometheus_every_port_of_metrics(overlay: str) -> None:
    objects = render(overlay)
    open_to = {
        name: range(port["port"], port["endPort"] + 1)
        for name in ("unit", "metrics")
        for rule in objects.one("NetworkPolicy", name)["spec"]["ingress"]
        for port in rule["ports"]
    }
    (allowed,) = [
        rule["ports"] for rule in objects.one("NetworkPolicy", "router")["spec"]["egress"] if "endPort" in str(rule)
    ]
    assert range(allowed[0]["port"], allowed[0]["endPort"] + 1) == open_to["unit"]
    for config in mesh_of(objects).units:
        assert set(config.ports) <= set(open_to["unit"])
    for name, kind in (("router", "Deployment"), ("unit", "StatefulSet")):
        ports = pod_ports(objects.one(kind, name))
        metrics = {number for port, number in ports.items() if re.fullmatch(r"metrics(-.+)?", port)}
        assert metrics == {number for number in ports.values() if METRICS_PORT <= number < 50000}
        assert metrics <= set(open_to["metrics"])


@every_overlay
def test_the_router_listens_where_its_service_leads_and_redis_is_where_the_mesh_looks_for_it(overlay: str) -> None:
    objects = render(overlay)
    mesh, ports = mesh_of(objects), pod_ports(objects.one("Deployment", "router"))
    assert mesh.listen == f"0.0.0.0:{ports['grpc']}"
    (redis,) = objects.one("Service", "redis")["spec"]["ports"]
    assert mesh.redis_url == f"redis://redis:{redis['port']}/0"
    assert mesh_of(objects, {"REDIS_URL": "rediss://other"}).redis_url == "rediss://other"


def test_the_certificates_of_the_mesh_are_mounted_where_prepare_and_the_router_look_for_them() -> None:
    objects = render("overlays/tls")
    tls, router = mesh_of(objects).tls, objects.one("Deployment", "router")
    assert tls is not None
    (secret,) = [volume["secret"] for volume in router["spec"]["template"]["spec"]["volumes"] if "secret" in volume]
    assert secret["secretName"] == "muxmesh-tls"
    for container in containers(router):
        (mount,) = [one for one in container["volumeMounts"] if one["name"] == "tls"]
        assert mount["readOnly"] and "subPath" not in mount  # kubelet does not update a subPath
        assert {str(Path(file).parent) for file in (tls.cert, tls.key)} == {mount["mountPath"]}
    assert not any(
        one["name"] == "tls" for one in objects.one("StatefulSet", "unit")["spec"]["template"]["spec"]["volumes"]
    )
    for name in ("router", "muxmesh"):
        (port,) = objects.one("Service", name)["spec"]["ports"]
        assert port["appProtocol"] == "https"


@every_overlay
def test_the_memory_limits_of_a_unit_hold_what_its_processes_need(overlay: str) -> None:
    """By the same rules by which the processes refuse to start."""
    objects = render(overlay)
    (config,) = mesh_of(objects).units
    kvstore, *workers = containers(objects.one("StatefulSet", "unit"), with_init=False)

    def limit(container: Object) -> MemoryLimit:
        return MemoryLimit(quantity(container["resources"]["limits"]["memory"]), Path("memory.max"))

    assert config.is_cuda or kvstore_problem(config, limit(kvstore)) is None
    for worker in workers:
        model = next(model for model in config.models if model.name == option(worker, "--model"))
        weights = 0 if model.engine == "sim" else WEIGHTS_BYTES[model.name]
        assert worker_problem(config, model, weights, limit(worker)) is None


@every_overlay
def test_images_and_users_are_those_of_the_dockerfile(overlay: str) -> None:
    for workload in render(overlay).workloads:
        images = {container["image"] for container in containers(workload)}
        if workload["metadata"]["name"] == "redis":
            assert images == {"redis:7-bookworm"}
            continue
        context = workload["spec"]["template"]["spec"]["securityContext"]
        user = f"{context['runAsUser']}:{context['runAsGroup']}"
        for image in images:
            target = image.removeprefix("muxmesh-").removesuffix(":dev")
            (stage,) = re.findall(rf"^FROM \S+ AS {target}\n(.*?)(?=^FROM|\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
            assert f"USER {user}\n" in stage
        assert context["fsGroup"] == context["runAsGroup"]


def commands() -> list[tuple[str, ...]]:
    """Every command line of the product in any overlay."""
    found = {
        tuple(text.replace(POD_NAME, "unit-0") for text in (*container["command"], *container["args"]))
        for overlay in OVERLAYS
        for workload in render(overlay).workloads
        for container in containers(workload)
        if container["image"].startswith("muxmesh-")
    }
    return sorted(found)


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_a_container_s_command_line_is_one_that_its_service_understands(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    """A service that understands it misses the runtime file; one that does not exits with 2."""
    if command[0] == "muxmesh":
        arguments = command_parser().parse_args(command[1:])
        assert arguments.module == "prepare"
        assert (arguments.unit == "unit-0") is not arguments.router
        return
    missing = tmp_path / "runtime.json"
    arguments_here = [text.replace("/run/muxmesh/runtime.json", str(missing)) for text in command[1:]]
    result = subprocess.run(
        [sys.executable, *arguments_here], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (1, "")
    assert f"{missing}: the runtime file cannot be read" in result.stderr


@pytest.mark.parametrize("overlay", ["overlays/gpu", "overlays/gpu-device-plugin"])
def test_all_containers_of_a_gpu_unit_get_the_gpu(overlay: str) -> None:
    stateful_set = render(overlay).one("StatefulSet", "unit")
    found = containers(stateful_set)
    assert [one["name"] for one in found][:3] == ["prepare", "mps", "kvstore"]
    assert found[1]["restartPolicy"] == "Always"
    if overlay == "overlays/gpu":
        assert all(one["resources"]["claims"] == [{"name": "gpu"}] for one in found)
        return
    assert stateful_set["spec"]["template"]["spec"]["runtimeClassName"] == "nvidia"
    by_resource = {one["name"] for one in found if one["resources"]["limits"].get("nvidia.com/gpu") == 1}
    by_runtime = {one["name"] for one in found if {"name": "NVIDIA_VISIBLE_DEVICES", "value": "all"} in one["env"]}
    assert by_resource == {"prepare", "kvstore"}
    assert by_runtime == {one["name"] for one in found} - by_resource


def test_the_autoscaler_s_metric_is_one_that_routers_have_and_the_adapter_serves() -> None:
    (metric,) = [
        one["pods"]["metric"]["name"]
        for one in render("base").one("HorizontalPodAutoscaler", "router")["spec"]["metrics"]
        if one["type"] == "Pods"
    ]
    assert f'"{metric}"' in (ROOT / "router" / "router_metrics.py").read_text()
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter-values.yaml").read_text())["rules"]["custom"]
    assert rule["name"]["as"] == metric and re.fullmatch(rule["name"]["matches"], metric)
    assert rule["seriesQuery"].startswith(f"{metric}{{")
