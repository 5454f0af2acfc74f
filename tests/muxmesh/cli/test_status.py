import json

import pytest

from muxmesh.cli.main import main
from muxmesh.cli.status import message_dict, show
from muxmesh.errors import Overloaded
from muxmesh.v1 import mesh_pb2
from tests.support.fake_mesh import FakeMesh

MIB = 1 << 20
UNIT = mesh_pb2.UnitStatus(
    unit="unit0",
    device="cpu",
            transport="host shm",
    connected=True,
    pool=mesh_pb2.PoolStatus(
        pool_bytes=64 * MIB, slab_bytes=2 * MIB, num_slabs=32, num_free_slabs=30, leased_bytes=MIB,
        cached_bytes=MIB // 2, fragmented_bytes=3 * MIB // 2, num_handoffs=5,
    ),
    models=[
        mesh_pb2.UnitModelStatus(
            model="sim", state="awake", quota_bytes=32 * MIB, num_leased_token_blocks=4, num_cached_token_blocks=2,
            num_free_token_blocks=100, num_prefix_tokens_queried=64, num_prefix_tokens_hit=16, num_queued_requests=3,
        ),
        mesh_pb2.UnitModelStatus(model="idle", state="asleep"),
    ],
    workers=[
        mesh_pb2.WorkerStatus(
            name="prefill/sim", pid=11, ready=True, num_leases=1, num_steps=20, num_computed_tokens=300, busy_s=1.25,
            swap_out_bytes=MIB, swap_s=0.25,
        ),
        mesh_pb2.WorkerStatus(name="decode/sim", pid=12, swap_in_bytes=MIB, swap_s=0.5),
    ],
)  # fmt: skip
STATUS = mesh_pb2.GetStatusResponse(
    version="1.2.3",
    redis_connected=True,
    order_policy="srtf-aged",
    models=[
        mesh_pb2.RouterModelStatus(
            model="sim", num_requests_waiting=1, num_requests_running=2, num_requests_finished=30,
            num_requests_aborted=4, num_restarts=5, prompt_tokens=600, output_tokens=700, predictions_used=True,
            slo=mesh_pb2.SloStatus(total=mesh_pb2.SloTally(num_requests=2000, num_met=1999), window_s=60),
        )
    ],
    units=[UNIT],
    processes=[mesh_pb2.ProcessStatus(name="router", pid=10, num_restarts=1, address="127.0.0.1:50051")],
)  # fmt: skip


def shown(status: mesh_pb2.GetStatusResponse, capsys: pytest.CaptureFixture[str]) -> list[str]:
    show(status)
    return capsys.readouterr().out.splitlines()


def test_a_status_is_one_table_each_for_models_units_workers_and_processes(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.status = STATUS
    assert main(["status"]) == 0
    assert (
        capsys.readouterr().out
        == """\
muxmesh 1.2.3, Redis connected, order srtf-aged

MODEL  WAITING  RUNNING  FINISHED  ABORTED  RESTARTS  PROMPT TOKENS  OUTPUT TOKENS  PREDICTED TAU  SLO MET  RECENTLY
sim    1        2        30        4        5         600            700            -              99.9 %   -

unit unit0 on cpu: KV pool 64 MiB, leased 1.0 MiB, cached 0.5 MiB, 30 of 32 slabs free, 1.5 MiB fragmented
memory shared by host shm; 5 hand-offs, 0 bytes copied

MODEL  STATE   QUOTA MIB  BLOCKS LEASED  BLOCKS CACHED  BLOCKS FREE  PREFIX HITS  WAITING
sim    awake   32         4              2              100          25 %         3
idle   asleep  0          0              0              0            -            0

WORKER       PID  READY  LEASES  STEPS  TOKENS  BUSY S
prefill/sim  11   yes    1       20     300     1.2
decode/sim   12   no     0       0      0       0.0

PROCESS  PID  RESTARTS  ADDRESS
router   10   1         127.0.0.1:50051
"""
    )


def test_the_help_text_explains_the_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--help"]) == 0
    printed = capsys.readouterr().out
    for column in (
        "WAITING",
        "PREDICTED TAU",
        "SLO MET",
        "STATE",
        "QUOTA MIB",
        "BLOCKS LEASED",
        "PREFIX HITS",
        "SERVICE S",
        "BANDS AHEAD",
        "LEASES",
        "BUSY S",
    ):
        assert f"\n  {column}" in printed or f", {column}" in printed


def test_the_tau_of_predictions_is_shown_with_whether_they_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    models = [
        mesh_pb2.RouterModelStatus(model="new", predictions_used=True),
        mesh_pb2.RouterModelStatus(model="good", predictions_used=True, prediction_tau=0.612),
        mesh_pb2.RouterModelStatus(model="bad", predictions_used=False, prediction_tau=-0.02),
    ]
    lines = shown(mesh_pb2.GetStatusResponse(models=models), capsys)
    taus = {line.split()[0]: " ".join(line.split()[8:-2]) for line in lines[3:6]}
    assert taus == {"new": "-", "good": "0.61", "bad": "-0.02, not used"}


def test_a_unit_or_registry_that_cannot_be_reached_stands_out(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(mesh_pb2.GetStatusResponse(version="1", units=[mesh_pb2.UnitStatus(unit="unit1")]), capsys)
    assert lines[0].startswith("muxmesh 1, Redis NOT CONNECTED")
    assert "unit unit1: NOT CONNECTED" in lines
    assert not any("KV pool" in line for line in lines)


def test_swap_and_lost_leases_have_a_line_only_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    assert not any(line.startswith(("swap", "leases:")) for line in shown(STATUS, capsys))
    unit = mesh_pb2.UnitStatus()
    unit.CopyFrom(UNIT)
    unit.pool.swap_bytes, unit.pool.swap_used_bytes, unit.pool.num_swapped_leases = 8 * MIB, MIB, 2
    unit.pool.num_leases_orphaned = 3
    lines = shown(mesh_pb2.GetStatusResponse(units=[unit]), capsys)
    assert "swap 1.0 of 8 MiB, 2 leases swapped out, 2.0 MiB copied in 0.75 s" in lines
    assert "leases: 0 expired, 3 orphaned" in lines


def test_tenants_have_a_table_where_requests_have_tenants(capsys: pytest.CaptureFixture[str]) -> None:
    unit = mesh_pb2.UnitStatus(unit="u", connected=True, tenants=[mesh_pb2.TenantUse(service_s=1.0)])
    assert not any("TENANT" in line for line in shown(mesh_pb2.GetStatusResponse(units=[unit]), capsys))
    unit.tenants[0].tenant = "acme"
    unit.tenants[0].num_leases = 3
    unit.tenants.add(tenant="other", service_s=0.25, num_bands_ahead=2, num_queued_requests=40)
    lines = shown(mesh_pb2.GetStatusResponse(units=[unit]), capsys)
    at = lines.index("TENANT  SERVICE S  BANDS AHEAD  WAITING  LEASES")
    assert [line.split() for line in lines[at + 1 : at + 3]] == [
        ["acme", "1.0", "0", "0", "3"],
        ["other", "0.2", "2", "40", "0"],
    ]


def test_kv_that_was_copied_is_shown_in_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    unit = mesh_pb2.UnitStatus()
    unit.CopyFrom(UNIT)
    unit.pool.kv_bytes_copied = 4096
    lines = shown(mesh_pb2.GetStatusResponse(units=[unit]), capsys)
    assert "memory shared by host shm; 5 hand-offs, 4096 bytes copied" in lines


def test_json_has_every_field_without_presence_even_if_it_is_zero(
    mesh: FakeMesh, capsys: pytest.CaptureFixture[str]
) -> None:
    mesh.status = STATUS
    assert main(["status", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["units"][0]["pool"]["swap_bytes"] == 0, "64-bit numbers are numbers, unlike in protobuf's JSON"
    assert content["units"][0]["workers"][1]["ready"] is False
    assert content["models"][0]["num_requests_waiting"] == 1
    assert "prediction_tau" not in content["models"][0], "an optional field is absent if it is unset"
    assert content["processes"][0]["name"] == "router"


def test_an_error_of_the_mesh_is_printed_in_the_chosen_form(mesh: FakeMesh, capsys: pytest.CaptureFixture[str]) -> None:
    mesh.unary_error = Overloaded("full")
    assert main(["status"]) == 1
    assert capsys.readouterr().err == "muxmesh: full\n"
    assert main(["status", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"error": "Overloaded", "field": None, "message": "full"}


def test_a_message_keeps_proto_names_and_fields_that_are_zero() -> None:
    content = message_dict(mesh_pb2.RouterModelStatus(model="m", prediction_tau=0.5))
    assert content["num_requests_waiting"] == 0 and content["predictions_used"] is False
    assert (content["model"], content["prediction_tau"]) == ("m", 0.5)
    assert "prediction_tau" not in message_dict(mesh_pb2.RouterModelStatus())


def test_whole_numbers_of_a_message_are_numbers() -> None:
    pool = mesh_pb2.PoolStatus(num_slabs=3, pool_bytes=1 << 40)
    unit = message_dict(mesh_pb2.GetStatusResponse(units=[mesh_pb2.UnitStatus(pool=pool)]))["units"][0]
    assert (unit["pool"]["num_slabs"], unit["pool"]["pool_bytes"]) == (3, 1 << 40)
