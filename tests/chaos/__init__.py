"""Break a real cluster under load and judge every answer: `python -m tests.chaos --rounds 20 --seed 1`."""
