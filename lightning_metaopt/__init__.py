"""Learned optimizers and meta-learning for PyTorch Lightning."""

from lightning_metaopt import analysis, baselines, episode, metagrads, objectives, rules, tasks
from lightning_metaopt.adaptation import Adaptation, adapt
from lightning_metaopt.callbacks import (
    Curriculum,
    EvaluationWeights,
    GPCMetaOpt,
    HypergradientDescent,
    OptimisticMetaGrad,
    SwapOptimizer,
)
from lightning_metaopt.loop import MetaLearner, MetaLoop
from lightning_metaopt.metagrads import (
    Adapted,
    Counterfactual,
    Estimate,
    ForwardMode,
    Implicit,
    MetaGradient,
    Unrolled,
    ZerothOrder,
)
from lightning_metaopt.online import OptimisticFTRL
from lightning_metaopt.optimizer import LearnedOptimizer
from lightning_metaopt.rule import Rule
from lightning_metaopt.storage import load_rule, save_rule
from lightning_metaopt.task import Task, TaskFamily

__all__ = [
    "Adaptation",
    "Adapted",
    "Counterfactual",
    "Curriculum",
    "Estimate",
    "EvaluationWeights",
    "ForwardMode",
    "GPCMetaOpt",
    "HypergradientDescent",
    "Implicit",
    "LearnedOptimizer",
    "MetaGradient",
    "MetaLearner",
    "MetaLoop",
    "OptimisticFTRL",
    "OptimisticMetaGrad",
    "Rule",
    "SwapOptimizer",
    "Task",
    "TaskFamily",
    "Unrolled",
    "ZerothOrder",
    "adapt",
    "analysis",
    "baselines",
    "episode",
    "load_rule",
    "metagrads",
    "objectives",
    "rules",
    "save_rule",
    "tasks",
]
