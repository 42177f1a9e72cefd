"""Makes the masks of structured answers beside the step loop: while the model computes the logits that they are for.

The step loop asks (`begin`) when it has a batch, the rank that samples takes them (`take`) once the model has run.
Compiling a grammar, which may take longer than a step, comes before its request is scheduled (`prepare`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from tandem.errors import InvalidRequest, RequestError
from tandem.grammar.compiler import GrammarCompiler
from tandem.grammar.matchers import Matchers
from tandem.scheduling.batch import Batch, Mask, RowError
from tandem.scheduling.scheduler import Scheduler
from tandem.wire.grammar import Grammar

log = logging.getLogger(__name__)

THREADS = 2


@dataclass(frozen=True, slots=True)
class Constrained:
    """A row whose next token a grammar constrains. `output`: the request's tokens so far, less the prompt."""

    request_id: str
    grammar: Grammar
    output: list[int]


class MaskMaker:
    """The step loop's side; all methods are for its thread.

    Args:
        load: makes the compiler, which takes the tokenizer; called in another thread, for the first grammar.
    """

    def __init__(self, load: Callable[[], GrammarCompiler]) -> None:
        self._load = load
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="masks")
        # Grammars are compiled one at a time, and never before the masks that a step waits for.
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._compiler: GrammarCompiler | None = None
        self._matchers: Matchers | None = None
        self._batches: dict[int, dict[str, Future[Mask]]] = {}

    def prepare(self, grammar: Grammar, done: Callable[[RequestError | None], None]) -> bool:
        """Return whether masks of this grammar can be made at once; else `done` is called later, in another thread."""
        if self._compiler is not None and self._compiler.knows(grammar):
            return True
        self._compiling.submit(self._prepare, grammar, done)
        return False

    def begin(self, batch_id: int, rows: list[Constrained]) -> None:
        """Start to make the masks of a batch."""
        if rows:
            self._batches[batch_id] = {row.request_id: self._threads.submit(self._mask, row) for row in rows}

    def take(self, batch_id: int) -> dict[str, Mask]:
        """Return the masks of a batch by request, when they are made."""
        return {request_id: future.result() for request_id, future in self._batches.pop(batch_id, {}).items()}

    def drop(self, batch_id: int) -> None:
        """Forget the masks of a batch that is done, if it had no use for them."""
        self._batches.pop(batch_id, None)

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that has ended."""
        if self._matchers is not None:
            self._matchers.forget(request_id)

    def close(self) -> None:
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _prepare(self, grammar: Grammar, done: Callable[[RequestError | None], None]) -> None:
        error: RequestError | None = None
        try:
            if self._compiler is None:
                compiler = self._load()
                self._matchers, self._compiler = Matchers(compiler), compiler
            self._compiler.matcher(grammar)
        except RequestError as problem:
            error = problem
        except Exception as problem:
            log.exception("a grammar could not be compiled")
            error = RequestError(f"the grammar could not be compiled: {type(problem).__name__}")
        done(error)

    def _mask(self, row: Constrained) -> Mask:
        try:
            if self._matchers is None:
                raise RequestError("no grammar has been compiled here")
            return self._matchers.mask(row.request_id, row.grammar, row.output)
        except InvalidRequest as error:
            return RowError(error.code, str(error))
        except BaseException as error:  # the library's panics are no Exception; they are this row's alone
            log.exception("request %s: its mask could not be made", row.request_id)
            return RowError(RequestError.code, f"the next token's mask could not be made: {type(error).__name__}")


def constrained_rows(batch: Batch, scheduler: Scheduler) -> list[Constrained]:
    """Return the rows of a batch that was just scheduled whose next token a grammar constrains."""
    found = []
    for row in batch.rows:
        request = scheduler.get(row.request_id) if row.sample is not None and row.sample.constrained else None
        if request is not None and request.grammar is not None:
            found.append(Constrained(row.request_id, request.grammar, request.tokens[request.prompt_len :]))
    return found
