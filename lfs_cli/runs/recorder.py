"""The records of a run as it goes: numbers on the device become lines of the journal, one step behind."""

import time
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from lfs_cli.config import TrainConfig
from lfs_cli.runs.folder import RunFolder
from lfs_cli.runs.journal import Journal, Samples
from lfs_cli.runs.observer import Observer
from lfs_cli.runs.progress import Progress, batch_of
from lfs_cli.training.anomaly import AnomalyError, Watch
from lfs_cli.training.cost import flops_per_token, memory_bytes, peak_flops
from lfs_cli.training.evaluate import Evaluation
from lfs_cli.training.step import Readback, StepRecord

RECENT_STEPS = 20
"""Steps over which the speed is averaged."""

RISE = 1.01
"""Times its lowest value at which a validation loss has risen: less is the noise of evaluations."""


class Recorder:
    """Turns numbers on the device into records, and keeps the run's time and `Progress`.

    Numbers of a GPU are read one step behind, so that it never runs dry; but not where the policy is to skip updates,
    which cannot be decided without them.

    Args:
        config: The experiment.
        run: Where the records go. Those after the last step of ``progress`` are dropped first.
        progress: What the run knows of itself; kept up to date here.
        observer: Is told about each record.
        device: Where the numbers come from.
    """

    def __init__(
        self, config: TrainConfig, run: RunFolder, progress: Progress, observer: Observer, device: torch.device
    ) -> None:
        self.config, self.progress, self.observer, self.device = config, progress, observer, device
        self.asks_first = device.type == "cpu" or config.anomaly.policy == "skip"
        self._journal, self._samples = Journal(run.metrics), Samples(run.samples)
        anomaly = config.anomaly
        self._watch = Watch(
            spike=anomaly.spike,
            window=anomaly.window,
            grace=anomaly.grace,
            losses=progress.losses,
            norms=progress.norms,
        )
        self._flops = flops_per_token(config.model)
        self._peak = peak_flops(device)
        self._pending: tuple[int, float, Readback] | None = None
        # The first step compiles. A GPU may work off the second one while the host still compiles, and it ends at once
        self._cold_steps = 1 if device.type == "cpu" else 2
        self._last_evaluation: Evaluation | None = None
        self._lap = time.perf_counter()
        self.go_back()

    def go_back(self) -> None:
        """Forget the records after the last step of the progress, and the step that is under way."""
        self._pending = None
        self._samples.trim(self.progress.step)
        kept = self._journal.trim(self.progress.step)
        rollbacks = [record for record in kept if record.get("action") == "rollback"]
        left_out = {record["batch"] for record in rollbacks}
        self.progress.skipped[:] = sorted(left_out.union(self.progress.skipped))
        self._returns = [record["step"] for record in rollbacks]
        for record in kept:
            if record.get("kind") == "microbatch":
                self.progress.microbatch = {name: record.get(name) for name in ("asked", "rows")}

    def returns(self, step: int) -> int:
        """Return how often the run went back to the checkpoint of ``step``."""
        return self._returns.count(step)

    def accept(self, step: int, loss: float, norm: float) -> bool:
        """Whether the numbers of ``step`` are good enough for its update to be applied."""
        return self._watch.judge(step, loss, norm) is None

    def seconds(self) -> float:
        """Return the seconds of training up to the step that starts now, estimated where one is under way."""
        under_way = self.progress.recent[-1] if self._pending and self.progress.recent else 0.0
        return self.progress.seconds + under_way

    def start_clock(self) -> None:
        """Leave out of the training time what has passed since the last record, unless a step is under way."""
        if self._pending is None:
            self._lap = time.perf_counter()

    def take(self, step: int, lr: float, numbers: Tensor) -> None:
        """Note that ``step`` is under way with its loss and norm in ``numbers``, and record the one before it.

        Raises:
            AnomalyError: When the numbers of a step are wrong and the policy is not to skip it.
        """
        readback = Readback(numbers)
        self.settle()
        self._pending = (step, lr, readback)
        if self.asks_first or not numbers.is_cuda:  # the numbers are here already
            self.settle()

    def settle(self) -> None:
        """Record the step that is under way, if one is. Raises AnomalyError as `take` does."""
        if self._pending is None:
            return
        (step, lr, readback), self._pending = self._pending, None
        loss, norm = readback.read()
        wrong = self._watch.judge(step, loss, norm)
        if wrong and self.config.anomaly.policy != "skip":
            raise AnomalyError(step, wrong)
        self._tick()
        self.progress.step = step
        if wrong:
            self._skip(step, wrong)
            return
        self._watch.remember(loss, norm)
        self.progress.loss = loss
        self.progress.passed = 0
        recent, progress = self.progress.recent, self.progress
        laps, seconds = (len(recent), sum(recent)) if recent else (progress.cold_steps, progress.cold_seconds)
        rate = self.config.batch_tokens * laps / seconds
        record = StepRecord(
            step=step,
            loss=loss,
            lr=lr,
            gradient_norm=norm,
            tokens=step * self.config.batch_tokens,
            seconds=self.progress.seconds,
            tokens_per_second=rate,
            mfu=rate * self._flops / self._peak if self._peak else None,
            memory_bytes=memory_bytes(self.device),
        )
        self._journal.append(record.line())
        self.observer.step(record)

    def evaluated(self, found: Evaluation) -> None:
        """Record an evaluation. Raises AnomalyError when its loss is not a number."""
        if not isfinite(found.loss):
            raise AnomalyError(found.step, "validation loss is not a number")
        self._journal.append(found.line())
        self._last_evaluation = found
        self.progress.evaluated = found.step
        if not self.progress.best or found.loss < self.progress.best["loss"]:
            self.progress.best = found.line()
        self.observer.evaluation(found)

    def tell_of_a_rise(self, text_tokens: int) -> None:
        """Warn when the validation loss has risen since its lowest, most often as the model learns its text by heart.

        Args:
            text_tokens: Tokens of the training text.

        Source: Muennighoff et al., "Scaling Data-Constrained Language Models", 2023 (arXiv:2305.16264): up to about
        four readings are worth nearly as much as new text.
        """
        best, last = self.progress.best, self._last_evaluation
        if last is None or not best or last.loss < RISE * best["loss"]:
            return
        times = self.progress.step * self.config.batch_tokens / text_tokens
        more_steps = self.config.model_copy(update={"steps": 2 * self.config.steps})
        is_cut = more_steps.steps_for(text_tokens) == self.config.steps
        less = "a lower `max_epochs`" if is_cut else "fewer steps"
        advice = f"{less}, or more text, would have done better" if times > 1 else "try a lower learning rate"
        self.observer.warning(
            f"validation loss was lowest after step {best['step']:,} ({best['loss']:.4f}) and rose to {last.loss:.4f}; "
            f"the run read its text {times:,.1f} times: {advice}"
        )

    def wrote(self, text: str) -> None:
        """Keep what the model wrote after the step recorded last."""
        if text:
            self.progress.sample = text
            self._samples.append(self.progress.step, text)
            self.observer.sample(self.progress.step, text)

    def went_back(self, anomaly: AnomalyError, batch: int) -> None:
        """Record that ``anomaly`` made the run go back to where the progress is now, and leave out ``batch``.

        The record belongs to the step that the run went back to. So a run that is killed before its next checkpoint
        finds it, and leaves the batch out from the start.
        """
        self._note(anomaly.what, "rollback", batch, anomaly.step)
        self.progress.skipped[:] = sorted({*self.progress.skipped, batch})
        self._returns.append(self.progress.step)
        self.observer.warning(
            f"{anomaly}: back to the checkpoint of step {self.progress.step:,}, and on without batch {batch:,}"
        )

    def microbatch(self, rows: int, why: str) -> None:
        """Record that so many sequences go through the model at once after the last step, and ``why``.

        The record belongs to that step. So a run that is killed before its next checkpoint finds it, and goes on as if
        it had not been.

        Raises:
            AnomalyError: As `settle` does.
        """
        self.settle()
        self.progress.microbatch = {"asked": self.config.microbatch, "rows": rows}
        record = {"kind": "microbatch", "step": self.progress.step, **self.progress.microbatch, "why": why}
        self._journal.append(record)

    def ran_out(self, rows: int) -> None:
        """Record that memory ran out in the step or evaluation under way, and that it is tried with ``rows`` at once.

        Raises:
            AnomalyError: As `settle` does.
        """
        self.microbatch(rows, "out of memory")
        self.observer.warning(
            f"out of memory after step {self.progress.step:,}: from here on {rows:,} of {self.config.batch_size:,} "
            "sequences at once, which changes nothing but rounding"
        )

    def _skip(self, step: int, wrong: str) -> None:
        self.progress.passed += 1
        if self.progress.passed > self.config.anomaly.repeats:
            raise AnomalyError(step, f"{wrong}, {self.progress.passed} times in a row,")
        self._note(wrong, "skip", batch_of(step, self.progress.skipped), step)
        self.observer.warning(f"{wrong} at step {step:,}: its update is not applied")

    def _note(self, what: str, action: str, batch: int, at: int) -> None:
        record: dict[str, Any] = {"kind": "anomaly", "step": self.progress.step, "what": what, "action": action}
        self._journal.append({**record, "batch": batch, "at": at})

    def _tick(self) -> None:
        """Add the time since the last step to the run's."""
        now = time.perf_counter()
        seconds, self._lap = now - self._lap, now
        self.progress.seconds += seconds
        if not self._cold_steps:
            self.progress.recent[:] = [*self.progress.recent[1 - RECENT_STEPS :], seconds]
            self.progress.warm_steps += 1
            self.progress.warm_seconds += seconds
        else:
            self.progress.cold_steps += 1
            self.progress.cold_seconds += seconds
            self._cold_steps -= 1
