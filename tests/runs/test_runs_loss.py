"""The loss of a run: what the z-loss is added to, and what it leaves alone."""

import json
from typing import Any

import pytest
import torch
from tiny_run import Train, folder_of, tiny

from lfs_cli.model import Transformer, cross_entropy
from lfs_cli.runs.folder import RunFolder
from lfs_cli.runs.setup import training_loss

CPU = torch.device("cpu")
TEXT = torch.arange(34).view(2, 17)
BATCH = TEXT[:, :-1], TEXT[:, 1:]


def build(**changes: Any) -> tuple[Transformer, Any]:
    """Return a model and the loss that it is trained on."""
    torch.manual_seed(0)
    config = tiny(**changes)
    model = Transformer(config.model)
    return model, training_loss(model, config, CPU, torch.float32)


def records(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_the_z_loss_is_added_in_training_and_never_in_evaluation() -> None:
    model, loss = build(model__z_loss=0.1)
    logits = model(BATCH[0])
    entropy = cross_entropy(logits, BATCH[1])

    torch.testing.assert_close(loss(*BATCH), entropy + 0.1 * logits.logsumexp(-1).square().mean())
    model.eval()
    assert torch.equal(loss(*BATCH), build()[1](*BATCH))


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # torch's own, in 2.13
def test_a_compiled_loss_tells_training_from_evaluation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend="aot_eager"))
    torch._dynamo.reset()
    (model, loss), plain = build(model__z_loss=0.1, compile=True), build(model__z_loss=0.1)
    for is_training in (True, False, True):
        model.train(is_training)
        plain[0].train(is_training)
        with torch.no_grad():
            torch.testing.assert_close(loss(*BATCH), plain[1](*BATCH))


def test_without_it_losses_and_gradients_keep_their_bits() -> None:
    found = []
    for changes in ({}, {"model__z_loss": 0.0}):
        model, loss = build(**changes)
        (value := loss(*BATCH)).backward()
        found.append([value, *(weight.grad for weight in model.parameters())])
    model, _ = build()
    entropy = cross_entropy(model(BATCH[0]), BATCH[1])

    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    torch.testing.assert_close(found[0][0], entropy)


def test_a_run_shows_it_in_its_training_loss_alone(train_tiny: Train) -> None:
    still = {"optimizer__0__lr": 0.0, "steps": 2}  # the weights stay as they were drawn
    plain, with_it = (folder_of(train_tiny(tiny(**still, model__z_loss=weight))) for weight in (0.0, 0.1))

    for one, other in zip(records(plain, "evaluation"), records(with_it, "evaluation"), strict=True):
        assert (one["loss"], one["bits_per_byte"]) == (other["loss"], other["bits_per_byte"])
    for one, other in zip(records(plain, "step"), records(with_it, "step"), strict=True):
        assert other["loss"] > one["loss"] + 1
