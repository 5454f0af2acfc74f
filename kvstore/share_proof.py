"""Whether a worker on a GPU is limited as the configuration says. It has to prove that before it serves.

A worker that finds no MPS daemon computes on the whole device, without any error. So it reports what its driver says
after its context exists, and the unit compares that with the daemon's list of clients and with the whole device.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvstore.worker_slots import WorkerRecord
from muxmesh.errors import Unavailable
from muxmesh.types import Role


@dataclass(frozen=True, slots=True)
class ReportedShare:
    """What the driver says in the worker's process. ``num_sms``: streaming multiprocessors that it may use."""

    num_sms: int
    is_mps_client: bool

    @staticmethod
    def parse(message: Mapping[str, Any]) -> ReportedShare:
        """Reads a worker's message. Raises ValueError."""
        num_sms, is_mps_client = message.get("num_sms"), message.get("mps")
        if type(num_sms) is not int or type(is_mps_client) is not bool:
            raise ValueError(
                f"num_sms must be an integer and mps a boolean, but they are {num_sms!r}, {is_mps_client!r}"
            )
        return ReportedShare(num_sms, is_mps_client)


@dataclass(frozen=True, slots=True)
class ConfiguredShare:
    """What the configuration says. ``percent`` of the ``num_sms`` of the whole device; ``pipe_dir``: "" without MPS."""

    percent: int
    num_sms: int
    pipe_dir: str

    @property
    def max_sms(self) -> int:
        """MPS rounds a percentage down."""
        return self.num_sms * self.percent // 100


def share_problem(reported: ReportedShare, configured: ConfiguredShare, is_listed: bool) -> str:
    """Why a worker is refused, and what would be right; "" if it is limited as configured. Pure.

    ``is_listed``: the daemon lists the worker's process. The number of SMs shows nothing at a share of 100 %.
    """
    if not configured.pipe_dir:
        if reported.is_mps_client:
            return (
                "it is a client of an MPS daemon, but the unit does not use MPS: its CUDA_MPS_PIPE_DIRECTORY has to be "
                "one in which no daemon listens"
            )
        return ""
    if not reported.is_mps_client:
        return (
            f"it is no client of MPS, so nothing limits it to {configured.percent} %: a daemon has to listen in "
            f"{configured.pipe_dir}, which its CUDA_MPS_PIPE_DIRECTORY has to name"
        )
    if not is_listed:
        return (
            f"the MPS daemon in {configured.pipe_dir} does not list its process: it is a client of another daemon, or "
            "in another pid namespace than the daemon"
        )
    if configured.percent < 100 and reported.num_sms > configured.max_sms:
        return (
            f"it may use {reported.num_sms} of {configured.num_sms} SMs; its compute_share of {configured.percent} % "
            f"allows {configured.max_sms}: CUDA_MPS_ACTIVE_THREAD_PERCENTAGE has to be {configured.percent} when it "
            "starts"
        )
    return ""


class ShareProver:
    """Checks the reports of the workers of one unit."""

    def __init__(
        self,
        share_of: Callable[[Role, str], int],
        num_sms: int,
        pipe_dir: str,
        is_client: Callable[[int], Awaitable[bool]] | None,
    ) -> None:
        """``share_of``: percentage by role and model. ``is_client``: whether the daemon lists a pid; None: no MPS."""
        self._share_of = share_of
        self._num_sms = num_sms
        self._pipe_dir = pipe_dir
        self._is_client = is_client

    async def problem(self, worker: WorkerRecord, message: Mapping[str, Any]) -> str:
        """Why the worker is refused, or "". A daemon that does not answer is a problem too."""
        try:
            reported = ReportedShare.parse(message)
            is_listed = self._is_client is not None and await self._is_client(worker.pid)
        except (ValueError, Unavailable) as error:
            return str(error)
        share = ConfiguredShare(self._share_of(worker.role, worker.model), self._num_sms, self._pipe_dir)
        return share_problem(reported, share, is_listed)
