"""The steps of a tokenizer's components, with their parameters as in tokenizer.json. Changes none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def component_steps(component: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, in the order in which they are applied. None has none."""
    waiting = [] if component is None else [json.loads(component.__getstate__())]
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting = next(value for value in step.values() if isinstance(value, list)) + waiting
        else:
            yield step
