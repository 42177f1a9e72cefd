"""Many prompts from a script, on engines of its own: `python offline_batch.py [MODEL]`."""

import sys
from pathlib import Path

import tandem
from tandem import LLM, SamplingParams
from tandem.demo_questions import questions

model = sys.argv[1] if len(sys.argv) > 1 else Path(tandem.__file__).parent / "demo_model"
asked = questions(32, seed=1)

with LLM(model, prefill=1, decode=1, kv_memory="256MiB") as llm:
    chats = [[{"role": "user", "content": question.prompt}] for question in asked]
    answers = llm.chat(chats, SamplingParams(max_tokens=64, temperature=0))
    for question, answer in zip(asked, answers, strict=True):
        mark = "right" if answer.text == question.answer else "wrong"
        print(f"{mark}  {question.prompt[:60]} -> {answer.text}")
    print(f"{sum(answer.tandem.bytes for answer in answers):,} bytes of KV moved from prefill to decode")

    # Text or token ids, stop strings, sampling with a seed.
    prompts: list[str | list[int]] = ["Hello", [72, 69, 76]]
    for one in llm.generate(prompts, SamplingParams(max_tokens=8, seed=7), stop=["\n"]):
        print(repr(one.prompt), "->", repr(one.text), one.finish_reason)
