"""Which processes a changed runtime file concerns: a table."""

from pathlib import Path
from typing import Any

import pytest

from muxmesh.config.model_config import ModelConfig
from muxmesh.config.runtime import MeshRuntime, PreparedModel
from muxmesh.config.runtime_changes import restarts_needed, with_model, without_model
from muxmesh.config.schema import MeshConfig

ROUTERS = "every router"
U, V = ["kvstore/u", "prefill/a", "decode/a"], ["kvstore/v", "prefill/b", "decode/b"]


def runtime_of(v: dict[str, Any] | None = None, fingerprint: str = "w", redis: str = "x", **config: Any) -> MeshRuntime:
    """Two units; ``v``: fields of the second one."""
    first = {"name": "u", "cores": [0], "models": [{"name": "a"}]}
    second = {"name": "v", "cores": [1], "models": [{"name": "b"}], **(v or {})}
    parsed = MeshConfig.model_validate({"units": [first, second], **config})
    prepared = {"v": {"b": PreparedModel(folder=None, image=None, weights_fingerprint=fingerprint)}}
    return MeshRuntime(
        config=parsed, run_dir=Path("/r"), cache_dir=Path("/c"), redis_url=f"unix:///{redis}", prepared=prepared
    )


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, []),
        ({"metrics": {"listen": "127.0.0.1:9464"}}, []),
        ({"listen": "127.0.0.1:1"}, [ROUTERS]),
        ({"tls": {"cert": "/a.pem", "key": "/a.key"}}, [ROUTERS]),
        ({"router": {"max_restarts": 1}}, [ROUTERS]),
        ({"v": {"kv_pool": "64MiB"}}, [*V, ROUTERS]),
        ({"v": {"models": [{"name": "b", "max_num_seqs": 1}]}}, [*V, ROUTERS]),
        ({"v": {"models": [{"name": "b", "slo": {"scale": 8}}]}}, ["kvstore/v", ROUTERS]),
        ({"v": {"arbiter": {"max_overtakes": 4}, "models": [{"name": "b", "slo": {"scale": 8}}]}}, [*V, ROUTERS]),
        ({"fingerprint": "other"}, [*V, ROUTERS]),
        ({"v": {"models": [{"name": "c"}]}}, [*V, ROUTERS, "prefill/c", "decode/c"]),
        ({"order": {"policy": "fcfs"}}, [*U, *V, ROUTERS]),
        ({"redis": "y"}, [*U, *V, ROUTERS]),
        (
            {"v": {"models": [{"name": "b"}, {"name": "a"}]}},
            ["prefill/u/a", "decode/u/a", *V, ROUTERS, "prefill/v/a", "decode/v/a"],
        ),
    ],
)
def test_what_has_changed_concerns_these_processes(change: dict[str, Any], names: list[str]) -> None:
    assert restarts_needed(runtime_of(), runtime_of(**change)) == names


def test_an_slo_concerns_only_routers_where_it_does_not_change_the_order_of_workers() -> None:
    def runtime(scale: int) -> MeshRuntime:
        return runtime_of({"models": [{"name": "b", "slo": {"scale": scale}}]})

    assert restarts_needed(runtime(2), runtime(8)) == [ROUTERS]


def test_a_model_that_is_added_and_removed_again_leaves_the_runtime_as_it_was() -> None:
    before, prepared = runtime_of(), PreparedModel(folder=None, image=None, weights_fingerprint="new")
    after = with_model(before, "v", ModelConfig(name="c"), prepared)
    assert restarts_needed(before, after) == [*V, ROUTERS, "prefill/c", "decode/c"]
    assert [model.name for model in after.unit("v").models] == ["b", "c"]
    assert after.prepared_model("v", "c") is prepared
    assert without_model(after, "v", "c") == before
    assert MeshRuntime.model_validate_json(after.model_dump_json(exclude_unset=True)) == after
