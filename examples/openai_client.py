"""The official openai client on a Tandem server: `python openai_client.py [URL]`."""

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id

answer = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Reverse: krqzm"}], temperature=0
)
print(answer.choices[0].message.content)

# Fields beyond OpenAI's are in `model_extra`.
how = (answer.model_extra or {})["tandem"]
print(f"{how['prefill_engine']} -> {how['decode_engine']}: {how['blocks']} blocks, {how['bytes']} bytes")

stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Walk from k: a>t, k>a, t>."}],
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"top_k": 40},
)
for event in stream:
    for choice in event.choices:
        print(choice.delta.content or "", end="", flush=True)
    if event.usage is not None:
        print(f"  ({event.usage.completion_tokens} tokens)")
