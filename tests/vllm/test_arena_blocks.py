from __future__ import annotations

from tandem.vllm.arena_blocks import ArenaBlocks


def test_exports_leave_room_for_imports() -> None:
    arena = ArenaBlocks(8, 32, 0.5)
    assert arena.for_export(5) is None
    assert arena.for_export(4) is not None
    assert arena.for_export(1) is None
    assert arena.max_import == 4
    assert arena.for_import(arena.max_import) is not None
    assert arena.for_import(1) is None


def test_blocks_wait_for_the_step_that_copies_them() -> None:
    arena = ArenaBlocks(4, 32, 1.0)
    taken = arena.for_export(4)
    assert taken is not None
    arena.free(taken, after=2, exported=True)
    arena.step_done(1)
    assert arena.available == 0
    arena.step_done(2)
    assert arena.available == 4
    assert arena.for_export(4) is not None


def test_a_step_that_is_done_already_holds_nothing_back() -> None:
    arena = ArenaBlocks(4, 32, 0.0)
    arena.step_done(7)
    taken = arena.for_import(3)
    assert taken is not None
    arena.free(taken, after=7)
    assert arena.available == 4
