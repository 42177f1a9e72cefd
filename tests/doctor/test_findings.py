"""What is said of a machine."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

import pytest

from tandem.doctor import machine, network, software
from tandem.doctor.deadline import within
from tandem.doctor.finding import Level, any_problem, ok, problem, warning
from tandem.doctor.machine import GIB
from tandem.doctor.network import Interface
from tandem.doctor.nixl_probe import NixlReport
from tandem.doctor.ucx import UcxReport, parse_resources
from tandem.errors import ConfigError
from tandem.wire.keys import new_key_file

ETH0 = Interface("eth0", "10.0.0.5", 1500, 25_000)
LO = Interface("lo", "127.0.0.1", 65536, None)


def test_only_problems_count_as_problems() -> None:
    assert not any_problem([ok("a", "x"), warning("b", "y", "do")])
    assert any_problem([ok("a", "x"), problem("b", "y", "do")])


def test_a_check_that_hangs_is_a_problem_and_not_a_hang() -> None:
    never = threading.Event()
    [finding] = within(0.05, "names", lambda: [ok("x", "y")] if never.wait() else [])
    assert finding.level is Level.PROBLEM
    assert "names" in finding.what


def test_a_check_that_breaks_is_a_problem_that_says_how() -> None:
    [finding] = within(5, "odd file", lambda: [ok("x", str(1 // 0))])
    assert finding.level is Level.PROBLEM
    assert "ZeroDivisionError" in finding.found


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
    assert machine.memory(200 * GIB, available, limit).level is level


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
    assert network.interfaces([LO]).level is Level.WARNING
    assert network.interfaces([LO, ETH0]) == ok("network", "eth0 (10.0.0.5, MTU 1500, 25 Gbit/s)")


def test_a_small_mtu_is_named() -> None:
    finding = network.interfaces([Interface("wg0", "10.9.0.1", 1280, None)])
    assert finding.level is Level.WARNING
    assert "wg0" in (finding.advice or "")


def test_a_host_name_that_is_loopback_says_which_host_to_set() -> None:
    finding = network.host_name("n1", ["127.0.1.1"], ["127.0.0.1", "10.0.0.5"])
    assert finding.level is Level.WARNING
    assert "--host to 10.0.0.5" in (finding.advice or "")


@pytest.mark.parametrize(("addresses", "level"), [
    (["10.0.0.5"], Level.OK), (["10.0.0.6"], Level.WARNING), (ConfigError("unknown"), Level.WARNING),
])  # fmt: skip
def test_a_host_name_should_be_an_address_of_this_machine(addresses: list[str] | ConfigError, level: Level) -> None:
    assert network.host_name("n1", addresses, ["127.0.0.1", "10.0.0.5"]).level is level


def test_a_given_host_that_is_not_ours_is_a_problem() -> None:
    assert network.given_host("10.0.0.9", ["10.0.0.5"]).level is Level.PROBLEM
    assert network.given_host("10.0.0.5", ["10.0.0.5"]).level is Level.OK
    assert network.given_host("127.0.0.1", ["127.0.0.1"]).level is Level.WARNING


def test_a_port_in_use_is_a_warning_that_names_the_flag() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        finding = network.port_free("127.0.0.1", port, "OpenAI API", "--port")
    assert finding.level is Level.WARNING
    assert "--port" in (finding.advice or "")
    assert network.port_free("127.0.0.1", 0, "OpenAI API", "--port").level is Level.OK


def test_infiniband_without_an_active_port_is_a_warning() -> None:
    assert network.infiniband([]).level is Level.OK
    assert network.infiniband([("mlx5_0:1", "ACTIVE", "400 Gb/sec")]).level is Level.OK
    assert network.infiniband([("mlx5_0:1", "DOWN", "10 Gb/sec")]).level is Level.WARNING


@pytest.mark.parametrize(("version", "level"), [
    ("2.11.0", Level.OK), ("2.13.1+cu130", Level.OK), ("2.14.0", Level.WARNING), ("2.9.1", Level.WARNING),
])  # fmt: skip
def test_a_torch_that_was_not_tested_is_a_warning(version: str, level: Level) -> None:
    assert software.torch_version(version).level is level


def test_a_gpu_that_torch_cannot_use_is_a_warning() -> None:
    assert software.cuda_devices([], None, driver=True).level is Level.WARNING
    assert software.cuda_devices([], None, driver=False).level is Level.OK
    assert software.cuda_devices(["0: H200"], "13.0", driver=True).level is Level.OK


def test_a_zeromq_without_curve_is_a_problem() -> None:
    assert software.messages("27", "4.3.5", curve=False).level is Level.PROBLEM


def test_a_nixl_without_ucx_is_a_problem() -> None:
    assert any_problem(software.nixl(NixlReport("1.5.1", ["POSIX"])))
    assert any_problem(software.nixl(NixlReport(error="NIXL does not start: backend")))
    assert not any_problem(software.nixl(NixlReport("1.5.1", ["UCX"], UcxReport("1.23.0", []))))


def ucx_advice(transports: list[str], cuda: bool = False, **environment: str) -> str:
    report = UcxReport("1.23.0", [(name, "device") for name in transports])
    return software.ucx(report, environment, cuda)[-1].advice or ""


def test_missing_ucx_transports_are_named() -> None:
    assert ucx_advice(["tcp", "posix", "cma"]) == ""
    assert "leaves this machine" in ucx_advice(["posix", "cma"])
    assert "UCX_TLS=sm" in ucx_advice(["posix", "cma"], UCX_TLS="sm")
    assert "GPU memory" in ucx_advice(["tcp", "posix", "cma"], cuda=True)
    assert ucx_advice(["rc_mlx5", "posix", "cma", "cuda_copy"], cuda=True) == ""
    assert "SYS_PTRACE" in ucx_advice(["tcp", "posix"])
    assert "two processes of one machine" in ucx_advice(["tcp"])


def test_a_network_device_that_does_not_exist_is_a_problem() -> None:
    devices = {"eth0", "lo", "mlx5_0", "mlx5_0:1"}
    assert software.ucx_settings({"UCX_NET_DEVICES": "eth7"}, devices).level is Level.PROBLEM
    for fine in ("eth0", "mlx5_0:1,eth0", "all", "^lo"):
        assert software.ucx_settings({"UCX_NET_DEVICES": fine}, devices).level is Level.OK


def test_ucx_resources_are_read_from_what_it_prints() -> None:
    lines = [
        "#     component 1  :  tcp",
        "#      resource 1  :  md 1  dev 1  flags -- tcp/eth0",
        "#      resource 12 :  md 5  dev 3  flags a- rc_mlx5/mlx5_0:1",
    ]
    text = "\n".join(lines)
    assert parse_resources(text) == [("tcp", "eth0"), ("rc_mlx5", "mlx5_0:1")]


def test_a_cluster_key_that_everybody_may_read_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "key"
    new_key_file(path)
    assert not any_problem(software.check_key(path))
    path.chmod(0o644)
    assert any_problem(software.check_key(path))
    assert any_problem(software.check_key(tmp_path / "none"))
    assert not any_problem(software.check_key(None))
