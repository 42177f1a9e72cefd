"""Which OpenMP runtime engines compute with, and how its threads wait: chosen by machine; a user's choice stands."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest

from tandem.openmp import WAITING, OpenMp, choose, installed_runtime

INTEL = Path("/venv/lib/libiomp5.so")


def on_linux(**environment: str) -> OpenMp:
    return choose("linux", "x86_64", INTEL, environment)


def test_intels_runtime_is_taken_where_it_is_installed_on_x86() -> None:
    assert on_linux() == OpenMp(INTEL, WAITING)


@pytest.mark.parametrize(
    ("system", "machine", "installed"),
    [("linux", "x86_64", None), ("linux", "aarch64", INTEL), ("darwin", "x86_64", INTEL)],
)
def test_elsewhere_torchs_own_spins_for_a_bounded_time(system: str, machine: str, installed: Path | None) -> None:
    assert choose(system, machine, installed, {}) == OpenMp(None, WAITING)


def test_a_bound_is_set_for_either_runtime_as_each_reads_its_own() -> None:
    assert {name.partition("_")[0] for name in WAITING} == {"KMP", "GOMP"}


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY", "GOMP_SPINCOUNT"])
def test_how_threads_wait_is_the_users_choice_if_he_made_one(name: str) -> None:
    assert on_linux(**{name: "1000"}).settings == {}
    assert on_linux(**{name: ""}).settings == WAITING


@pytest.mark.parametrize(
    "environment",
    [
        {"LD_PRELOAD": "/opt/intel/libiomp5.so"},
        {"LD_PRELOAD": "/usr/lib/libtcmalloc.so.4:/usr/lib/libomp.so.5"},
        {"LD_PRELOAD": "libtcmalloc.so.4 libgomp.so.1"},
        {"LD_PRELOAD": "/usr/lib/libgomp-a34b3233.so.1"},
        {"GOMP_SPINCOUNT": "0"},
        {"GOMP_CPU_AFFINITY": "0 1"},
    ],
)
def test_a_runtime_that_the_user_chose_or_tuned_is_left_alone(environment: dict[str, str]) -> None:
    assert on_linux(**environment).library is None


@pytest.mark.parametrize(
    "environment",
    [{"LD_PRELOAD": "/usr/lib/libtcmalloc.so.4"}, {"OMP_NUM_THREADS": "4"}, {"OMP_WAIT_POLICY": "ACTIVE"}],
)
def test_what_is_no_choice_of_a_runtime_leaves_it_to_us(environment: dict[str, str]) -> None:
    assert on_linux(**environment).library == INTEL


def test_the_runtime_is_installed_where_the_package_asks_for_it() -> None:
    assert (installed_runtime() is not None) == (sys.platform == "linux" and platform.machine() == "x86_64")
