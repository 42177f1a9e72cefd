"""What is said of the installed software and the cluster key."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.doctor import software
from tandem.doctor.findings import Level, any_problem
from tandem.doctor.nixl_probe import NixlReport, UcxReport, parse_resources
from tandem.wire.keys import new_key_file


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
    assert software.zeromq("27", "4.3.5", curve=False).level is Level.PROBLEM


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
