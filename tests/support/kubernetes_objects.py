"""What holds between the objects of rendered Kubernetes manifests, which no schema can see. Pure.

Each check yields a line for each problem, `KIND NAME: problem`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

Object = dict[str, Any]
NAME = "app.kubernetes.io/name"
WORKLOADS = ("Deployment", "StatefulSet")
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


class Objects:
    """The objects of one rendered overlay."""

    def __init__(self, documents: Sequence[Object]) -> None:
        self.documents = list(documents)

    def of_kind(self, *kinds: str) -> list[Object]:
        return [one for one in self.documents if one["kind"] in kinds]

    def one(self, kind: str, name: str) -> Object:
        """The only object of this kind and name. Raises ValueError."""
        (found,) = [one for one in self.of_kind(kind) if one["metadata"]["name"] == name]
        return found

    @property
    def workloads(self) -> list[Object]:
        return self.of_kind(*WORKLOADS)

    def selected(self, selector: Mapping[str, Any]) -> list[Object]:
        """The workloads whose Pods a label selector matches. An empty one matches all."""
        return [one for one in self.workloads if matches(selector, one["spec"]["template"]["metadata"]["labels"])]

    def problems(self) -> list[str]:
        """Those of all checks."""
        return [problem for check in CHECKS for problem in check(self)]


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a LabelSelector matches. Raises KeyError for an operator that the manifests do not use."""
    wanted = selector.get("matchLabels", {}).items()
    operators: dict[str, Callable[[Any, Sequence[str]], bool]] = {"In": lambda value, values: value in values}
    return all(labels.get(key) == value for key, value in wanted) and all(
        operators[one["operator"]](labels.get(one["key"]), one["values"])
        for one in selector.get("matchExpressions", [])
    )


def containers(workload: Object, with_init: bool = True) -> list[Object]:
    spec = workload["spec"]["template"]["spec"]
    return [*(spec.get("initContainers", []) if with_init else []), *spec["containers"]]


def title(one: Object) -> str:
    return f"{one['kind']} {one['metadata']['name']}"


def ports_of(container: Object) -> dict[str, int]:
    """Container ports by name."""
    return {port["name"]: port["containerPort"] for port in container.get("ports", [])}


def pod_ports(workload: Object) -> dict[str, int]:
    return dict(chain.from_iterable(ports_of(one).items() for one in containers(workload)))


def _selectors(objects: Objects) -> Iterator[str]:
    for workload in objects.workloads:
        if not matches(workload["spec"]["selector"], workload["spec"]["template"]["metadata"]["labels"]):
            yield f"{title(workload)}: its selector does not match its own Pods"
    for service in objects.of_kind("Service"):
        if len(objects.selected({"matchLabels": service["spec"]["selector"]})) != 1:
            yield f"{title(service)}: selects not exactly one workload"
    for one in objects.of_kind("PodDisruptionBudget", "PodMonitor"):
        if not objects.selected(one["spec"]["selector"]):
            yield f"{title(one)}: selects no workload"
    for policy in objects.of_kind("NetworkPolicy"):
        rules = [*policy["spec"].get("ingress", []), *policy["spec"].get("egress", [])]
        own = [peer["podSelector"] for rule in rules for peer in rule.get("from", []) + rule.get("to", [])
               if "podSelector" in peer]  # fmt: skip
        inside = [selector for selector in own if NAME in str(selector)]  # others are labels of clients
        if not all(map(objects.selected, [policy["spec"]["podSelector"], *inside])):
            yield f"{title(policy)}: a selector matches no workload"


def _ports(objects: Objects) -> Iterator[str]:
    for workload in objects.workloads:
        numbers = [number for container in containers(workload) for number in ports_of(container).values()]
        if len(set(numbers)) != len(numbers) or len(pod_ports(workload)) != len(numbers):
            yield f"{title(workload)}: two containers of a Pod have one port, or one name of a port"
        for container in containers(workload):
            known = ports_of(container)
            for probe in (container[name] for name in PROBES if name in container):
                port = (probe.get("httpGet") or probe.get("tcpSocket") or {}).get("port")
                if port is not None and port not in known and port not in known.values():
                    yield f"{title(workload)}: {container['name']}: no port {port} for a probe"
    for service in objects.of_kind("Service"):
        for workload in objects.selected({"matchLabels": service["spec"]["selector"]}):
            for port in service["spec"]["ports"]:
                if port["targetPort"] not in pod_ports(workload):
                    yield f"{title(service)}: no port {port['targetPort']} in {title(workload)}"
    for policy in objects.of_kind("NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            open_ports = chain.from_iterable(
                pod_ports(one).items() for one in objects.selected(policy["spec"]["podSelector"])
            )
            known_ports = {part for port in open_ports for part in port}
            for port in rule["ports"]:
                admitted = {*range(port["port"], port["endPort"] + 1)} if "endPort" in port else {port["port"]}
                if not known_ports & admitted:
                    yield f"{title(policy)}: no Pod has the port {port['port']}"


def _volumes(objects: Objects) -> Iterator[str]:
    generated = {one["metadata"]["name"] for one in objects.of_kind("ConfigMap")}
    for workload in objects.workloads:
        volumes = workload["spec"]["template"]["spec"].get("volumes", [])
        claims = workload["spec"].get("volumeClaimTemplates", [])
        names = {volume["name"] for volume in volumes} | {claim["metadata"]["name"] for claim in claims}
        for container in containers(workload):
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in names:
                    yield f"{title(workload)}: {container['name']}: mounts {mount['name']}, which is no volume"
        for volume in volumes:
            if "configMap" in volume and volume["configMap"]["name"] not in generated:
                yield f"{title(workload)}: no ConfigMap {volume['configMap']['name']}"


def _targets(objects: Objects) -> Iterator[str]:
    names = {(one["kind"], one["metadata"]["name"]) for one in objects.documents}
    for one in objects.of_kind("HorizontalPodAutoscaler"):
        target = one["spec"]["scaleTargetRef"]
        if (target["kind"], target["name"]) not in names:
            yield f"{title(one)}: no {target['kind']} {target['name']}"
        elif "replicas" in objects.one(target["kind"], target["name"])["spec"]:
            yield f"{title(one)}: its target has `replicas`, which each apply would reset"
    for workload in objects.workloads:
        spec = workload["spec"]["template"]["spec"]
        for kind, name in (
            ("ServiceAccount", spec.get("serviceAccountName")),
            ("Service", workload["spec"].get("serviceName")),
            *(
                ("ResourceClaimTemplate", claim["resourceClaimTemplateName"])
                for claim in spec.get("resourceClaims", [])
            ),
        ):
            if name is not None and (kind, name) not in names:
                yield f"{title(workload)}: no {kind} {name}"
        claims = {claim["name"] for claim in spec.get("resourceClaims", [])}
        for container in containers(workload):
            for claim in container["resources"].get("claims", []):
                if claim["name"] not in claims:
                    yield f"{title(workload)}: {container['name']}: no resource claim {claim['name']}"


def _security(objects: Objects) -> Iterator[str]:
    """What the Pod Security Standard `restricted` asks, a read-only root and no token of the Kubernetes API."""
    for workload in objects.workloads:
        pod = workload["spec"]["template"]["spec"]
        context = pod.get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield f"{title(workload)}: may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{title(workload)}: has no seccomp profile"
        if pod.get("automountServiceAccountToken") is not False:
            yield f"{title(workload)}: mounts a token of the Kubernetes API"
        if any(pod.get(name) for name in ("hostPID", "hostIPC", "hostNetwork")):
            yield f"{title(workload)}: shares a namespace of its host"
        for container in containers(workload):
            own = container.get("securityContext", {})
            is_strict = (
                own.get("allowPrivilegeEscalation") is False
                and own.get("readOnlyRootFilesystem") is True
                and own.get("capabilities", {}).get("drop") == ["ALL"]
                and not own.get("privileged")
                and not own.get("capabilities", {}).get("add")
                and own.get("runAsUser", 1) != 0
            )
            if not is_strict:
                yield f"{title(workload)}: {container['name']}: its security context is not restricted"


def _resources(objects: Objects) -> Iterator[str]:
    for workload in objects.workloads:
        for container in containers(workload):
            resources = container["resources"]
            needed, limits = resources.get("requests", {}), resources.get("limits", {})
            if not {"cpu", "memory"} <= needed.keys() or "memory" not in limits:
                yield f"{title(workload)}: {container['name']}: has no requests, or no limit of memory"
            elif quantity(needed["memory"]) > quantity(limits["memory"]):
                yield f"{title(workload)}: {container['name']}: requests more memory than its limit"


def _shutdown(objects: Objects) -> Iterator[str]:
    """A Pod has time for preStop and for the drain of its container."""
    for workload in objects.workloads:
        grace_s = workload["spec"]["template"]["spec"].get("terminationGracePeriodSeconds", 30)
        for container in containers(workload, with_init=False):
            pause_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
            drain_s = float(option(container, "--drain") or 0)
            if pause_s + drain_s >= grace_s:
                yield f"{title(workload)}: {container['name']}: needs more than {grace_s} s to end"


CHECKS: tuple[Callable[[Objects], Iterator[str]], ...] = (
    _selectors, _ports, _volumes, _targets, _security, _resources, _shutdown
)  # fmt: skip


def option(container: Object, name: str) -> str | None:
    """The value of a command line option of a container."""
    arguments: list[str] = container.get("args", [])
    return arguments[arguments.index(name) + 1] if name in arguments else None


def quantity(text: str) -> int:
    """Bytes of a quantity like 512Mi. Raises ValueError for units that the manifests do not use."""
    match = re.fullmatch(r"(\d+)(Ki|Mi|Gi)?", text)
    if match is None:
        raise ValueError(text)
    return int(match[1]) * {None: 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}[match[2]]
