"""Offline use from Python: `with LLM("path/to/model") as llm: llm.generate(prompts)`.

The same processes as `tandem serve` starts, on free ports of loopback, until the `LLM` is closed.
"""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from tandem.api.backend import ServingDetails
from tandem.client import Client, Response
from tandem.config import ClusterConfig
from tandem.console import Console
from tandem.errors import ConfigError, InvalidRequest, RequestError
from tandem.flags import parse_size
from tandem.local_cluster import LocalCluster, start_cluster
from tandem.model_folder import find_model
from tandem.processes import ChildProcesses
from tandem.supervisor import Supervisor, SupervisorThread, Unit
from tandem.wire.sampling import SamplingParams

Prompt = str | list[int]
Messages = list[dict[str, Any]]
StopStrings = str | list[str] | None
Result = TypeVar("Result")
Section = TypeVar("Section")


@dataclass(frozen=True, slots=True)
class Completion:
    """The completion of one prompt.

    Attributes:
        prompt: as it was given; of a chat, its messages.
        token_ids: of the output, the token that stopped it included.
        finish_reason: "stop" or "length".
        stop_reason: the stop string or stop token id; None after end-of-sequence or at the length.
        logprobs: if they were asked for, as the HTTP API has them.
        tandem: how it was served: engines, disaggregated or not, times, blocks and bytes moved.
    """

    prompt: Prompt | Messages
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: dict[str, Any] | None
    tandem: ServingDetails


class LLM:
    """A model on engines of this machine; use as a context manager, or call `close()`.

    May be used from any thread, in notebooks, and in scripts without `if __name__ == "__main__"`. An engine or router
    that dies is started anew; requests that it had go on, but those of a router, which fail.

    Args:
        model: a local folder in Hugging Face format, or a name on the hub.
        flags: those of `tandem serve` but host, port, API key file and TLS, with underscores: `prefill`, `decode_tp`,
            `connector`, `dtype`, `kv_memory`, `max_num_seqs`, `seed`, `threads` ...

    Raises TandemError if it cannot be started.
    """

    def __init__(self, model: str | Path, **flags: Any) -> None:
        config = cluster_config(flags)
        console = Console()
        self._running = running = _Running(ChildProcesses(echo=console.echo))
        running.children.warm()
        # multiprocessing waits at exit for children that still run; what is registered later comes before that.
        atexit.register(running.stop)
        self._finalizer = weakref.finalize(self, running.stop)
        try:
            folder = find_model(str(model), config.model.served_model_name)
            with console:
                cluster = start_cluster(running.children, config, folder, console)
            running.supervise(cluster, console, config.time.start_timeout)
        except BaseException:
            self.close()
            raise
        self.url = f"http://{cluster.router.http}"
        self._api_key = config.http.api_key
        most = min(config.batch.max_waiting, config.limits.max_requests, config.limits.max_client_connections)
        self._connections = min(2 * config.decode * config.batch.max_num_seqs, most)

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
        stop: StopStrings = None,
    ) -> list[Completion]:
        """Complete text or token-id prompts; many run at once, and the completions are in the prompts' order.

        Args:
            prompts: one prompt or several.
            sampling: for all of them, or one for each. Where it is one for all, prompt i has seed + i, so that equal
                prompts may get different completions.
            stop: stop strings.

        Raises RequestError for the first prompt that fails, StartError if what died could not be started anew.
        """
        given = prompt_list(prompts)
        bodies = [
            {"prompt": prompt, **request_fields(params, stop), "logprobs": params.logprobs}
            for prompt, params in zip(given, params_list(sampling, len(given)), strict=True)
        ]
        return self._complete("/v1/completions", given, bodies)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: StopStrings = None,
    ) -> list[Completion]:
        """Answer one conversation or several, each a list of `{"role": ..., "content": ...}`; else as `generate`."""
        given = conversations(messages)
        bodies = [
            {"messages": one, **request_fields(params, stop), **_chat_logprobs(params)}
            for one, params in zip(given, params_list(sampling, len(given)), strict=True)
        ]
        return self._complete("/v1/chat/completions", given, bodies)

    def _complete(
        self, path: str, prompts: Sequence[Prompt | Messages], bodies: Sequence[Mapping[str, Any]]
    ) -> list[Completion]:
        if not self._finalizer.alive:
            raise ConfigError("this LLM is closed; make another")
        try:
            responses = blocking(self._post_all(path, bodies))
        except RequestError:
            self._running.check()
            raise
        return [_completion(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]

    async def _post_all(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[Response]:
        async with Client(self.url, api_key=self._api_key, connections=self._connections) as client:

            async def post(index: int, body: Mapping[str, Any]) -> Response:
                try:
                    return await client.post(path, body)
                except RequestError as error:
                    raise type(error)(f"prompt {index}: {error}", param=error.param) from None

            return await asyncio.gather(*(post(index, body) for index, body in enumerate(bodies)))


class _Running:
    """The processes of an LLM, which must not hold on to it. All are gone after `stop`."""

    def __init__(self, children: ChildProcesses) -> None:
        self.children = children
        self._cluster: LocalCluster | None = None
        self._supervisor: SupervisorThread | None = None

    def supervise(self, cluster: LocalCluster, console: Console, start_seconds: float) -> None:
        """Start anew what dies of a cluster that is up."""
        units: list[Unit] = [cluster.router, *cluster.engines]
        supervisor = Supervisor(self.children, units, console.echo, start_seconds)
        self._cluster, self._supervisor = cluster, SupervisorThread(supervisor, self.children)

    def check(self) -> None:
        """Raise StartError if something died so often that it is not started anew any more."""
        if self._supervisor is not None:
            self._supervisor.check()

    def stop(self) -> None:
        """End everything. Idempotent."""
        atexit.unregister(self.stop)
        if self._supervisor is not None:
            self._supervisor.stop()
        self.children.stop()
        if self._cluster is not None:
            self._cluster.close_listeners()


def cluster_config(flags: Mapping[str, Any]) -> ClusterConfig:
    """Make a config on free ports of flags by name. Raises ConfigError for one that is not known or cannot work."""
    known = _flag_names(ClusterConfig) - {"host", "port", "api_key_file", "tls_cert", "tls_key"}
    if unknown := flags.keys() - known:
        raise ConfigError(f"LLM has no option {min(unknown)!r}; it takes {', '.join(sorted(known))}")
    values = {"log_level": "warning", **flags, "port": 0}
    if isinstance(values.get("kv_memory"), str):
        values["kv_memory"] = parse_size(values["kv_memory"], "--kv-memory")
    if isinstance(values.get("served_model_name"), str):
        values["served_model_name"] = (values["served_model_name"],)
    if values.get("cluster_key_file") is not None:
        # Absolute, as child processes start in the directory in which Python was started.
        values["cluster_key_file"] = Path(values["cluster_key_file"]).resolve()
    return _section(ClusterConfig, values)


def _flag_names(section: type[Any]) -> set[str]:
    """Return the names of the flags of a section and of the sections inside it."""
    names: set[str] = set()
    for field in dataclasses.fields(section):
        names |= _flag_names(type(field.default)) if is_dataclass(field.default) else {field.name}
    return names


def _section(section: type[Section], values: Mapping[str, Any]) -> Section:
    """Make a section, and those inside it, of the flags among `values` that are its own."""
    given: dict[str, Any] = {}
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        if is_dataclass(field.default):
            given[field.name] = _section(type(field.default), values)
        elif field.name in values:
            given[field.name] = values[field.name]
    return section(**given)


def request_fields(params: SamplingParams, stop: StopStrings) -> dict[str, Any]:
    """Return `params` as fields of a request that both APIs have. Raises InvalidRequest."""
    params.check()
    if params.banned_runs:
        raise InvalidRequest("banned_runs is for engines; the HTTP API makes it of `bad_words`", param="banned_runs")
    left_out = ("logprobs", "banned_runs")
    given = {name: getattr(params, name) for name in params.__struct_fields__ if name not in left_out}
    return given | {"stop": stop, "return_token_ids": True}


def params_list(sampling: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    """Return one for each prompt. Raises InvalidRequest if there are more or fewer."""
    if sampling is None or isinstance(sampling, SamplingParams):
        one = sampling or SamplingParams()
        return [msgspec.structs.replace(one, seed=(one.seed + index) % 2**63) for index in range(count)]
    if len(sampling) != count:
        raise InvalidRequest(f"there are {count} prompts and {len(sampling)} SamplingParams; give one, or one for each")
    return list(sampling)


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts, whether one or several were given. Raises InvalidRequest."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(one, int) for one in prompts):
        return [list(prompts)]  # type: ignore[arg-type]
    for index, one in enumerate(prompts):
        if not isinstance(one, str | list):
            raise InvalidRequest(f"prompt {index} must be a string or a list of token ids; it is {one!r}")
    return list(prompts)  # type: ignore[arg-type]


def conversations(messages: Messages | Sequence[Messages]) -> list[Messages]:
    """Return the conversations, whether one or several were given."""
    if messages and isinstance(messages[0], dict):
        return [list(messages)]  # type: ignore[arg-type]
    return list(messages)  # type: ignore[arg-type]


def blocking(work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` to its end, also from where an event loop runs already, as in notebooks."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1, "tandem requests") as thread:
        return thread.submit(asyncio.run, work).result()


def _chat_logprobs(params: SamplingParams) -> dict[str, Any]:
    return {} if params.logprobs is None else {"logprobs": True, "top_logprobs": params.logprobs}


def _completion(prompt: Prompt | Messages, response: Response) -> Completion:
    [choice] = response.choices
    # Our own router fills them in; they are optional to clients of other servers.
    assert choice.token_ids is not None
    assert choice.finish_reason is not None
    assert response.tandem is not None
    return Completion(
        prompt,
        choice.content,
        choice.token_ids,
        choice.finish_reason,
        choice.stop_reason,
        choice.logprobs,
        response.tandem,
    )
