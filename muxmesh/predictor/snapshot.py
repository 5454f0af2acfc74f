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
from muxmesh.predictor.length_predictor import CAPACITY, LengthPredictor
from muxmesh.predictor.prompt_features import LEXICAL_NAMES, WORD_DIM
from muxmesh.predictor.regression import Fit, Matrix
from muxmesh.quoting import named

_FORMAT = f"3/{len(LEXICAL_NAMES)}/{WORD_DIM}"
"""The first number is raised with every change after which older snapshots would be misread."""

_FIT = "fit_"
"""Prefix of the names of a fit's arrays."""


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Copies of the state of a predictor and of the checks on it. ``words`` and ``lexical`` have one row a prompt.

    A tenant is in it under the name that `CheckedPredictor.predict` got.
    """

    words: Matrix
    lexical: Matrix
    fit: Fit | None
    state: dict[str, Any]


def take(predictor: LengthPredictor, checked: CheckedPredictor) -> Snapshot:
    """Copies the state. Called between predictions, in the thread of the predictor."""
    words, lexical, history = predictor.history.dump()
    state = {"format": _FORMAT, "history": history, "predictor": predictor.dump(), "checked": checked.dump()}
    return Snapshot(words, lexical, predictor.fit, state)


def write(snapshot: Snapshot) -> bytes:
    """Serializes a snapshot, in about 1,000 bytes for each prompt, and 500 for each that the fit is made of."""
    out = io.BytesIO()
    state = np.frombuffer(json.dumps(snapshot.state).encode(), np.uint8)
    arrays: dict[str, Any] = {"words": snapshot.words, "lexical": snapshot.lexical, "state": state}
    fit = {} if snapshot.fit is None else snapshot.fit.arrays()
    np.savez(out, allow_pickle=False, **arrays, **{f"{_FIT}{name}": array for name, array in fit.items()})
    return out.getvalue()


def read(data: bytes, capacity: int = CAPACITY) -> tuple[LengthPredictor, CheckedPredictor]:
    """A predictor that continues from a snapshot, and the checks on it: both predict what the saved ones do.

    ``capacity``: as in `LengthPredictor`. Raises ConfigError if the snapshot is damaged or has another format.
    """
    predictor = LengthPredictor(capacity)
    checked = CheckedPredictor(predictor)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            words, lexical = arrays["words"].astype(np.float32), arrays["lexical"].astype(np.float32)
            state = json.loads(arrays["state"].tobytes())
            fit = {name.removeprefix(_FIT): arrays[name] for name in arrays.files if name.startswith(_FIT)}
        if state["format"] != _FORMAT:
            raise ConfigError(f"the snapshot has format {named(str(state['format']))}, this version reads {_FORMAT}")
        predictor.history.load(words, lexical, state["history"])
        num_features = len(LEXICAL_NAMES) + WORD_DIM
        predictor.load(state["predictor"], Fit.from_arrays(fit, num_features) if fit else None)
        checked.load(state["checked"])
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
        raise ConfigError(f"the snapshot is damaged: {named(str(error))}") from error
    return predictor, checked
