"""What a command's body tells whoever watches it. The body prints nothing; the command line overrides these methods."""

from typing import Any


class Observer:
    """Watches a command at work. This one looks away; `cli.console` has one that shows what it sees."""

    def stage(self, text: str) -> None:
        """A new part of the work begins, such as `learning 10,000 tokens on tinystories`."""

    def progress(self, label: str, done: int, total: int, unit: str = "B") -> None:
        """``done`` of ``total`` units of the part ``label`` are ready. Called often; a new label is a new bar."""

    def finish_progress(self) -> None:
        """The bar shown last is complete, or no longer of interest."""

    def warning(self, text: str) -> None:
        """Something that the user should know and can act on."""

    def bounded(self, steps: int) -> None:
        """The run will do ``steps`` at most, fewer than its config has: its text is short."""

    def step(self, record: Any) -> None:
        """A training step is done (`training.step.StepRecord`)."""

    def evaluation(self, record: Any) -> None:
        """The model was evaluated (`training.evaluate.Evaluation`)."""

    def sample(self, step: int, text: str) -> None:
        """The model wrote ``text`` after ``step`` steps."""
