"""BasicSR's SRModel with a pass of the teacher, as a baseline of logits distillation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdsr.models.kd_model import KDModel
from kdsr.tools.srmodel_step import SRModelStep, problem
from small_runs import complete

Options = dict[str, Any]


@pytest.fixture
def logits_options(teacher_options: Options) -> Options:
    teacher_options["train"].update(logits_opt={"type": "L1Loss"}, pixel_opt=None)
    return complete(teacher_options)


def test_it_does_the_work_of_the_step(logits_options: Options) -> None:
    """Where the ground truth is the teacher's output, both end in the same weights."""
    assert problem(logits_options) is None
    torch.manual_seed(0)
    model = KDModel(logits_options)
    baseline = SRModelStep(model)
    baseline.stock.net_g.load_state_dict(model.net_g.state_dict())
    baseline.stock.model_ema(0)
    passes: list[int] = []
    baseline.teacher.register_forward_hook(lambda *_: passes.append(1))
    lq = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = {"lq": lq, "gt": model.net_t(lq).detach()}
    passes.clear()
    for iteration in (1, 2):
        for side in (model, baseline):
            side.feed_data(batch)
            side.optimize_parameters(iteration)
    assert len(passes) == 4
    for name in ("net_g", "net_g_ema"):
        ours, theirs = getattr(model, name).state_dict(), getattr(baseline.stock, name).state_dict()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=1e-8)
    assert float(baseline.log_dict["l_pix"]) == pytest.approx(model.get_current_log()["l_ts"])


def test_options_without_such_a_step(logits_options: Options) -> None:
    train = logits_options["train"]
    assert "needs one teacher" in str(problem(logits_options | {"network_t": [logits_options["network_t"]]}))
    assert "add --force_yml train:lcr_opt=null" in str(
        problem({**logits_options, "train": {**train, "lcr_opt": {"type": "L1Loss"}}})
    )
    optimizer = {**train["optim_g"], "type": "SGD"}
    assert "has Adam alone" in str(problem({**logits_options, "train": {**train, "optim_g": optimizer}}))
