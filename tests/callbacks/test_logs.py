"""What callbacks measure reaches the loggers at the right steps, and costs later steps nothing."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from step_cases import PACKAGES, fit, module, sgd

from lightning_metaopt.callbacks import OptimisticMetaGrad


@pytest.mark.parametrize("package", PACKAGES)
def test_values_reach_loggers_beside_what_the_module_logs(package: str, tmp_path: Path) -> None:
    CSVLogger = pytest.importorskip(f"{package}.loggers").CSVLogger
    net = module(sgd(), package=package)
    plain = net.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        loss = plain(batch, batch_idx)
        net.log("loss", loss)
        return loss

    net.training_step = training_step
    logger = CSVLogger(tmp_path, name="", version="")
    callback = OptimisticMetaGrad(scope="optimizer")
    trainer = fit(net, callback, package=package, logger=logger, log_every_n_steps=5)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    key = "OptimisticMetaGrad/factor"
    assert [row["step"] for row in rows if row[key]] == [row["step"] for row in rows if row["loss"]] == ["4", "9"]
    assert float([row[key] for row in rows if row[key]][-1]) == pytest.approx(float(trainer.logged_metrics[key]))
    assert float(trainer.callback_metrics[key]) == float(trainer.logged_metrics[key])
