"""The report of a load test: which numbers it has, and when a test has failed."""

from __future__ import annotations

import json

import pytest

from clients import Outcome
from report import comparison, report
from run import Result
from serve_process import ServerStats

BEFORE = ServerStats(memory=1e8, files=10.0, cpu=1.0, pictures=0.0, refused={}, batches={})
WARM = ServerStats(memory=2e8, files=12.0, cpu=3.0, pictures=5.0, refused={}, batches={1: 2, 4: 1})
AFTER = ServerStats(memory=3e8, files=14.0, cpu=4.0, pictures=9.0, refused={}, batches={1: 2, 4: 3, 8: 1})
DRAWN, REJECTED = Outcome(seconds=0.5, pictures=3), Outcome(seconds=0.1, error="429 queue_full")
FAILED = Outcome(seconds=9.0, error="500 internal_error")


def result_of(
    *outcomes: Outcome,
    after: ServerStats | None = AFTER,
    differences: tuple[int, ...] = (),
    broken: tuple[str, ...] = (),
) -> Result:
    return Result(
        outcomes=list(outcomes),
        seconds=2.0,
        before=BEFORE,
        warm=WARM,
        after=after,
        memory=[2e8, 4e8],
        differences=list(differences),
        broken=broken,
    )


def test_the_numbers_of_a_test() -> None:
    streams = [Outcome(stream=True, seconds=float(i), first_level=i / 10, pictures=1) for i in range(1, 102)]
    numbers, lines, failed = report(result_of(*streams, DRAWN, REJECTED, FAILED, differences=(0, 1)))
    assert failed
    assert (numbers["requests"], numbers["pictures"], numbers["seconds"]) == (104, 104, 2.0)
    assert (numbers["refused"], numbers["errors"]) == (1, {"500 internal_error": 1})
    latencies = numbers["latencies"]
    assert latencies["streams"] == {"n": 101, "p50": 51.0, "p95": 96.0, "p99": 100.0, "largest": 101.0}
    assert latencies["first level of a stream"]["p50"] == pytest.approx(5.1)
    assert latencies["plain requests"] == {"n": 1, "p50": 0.5, "p95": 0.5, "p99": 0.5, "largest": 0.5}
    assert (latencies["whole answer"]["n"], latencies["whole answer"]["largest"]) == (102, 101.0)
    assert numbers["batches"] == {4: 2, 8: 1}
    assert numbers["memory"] == {"ready": 100, "warm": 200, "end": 300, "largest": 400, "parts": [200, 400]}
    assert (numbers["cores"], numbers["files"]) == (0.5, [12.0, 14.0])
    assert "104 requests in 2.0 s, 104 pictures: 52.00 requests/s, 52.00 pictures/s" in lines
    assert "refused with 429: 1; errors: 500 internal_error: 1" in lines
    assert "batches of up to so many pictures: 4: 2, 8: 1" in lines
    assert lines[-1] == "2 of the pictures drawn again alone: largest difference 1 of 255"


@pytest.mark.parametrize(
    ("result", "failed"),
    [
        (result_of(DRAWN), False),
        (result_of(DRAWN, REJECTED), False),
        (result_of(DRAWN, differences=(0, 1)), False),
        (result_of(DRAWN, differences=(2, 0)), True),
        (result_of(DRAWN, FAILED), True),
        (result_of(DRAWN, broken=("a picture was not drawn again",)), True),
        (result_of(REJECTED), True),
        (result_of(), True),
    ],
)
def test_a_test_fails_for_errors_differences_and_a_lack_of_pictures(result: Result, failed: bool) -> None:
    assert report(result)[2] == failed


def test_a_test_without_a_picture_says_so() -> None:
    numbers, lines, _ = report(result_of(REJECTED, REJECTED))
    assert (numbers["refused"], numbers["errors"]) == (2, {})
    assert lines[-1] == "FAILED: no picture came"


def test_a_server_that_is_gone_at_the_end_is_reported_without_its_numbers() -> None:
    numbers, lines, failed = report(result_of(DRAWN, after=None, broken=("gone",)))
    assert failed
    assert (numbers["memory"]["end"], numbers["cores"], numbers["server"]) == (None, None, None)
    assert lines[-2:] == [
        "server: 100 MB when ready, 200 warm, 400 at most; by tenths of the run 200 400", "FAILED: gone"
    ]  # fmt: skip


def test_a_comparison_takes_the_median_of_the_ratios() -> None:
    slow = result_of(Outcome(seconds=1.0, pictures=1))
    numbers, lines, failed = comparison([(result_of(DRAWN), slow), (slow, slow), (slow, result_of(DRAWN))])
    assert not failed
    assert numbers["ratios"] == pytest.approx([3, 1, 1 / 3])
    assert numbers["ratio"] == 1
    assert "batching draws 1.00 times as many (median; 0.33 to 3.00)" in lines
    assert "batched: p50 of the whole answer 1.000 s" in lines


def test_a_comparison_of_servers_that_drew_nothing_is_reported() -> None:
    numbers, lines, failed = comparison([(result_of(DRAWN), result_of(REJECTED)), (result_of(DRAWN), result_of(DRAWN))])
    assert failed
    assert numbers["ratios"] == [None, 1.0]
    assert "FAILED: round 1, one by one: no picture came" in lines
    numbers, lines, failed = comparison([(result_of(DRAWN), result_of())])
    assert failed
    assert numbers["ratio"] is None
    assert any(line.startswith("batched: p50") for line in lines)
    assert not any(line.startswith("one by one: p50") for line in lines)
    json.dumps(numbers, allow_nan=False)


def test_a_comparison_fails_for_errors_and_for_what_broke() -> None:
    for result in (result_of(DRAWN, FAILED), result_of(DRAWN, broken=("broke",))):
        _, lines, failed = comparison([(result_of(DRAWN), result)])
        assert failed
        assert lines[-1].startswith("FAILED: round 1, one by one: ")
