import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.record import INTERRUPTED, Record
from loadtest.report import About, build_report
from loadtest.slo import SCALES, Objectives, Unloaded, attainment, attainment_figures, fit_unloaded
from loadtest.target import TargetError
from muxmesh.errors import ConfigError
from muxmesh.slo import Slo, Verdict
from tests.support.loadtest_reports import make_record
from tests.support.loadtest_target import StubTarget, drive

LENGTHS = ((10, 5), (400, 10), (50, 80), (700, 40), (20, 20))


def record_of(seconds: float, num_input: int = 10, num_output: int = 10, status: str = "OK") -> Record:
    return make_record(end_s=seconds, status=status, num_input=num_input, num_output=num_output)


def records_of(unloaded: Unloaded) -> list[Record]:
    return [record_of(unloaded.e2el_s(*lengths), *lengths) for lengths in LENGTHS]


COEFFICIENT = st.floats(1e-4, 1.0)


@given(COEFFICIENT, COEFFICIENT, COEFFICIENT)
def test_the_fit_recovers_the_coefficients_of_a_linear_server(base: float, per_input: float, per_output: float) -> None:
    fitted = fit_unloaded(records_of(Unloaded(base, per_input, per_output)))
    for lengths in LENGTHS:
        assert fitted.e2el_s(*lengths) == pytest.approx(Unloaded(base, per_input, per_output).e2el_s(*lengths))


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500), st.floats(0.01, 10)), min_size=1, max_size=8))
def test_no_coefficient_is_negative(measured: list[tuple[int, int, float]]) -> None:
    fitted = fit_unloaded([record_of(seconds, prompt, output) for prompt, output, seconds in measured])
    assert min(fitted.base_s, fitted.per_input_s, fitted.per_output_s) >= 0


def test_a_server_whose_latency_falls_with_the_prompt_has_no_prompt_coefficient() -> None:
    records = [
        record_of(1.0 + 0.01 * num_output - 0.0005 * num_input, num_input, num_output)
        for num_input, num_output in LENGTHS
    ]
    assert fit_unloaded(records).per_input_s == 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_than_four_requests_fit_only_the_time_per_output_token(count: int) -> None:
    fitted = fit_unloaded([record_of(2.0, 100, 10)] * count)
    assert (fitted.base_s, fitted.per_input_s) == (0, 0)
    assert fitted.per_output_s == pytest.approx(0.2)


def test_the_first_token_and_the_others_are_fitted_apart_from_the_whole() -> None:
    records = []
    for num_input, num_output in LENGTHS:
        first_s = 0.2 + 0.0001 * num_input  # hardly anything beside the output, which takes 10 s and more
        times_s = tuple(first_s + 2.0 * position for position in range(num_output))
        records.append(make_record(times_s=times_s, num_input=num_input))
    fitted = fit_unloaded(records)
    assert fitted.ttft_s(1000) == pytest.approx(0.3)
    assert fitted.tpot_s(1000, 50) == pytest.approx(2.0)


def test_a_latency_of_an_earlier_report_has_the_first_token_of_the_whole() -> None:
    earlier = Unloaded(0.1, 0.001, 0.02)
    assert earlier.ttft_s(100) == pytest.approx(0.2)
    assert earlier.tpot_s(100) == 0.02


def test_failed_requests_are_not_part_of_the_fit() -> None:
    unloaded = Unloaded(0.1, 0.001, 0.02)
    records = [*records_of(unloaded), record_of(1000.0, status="UNAVAILABLE")]
    assert fit_unloaded(records).e2el_s(300, 30) == pytest.approx(unloaded.e2el_s(300, 30))


@pytest.mark.parametrize("records", [[], [record_of(1.0, status="UNAVAILABLE")]])
def test_a_fit_without_a_success_is_an_error(records: list[Record]) -> None:
    with pytest.raises(ConfigError, match="calibration: no request succeeded on the idle server"):
        fit_unloaded(records)


def test_attainment_counts_a_latency_of_exactly_the_multiple() -> None:
    found = attainment([record_of(factor) for factor in (0.5, 2.0, 2.001, 16.0)], Unloaded(1.0, 0.0, 0.0))
    assert found == {
        scale: 0.25 if scale == 1 else 0.5 if scale == 2 else 0.75 if scale < 16 else 1.0 for scale in SCALES
    }


def test_the_slo_of_a_request_grows_with_its_length() -> None:
    unloaded = Unloaded(0.0, 0.001, 0.01)
    short, long = record_of(2.0, 100, 10), record_of(2.0, 1000, 100)
    assert (attainment([short], unloaded)[1], attainment([long], unloaded)[1]) == (0.0, 1.0)


def test_failed_requests_miss_every_slo() -> None:
    target = StubTarget(failure=lambda request: TargetError("X", "x") if request.index % 2 else None)
    run = drive(target, "rate=5 lengths=D(5,5) requests=100")
    report = build_report(About("", "", [], "", ""), run, objectives=Objectives({"": fit_unloaded(run.records)}))
    assert report["slo"]["attainment"][16] <= 0.5


def test_interrupted_requests_are_left_out_of_the_attainment_of_a_report() -> None:
    run = drive(StubTarget(), "rate=5 lengths=D(5,5) requests=20")
    for record in run.records[:10]:
        record.status = INTERRUPTED
    report = build_report(About("", "", [], "", ""), run, objectives=Objectives({"": Unloaded(1e6, 0.0, 0.0)}))
    assert report["slo"]["attainment"][1] == 1.0


def test_the_attainment_of_no_request_is_zero() -> None:
    assert attainment([], Unloaded(1.0, 0.0, 0.0)) == dict.fromkeys(SCALES, 0.0)


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=20))
def test_attainment_never_falls_with_the_scale(seconds: list[float]) -> None:
    shares = list(attainment([record_of(one) for one in seconds], Unloaded(1.0, 0.0, 0.0)).values())
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)


ALONE = {"a": Unloaded(1.0, 0.0, 0.0), "b": Unloaded(4.0, 0.0, 0.0)}


def of_model(model: str | None, seconds: float, status: str = "OK") -> Record:
    record = record_of(seconds, status=status)
    record.model = model
    return record


def test_each_request_is_compared_with_the_idle_latency_of_its_own_model() -> None:
    records = [of_model("a", 3.0), of_model("a", 3.0), of_model("a", 1.0), of_model("b", 3.0)]
    found = Objectives(ALONE).by_scale(records)
    assert [found["attainment"][scale] for scale in (1, 2, 3)] == [0.5, 0.5, 1.0]
    assert found["by_model"]["a"]["attainment"][1] == pytest.approx(1 / 3)
    assert found["by_model"]["b"]["attainment"][1] == 1.0
    assert Unloaded(**found["by_model"]["b"]["unloaded"]) == ALONE["b"]


def test_one_model_has_its_attainment_alone() -> None:
    found = Objectives({"m": ALONE["a"]}, default="m").by_scale([of_model(None, 2.0)])
    assert found.keys() == {"unloaded", "attainment"}
    assert (found["attainment"][1], found["attainment"][2]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("record", "met"),
    [
        (of_model("a", 4.0), True),
        (of_model("a", 4.1), False),
        (of_model(None, 4.1), False),
        (of_model("a", 0.1, "UNAVAILABLE"), False),
        (of_model("a", 9.9, INTERRUPTED), None),
        (of_model("b", 9.9), None),
    ],
)
def test_a_request_is_judged_by_the_slo_that_its_model_has(record: Record, met: bool | None) -> None:
    verdict = Objectives(ALONE, {"a": Slo(scale=4)}, "a").verdict(record)
    assert (None if verdict is None else verdict.met) == met


def test_a_scale_of_a_latency_that_is_not_known_judges_nothing() -> None:
    assert Objectives({}, {"a": Slo(scale=4)}).verdict(of_model("a", 1.0)) is None


def test_the_figures_are_shares_of_the_requests_that_count() -> None:
    verdicts = [Verdict(True, True, True), Verdict(True, False, True), None, Verdict(False, False, False)]
    assert attainment_figures(verdicts) == {
        "slo_attainment": pytest.approx(1 / 3),
        "slo_ttft_attainment": pytest.approx(2 / 3),
        "slo_tpot_attainment": pytest.approx(1 / 3),
        "slo_e2el_attainment": pytest.approx(2 / 3),
    }
    assert set(attainment_figures([None]).values()) == {None}
