"""Text of a model or of a mesh on a terminal: it is shown, and controls nothing."""

from __future__ import annotations

from typing import TextIO

_KEPT = "\t\n"
_CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in _KEPT}
_VISIBLE = {**_CONTROL_PICTURES, 0x7F: "\u2421", **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}}


def harmless(text: str, stream: TextIO) -> str:
    """``text`` as it may be written to ``stream``.

    On a terminal, control characters except tab and newline are replaced with visible signs, so that no escape sequence
    has an effect. Elsewhere the text is unchanged.
    """
    return text.translate(_VISIBLE) if stream.isatty() else text
