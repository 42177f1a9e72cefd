"""The `tandem` command. Heavy modules are imported inside the commands that need them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Group, Parameter
from cyclopts.config import Env, Toml

from tandem import __version__
from tandem.config import Device, LogLevel, ParallelSection, Role, RouterConfig
from tandem.config_file import check_tables, take_config
from tandem.errors import ConfigError, TandemError
from tandem.options import ModelOptions, NetworkOptions, RunOptions, engine_config, optional_address

SHAPE = Group("Engines", sort_key=1)
DOCTOR = Group("What to look at", sort_key=0)
LOOPBACK = "127.0.0.1"


def count(flag: str) -> Parameter:
    """How many of something that there must be."""

    def check(_: object, value: int) -> None:
        if value < 1:
            raise ConfigError(f"{flag} must be at least 1; got {value}")

    return Parameter(group=SHAPE, validator=check)


app = App(
    name="tandem",
    version=__version__,
    help=(
        "Serve large language models with prefill and decode on separate engines.\n\n"
        "Every flag can be set as TANDEM_... in the environment, or in a TOML file (--config FILE or TANDEM_CONFIG)"
        " with a table per command."
    ),
    config=[Env("TANDEM_", command=False)],
)


@app.command
def demo(*, questions: int = 12, connector: str | None = None, log_level: LogLevel = "warning") -> int:
    """Serve the bundled model with one prefill and one decode engine, ask it questions, check the answers.

    Parameters
    ----------
    questions
        How many to ask; the exit code is 0 if all answers are right.
    connector
        nixl or tcp; by default nixl where it is installed.
    """
    from tandem.commands.demo import run

    return run(questions, connector, log_level)


@app.command
def serve(
    model: str,
    *,
    host: Annotated[str, Parameter(group=SHAPE)] = LOOPBACK,
    port: Annotated[int, Parameter(group=SHAPE)] = 8000,
    prefill: Annotated[int, Parameter(group=SHAPE)] = 1,
    prefill_tp: Annotated[int, count("--prefill-tp")] = 1,
    prefill_pp: Annotated[int, count("--prefill-pp")] = 1,
    decode: Annotated[int, count("--decode")] = 1,
    decode_tp: Annotated[int, count("--decode-tp")] = 1,
    decode_pp: Annotated[int, count("--decode-pp")] = 1,
    prefill_block_size: Annotated[int | None, Parameter(group=SHAPE)] = None,
    decode_block_size: Annotated[int | None, Parameter(group=SHAPE)] = None,
    connector: Annotated[str | None, Parameter(group=SHAPE)] = None,
    options: ModelOptions | None = None,
    network: NetworkOptions | None = None,
    run: RunOptions | None = None,
) -> int:
    """Serve a model on this machine: engines and router with one command.

    Parameters
    ----------
    model
        A local folder in Hugging Face format, or a name on the hub.
    host
        Address of the OpenAI API.
    port
        Port of the OpenAI API; 0 for any.
    prefill
        Number of prefill engines; 0 for engines that do both (as many as --decode says).
    prefill_tp
        Tensor-parallel ranks of each prefill engine.
    prefill_pp
        Pipeline stages of each prefill engine.
    decode
        Number of decode engines.
    decode_tp
        Tensor-parallel ranks of each decode engine.
    decode_pp
        Pipeline stages of each decode engine.
    prefill_block_size
        Tokens per KV block on prefill engines, if not as --block-size.
    decode_block_size
        Tokens per KV block on decode engines, if not as --block-size.
    connector
        How KV moves: nixl or tcp; by default nixl where it is installed.
    """
    from tandem.commands.serve import ServePlan, run_serve

    plan = ServePlan(
        prefill=prefill,
        prefill_shape=ParallelSection(prefill_tp, prefill_pp),
        prefill_block_size=prefill_block_size,
        decode=decode,
        decode_shape=ParallelSection(decode_tp, decode_pp),
        decode_block_size=decode_block_size,
    )
    return run_serve(
        model,
        plan,
        host,
        port,
        connector,
        options or ModelOptions(),
        network or NetworkOptions(),
        run or RunOptions(),
    )


@app.command
def engine(
    model: str,
    *,
    role: Annotated[Role, Parameter(group=SHAPE)] = "mixed",
    tp: Annotated[int, count("--tp")] = 1,
    pp: Annotated[int, count("--pp")] = 1,
    nnodes: Annotated[int, count("--nnodes")] = 1,
    node_rank: Annotated[int, Parameter(group=SHAPE)] = 0,
    master: Annotated[str | None, Parameter(group=SHAPE)] = None,
    engine_id: Annotated[str | None, Parameter(group=SHAPE)] = None,
    connector: Annotated[str | None, Parameter(group=SHAPE)] = None,
    router: Annotated[str | None, Parameter(group=SHAPE)] = None,
    host: Annotated[str | None, Parameter(group=SHAPE)] = None,
    port: Annotated[int, Parameter(group=SHAPE)] = 0,
    options: ModelOptions | None = None,
    network: NetworkOptions | None = None,
    run: RunOptions | None = None,
) -> int:
    """Run this node's ranks of one engine.

    Parameters
    ----------
    model
        A local folder in Hugging Face format, or a name on the hub.
    role
        What the router uses it for; sent a request directly, an engine of any role answers by itself.
    tp
        Tensor-parallel ranks.
    pp
        Pipeline stages.
    nnodes
        Number of nodes; tp x pp ranks are laid out by node, tensor-parallel ranks fastest.
    node_rank
        Which of them this is, from 0.
    master
        HOST:PORT on node 0, where the ranks meet.
    engine_id
        Names the engine over restarts; by default a fresh one. Must be the same on all nodes.
    connector
        How KV moves: nixl or tcp; by default nixl where it is installed.
    router
        HOST:PORT of a router's control port, to register with.
    host
        This node's address for everything the engine listens on; by default found from the route to the others.
    port
        Port of the engine's own API, on node 0; 0 for any.
    """
    from tandem.commands.engine import run_engine
    from tandem.models_on_disk import local_model
    from tandem.transfer.transports.registry import connector_name

    options, network, run = options or ModelOptions(), network or NetworkOptions(), run or RunOptions()
    path, name = local_model(model)
    config = engine_config(
        role,
        options.model(path, name),
        options,
        network,
        run,
        ParallelSection(tp, pp, nnodes, node_rank, optional_address(master, "--master")),
        connector=connector_name(connector),
        engine_id=engine_id,
        host=host,
        port=port,
        router=optional_address(router, "--router"),
    )
    return run_engine(config)


@app.command
def router(
    *,
    host: Annotated[str, Parameter(group=SHAPE)] = LOOPBACK,
    port: Annotated[int, Parameter(group=SHAPE)] = 8000,
    control_host: Annotated[str | None, Parameter(group=SHAPE)] = None,
    control_port: Annotated[int, Parameter(group=SHAPE)] = 7000,
    network: NetworkOptions | None = None,
    run: RunOptions | None = None,
) -> int:
    """Run the front door: OpenAI API for clients, control port for engines.

    Parameters
    ----------
    host
        Address of the OpenAI API.
    port
        Port of the OpenAI API; 0 for any.
    control_host
        Address of the control port; by default as --host.
    control_port
        Port where engines register; 0 for any.
    """
    from tandem.commands.router import run_router

    network, run = network or NetworkOptions(), run or RunOptions()
    config = RouterConfig(
        host=host,
        port=port,
        control_host=control_host or host,
        control_port=control_port,
        cluster_key_file=network.key_file(),
        api_key=network.api_key,
        request_timeout=run.request_timeout,
        seed=run.seed,
        log_level=run.log_level,
    )
    return run_router(config, run.start_timeout)


@app.command
def bench(
    *,
    url: str = "http://127.0.0.1:8000",
    input_len: int = 512,
    output_len: int = 64,
    num_prompts: int = 32,
    request_rate: float = float("inf"),
    concurrency: int | None = None,
    model: str | None = None,
    seed: int = 0,
    warmup: int = 1,
    vocab_size: int = 256,
    ttft_goal: float | None = None,
    tpot_goal: float | None = None,
    api_key: str | None = None,
    json: Path | None = None,
) -> int:
    """Send random prompts to a server and measure what comes back; exit code 1 if a request fails.

    Parameters
    ----------
    url
        Of a router, an engine, or another server with an OpenAI API.
    input_len
        Tokens of each prompt.
    output_len
        Tokens of each answer.
    num_prompts
        How many requests to measure.
    request_rate
        Requests a second, arriving as a Poisson process; inf for all at once.
    concurrency
        Most requests under way at once; by default no limit.
    model
        What the server calls its model; by default the first that it lists.
    seed
        Of the prompts and arrivals.
    warmup
        Requests sent before the measured ones.
    vocab_size
        Prompts are made of token ids below it; any model has the first 256.
    ttft_goal
        Milliseconds to the first token; requests that keep the goals count as goodput.
    tpot_goal
        Milliseconds for each token after the first.
    api_key
        Bearer token for the server.
    json
        A file for the summary and the raw record of each request.
    """
    from tandem.commands.bench import Workload, run
    from tandem.commands.bench_report import Slo

    goal = Slo(ttft_goal and ttft_goal / 1e3, tpot_goal and tpot_goal / 1e3)
    load = Workload(
        url=url,
        input_len=input_len,
        output_len=output_len,
        num_prompts=num_prompts,
        request_rate=request_rate,
        concurrency=concurrency,
        model=model,
        seed=seed,
        warmup=warmup,
        vocab_size=vocab_size,
        goal=goal,
    )
    return run(load, api_key, json)


@app.command
def keygen(file: Path) -> int:
    """Write a new cluster key. Give the same file to every router and engine with --cluster-key-file.

    Parameters
    ----------
    file
        A new file; only you will be able to read it.
    """
    from tandem.wire.keys import new_key_file

    new_key_file(file)
    print(f"wrote a new cluster key to {file}; copy it to every node, readable by you alone")
    return 0


@app.command
def doctor(
    *,
    url: Annotated[str | None, Parameter(group=DOCTOR)] = None,
    api_key: Annotated[str | None, Parameter(group=DOCTOR)] = None,
    master: Annotated[str | None, Parameter(group=SHAPE)] = None,
    nnodes: Annotated[int, count("--nnodes")] = 1,
    node_rank: Annotated[int, Parameter(group=SHAPE)] = 0,
    tp: Annotated[int | None, Parameter(group=SHAPE)] = None,
    pp: Annotated[int, count("--pp")] = 1,
    engine_id: Annotated[str | None, Parameter(group=SHAPE)] = None,
    connector: Annotated[str | None, Parameter(group=SHAPE)] = None,
    device: Annotated[Device, Parameter(group=SHAPE)] = "auto",
    start_timeout: Annotated[float, Parameter(group=SHAPE)] = 120.0,
    host: Annotated[str | None, Parameter(group=DOCTOR)] = None,
    cluster_key_file: Annotated[Path | None, Parameter(group=DOCTOR)] = None,
) -> int:
    """Say what to mend, before traffic comes: on this machine; with --master, between nodes; with --url, in a cluster.

    The exit code is 0 if nothing is in the way of serving.

    Parameters
    ----------
    url
        Ask this router about its engines, and why pairs of them do not work together.
    api_key
        As clients of the router send it.
    master
        Run on every node as `tandem engine` would be: meets, agrees, and measures reads between all nodes.
    nnodes
        Number of nodes.
    node_rank
        Which of them this is, from 0.
    tp
        As it will be given to the engine; by default --nnodes / --pp.
    pp
        As it will be given to the engine.
    engine_id
        As it will be given to the engine.
    connector
        How KV moves: nixl or tcp; by default nixl where it is installed.
    device
        Whose memory is read: cpu or cuda; auto takes CUDA where there is some.
    start_timeout
        Seconds for all nodes to come.
    host
        This node's address towards the others.
    cluster_key_file
        Key of the cluster.
    """
    from tandem.commands.doctor import DoctorOptions, run_doctor

    return run_doctor(
        DoctorOptions(
            url=url,
            api_key=api_key,
            master=optional_address(master, "--master"),
            nnodes=nnodes,
            node_rank=node_rank,
            tp=tp,
            pp=pp,
            engine_id=engine_id,
            connector=connector,
            device=device,
            start_timeout=start_timeout,
            host=host,
            cluster_key_file=cluster_key_file,
        )
    )


def main() -> None:
    """Entry point: a mistake of the user is one sentence on stderr and exit code 1 (2 for wrong flags)."""
    try:
        arguments, file = take_config(sys.argv[1:], os.environ)
        if file is not None:
            check_tables(file, [command for command in app if not command.startswith("-")])
            app.config = [*app.config, Toml(file, must_exist=True)]
        code = app(arguments, exit_on_error=True, print_error=True, result_action="return_value")
    except TandemError as error:
        print(f"tandem: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
