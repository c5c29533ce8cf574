"""Optimizers and what goes with them: groups of weights, learning-rate schedules, gradient clipping."""

from lfs_cli.optimizers.adafactor import Adafactor
from lfs_cli.optimizers.adamw import AdamW
from lfs_cli.optimizers.base import OPTIMIZERS, Group, Optimizer, Params, State
from lfs_cli.optimizers.clip import clip_gradients, clip_scale, step_scaled
from lfs_cli.optimizers.groups import build_optimizers
from lfs_cli.optimizers.lion import Lion
from lfs_cli.optimizers.muon import Muon
from lfs_cli.optimizers.schedules import SCHEDULES, build_schedule, cosine_schedule
from lfs_cli.optimizers.sgd import SGD

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "SGD",
    "Adafactor",
    "AdamW",
    "Group",
    "Lion",
    "Muon",
    "Optimizer",
    "Params",
    "State",
    "build_optimizers",
    "build_schedule",
    "clip_gradients",
    "clip_scale",
    "cosine_schedule",
    "step_scaled",
]
