from prometheus_client.parser import text_string_to_metric_families

from muxmesh.metrics.exposition import merge, render
from muxmesh.metrics.family import Histogram, counter, gauge, histogram

LATENCY = Histogram((0.5, 1.0))
LATENCY.observe(0.75)
FAMILIES = [
    gauge("vllm:num_requests_running", "Running requests.", ("model_name",), {("a",): 2, ('b"\n\\',): 1}),
    counter("muxmesh_steps_total", "Steps.", ("model_name", "role"), {("a", "decode"): 7}),
    histogram("vllm:e2e_request_latency_seconds", "Latency.", ("model_name",), {("a",): LATENCY}),
]


def test_families_are_written_as_prometheus_reads_them() -> None:
    parsed = {family.name: family for family in text_string_to_metric_families(render(FAMILIES).decode())}
    running = parsed["vllm:num_requests_running"]
    assert (running.type, running.documentation) == ("gauge", "Running requests.")
    assert [(sample.labels, sample.value) for sample in running.samples] == [
        ({"model_name": "a"}, 2),
        ({"model_name": 'b"\n\\'}, 1),
    ]
    steps = parsed["muxmesh_steps"]
    assert steps.type == "counter"
    assert [(sample.name, sample.labels) for sample in steps.samples] == [
        ("muxmesh_steps_total", {"model_name": "a", "role": "decode"})
    ]
    latency = parsed["vllm:e2e_request_latency_seconds"]
    assert latency.type == "histogram"
    assert [(sample.name.rpartition("_")[2], sample.labels.get("le"), sample.value) for sample in latency.samples] == [
        ("bucket", "0.5", 0),
        ("bucket", "1.0", 1),
        ("bucket", "+Inf", 1),
        ("sum", None, 0.75),
        ("count", None, 1),
    ]


def test_the_process_itself_is_measured() -> None:
    parsed = {family.name: family for family in text_string_to_metric_families(render([]).decode())}
    assert parsed["process_resident_memory_bytes"].samples[0].value > 1e6


def test_a_family_of_several_processes_has_one_type_and_hostile_labels_stay_labels() -> None:
    one = b'# HELP c_total Help.\n# TYPE c_total counter\nc_total{code="a\\"b\\\\\\n}"} 2\n'
    other = b'# HELP c_total Help.\n# TYPE c_total counter\nc_total{code="x"} 3\nc_total{code="y",process="z"} 4\n'
    text = merge({"p": one, "q": other})
    assert text.count(b"# TYPE c_total counter") == 1
    (family,) = text_string_to_metric_families(text.decode())
    assert [(sample.name, sample.labels, sample.value) for sample in family.samples] == [
        ("c_total", {"code": 'a"b\\\n}', "process": "p"}, 2),
        ("c_total", {"code": "x", "process": "q"}, 3),
        ("c_total", {"code": "y", "process": "z"}, 4),
    ]
