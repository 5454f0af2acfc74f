"""`python -m tests.support.bad_router` is the router with a predictor that is of no use, as BAD_PREDICTOR names it."""

import os
import random
import time
from collections.abc import Callable

import router.__main__
import router.predictor_snapshots
from muxmesh.predictor.length_predictor import LengthPredictor, RawPrediction


def _hang(guess: RawPrediction) -> float:
    time.sleep(3600)
    return 1.0


def _crash(guess: RawPrediction) -> float:
    raise RuntimeError("no guess today")


_RNG = random.Random(1)
BAD: dict[str, Callable[[RawPrediction], float]] = {
    "one": lambda guess: 1.0,
    "huge": lambda guess: 1e300,
    "nan": lambda guess: float("nan"),
    "random": lambda guess: _RNG.lognormvariate(4, 2),
    "hang": _hang,
    "crash": _crash,
}


class BadPredictor(LengthPredictor):
    """Learns as the good one does, and says something else."""

    def predict(self, text: str, model: str, tenant: str = "") -> RawPrediction:
        """See `Predictor`."""
        guess = super().predict(text, model, tenant)
        tokens = BAD[os.environ["BAD_PREDICTOR"]](guess)
        return RawPrediction(
            tokens,
            tokens,
            "regressed",
            guess.features,
            guess.prompt_hash,
            guess.log_spread,
            guess.bound,
            guess.median_shift,
        )


if __name__ == "__main__":
    router.predictor_snapshots.LengthPredictor = BadPredictor  # type: ignore[attr-defined]
    router.__main__.main()
