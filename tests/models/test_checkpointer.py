"""A method with a trainable adapter and negatives from every rank: one module for DDP, all of it in the state."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

import ranks
from faults.lives import differences
from kdsr.models.kd_model import KDModel
from kdsr.runtime.distributed import gather_batches
from small_runs import after_steps

STOP_AT = 4


class _Bundle(nn.Module):
    """The student with an adapter on its first features, as a feature loss needs it."""

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.student = student
        self.adapter = nn.Conv2d(8, 12, 1)

    def forward(self, lq: Tensor) -> Tensor:
        self.adapted = self.adapter(self.student.conv_first(lq))
        return self.student(lq)


class AdapterModel(KDModel):
    """Logits, a feature loss through an adapter, and a contrast with the teacher's features of all ranks."""

    def trained_module(self) -> nn.Module:
        self.student_and_adapter = _Bundle(self.net_g).to(self.device)
        return self.student_and_adapter

    def compute_losses(self, current_iter: int) -> dict[str, Tensor]:
        losses = super().compute_losses(current_iter)
        adapted = self.student_and_adapter.adapted
        with torch.no_grad():
            assert self.net_t is not None
            teacher_feature = self.net_t.conv_first(self.lq)  # type: ignore[operator]
        negatives = gather_batches(teacher_feature)
        assert len(negatives) == len(teacher_feature) * self.opt["world_size"]
        losses["l_feat"] = (adapted - teacher_feature).abs().mean()
        losses["l_far"] = -0.01 * (adapted.unsqueeze(1) - negatives).abs().mean()
        return losses

    def state_networks(self) -> dict[str, nn.Module]:
        return {**super().state_networks(), "adapter": self.student_and_adapter.adapter}


def prepare(rank: int) -> None:
    MODEL_REGISTRY.register(AdapterModel)


def prepare_and_stop(rank: int) -> None:
    prepare(rank)

    def stop(model: Any, current_iter: int) -> None:
        if rank == 1 and current_iter == STOP_AT and Path("experiments").exists():
            os.kill(os.getpid(), signal.SIGUSR2)

    after_steps(stop)


@pytest.mark.slow
def test_student_and_adapter_are_trained_saved_and_resumed_together(
    run_options: dict[str, Any], tmp_path: Path
) -> None:
    """Two processes, without find_unused_parameters, stopped and started again: the same bits."""
    from basicsr.archs import build_network

    teacher = {**run_options["network_g"], "num_feat": 12}
    torch.manual_seed(7)
    torch.save({"params": build_network(teacher).state_dict()}, tmp_path / "teacher.pth")
    run_options.update(model_type="AdapterModel", network_t=teacher)
    run_options["path"]["pretrain_network_t"] = str(tmp_path / "teacher.pth")
    run_options["train"].update(logits_opt=dict(run_options["train"]["pixel_opt"]), total_iter=8)
    run_options["datasets"]["train"].update(batch_size_per_gpu=1, dataset_enlarge_ratio=3)
    run_options["logger"]["save_checkpoint_freq"] = 8
    for folder in ("whole", "parted"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    command = ["-opt", "run.yml", "--auto_resume"]
    assert ranks.run(tmp_path / "whole", command, prepare=prepare) == [0, 0]
    assert ranks.run(tmp_path / "parted", command, prepare=prepare_and_stop) == [75, 75]
    runs = [tmp_path / folder / "experiments/run" for folder in ("whole", "parted")]
    stopped = torch.load(runs[1] / f"training_states/{STOP_AT}.state", weights_only=True)
    assert ranks.run(tmp_path / "parted", command, prepare=prepare) == [0, 0]
    assert differences(*runs) == []
    ended = torch.load(runs[1] / "training_states/8.state", weights_only=True)
    moved = ended["networks"]["adapter"]["weight"] - stopped["networks"]["adapter"]["weight"]
    assert moved.abs().max() > 0
    student = torch.load(runs[1] / "models/net_g_8.pth", weights_only=True)
    assert student["params"].keys() == ended["networks"]["net_g"].keys()  # the student alone
