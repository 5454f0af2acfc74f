"""Metric families as Prometheus text. The one user of prometheus_client, which is loaded only where metrics are on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import inf, isinf

from prometheus_client import ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from muxmesh.metrics.family import Family, HistogramValue

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_PROCESS = ProcessCollector(registry=None)


class _Families(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def render(families: Iterable[Family]) -> bytes:
    """The text of ``families`` and of ``process_*`` of this process. Reads /proc; takes about 10 us for a sample."""
    return generate_latest(_Families([*map(_metric, families), *_PROCESS.collect()]))


def merge(texts: Mapping[str, bytes]) -> bytes:
    """The metrics of several processes as one text: each family once, each sample with the label ``process``.

    ``texts``: name of the process → its text. A sample that has the label already keeps it.
    """
    merged: dict[str, Metric] = {}
    for process, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            metric = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            metric.samples += [
                sample._replace(labels={"process": process, **sample.labels}) for sample in family.samples
            ]
    return generate_latest(_Families(merged.values()))


def _metric(family: Family) -> Metric:
    name = family.name.removesuffix("_total") if family.kind == "counter" else family.name
    metric = Metric(name, family.help, family.kind)
    for values, value in family.samples.items():
        labels = dict(zip(family.label_names, values, strict=True))
        if isinstance(value, HistogramValue):
            for suffix, extra, number in _parts(value):
                metric.add_sample(family.name + suffix, {**labels, **extra}, number)
        else:
            metric.add_sample(family.name, labels, value)
    return metric


def _parts(value: HistogramValue) -> Iterator[tuple[str, dict[str, str], float]]:
    """The samples of a histogram: suffix of the name, label of the bound, number."""
    for bound, count in zip((*value.bounds, inf), value.cumulative, strict=True):
        yield "_bucket", {"le": "+Inf" if isinf(bound) else str(float(bound))}, count
    yield "_sum", {}, value.sum
    yield "_count", {}, value.cumulative[-1]
