"""Offline use from Python, and `tandem bench` on the server that it starts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tandem import LLM, SamplingParams
from tandem.commands.demo import MODEL
from tandem.demo_questions import questions
from tandem.errors import ConfigError, InvalidRequest, RequestError
from tandem.llm import Completion
from tests.support.deployment import clean_environment, run_tandem
from tests.support.processes import until

GREEDY_TO_THE_END = SamplingParams(max_tokens=64, temperature=0)
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(MODEL, threads=1, kv_memory="64MiB", connector="tcp", max_num_seqs=4) as one:
        yield one


def test_questions_are_answered_in_their_order_many_at_once(llm: LLM) -> None:
    asked = questions(24, seed=5)
    answers = llm.chat([[{"role": "user", "content": question.prompt}] for question in asked], GREEDY_TO_THE_END)
    assert [answer.text for answer in answers] == [question.answer for question in asked]
    assert all(answer.finish_reason == "stop" for answer in answers)
    assert all(answer.tandem.disaggregated for answer in answers), [answer.tandem.reason for answer in answers]


def test_text_and_its_token_ids_are_completed_alike(llm: LLM) -> None:
    prompts: list[str | list[int]] = ["Hello", [39, 68, 75, 75, 78]]
    text, ids = llm.generate(prompts, GREEDY)
    assert text.prompt == "Hello"
    assert text.token_ids == ids.token_ids
    assert len(text.token_ids) == 12
    assert text.finish_reason == "length"


def test_a_stop_string_ends_a_completion(llm: LLM) -> None:
    [whole] = llm.generate("Hello", GREEDY)
    stop = whole.text[3]
    [cut] = llm.generate("Hello", GREEDY, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)


def test_logprobs_come_with_the_tokens(llm: LLM) -> None:
    [one] = llm.generate("Hello", SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, logprobs=2))
    assert one.logprobs is not None
    assert len(one.logprobs["token_logprobs"]) == 3


def test_equal_prompts_with_one_sampling_get_different_answers_which_come_again(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=24, temperature=1.5, seed=3, ignore_eos=True)
    first = [one.token_ids for one in llm.generate(["Hello"] * 3, sampling)]
    assert first == [one.token_ids for one in llm.generate(["Hello"] * 3, sampling)]
    assert len({tuple(one) for one in first}) == 3


def test_a_prompt_that_cannot_be_served_is_named(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt 1: .*5000 tokens"):
        llm.generate([[1, 2], [1] * 5000], GREEDY)


def test_another_thread_may_ask(llm: LLM) -> None:
    found: list[Completion] = []
    thread = threading.Thread(target=lambda: found.extend(llm.generate("Hello", GREEDY)))
    thread.start()
    thread.join()
    assert [one.token_ids for one in found] == [one.token_ids for one in llm.generate("Hello", GREEDY)]


def test_the_benchmark_measures_every_request_and_writes_what_it_saw(llm: LLM, tmp_path: Path) -> None:
    load = ["--input-len", "40", "--output-len", "6", "--num-prompts", "5", "--request-rate", "50"]
    ended = run_tandem("bench", "--url", llm.url, *load, "--json", tmp_path / "found.json")
    assert ended.code == 0, ended.out + ended.err
    assert "5 of 5 requests" in ended.out
    assert "5 of 5 disaggregated" in ended.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["summary"]["output_tokens"] == 30
    assert [record["output_tokens"] for record in found["requests"]] == [6] * 5
    assert all(record["tandem"]["bytes"] > 0 for record in found["requests"])


def test_the_benchmark_fails_if_a_request_does(llm: LLM) -> None:
    load = ["--input-len", "5000", "--num-prompts", "2", "--warmup", "0"]
    ended = run_tandem("bench", "--url", llm.url, *load)
    assert ended.code == 1
    assert "2 failed:" in ended.out
    assert "5000 tokens" in ended.out


def test_a_model_that_is_not_there_is_a_readable_error() -> None:
    with pytest.raises(ConfigError, match="neither a folder"):
        LLM("/no/such/folder")


def kill(llm: LLM, name: str) -> None:
    """Kill a process of this name; returns once it is gone."""
    [child] = [child for child in llm._running.children.children if child.name == name]
    child.send_signal(signal.SIGKILL)
    child.process.join(20.0)


def test_engines_that_die_are_started_anew_and_answers_are_right_meanwhile(llm: LLM) -> None:
    right = [one.token_ids for one in llm.generate(["Hello", "World"], GREEDY)]
    for name in ("decode-0 rank 0", "prefill-0 rank 0", "decode-0 rank 0"):
        kill(llm, name)
        assert [one.token_ids for one in llm.generate(["Hello", "World"], GREEDY)] == right


def test_a_request_whose_engine_dies_goes_on_in_its_next_life(llm: LLM) -> None:
    long = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
    [right] = llm.generate("Hello", long)
    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(llm.generate, "Hello", long)
        url = f"{llm.url}/tandem/engines"

        def decodes() -> bool:
            with urllib.request.urlopen(url) as reply:
                engines = json.load(reply)["engines"]
            return any(one["role"] == "decode" and one["requests"]["running"] for one in engines)

        assert until(decodes, 20.0)
        kill(llm, "decode-0 rank 0")
        [answer] = asked.result()
    assert answer.token_ids == right.token_ids


def test_after_the_router_has_died_calls_work_again(llm: LLM) -> None:
    right = [one.token_ids for one in llm.generate("Hello", GREEDY)]
    kill(llm, "router")

    def works() -> bool:
        try:
            return [one.token_ids for one in llm.generate("Hello", GREEDY)] == right
        except RequestError:
            return False

    assert until(works, 60.0)


SCRIPT = """
from tandem import LLM, SamplingParams

llm = LLM({model!r}, prefill=0, threads=1, kv_memory="16MiB", connector="tcp")
print(llm.generate("Hello", SamplingParams(max_tokens=2))[0].finish_reason)
"""


def test_a_script_without_a_main_guard_that_forgets_to_close_ends_cleanly(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(model=str(MODEL)))
    command = [sys.executable, str(script)]
    ended = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout) == (0, "length\n"), ended.stderr
    assert "Traceback" not in ended.stderr
