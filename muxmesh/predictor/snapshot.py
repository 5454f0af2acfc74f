"""What a predictor knows, as bytes: a restarted router goes on from there. Arrays and JSON, nothing executable."""

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
from muxmesh.predictor.prompt_features import NAMES, WORD_DIM
from muxmesh.predictor.regression import Matrix

_FORMAT = f"1/{len(NAMES)}/{WORD_DIM}"
"""Raised with every change that makes older snapshots mean something else."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Copies of what a predictor and its guard know."""

    words: Matrix
    lexical: Matrix
    state: dict[str, Any]


def take(predictor: LengthPredictor, guard: CheckedPredictor) -> Snapshot:
    """A copy, quickly made: between two guesses."""
    words, lexical, known = predictor.history.dump()
    state = {"format": _FORMAT, "history": known, "scores": predictor.scores(), "guard": guard.dump()}
    return Snapshot(words, lexical, state)


def write(snapshot: Snapshot) -> bytes:
    """The snapshot as bytes, about 700 for each prompt that is remembered."""
    out = io.BytesIO()
    text = np.frombuffer(json.dumps(snapshot.state).encode(), np.uint8)
    np.savez(out, words=snapshot.words.astype(np.float16), lexical=snapshot.lexical, state=text)
    return out.getvalue()


def read(written: bytes) -> tuple[LengthPredictor, CheckedPredictor]:
    """A predictor that knows what was written, and its guard. Raises ConfigError if this version cannot read it."""
    predictor = LengthPredictor()
    guard = CheckedPredictor(predictor)
    try:
        with np.load(io.BytesIO(written), allow_pickle=False) as arrays:
            words, lexical = arrays["words"].astype(np.float32), arrays["lexical"].astype(np.float32)
            state = json.loads(arrays["state"].tobytes())
        if state["format"] != _FORMAT:
            raise ConfigError(f"the snapshot has format {state['format']}, this version reads {_FORMAT}")
        predictor.history.load(words, lexical, state["history"])
        predictor.restore_scores({model: [float(one) for one in known] for model, known in state["scores"].items()})
        guard.load(state["guard"])
        fit_now(predictor)
    except (
        ArithmeticError,
        AttributeError,
        EOFError,
        KeyError,
        OSError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        raise ConfigError(f"the snapshot is damaged: {error}") from error
    return predictor, guard
