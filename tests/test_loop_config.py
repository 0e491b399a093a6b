"""Learner and loop from configuration files."""

from __future__ import annotations

from argparse import ArgumentError
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_metaopt as lmo

CONFIG = """
loop:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  gradient_clip_val: 0.5
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {every_n_train_steps: 1, dirpath: DIRECTORY}
learner:
  rule: {class_path: lightning_metaopt.rules.HeavyBall, init_args: {lr: 0.005}}
  family: {class_path: lightning_metaopt.tasks.LeastSquares, init_args: {dim: 3, rows: 5}}
  metagrad: {class_path: lightning_metaopt.ZerothOrder, init_args: {steps: 2, pairs: 2, persistent: true}}
  objective: mean
  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.001}}
  scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 2}}
  tasks: 4
  pool: 8
  horizon: 4
"""


def parser() -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(lmo.MetaLoop, "loop")
    made.add_class_arguments(lmo.MetaLearner, "learner")
    return made


def test_any_trainer_argument_and_every_part_of_a_learner(tmp_path: Path) -> None:
    made = parser()
    configuration = made.parse_string(CONFIG.replace("DIRECTORY", str(tmp_path)))
    ready = made.instantiate_classes(configuration)
    loop, learner = ready.loop, ready.learner
    assert isinstance(loop, lmo.MetaLoop)
    rule = loop.fit(learner)
    assert isinstance(rule, lmo.rules.HeavyBall)
    assert loop.trainer is not None
    assert loop.trainer.gradient_clip_val == 0.5
    assert isinstance(loop.trainer.checkpoint_callback, ModelCheckpoint)
    assert len(list(tmp_path.glob("*.ckpt"))) == 1
    assert loop.trainer.global_step == 4
    (optimizer,) = loop.trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)  # the schedule ran


ARGUMENTS = ["--learner.rule=lightning_metaopt.rules.GradientDescent", "--learner.family=lightning_metaopt.tasks.LeastSquares"]


def test_the_default_optimizer_and_overrides() -> None:
    made = parser()
    configuration = made.parse_args([*ARGUMENTS, "--loop.max_steps=3", "--learner.tasks=2", "--loop.precision=bf16-mixed"])
    ready = made.instantiate_classes(configuration)
    assert ready.learner.tasks == 2
    optimizer = ready.learner.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_unknown_keys_are_rejected() -> None:
    with pytest.raises(ArgumentError, match="max_epochz"):
        parser().parse_args([*ARGUMENTS, "--loop.max_epochz=3"])


def test_a_loop_from_a_configuration_needs_an_end() -> None:
    made = parser()
    configuration = made.parse_args(ARGUMENTS)
    with pytest.raises(ValueError, match="say when meta-training ends"):
        made.instantiate_classes(configuration)
