from pathlib import Path

import pytest

from tandem import model_folder
from tandem.errors import ConfigError
from tandem.model_folder import find_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = tmp_path / "models" / "tiny"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return made


def test_a_folder_is_called_by_its_last_part_as_it_was_typed_and_by_its_path(folder: Path) -> None:
    found = find_model("models/tiny/")
    assert (found.path, found.name) == (str(folder), "tiny")
    assert found.aliases == ("models/tiny/", str(folder))


def test_served_names_come_first_and_take_no_other_name_away(folder: Path) -> None:
    found = find_model(str(folder), ("gpt", "best", "gpt"))
    assert (found.name, found.aliases) == ("gpt", ("best", "tiny", str(folder)))


def test_a_model_of_the_hub_is_called_by_its_name_and_the_last_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "_fetch", lambda name: f"/cache/{name}")
    found = find_model("Qwen/Qwen3-0.6B")
    assert (found.path, found.name, found.aliases) == ("/cache/Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", ("Qwen3-0.6B",))


@pytest.mark.parametrize("wrong", ["./nothing", "/nothing", "a/b/c", "plain"])
def test_what_is_neither_a_folder_nor_a_name_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="neither"):
        find_model(wrong)
