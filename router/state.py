"""What the router's services share. Plain data."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from muxmesh.clock import Clock
from muxmesh.config.schema import RouterConfig
from muxmesh.internal.v1 import kvstore_pb2_grpc
from muxmesh.order import Order
from muxmesh.registry import Registry
from router.credits import UnitCredits
from router.forecast import Forecaster
from router.request import RequestDriver
from router.served_model import ServedModel
from router.work import UnitWork


@dataclass(slots=True)
class ModelCounters:
    """Of one model since the router started. An answer is running from its arrival on, held back until its request's
    first answer has the prompt computed.
    """

    num_running: int = 0
    num_held_back: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_restarts: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class UnitLink:
    """One unit as the router reaches it."""

    credits: UnitCredits
    driver: RequestDriver
    kvstore: kvstore_pb2_grpc.KvStoreServiceAsyncStub
    work: UnitWork = field(default_factory=UnitWork)


@dataclass(frozen=True, slots=True)
class RouterState:
    """What both services share."""

    config: RouterConfig
    models: Mapping[str, ServedModel]
    units: Mapping[str, UnitLink]
    clock: Clock
    rng: random.Random
    tokenizing: ThreadPoolExecutor
    registry: Registry
    order: Order
    forecaster: Forecaster
    counters: defaultdict[str, ModelCounters] = field(default_factory=lambda: defaultdict(ModelCounters))
