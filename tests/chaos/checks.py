"""What must be true of a cluster that has nothing to do: nothing held, nothing stale, every path right."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import aiohttp

from tests.chaos.cluster import ENGINES, Cluster
from tests.chaos.load import Book, Question, Request, ask

GRACE_SECONDS = 8.0
"""Beyond --lease-ttl, for everything to be given back."""
PATH_SECONDS = 20.0
HANDED_OVER = {"do_remote_decode": True}


async def idle_problems(cluster: Cluster) -> list[str]:
    """Wait until nothing is held or stale, and return what still is after a bounded time."""
    deadline = time.monotonic() + cluster.settings.lease_ttl + GRACE_SECONDS
    while True:
        problems = await _held(cluster)
        if not problems or time.monotonic() > deadline:
            return problems
        await asyncio.sleep(0.2)


async def _held(cluster: Cluster) -> list[str]:
    engines: dict[str, dict[str, Any]] = {}
    problems = []
    for name, url in cluster.urls.items():
        try:
            status, body = await cluster.get(f"{url}/tandem/engine")
            if status == 200:
                engines[name] = body
            else:
                problems.append(f"{name} does not tell of itself: {status} {body}")
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            problems.append(f"{name} does not tell of itself: {error!r}")
    alive = {(name, engine["incarnation"]) for name, engine in engines.items()}
    for name, engine in engines.items():
        kv, requests = engine["kv"], engine["requests"]
        if kv["leased"] or kv["in_use"] or kv["free"] + kv["cached"] != kv["blocks"]:
            problems.append(f"{name} holds blocks: {kv}")
        if any(requests[state] for state in ("waiting", "waiting_for_kv", "running")):
            problems.append(f"{name} has requests: {requests}")
        problems += [
            f"{name} has a stale session with {peer['engine_id']}: {peer['state']}, {peer['error']}"
            for peer in engine["peers"]
            if (peer["engine_id"], peer["incarnation"]) not in alive
        ]
    return problems


async def path_problems(cluster: Cluster, book: Book) -> list[str]:
    """Ask once on each pair of engines, as a foreign proxy does, and through the router; return what is not right."""
    usual = [q for q in book.questions if q.choices == 1 and q.path == "/v1/completions"]
    longer = [q for q in usual if int(q.body["max_tokens"]) in (8, 16, 24)]
    pairs = [(p, d) for p in _of_role("prefill") for d in _of_role("decode")]
    tasks = [_through(cluster, book, question) for question in longer[:4]]
    tasks += [_pair(cluster, book, pair, longer[-1 - index]) for index, pair in enumerate(pairs)]
    return [problem for problem in await asyncio.gather(*tasks) if problem]


def _of_role(role: str) -> list[str]:
    return [name for name, shape in ENGINES.items() if shape.role == role]


async def _through(cluster: Cluster, book: Book, question: Question) -> str:
    answer = await ask(cluster.http, cluster.url, Request(question), PATH_SECONDS)
    verdict, code, detail = book.verdict(question, answer)
    return "" if verdict == "right" else f"router, question {question.number}: {verdict} {code} {detail}"


async def _pair(cluster: Cluster, book: Book, pair: tuple[str, str], question: Question) -> str:
    """The prompt on one engine, the answer on the other."""
    prefill, decode = pair
    where = f"{prefill} to {decode}, question {question.number}"
    first = dict(question.body) | {"max_tokens": 1, "kv_transfer_params": HANDED_OVER}
    timeout = aiohttp.ClientTimeout(total=PATH_SECONDS)
    try:
        async with cluster.http.post(cluster.urls[prefill] + question.path, json=first, timeout=timeout) as reply:
            body = await reply.json(content_type=None)
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        return f"{where}: {error!r}"
    if reply.status != 200 or not body.get("kv_transfer_params"):
        return f"{where}: prefill answered {reply.status} {str(body)[:200]}"
    second = replace(question, body=dict(question.body) | {"kv_transfer_params": body["kv_transfer_params"]})
    answer = await ask(cluster.http, cluster.urls[decode], Request(second), PATH_SECONDS)
    verdict, code, detail = book.verdict(question, answer)
    if verdict == "right" and answer is not None and not answer.how.get("disaggregated"):
        return f"{where}: right, but the KV was not handed over: {answer.how.get('reason')}"
    return "" if verdict == "right" else f"{where}: {verdict} {code} {detail}"
