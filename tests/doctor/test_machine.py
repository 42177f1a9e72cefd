"""What is said of this machine and its network."""

from __future__ import annotations

import resource
import socket

import pytest

from tandem.doctor import machine
from tandem.doctor.findings import Level, ok
from tandem.doctor.machine import GIB, Interface

ETH0 = Interface("eth0", ["10.0.0.5"], 1500, 25_000)
LO = Interface("lo", ["127.0.0.1", "::1"], 65536)


def test_a_quota_below_the_cpus_is_a_warning_that_names_the_flag() -> None:
    finding = machine.processors(64, 64, 8.0)
    assert finding.level is Level.WARNING
    assert "8 usable" in finding.found
    assert "--threads 8" in (finding.advice or "")


def test_a_quota_that_covers_the_allowed_cpus_is_no_matter() -> None:
    assert machine.processors(64, 4, 8.0) == ok("CPUs", "64, 4 usable")


@pytest.mark.parametrize(("available", "limit", "level"), [
    (100 * GIB, None, Level.OK), (100 * GIB, GIB, Level.WARNING), (GIB, None, Level.WARNING),
])  # fmt: skip
def test_memory_is_what_the_control_group_leaves(available: int, limit: int | None, level: Level) -> None:
    assert machine.free_memory(200 * GIB, available, limit).level is level


def test_dockers_64_mib_of_shared_memory_are_too_little() -> None:
    finding = machine.shared_memory(64 << 20)
    assert finding.level is Level.WARNING
    assert "--shm-size" in (finding.advice or "")
    assert machine.shared_memory(8 * GIB).level is Level.OK


def test_few_open_files_are_a_warning_and_no_limit_is_fine() -> None:
    assert machine.open_files(1024).level is Level.WARNING
    assert machine.open_files(65536).level is Level.OK
    assert machine.open_files(resource.RLIM_INFINITY).level is Level.OK


def test_locked_memory_matters_with_rdma_alone() -> None:
    assert machine.locked_memory(8 << 20, rdma=False).level is Level.OK
    assert machine.locked_memory(8 << 20, rdma=True).level is Level.WARNING
    assert machine.locked_memory(resource.RLIM_INFINITY, rdma=True).level is Level.OK


def test_a_clock_that_was_never_set_or_is_slow_is_a_warning() -> None:
    assert machine.clock("tsc", 1_900_000_000).level is Level.OK
    assert machine.clock("tsc", 1_000).level is Level.WARNING
    assert machine.clock("hpet", 1_900_000_000).level is Level.WARNING


def test_sizes_are_written_as_people_read_them() -> None:
    assert [machine.size(n) for n in (512, 1536, 8 << 20, 3 << 30, 5 << 40)] == [
        "512 bytes", "1.5 KiB", "8.0 MiB", "3.0 GiB", "5.0 TiB",
    ]  # fmt: skip


def test_a_machine_with_loopback_alone_is_told_so() -> None:
    assert machine.interfaces([LO]).level is Level.WARNING
    assert machine.interfaces([LO, ETH0]) == ok("network", "eth0 (10.0.0.5, MTU 1500, 25 Gbit/s)")


def test_a_small_mtu_is_named() -> None:
    finding = machine.interfaces([Interface("wg0", ["10.9.0.1"], 1280)])
    assert finding.level is Level.WARNING
    assert "wg0" in (finding.advice or "")


def test_a_host_name_that_is_loopback_says_which_host_to_set() -> None:
    finding = machine.host_name("n1", ["127.0.1.1"], ["127.0.0.1", "10.0.0.5"])
    assert finding.level is Level.WARNING
    assert "--host to 10.0.0.5" in (finding.advice or "")


@pytest.mark.parametrize(("addresses", "level"), [
    (["10.0.0.5"], Level.OK), (["10.0.0.6"], Level.WARNING), ([], Level.WARNING),
])  # fmt: skip
def test_a_host_name_should_be_an_address_of_this_machine(addresses: list[str], level: Level) -> None:
    assert machine.host_name("n1", addresses, ["127.0.0.1", "10.0.0.5"]).level is level


def test_a_given_host_that_is_not_ours_is_a_problem() -> None:
    assert machine.given_host("10.0.0.9", ["10.0.0.5"]).level is Level.PROBLEM
    assert machine.given_host("10.0.0.5", ["10.0.0.5"]).level is Level.OK
    assert machine.given_host("127.0.0.1", ["127.0.0.1"]).level is Level.WARNING


def test_a_port_in_use_is_a_warning_that_names_the_flag() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        finding = machine.port_free("127.0.0.1", port, "OpenAI API", "--port")
    assert finding.level is Level.WARNING
    assert "--port" in (finding.advice or "")
    assert machine.port_free("127.0.0.1", 0, "OpenAI API", "--port").level is Level.OK


def test_infiniband_without_an_active_port_is_a_warning() -> None:
    assert machine.infiniband([]).level is Level.OK
    assert machine.infiniband([("mlx5_0:1", "ACTIVE", "400 Gb/sec")]).level is Level.OK
    assert machine.infiniband([("mlx5_0:1", "DOWN", "10 Gb/sec")]).level is Level.WARNING


def test_ipv6_addresses_count_and_link_local_ones_are_of_no_use_to_others() -> None:
    both = Interface("eth0", ["10.0.0.5", "fd00::5", "fe80::1"], 1500)
    assert machine.interfaces([LO, both]) == ok("network", "eth0 (10.0.0.5, fd00::5, MTU 1500)")
    assert machine.interfaces([LO, Interface("eth0", ["fe80::1"], 1500)]).found == "only loopback"
    assert machine.given_host("fd00::5", both.addresses).level is Level.OK
    assert machine.given_host("fd00::6", both.addresses).level is Level.PROBLEM


def test_all_addresses_of_the_machine_may_be_given_as_host() -> None:
    for any_address in ("0.0.0.0", "::"):
        assert machine.given_host(any_address, ["10.0.0.5"]).level is Level.OK


def test_loopback_is_among_the_interfaces_that_are_read() -> None:
    assert any("127.0.0.1" in interface.addresses for interface in machine.network_interfaces())
    assert "lo" in machine.network_devices()
