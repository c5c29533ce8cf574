"""Groups of weights: the first match wins, every weight is taken once, and every mistake is explained."""

from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lfs_cli.config import ModelConfig, OptimizerGroup
from lfs_cli.errors import ConfigError
from lfs_cli.model import Transformer
from lfs_cli.optimizers import SGD, AdamW, build_optimizers

MODEL = ModelConfig(vocab_size=20, context_length=8, width=8, layers=2, heads=2, feed_forward_width=8)


def names_in(optimizer: torch.optim.Optimizer) -> list[str]:
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def test_the_first_match_takes_a_weight() -> None:
    model = Transformer(MODEL)
    groups = [
        OptimizerGroup(match="*norm.weight", name="sgd", lr=0.5, options={"momentum": 0.9}),
        OptimizerGroup(match="blocks.?.*.weight", name="sgd", lr=0.1),
        OptimizerGroup(lr=3e-4, options={"betas": [0.8, 0.9]}),
    ]

    norms, blocks, rest = build_optimizers(model, groups)

    assert [type(optimizer) for optimizer in (norms, blocks, rest)] == [SGD, SGD, AdamW]
    assert names_in(norms)[-1] == "norm.weight"
    assert len(names_in(norms)) == 5
    assert len(names_in(blocks)) == 14
    assert names_in(rest) == ["embedding.weight", "head.weight"]
    assert norms.param_groups[0]["momentum"] == 0.9
    assert rest.param_groups[0]["betas"] == (0.8, 0.9)
    assert [optimizer.param_groups[0]["peak_lr"] for optimizer in (norms, blocks, rest)] == [0.5, 0.1, 3e-4]
    assert [optimizer.param_groups[0]["lr"] for optimizer in (norms, blocks, rest)] == [0.5, 0.1, 3e-4]


@pytest.mark.parametrize(
    ("match", "taken"),
    [
        (("blocks.*.weight", "!*norm*"), 14),
        (("!*norm*", "blocks.*.weight"), 14),
        (("!blocks.*",), 3),
        (("embedding.*", "head.*"), 2),
        (("*", "!*.query.*", "!blocks.1.*", "!norm*"), 10),
    ],
    ids=str,
)
def test_several_patterns_take_what_one_matches_and_none_keeps_out(match, taken) -> None:
    groups = [OptimizerGroup(match=match), OptimizerGroup(lr=0.1)]

    first, rest = build_optimizers(Transformer(MODEL), groups)

    assert len(names_in(first)) == taken
    assert len(names_in(rest)) == 21 - taken


@settings(max_examples=25, deadline=None)
@given(patterns=st.permutations(["*.layers.0.*", "blocks.*", "*norm*", "head.*", "embedding.weight", "*"]))
def test_every_weight_is_taken_exactly_once_whatever_the_order(patterns) -> None:
    model = Transformer(MODEL)
    names, groups = [name for name, _ in model.named_parameters()], []
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        groups += [OptimizerGroup(match=pattern)] if matched else []
        names = [name for name in names if name not in matched]

    optimizers = build_optimizers(model, groups)

    taken = sorted(name for optimizer in optimizers for name in names_in(optimizer))
    assert taken == sorted(name for name, _ in model.named_parameters())


def test_a_frozen_weight_is_in_no_group_and_a_tied_one_in_one() -> None:
    model = Transformer(MODEL.model_copy(update={"tied_head": True}))
    model.norm.weight.requires_grad_(False)

    (optimizer,) = build_optimizers(model, [OptimizerGroup()])

    assert "norm.weight" not in names_in(optimizer)
    assert len(names_in(optimizer)) == len(set(names_in(optimizer))) == len(list(model.parameters())) - 1


@pytest.mark.parametrize(
    ("groups", "message", "hint"),
    [
        ([{"match": "block.*"}, {}], "`optimizer.0.match` (`block.*`) matches no weight", "`embedding.weight`"),
        (
            [{}, {"match": "norm*"}],
            "`optimizer.1.match` (`norm*`) matches only weights of earlier groups",
            "move it up",
        ),
        ([{"match": ["*", "!*"]}, {}], '`optimizer.0.match` (`["*", "!*"]`) matches no weight', "`embedding.weight`"),
        ([{"match": "blocks.*"}], "no optimizer group matches `embedding.weight`, `norm.weight`, `head.weight`", '"*"'),
        ([{"name": "adamv"}], "unknown optimizer `adamv`", "`adamw`"),
        ([{"options": {"beta": 1}}], "optimizer `adamw` has no option `beta`", "`betas`"),
        ([{"options": {"betas": [0.9]}}], "optimizer `adamw` cannot use its settings", "`optimizer.0.options`"),
        ([{"options": {"betas": 0.9}}], "`optimizer.0.options.betas` must be a list of numbers", "`[0.9, 0.95]`"),
        ([{"options": {"eps": True}}], "`optimizer.0.options.eps` must be a number, not `true`", "`1e-08`"),
        ([{"name": "sgd", "options": {"nesterov": "yes"}}], 'must be true or false, not `"yes"`', "`false`"),
        ([{"options": {"lr": 0.1}}], "optimizer `adamw` cannot use its settings", "`optimizer.0.options`"),
        ([{"options": {"eps": -1.0}}], "`eps` must not be negative", "`optimizer.0.options`"),
        ([{"options": {"eps": "small"}}], '`optimizer.0.options.eps` must be a number, not `"small"`', "`1e-08`"),
        ([{"options": {"params": []}}], "optimizer `adamw` has no option `params`", "choose one of"),
    ],
    ids=str,
)
def test_a_mistake_is_explained(groups, message, hint) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizers(Transformer(MODEL), [OptimizerGroup(**group) for group in groups])

    assert message in str(caught.value)
    assert hint in caught.value.hint


def test_a_model_without_weights_is_explained() -> None:
    with pytest.raises(ConfigError, match="matches no weight"):
        build_optimizers(nn.Identity(), [OptimizerGroup()])
