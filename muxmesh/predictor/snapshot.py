"""What a predictor knows, as bytes: a restarted router goes on from there. Arrays and JSON, nothing executable."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np

from muxmesh.errors import ConfigError
from muxmesh.predictor.features import NAMES, WORD_DIM
from muxmesh.predictor.guard import Guard
from muxmesh.predictor.predictor import LengthPredictor

_FORMAT = f"1/{len(NAMES)}/{WORD_DIM}"
"""Raised with every change that makes older snapshots mean something else."""


def save(predictor: LengthPredictor, guard: Guard) -> bytes:
    """A snapshot, about 700 bytes for each prompt that is remembered."""
    words, lexical, known = predictor.history.dump()
    state = {
        "format": _FORMAT,
        "history": known,
        "scores": predictor.scores(),
        "guard": guard.dump(),
    }
    out = io.BytesIO()
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    np.savez(out, words=words.astype(np.float16), lexical=lexical, state=text)
    return out.getvalue()


def restore(snapshot: bytes, predictor: LengthPredictor, guard: Guard) -> None:
    """Puts what was saved into a predictor that knows nothing. Raises ConfigError if this version cannot read it."""
    try:
        with np.load(io.BytesIO(snapshot), allow_pickle=False) as arrays:
            words, lexical = arrays["words"].astype(np.float32), arrays["lexical"].astype(np.float32)
            state = json.loads(arrays["state"].tobytes())
        if state["format"] != _FORMAT:
            raise ConfigError(f"the snapshot has format {state['format']}, this version reads {_FORMAT}")
        predictor.history.load(words, lexical, state["history"])
        predictor.restore_scores({model: [float(one) for one in known] for model, known in state["scores"].items()})
        guard.load(state["guard"])
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"the snapshot is damaged: {error}") from error
    if refit := predictor.refit():
        predictor.publish(refit.run())
