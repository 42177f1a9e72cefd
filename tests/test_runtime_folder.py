"""A command's folder is its own as long as it lives, and the next command removes it if nobody has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tandem.runtime_folder import make_folder, remove_abandoned

OWNER = """
import sys, time
from pathlib import Path
from tandem.runtime_folder import make_folder
print(make_folder(Path(sys.argv[1])), flush=True)
time.sleep(600)
"""


def test_a_folder_of_a_living_owner_stays_and_that_of_a_killed_one_goes(tmp_path: Path) -> None:
    own = make_folder(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        (folder / "listener").touch()
        remove_abandoned(tmp_path)
        assert folder.is_dir()
        owner.kill()
    remove_abandoned(tmp_path)
    assert not folder.exists()
    assert own.is_dir()


def test_only_its_user_may_enter_it(tmp_path: Path) -> None:
    assert make_folder(tmp_path).stat().st_mode & 0o777 == 0o700


def test_what_has_no_owners_file_is_not_ours_to_remove(tmp_path: Path) -> None:
    other = tmp_path / "tandem-notes"
    other.mkdir()
    remove_abandoned(tmp_path)
    assert other.is_dir()
