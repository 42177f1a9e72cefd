"""A digest is remembered for a file that has not changed, and for no other; the cache is never in the way."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tandem.checkpoint import digest_cache as module
from tandem.checkpoint.digest_cache import SETTLED_NS, DigestCache, FileState, default_folder
from tandem.checkpoint.fingerprint import file_digest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "weights"
    made.write_bytes(b"weights")
    return made


@pytest.fixture
def cache(tmp_path: Path) -> DigestCache:
    return DigestCache(tmp_path / "cache" / "digests")


def put(cache: DigestCache, file: Path, digest: str = "d") -> None:
    """As if it had been read long after it was written."""
    state = FileState.of(file)
    cache.put(state, digest, max(state.mtime_ns, state.ctime_ns) + SETTLED_NS)


def test_what_was_read_is_remembered_also_by_another_process(cache: DigestCache, file: Path, tmp_path: Path) -> None:
    put(cache, file)
    assert DigestCache(tmp_path / "cache" / "digests").get(FileState.of(file)) == "d"
    assert file_digest(file, cache) == "d"


def test_a_file_that_has_changed_in_any_way_is_read_again(cache: DigestCache, file: Path) -> None:
    for change in (
        lambda: file.write_bytes(b"WEIGHTS"),
        lambda: file.write_bytes(b"weights and more"),
        lambda: file.rename(file.with_name("old")) and file.write_bytes(b"weights"),
        lambda: os.utime(file, ns=(1, 1)),
    ):
        put(cache, file)
        change()
        assert cache.get(FileState.of(file)) is None


def test_a_file_whose_time_was_set_back_is_read_again(cache: DigestCache, file: Path) -> None:
    before = file.stat()
    put(cache, file)
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert FileState.of(file).mtime_ns == before.st_mtime_ns
    assert cache.get(FileState.of(file)) is None


@pytest.mark.parametrize(("age", "remembered"), [(SETTLED_NS - 1, False), (SETTLED_NS, True)])
def test_a_file_that_was_written_just_now_is_not_remembered(
    cache: DigestCache, file: Path, age: int, remembered: bool
) -> None:
    state = FileState.of(file)
    cache.put(state, "d", max(state.mtime_ns, state.ctime_ns) + age)
    assert (cache.get(state) is not None) == remembered


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"state": 1, "digest": "d"}'])
def test_an_entry_that_is_damaged_is_no_entry(cache: DigestCache, file: Path, tmp_path: Path, content: bytes) -> None:
    put(cache, file)
    [entry] = (tmp_path / "cache" / "digests").glob("*.json")
    entry.write_bytes(content)
    assert cache.get(FileState.of(file)) is None
    put(cache, file)
    assert cache.get(FileState.of(file)) == "d"


def test_a_cache_that_cannot_be_written_is_passed_over(file: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    cache = DigestCache(tmp_path / "taken" / "digests")
    put(cache, file)
    assert cache.get(FileState.of(file)) is None
    assert len(file_digest(file, cache)) == 64


def test_the_cache_is_bounded_and_the_newest_stay(
    cache: DigestCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ENTRIES", 4)
    files = [tmp_path / f"{number}" for number in range(20)]
    for number, file in enumerate(files):
        file.write_bytes(b"")
        put(cache, file)
        for entry in (tmp_path / "cache" / "digests").glob("*.json"):
            if number and entry.stat().st_mtime_ns > 10**12:
                os.utime(entry, ns=(number, number))
    assert len(list((tmp_path / "cache" / "digests").iterdir())) <= 8
    assert cache.get(FileState.of(files[-1])) == "d"


def test_writers_at_once_leave_whole_entries(cache: DigestCache, file: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: put(cache, file, str(number)), range(200)))
    assert cache.get(FileState.of(file)) in {str(number) for number in range(200)}
    assert [entry.name for entry in (tmp_path / "cache" / "digests").iterdir() if entry.name.startswith("new-")] == []


def test_one_process_reads_a_file_while_others_wait(cache: DigestCache, file: Path) -> None:
    state, inside, waiting = FileState.of(file), [], threading.Barrier(2)

    def read() -> None:
        waiting.wait(10)
        with cache.reading(state):
            inside.append("second")

    thread = threading.Thread(target=read)
    thread.start()
    with cache.reading(state):
        waiting.wait(10)
        inside.append("first")
    thread.join(10)
    assert inside == ["first", "second"]


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/tandem/digests")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/u")
    assert default_folder() == Path("/home/u/.cache/tandem/digests")
