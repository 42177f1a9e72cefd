"""lm-evaluation-harness: the scores that transformers has through the same harness, on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from tandem.demo_questions import questions
from tests.clients.conftest import DEMO_MODEL
from tests.support.deployment import Deployment

COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_text: "{{question}}"
"""
TASKS = {
    "by_choice": """
task: by_choice
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: right
metric_list: [{metric: acc}]
""",
    "by_text": """
task: by_text
output_type: generate_until
doc_to_target: "{{choices[right]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions that the bundled model knows, each with two wrong answers: its own backwards, and the next one's."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    asked = questions(8, 1)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    with data.open("w") as file:
        for one, other in zip(asked, [*asked[1:], asked[0]], strict=True):
            choices = [one.answer[::-1] + ".", one.answer, other.answer + "!"]
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": one.prompt}], tokenize=False, add_generation_prompt=True
            )
            file.write(json.dumps({"question": prompt, "choices": choices, "right": 1}) + "\n")
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(task + COMMON.replace("DATA", str(data)))
    return folder


def evaluate(tasks: Path, kind: str, **arguments: Any) -> dict[str, Any]:
    """Return the scores of each task, and the answers (log-likelihoods, or text) to each question."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    result = simple_evaluate(kind, model_args=arguments, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    return {
        name: ([score for key, score in result["results"][name].items() if key.endswith(",none")],
               [sample["filtered_resps"] for sample in sorted(result["samples"][name], key=lambda one: one["doc_id"])])
        for name in TASKS
    }  # fmt: skip


def test_scores_and_likelihoods_are_those_of_transformers(demo: Deployment, tasks: Path) -> None:
    there = evaluate(tasks, "hf", pretrained=str(DEMO_MODEL), dtype="float32", device="cpu")
    here = evaluate(
        tasks,
        "local-completions",
        model="demo",
        base_url=f"{demo.http.url}/v1/completions",
        tokenizer=str(DEMO_MODEL),
        tokenizer_backend="huggingface",
        num_concurrent=4,
        max_retries=1,
    )
    for name in TASKS:
        assert here[name][0] == there[name][0]
    assert here["by_text"] == there["by_text"]
    assert there["by_text"][0][0] > 0.8
    for ours, theirs in zip(here["by_choice"][1], there["by_choice"][1], strict=True):
        for (logprob, greedy), (expected, greedy_there) in zip(ours, theirs, strict=True):
            assert logprob == pytest.approx(expected, abs=1e-3)
            assert greedy == greedy_there
