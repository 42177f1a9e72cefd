"""Who may come in: keys, networks and certificates. A part of `tandem.config`, which explains the form."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tandem.errors import ConfigError
from tandem.flags import NETWORK

LOOPBACK = "127.0.0.1"


@Parameter(name="*", group=NETWORK)
@dataclass(frozen=True, slots=True)
class AccessSection:
    cluster_key_file: Path | None = None
    "Key of the cluster, made by `tandem keygen`; without one only loopback is used."
    allow_peers: Annotated[tuple[str, ...], Parameter(negative=(), show_default=list)] = ("127.0.0.0/8", "::1/128")
    "Networks into which the remote_host of a foreign PD proxy is followed."

    def __post_init__(self) -> None:
        if self.cluster_key_file is not None and not self.cluster_key_file.is_file():
            raise ConfigError(
                f"--cluster-key-file {self.cluster_key_file} is not a file; make one with `tandem keygen FILE`"
            )
        for network in self.allow_peers:
            try:
                loopback = ipaddress.ip_network(network, strict=False).is_loopback
            except ValueError:
                raise ConfigError(f"--allow-peers takes networks such as 10.0.0.0/8; got {network!r}") from None
            if self.cluster_key_file is None and not loopback:
                raise ConfigError(
                    f"--allow-peers {network} leads off this machine, which needs a cluster key: make one with"
                    " `tandem keygen FILE` and give it to every process with --cluster-key-file FILE"
                )

    def allows(self, host: str) -> bool:
        """Whether a client-sent address may be followed; names are not resolved, only addresses are allowed."""
        try:
            address = ipaddress.ip_address(LOOPBACK if host == "localhost" else host)
        except ValueError:
            return False
        return any(address in ipaddress.ip_network(network, strict=False) for network in self.allow_peers)


@Parameter(name="*", group=NETWORK)
@dataclass(frozen=True, slots=True)
class HttpSection:
    api_key: str | None = field(default=None, repr=False)
    "Clients of /v1 must send it as a bearer token; a process list shows it, TANDEM_API_KEY and a file do not."
    api_key_file: Path | None = None
    "File of API keys, one a line, # begins a comment; read again when it changes."
    tls_cert: Path | None = None
    "PEM file of the API's certificate and what it is signed with; the API then speaks https."
    tls_key: Path | None = None
    "PEM file of the certificate's private key."

    def __post_init__(self) -> None:
        if self.api_key is not None and (not self.api_key or self.api_key != self.api_key.strip()):
            raise ConfigError("--api-key is empty, or has spaces around it; give another, or none for no key")
        for name in ("api_key_file", "tls_cert", "tls_key"):
            file: Path | None = getattr(self, name)
            if file is not None and not file.is_file():
                raise ConfigError(f"--{name.replace('_', '-')} {file} is not a file")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key go together; give both, or none for plain http")

    @property
    def has_key(self) -> bool:
        """Whether clients need an API key."""
        return self.api_key is not None or self.api_key_file is not None

    @property
    def scheme(self) -> str:
        return "http" if self.tls_cert is None else "https"


ACCESS, HTTP = AccessSection(), HttpSection()
