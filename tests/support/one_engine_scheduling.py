"""How pytest-xdist divides the tests among processes. Needs pytest-xdist."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling


class OneEngineScheduling(LoadFileScheduling):  # type: ignore[misc]
    """One process for all files of tests/compose, which share a Docker engine; each other file goes to any process."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "tests/compose" if file.startswith("tests/compose/") else file
