"""Summaries of benchmark records."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tandem.api.backend import ServingDetails
from tandem.commands import bench
from tandem.commands.bench_report import Record, percentiles, summary
from tandem.commands.workload import Slo, Workload
from tandem.errors import ConfigError
from tests.commands.serving_details import serving_details


def record(ttft: float = 1.0, itl: float = 0.5, tokens: int = 3, details: ServingDetails | None = None) -> Record:
    ended = ttft + itl * (tokens - 1)
    return Record(10, tokens, 0.0, ended, ttft, [itl] * (tokens - 1), "length", tandem=details)


FAILED = Record(10, 0, 0.0, 9.0, 9.0, [], error="no engine")


def test_throughput_and_times_are_of_the_requests_that_succeeded() -> None:
    found = summary([record(), record(ttft=3.0), FAILED], 10.0, Slo())
    assert (found.requests, found.failed, found.errors) == (3, 1, {"no engine": 1})
    assert found.requests_per_second == pytest.approx(0.2)
    assert found.output_tokens_per_second == pytest.approx(0.6)
    assert found.prompt_tokens == 20
    assert found.ttft is not None
    assert found.ttft.mean == found.ttft.median == 2.0
    assert found.tpot is not None
    assert found.tpot.mean == pytest.approx(0.5)
    assert found.goodput is None
    assert found.serving is None


def test_nothing_but_failures_has_no_times() -> None:
    found = summary([FAILED, FAILED], 10.0, Slo(ttft=1.0))
    assert found.errors == {"no engine": 2}
    assert (found.ttft, found.itl, found.tpot, found.e2e, found.serving) == (None,) * 5
    assert found.goodput == 0.0


def test_goodput_counts_requests_that_meet_every_slo() -> None:
    records = [record(ttft=1.0, itl=0.5), record(ttft=1.0, itl=0.9), record(ttft=2.0, itl=0.5), FAILED]
    assert summary(records, 1.0, Slo(ttft=1.5)).goodput == 2.0
    assert summary(records, 1.0, Slo(tpot=0.6)).goodput == 2.0
    assert summary(records, 1.0, Slo(ttft=1.5, tpot=0.6)).goodput == 1.0


def test_the_share_of_disaggregated_requests_comes_with_the_reasons() -> None:
    moved = [serving_details(True, moved=size) for size in (100, 300)]
    details = [*moved, serving_details(False, "mixed engine")]
    found = summary([record(details=one) for one in details] + [record()], 1.0, Slo()).serving
    assert found is not None
    assert (found.requests, found.disaggregated, found.recomputations) == (3, 2, 3)
    assert found.total_bytes == 400
    assert found.reasons == {"mixed engine": 1}
    assert found.transports == {"tcp": 2}
    handoff = found.times["handoff_time"]
    assert [handoff.mean, handoff.median, handoff.p90, handoff.p99] == pytest.approx([0.4] * 4)
    assert found.amounts["descriptors"].mean == 2.0


def test_percentiles_are_interpolated() -> None:
    assert percentiles([]) is None
    found = percentiles(range(101))
    assert found is not None
    assert (found.mean, found.median, found.p90, found.p99) == (50.0, 50.0, 90.0, 99.0)


def test_a_record_survives_its_json() -> None:
    one = record(details=serving_details(True))
    assert msgspec.json.decode(msgspec.json.encode(one), type=Record) == one


def workload(**options: Any) -> Workload:
    given: dict[str, Any] = {"url": "http://x", "input_len": 8, "output_len": 4, "num_prompts": 200}
    return Workload(**given | options)


def test_prompts_are_random_tokens_below_the_vocabulary_and_the_same_for_the_same_seed() -> None:
    prompts = workload(vocab_size=7, warmup=3).prompts()
    assert len(prompts) == 203
    assert {len(prompt) for prompt in prompts} == {8}
    assert {token for prompt in prompts for token in prompt} == set(range(7))
    assert prompts == workload(vocab_size=7, warmup=3).prompts()
    assert prompts != workload(vocab_size=7, warmup=3, seed=1).prompts()


def test_arrivals_are_at_the_rate_that_was_asked_for() -> None:
    arrivals = workload(request_rate=50.0, num_prompts=5000).arrivals()
    assert len(arrivals) == 5000
    assert arrivals[0] == 0.0
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(100.0, rel=0.1)
    assert workload(request_rate=math.inf).arrivals() == [0.0] * 200


@pytest.mark.parametrize("name", ["input_len", "output_len", "num_prompts", "request_rate", "concurrency"])
def test_a_load_that_is_none_is_refused_by_the_name_of_its_flag(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} must be greater than 0"):
        workload(**{name: 0})


def test_the_written_file_names_its_parts_as_always(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def measure(*_: object) -> bench.Measured:
        return bench.Measured([record(details=serving_details(True))], 1.0)

    monkeypatch.setattr(bench, "measure", measure)
    assert bench.run_bench(workload(slo=Slo(ttft=0.5)), None, tmp_path / "found.json") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["load"]["goal"] == {"ttft": 0.5, "tpot": None}
    assert found["load"]["request_rate"] is None
    assert found["summary"]["hops"]["disaggregated"] == 1
    assert found["requests"][0]["tandem"]["decode_engine"] == "d"
