import io
import json
import sys

import pytest

from muxmesh.cli.operator_messages import OperatorMessages
from muxmesh.clock import ManualClock


class Pieces(io.StringIO):
    """A stream that keeps what it was given apart."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return len(text)


@pytest.mark.parametrize("are_json", [False, True])
def test_each_line_is_written_in_one_piece(monkeypatch: pytest.MonkeyPatch, are_json: bool) -> None:
    """Stdout and stderr may be one pipe, and each is written by a thread of its own."""
    out, err = Pieces(), Pieces()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    messages = OperatorMessages("up", ManualClock(5.0), shows_lines=True)
    if are_json:
        messages.log_format = "json"
    messages.result("ready")
    messages.progress("started")
    messages.notice("beware")
    messages.show_line("router", '{"message": "serving"}')
    messages.show_line("redis", "nobody wants this")
    if are_json:
        texts = [json.loads(piece)["message"] for piece in (*out.pieces, *err.pieces)]
        assert texts == ["ready", "started", "beware", "serving"]
    else:
        assert out.pieces == ["ready\n"]
        assert err.pieces == ["started\n", "muxmesh: beware\n", 'router | {"message": "serving"}\n']
    assert all(piece.endswith("\n") for piece in (*out.pieces, *err.pieces))
