"""The state of a predictor as bytes, so that a restarted router continues from it. Arrays and JSON, nothing executable.

Knows the format, not where snapshots are stored.
"""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from muxmesh.errors import ConfigError
from muxmesh.predictor.checked_predictor import CheckedPredictor
from muxmesh.predictor.length_predictor import LengthPredictor, fit_now
from muxmesh.predictor.prompt_features import LEXICAL_NAMES, WORD_DIM
from muxmesh.predictor.regression import Matrix

_FORMAT = f"2/{len(LEXICAL_NAMES)}/{WORD_DIM}"
"""The first number is raised with every change after which older snapshots would be misread."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Copies of the state of a predictor and of the checks on it. ``words`` and ``lexical`` have one row a prompt."""

    words: Matrix
    lexical: Matrix
    state: dict[str, Any]


def take(predictor: LengthPredictor, checked: CheckedPredictor) -> Snapshot:
    """Copies the state. Called between predictions, in the thread of the predictor."""
    words, lexical, history = predictor.history.dump()
    state = {"format": _FORMAT, "history": history, "scores": predictor.scores(), "checked": checked.dump()}
    return Snapshot(words, lexical, state)


def write(snapshot: Snapshot) -> bytes:
    """Serializes a snapshot, in about 700 bytes for each prompt. Word vectors are rounded to float16."""
    out = io.BytesIO()
    state = np.frombuffer(json.dumps(snapshot.state).encode(), np.uint8)
    np.savez(out, words=snapshot.words.astype(np.float16), lexical=snapshot.lexical, state=state)
    return out.getvalue()


def read(data: bytes) -> tuple[LengthPredictor, CheckedPredictor]:
    """A predictor that continues from a snapshot, and the checks on it. Fits it, which takes about a second.

    Raises ConfigError if the snapshot is damaged or has another format.
    """
    predictor = LengthPredictor()
    checked = CheckedPredictor(predictor)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            words, lexical = arrays["words"].astype(np.float32), arrays["lexical"].astype(np.float32)
            state = json.loads(arrays["state"].tobytes())
        if state["format"] != _FORMAT:
            raise ConfigError(f"the snapshot has format {state['format']}, this version reads {_FORMAT}")
        predictor.history.load(words, lexical, state["history"])
        predictor.restore_scores({model: [float(one) for one in scores] for model, scores in state["scores"].items()})
        checked.load(state["checked"])
        fit_now(predictor)
    except (
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        OSError,
        RuntimeError,  # a feature of zip files that numpy does not write
        TypeError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        raise ConfigError(f"the snapshot is damaged: {error}") from error
    return predictor, checked
