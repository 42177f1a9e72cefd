from __future__ import annotations

import stat
from pathlib import Path

import pytest

from tandem.errors import ConfigError
from tandem.wire.keys import ClusterKey, load_key, new_key, new_key_file, parse_key


def test_a_new_key_file_is_for_its_owner_alone_and_holds_the_key(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    key = new_key_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_key(path) == key
    assert path.read_text().count("\n") == 1


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not overwritten"):
        new_key_file(path)
    assert path.read_text() == "precious"


def test_a_key_file_that_every_user_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    new_key_file(path)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_key(path)
    path.chmod(0o440)
    assert load_key(path) is not None


def test_no_file_is_no_key() -> None:
    assert load_key(None) is None


def test_a_missing_file_and_a_folder_are_config_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_key(path)
    with pytest.raises(ConfigError, match="cannot be written"):
        new_key_file(tmp_path / "no" / "folder")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tandem-cluster-key-v1",
        "tandem-cluster-key-v1 c2hvcnQ=",
        "tandem-cluster-key-v1 not*base64",
        "tandem-cluster-key-v2 " + "A" * 43 + "=",
        "tandem-cluster-key-v1 \N{SNOWMAN}",
        "one two three",
    ],
)
def test_text_that_is_no_key_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ConfigError, match=r"TANDEM_KEY does not hold a cluster key") as caught:
        parse_key(text, "TANDEM_KEY")
    assert text == "" or text not in str(caught.value)


def test_a_key_survives_being_written_as_text() -> None:
    key = new_key()
    assert parse_key(f"  {key.text}\n", "here") == key


def test_a_key_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="32 bytes"):
        ClusterKey(b"short")


def test_keys_do_not_show_their_secret() -> None:
    key = new_key()
    shown = repr(key) + repr(key.server) + repr(key.client)
    assert key.secret.hex() not in shown
    assert repr(key.secret) not in shown
    assert repr(key.server.secret) not in shown


def test_both_sides_derive_the_same_curve_keys_and_other_keys_give_others() -> None:
    one, other = new_key(), new_key()
    assert ClusterKey(one.secret).server == one.server
    assert len({one.server.public, one.client.public, other.server.public, other.client.public}) == 4
