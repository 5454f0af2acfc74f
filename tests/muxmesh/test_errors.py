import copy
import multiprocessing
import pickle
import re

import pytest

from muxmesh import errors


def _tree(kind: type[Exception], depth: int = 0) -> list[tuple[int, str]]:
    return [(depth, kind.__name__)] + [
        line
        for child in kind.__subclasses__()
        if child.__module__ == errors.__name__
        for line in _tree(child, depth + 1)
    ]


def test_the_tree_in_the_module_docstring_is_the_class_hierarchy() -> None:
    drawn = re.findall(r"^([│ ]*)[├└]── (\w+)", errors.__doc__ or "", flags=re.MULTILINE)
    assert [(0, "MeshError"), *((len(bars) // 4 + 1, name) for bars, name in drawn)] == _tree(errors.MeshError)


def test_an_invalid_request_names_its_field() -> None:
    error = errors.InvalidRequest("sampling.top_p", "is 2; at most 1")
    assert (error.field, error.problem, str(error)) == (
        "sampling.top_p",
        "is 2; at most 1",
        "sampling.top_p: is 2; at most 1",
    )


def test_an_overloaded_service_suggests_a_retry_after_a_second() -> None:
    assert errors.Overloaded("the queue is full").retry_after_s == 1.0
    assert errors.Overloaded("the queue is full", retry_after_s=0.2).retry_after_s == 0.2


@pytest.mark.parametrize(
    ("special", "general"),
    [
        (errors.WorkerLost, errors.Unavailable),
        (errors.RequestPreempted, errors.RequestAborted),
        (errors.ModelUnsupported, errors.ConfigError),
    ],
)
def test_a_handler_of_the_general_error_catches_the_special_one(
    special: type[errors.MeshError], general: type[errors.MeshError]
) -> None:
    with pytest.raises(general, match="details"):
        raise special("details")


ERRORS = [
    errors.InvalidRequest("sampling.top_p", "is 2; at most 1"),
    errors.Overloaded("the queue is full", retry_after_s=0.2),
    errors.WorkerLost("the worker died"),
]


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_can_be_pickled_and_copied(error: errors.MeshError) -> None:
    for other in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert (type(other), str(other), vars(other)) == (type(error), str(error), vars(error))


def _refuse(field: str) -> None:
    raise errors.InvalidRequest(field, "is missing")


def test_an_invalid_request_in_a_pool_of_processes_is_raised_in_the_parent() -> None:
    with (
        multiprocessing.get_context("spawn").Pool(1) as pool,
        pytest.raises(errors.InvalidRequest, match="text: is missing"),
    ):
        pool.apply_async(_refuse, ("text",)).get(timeout=60)
