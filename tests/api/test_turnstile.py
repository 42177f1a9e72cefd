import asyncio

from tandem.api.turnstile import Turnstile


def test_callers_pass_in_order_and_so_many_in_a_round() -> None:
    async def run() -> list[list[int]]:
        turnstile = Turnstile(2)
        rounds: list[list[int]] = []
        passed: list[int] = []

        async def one(number: int) -> None:
            await turnstile.wait()
            passed.append(number)

        tasks = [asyncio.create_task(one(number)) for number in range(7)]
        while not all(task.done() for task in tasks):
            before = len(passed)
            await asyncio.sleep(0)
            rounds.append(passed[before:])
        assert passed == list(range(7))
        return rounds

    assert max(map(len, asyncio.run(run()))) == 2


def test_one_that_is_cancelled_takes_no_turn_and_later_ones_pass() -> None:
    async def run() -> None:
        turnstile = Turnstile(1)
        await turnstile.wait()
        cancelled, last = (asyncio.create_task(turnstile.wait()) for _ in range(2))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait_for(last, 10)
        await asyncio.wait_for(turnstile.wait(), 10)

    asyncio.run(run())
