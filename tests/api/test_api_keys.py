"""API keys from a flag and from a file that changes."""

import os
from pathlib import Path

import pytest

from tandem.api import api_keys
from tandem.api.api_keys import ApiKeys
from tandem.config_access import HttpSection
from tandem.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(api_keys, "CHECK_S", 0.0)
    path = tmp_path / "keys"
    path.write_text("# keys of the team\nfirst\n\n  second # of the nightly job\nwith#hash\n")
    return path


def test_each_key_of_flag_and_file_is_another_client(file: Path) -> None:
    keys = ApiKeys("flag", file)
    names = [keys.client(key) for key in (b"flag", b"first", b"second", b"with#hash")]
    assert None not in names
    assert len(set(names)) == 4
    assert not any(key in str(name) for name in names for key in ("flag", "first", "second"))


@pytest.mark.parametrize("wrong", [b"", b"#", b"keys of the team", b"firs", b"first ", b"of the nightly job", b"with"])
def test_all_else_is_no_key(file: Path, wrong: bytes) -> None:
    assert ApiKeys("flag", file).client(wrong) is None


def test_a_file_that_changes_is_read_again(file: Path) -> None:
    keys = ApiKeys(file=file)
    file.write_text("third-key-of-all\n")
    assert (keys.client(b"first"), bool(keys.client(b"third-key-of-all"))) == (None, True)


@pytest.mark.parametrize("spoil", [lambda file: file.write_text("# none\n"), os.unlink])
def test_a_file_that_is_spoilt_leaves_the_keys_as_they_are(file: Path, spoil: object) -> None:
    keys = ApiKeys(file=file)
    assert callable(spoil)
    spoil(file)
    assert keys.client(b"first")
    file.write_text("mended\n")
    assert (keys.client(b"first"), bool(keys.client(b"mended"))) == (None, True)


def test_a_file_without_keys_is_an_error_at_the_start(file: Path) -> None:
    file.write_text("\n# none\n")
    with pytest.raises(ConfigError, match=r"--api-key-file .* has no key"):
        ApiKeys(file=file)


@pytest.mark.parametrize("key", ["", " ", "key\n"])
def test_a_key_that_nobody_could_send_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        HttpSection(api_key=key)


def test_a_key_is_not_shown() -> None:
    assert "secret" not in repr(HttpSection(api_key="secret"))


def test_files_that_are_not_there_or_go_together_are_named(file: Path) -> None:
    with pytest.raises(ConfigError, match="--api-key-file /no/keys is not a file"):
        HttpSection(api_key_file=Path("/no/keys"))
    with pytest.raises(ConfigError, match="--tls-cert and --tls-key go together"):
        HttpSection(tls_cert=file)
