"""Offline use from Python: `with LLM("path/to/model") as llm: llm.generate(prompts)`.

The same processes as `tandem serve` starts, on free ports of loopback, for as long as the `LLM` lives.
"""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from tandem.api.backend import ServingDetails
from tandem.client import Client
from tandem.commands.console import Console
from tandem.commands.serve import ServePlan, plan_configs, start_all
from tandem.config import ParallelSection, RouterConfig
from tandem.errors import ConfigError, InvalidRequest, RequestError
from tandem.models_on_disk import local_model
from tandem.options import ModelOptions, NetworkOptions, RunOptions
from tandem.processes import ChildProcesses
from tandem.wire.sampling import SamplingParams

Prompt = str | list[int]
Messages = list[dict[str, Any]]
Stop = str | list[str] | None
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Completion:
    """What came of one prompt.

    Attributes:
        prompt: as it was given; of a chat, its messages.
        token_ids: of the output, the token that stopped it included.
        finish_reason: "stop" or "length".
        stop_reason: the stop string or stop token id; None after end-of-sequence or at the length.
        logprobs: if they were asked for, as the HTTP API has them.
        tandem: how it was made: engines, disaggregated or not, times, blocks and bytes moved.
    """

    prompt: Prompt | Messages
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: dict[str, Any] | None
    tandem: ServingDetails


class _Message(msgspec.Struct, frozen=True):
    content: str


class _Choice(msgspec.Struct, frozen=True):
    token_ids: list[int]
    finish_reason: str
    text: str = ""
    message: _Message | None = None
    stop_reason: str | int | None = None
    logprobs: dict[str, Any] | None = None


class _Answer(msgspec.Struct, frozen=True):
    choices: list[_Choice]
    tandem: ServingDetails


class LLM:
    """A model on engines of this machine; use as a context manager, or call `close()`.

    May be used from any thread, in notebooks, and in scripts without `if __name__ == "__main__"`.

    Args:
        model: a local folder in Hugging Face format, or a name on the hub.
        prefill: number of prefill engines; 0 for engines that do both (as many as `decode` says).
        flags: as of `tandem serve`, with underscores: `dtype`, `kv_memory`, `max_num_seqs`, `seed`, `threads` ...

    Raises TandemError if it cannot be started.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        prefill: int = 1,
        prefill_tp: int = 1,
        prefill_pp: int = 1,
        prefill_block_size: int | None = None,
        decode: int = 1,
        decode_tp: int = 1,
        decode_pp: int = 1,
        decode_block_size: int | None = None,
        connector: str | None = None,
        **flags: Any,
    ) -> None:
        options, network, run = grouped({"log_level": "warning"} | flags)
        plan = ServePlan(
            prefill=prefill,
            prefill_shape=ParallelSection(prefill_tp, prefill_pp),
            prefill_block_size=prefill_block_size,
            decode=decode,
            decode_shape=ParallelSection(decode_tp, decode_pp),
            decode_block_size=decode_block_size,
        )
        console = Console()
        self._family = ChildProcesses(echo=console.echo)
        self._family.warm()
        # multiprocessing waits at exit for children that still run; what is registered later comes before that.
        atexit.register(self._family.stop)
        self._finalizer = weakref.finalize(self, _stop, self._family)
        try:
            path, name = local_model(str(model))
            configs = plan_configs(plan, options.model(path, name), connector, options, network, run)
            with console:
                router = start_all(self._family, console, _router_config(network, run), configs)
        except BaseException:
            self.close()
            raise
        self.url = f"http://{router.http}"
        self._api_key = network.api_key
        self._connections = min(2 * decode * options.max_num_seqs, options.max_waiting)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all engines and the router. Idempotent."""
        self._finalizer()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: Stop = None,
    ) -> list[Completion]:
        """Complete text or token-id prompts; many run at once, and the answers are in the prompts' order.

        Args:
            prompts: one prompt or several.
            sampling: for all of them, or one for each. Where it is one for all, prompt i has seed + i, so that equal
                prompts may get different answers.
            stop: stop strings.

        Raises RequestError for the first prompt that fails, TandemError if an engine has died.
        """
        given = prompt_list(prompts)
        bodies = [
            {"prompt": prompt, **fields(params, stop), "logprobs": params.logprobs}
            for prompt, params in zip(given, spread(sampling, len(given)), strict=True)
        ]
        return self._complete("/v1/completions", given, bodies)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: Stop = None,
    ) -> list[Completion]:
        """Answer one conversation or several, each a list of `{"role": ..., "content": ...}`; else as `generate`."""
        given = conversations(messages)
        bodies = [
            {"messages": one, **fields(params, stop), **_chat_logprobs(params)}
            for one, params in zip(given, spread(sampling, len(given)), strict=True)
        ]
        return self._complete("/v1/chat/completions", given, bodies)

    def _complete(
        self, path: str, prompts: Sequence[Prompt | Messages], bodies: Sequence[Mapping[str, Any]]
    ) -> list[Completion]:
        if not self._finalizer.alive:
            raise ConfigError("this LLM is closed; make another")
        try:
            answers = blocking(self._post_all(path, bodies))
        except RequestError:
            self._family.check()  # an engine that died says better why
            raise
        return [_completion(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    async def _post_all(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[_Answer]:
        async with Client(self.url, api_key=self._api_key, connections=self._connections) as client:

            async def post(place: int, body: Mapping[str, Any]) -> _Answer:
                try:
                    return await client.post(path, body, _Answer)
                except RequestError as error:
                    raise type(error)(f"prompt {place}: {error}", param=error.param) from None

            return await asyncio.gather(*(post(place, body) for place, body in enumerate(bodies)))


def grouped(flags: Mapping[str, Any]) -> tuple[ModelOptions, NetworkOptions, RunOptions]:
    """Flags of `tandem serve` by their group. Raises ConfigError for one that does not exist."""
    groups: list[Any] = []
    left = dict(flags)
    if isinstance(left.get("cluster_key_file"), str):
        left["cluster_key_file"] = Path(left["cluster_key_file"])
    known: list[str] = []
    for group in (ModelOptions, NetworkOptions, RunOptions):
        names = [one.name for one in dataclasses.fields(group)]
        known += names
        groups.append(group(**{name: left.pop(name) for name in names if name in left}))
    if left:
        raise ConfigError(f"LLM has no option {min(left)!r}; beside its arguments it takes {', '.join(sorted(known))}")
    return groups[0], groups[1], groups[2]


def fields(params: SamplingParams, stop: Stop) -> dict[str, Any]:
    """`params` as fields of a request that both APIs have. Raises InvalidRequest."""
    params.check()
    given = {name: getattr(params, name) for name in params.__struct_fields__ if name != "logprobs"}
    return given | {"stop": stop, "return_token_ids": True}


def spread(sampling: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """One for each prompt. Raises InvalidRequest if there are more or fewer."""
    if sampling is None or isinstance(sampling, SamplingParams):
        one = sampling or SamplingParams()
        return [msgspec.structs.replace(one, seed=(one.seed + place) % 2**63) for place in range(count)]
    if len(sampling) != count:
        raise InvalidRequest(f"there are {count} prompts and {len(sampling)} SamplingParams; give one, or one for each")
    return list(sampling)


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts, whether one or several were given. Raises InvalidRequest."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(one, int) for one in prompts):
        return [list(prompts)]  # type: ignore[arg-type]
    for place, one in enumerate(prompts):
        if not isinstance(one, str | list):
            raise InvalidRequest(f"prompt {place} must be a string or a list of token ids; it is {one!r}")
    return list(prompts)  # type: ignore[arg-type]


def conversations(messages: Messages | Sequence[Messages]) -> list[Messages]:
    """The conversations, whether one or several were given."""
    if messages and isinstance(messages[0], dict):
        return [list(messages)]  # type: ignore[arg-type]
    return list(messages)  # type: ignore[arg-type]


def blocking(work: Coroutine[Any, Any, Made]) -> Made:
    """Run `work` to its end, also from where an event loop runs already, as in notebooks."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, "tandem requests") as thread:
        return thread.submit(asyncio.run, work).result()


def _router_config(network: NetworkOptions, run: RunOptions) -> RouterConfig:
    return RouterConfig(
        port=0,
        cluster_key_file=network.key_file(),
        api_key=network.api_key,
        request_timeout=run.request_timeout,
        seed=run.seed,
        log_level=run.log_level,
    )


def _chat_logprobs(params: SamplingParams) -> dict[str, Any]:
    return {} if params.logprobs is None else {"logprobs": True, "top_logprobs": params.logprobs}


def _completion(prompt: Prompt | Messages, answer: _Answer) -> Completion:
    [choice] = answer.choices
    text = choice.message.content if choice.message is not None else choice.text
    return Completion(
        prompt, text, choice.token_ids, choice.finish_reason, choice.stop_reason, choice.logprobs, answer.tandem
    )


def _stop(family: ChildProcesses) -> None:
    atexit.unregister(family.stop)
    family.stop()
