"""The `tandem` command. Its flags are the fields of the configs; heavy modules are imported inside the commands."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from cyclopts import App
from cyclopts.config import Env, Toml

from tandem import __version__
from tandem.client import DEFAULT_URL
from tandem.commands.doctor_options import DoctorOptions
from tandem.commands.workload import Workload
from tandem.config import ClusterConfig, EngineConfig, LogLevel, RouterConfig
from tandem.config_file import check_tables, take_config
from tandem.errors import TandemError
from tandem.wire.control_messages import Role

STDOUT = 1

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
    from tandem.commands.demo import run_demo

    return run_demo(questions, connector, log_level)


@app.command
def serve(model: str, *, config: ClusterConfig | None = None) -> int:
    """Serve a model on this machine: engines and router with one command.

    Parameters
    ----------
    model
        A local folder in Hugging Face format, or a name on the hub.
    """
    from tandem.commands.serve import run_serve

    return run_serve(model, config or ClusterConfig())


@app.command
def engine(model: str, *, config: EngineConfig | None = None) -> int:
    """Run this node's ranks of one engine.

    Parameters
    ----------
    model
        A local folder in Hugging Face format, or a name on the hub.
    """
    from tandem.commands.engine import run_engine

    return run_engine(model, config or EngineConfig())


@app.command
def router(*, config: RouterConfig | None = None) -> int:
    """Run the front door: OpenAI API for clients, control port for engines."""
    from tandem.commands.router import run_router

    return run_router(config or RouterConfig())


@app.command
def drain(engine: str, *, url: str = DEFAULT_URL, api_key: str | None = None) -> int:
    """Have an engine finish what it has, and end; new requests go to others. Returns once it is gone.

    Parameters
    ----------
    engine
        Its id, as /tandem/engines and `tandem doctor --url` show it.
    url
        Of a router that uses it.
    api_key
        As clients of the router send it.
    """
    from tandem.commands.operate import run_drain

    return run_drain(engine, url, api_key)


@app.command
def role(engine: str, role: Role, *, url: str = DEFAULT_URL, api_key: str | None = None) -> int:
    """Use an engine as a prefill, decode or mixed engine from now on, until it restarts; it finishes what it has.

    Parameters
    ----------
    engine
        Its id, as /tandem/engines and `tandem doctor --url` show it.
    role
        What routers use it for.
    url
        Of a router that uses it.
    api_key
        As clients of the router send it.
    """
    from tandem.commands.operate import run_role

    return run_role(engine, role, url, api_key)


@app.command
def bench(*, workload: Workload | None = None, api_key: str | None = None, json: Path | None = None) -> int:
    """Send random prompts to a server and measure what comes back; exit code 1 if a request fails.

    Parameters
    ----------
    api_key
        Bearer token for the server.
    json
        A file for the summary and the raw record of each request.
    """
    from tandem.commands.bench import run_bench

    return run_bench(workload or Workload(), api_key, json)


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
def doctor(*, options: DoctorOptions | None = None) -> int:
    """Say what to mend, before traffic comes: on this machine; with --master, between nodes; with --url, in a cluster.

    The exit code is 0 if nothing is in the way of serving.
    """
    from tandem.commands.doctor import run_doctor

    return run_doctor(options or DoctorOptions())


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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        print(f"tandem: the output cannot be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # what is left of it cannot be written at the exit either
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
