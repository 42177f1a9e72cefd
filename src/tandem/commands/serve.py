"""`tandem serve`: engines and router with one command."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from tandem.commands.console import Console
from tandem.commands.supervise import supervised, wait_forever
from tandem.config import EngineConfig, ModelSection, ParallelSection, Role, RouterConfig
from tandem.errors import ConfigError
from tandem.local_cluster import Progress, RouterProcess, start_engines, start_router, wait_healthy, wait_ready
from tandem.models_on_disk import local_model
from tandem.options import ModelOptions, NetworkOptions, RunOptions, engine_config
from tandem.processes import ChildProcesses
from tandem.transfer.transports.registry import connector_name

SOLO = ParallelSection()


@dataclass(frozen=True, slots=True)
class ServePlan:
    """How many engines of which shape; `prefill` 0 for `decode` mixed engines."""

    prefill: int = 1
    prefill_shape: ParallelSection = SOLO
    prefill_block_size: int | None = None
    decode: int = 1
    decode_shape: ParallelSection = SOLO
    decode_block_size: int | None = None

    def __post_init__(self) -> None:
        if self.prefill < 0 or self.decode < 1:
            raise ConfigError(
                f"--prefill must be 0 or more and --decode 1 or more; got {self.prefill} and {self.decode}"
            )

    @property
    def engines(self) -> list[tuple[str, Role, ParallelSection, int | None]]:
        """Name, role, shape and block size of each."""
        last: Role = "decode" if self.prefill else "mixed"
        prefills = [
            (f"prefill-{i}", "prefill", self.prefill_shape, self.prefill_block_size) for i in range(self.prefill)
        ]
        rest = [(f"{last}-{i}", last, self.decode_shape, self.decode_block_size) for i in range(self.decode)]
        return [*prefills, *rest]  # type: ignore[list-item]


def run_serve(
    model: str,
    plan: ServePlan,
    host: str,
    port: int,
    connector: str | None,
    options: ModelOptions,
    network: NetworkOptions,
    run: RunOptions,
) -> int:
    """Serve until stopped."""

    def body(family: ChildProcesses, console: Console) -> int:
        path, name = local_model(model)
        section = options.model(path, name)
        router_config = RouterConfig(
            host=host,
            port=port,
            cluster_key_file=network.key_file(),
            api_key=network.api_key,
            request_timeout=run.request_timeout,
            seed=run.seed,
            log_level=run.log_level,
        )
        configs = plan_configs(plan, section, connector, options, network, run)
        family.warm()
        with console:
            router = start_all(family, console, router_config, configs)
        url = f"http://{router.http}"
        console.panel(
            [
                f"[bold]{section.name}[/bold] is served at [bold cyan]{url}/v1[/bold cyan]",
                "Ctrl-C stops everything",
            ],
            f"curl {url}/v1/completions -H 'Content-Type: application/json'"
            f' -d \'{{"model": "{section.name}", "prompt": "Hello", "max_tokens": 16}}\'',
        )
        console.url(url)
        wait_forever(family)
        return 0

    return supervised(body)


def plan_configs(
    plan: ServePlan,
    model: ModelSection,
    connector: str | None,
    options: ModelOptions,
    network: NetworkOptions,
    run: RunOptions,
) -> list[tuple[str, EngineConfig]]:
    chosen = connector_name(connector)
    configs = []
    for name, role, shape, block_size in plan.engines:
        config = engine_config(role, model, options, network, run, shape, connector=chosen, engine_id=name)
        configs.append((name, with_block_size(config, block_size)))
    return configs


def with_block_size(config: EngineConfig, block_size: int | None) -> EngineConfig:
    if block_size is None:
        return config
    cache = msgspec.structs.replace(config.cache, block_size=block_size)
    return msgspec.structs.replace(config, cache=cache)


def start_all(
    family: ChildProcesses, console: Console, router_config: RouterConfig, configs: list[tuple[str, EngineConfig]]
) -> RouterProcess:
    """Returns once a request would be answered."""
    seconds = configs[0][1].time.start_timeout
    router = start_router(family, router_config, seconds)
    engines = start_engines(family, configs, router.control)
    https = {engine.name: engine.http for engine in engines}
    progress = Progress(console.loaded, lambda who, status: console.ready(who, status, https[who]))
    wait_ready(family, engines, seconds, progress)
    wait_healthy(family, router, seconds)
    return router
