"""The flags of `tandem doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from tandem.config import (
    Device,
    EngineConfig,
    ModelSection,
    NetworkSection,
    ParallelSection,
    TimeSection,
)
from tandem.config_access import AccessSection
from tandem.flags import ENGINES, check_counts, parse_address, text_flag
from tandem.wire.messages import Address

DOCTOR = Group("What to look at", sort_key=0)


@Parameter(name="*", group=ENGINES)
@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """`tp`: None for one rank per node."""

    url: Annotated[str | None, Parameter(group=DOCTOR)] = None
    "Ask this router about its engines, and why pairs of them do not work together."
    api_key: Annotated[str | None, Parameter(group=DOCTOR)] = None
    "As clients of the router send it."
    master: Annotated[Address | None, text_flag(parse_address, "--master")] = None
    "Run on every node as `tandem engine` would be: meets, agrees, and measures reads between all nodes."
    nnodes: int = 1
    "Number of nodes."
    node_rank: int = 0
    "Which of them this is, from 0."
    tp: int | None = None
    "As it will be given to the engine; by default --nnodes / --pp."
    pp: int = 1
    "As it will be given to the engine."
    engine_id: str | None = None
    "As it will be given to the engine."
    connector: str | None = None
    "How KV moves: nixl or tcp; by default nixl where it is installed."
    device: Device = "auto"
    "Whose memory is read: cpu or cuda; auto takes CUDA where there is some."
    start_timeout: float = 120.0
    "Seconds for all nodes to come."
    host: Annotated[str | None, Parameter(group=DOCTOR)] = None
    "This node's address towards the others."
    cluster_key_file: Annotated[Path | None, Parameter(group=DOCTOR)] = None
    "Key of the cluster."

    def __post_init__(self) -> None:
        check_counts(nnodes=self.nnodes, pp=self.pp)

    def engine_config(self) -> EngineConfig:
        """Return the configuration of the engine whose nodes are checked. Raises ConfigError if it cannot work."""
        tp = self.tp if self.tp is not None else max(1, self.nnodes // self.pp)
        return EngineConfig(
            parallel=ParallelSection(tp, self.pp, self.nnodes, self.node_rank, self.master),
            engine_id=self.engine_id,
            network=NetworkSection(self.connector, host=self.host),
            model=ModelSection(device=self.device),
            access=AccessSection(cluster_key_file=self.cluster_key_file),
            time=TimeSection(self.start_timeout),
        )
