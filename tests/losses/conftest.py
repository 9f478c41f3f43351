"""The golden vectors of DCKD's release, and their VQGAN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kdsr.archs.vqgan_arch import VQGAN


@dataclass
class Golden:
    """A vector file, and its VQGAN's outputs for the images in it."""

    vector: dict[str, Any]
    student: Tensor  # a leaf that asks for its gradient
    features: dict[str, list[Tensor]]
    logits: dict[str, Tensor]

    def gradient(self, loss: Tensor) -> Tensor:
        """d loss / d student's image; the graph stays for the next test."""
        return torch.autograd.grad(loss, self.student, retain_graph=True)[0]

    def relative_error(self, value: Tensor, name: str) -> float:
        """|value - vector[name]| / |vector[name]| by norm."""
        expected = torch.as_tensor(self.vector[name])
        return float((value.detach() - expected).norm() / expected.norm())


@pytest.fixture(scope="session", params=["dckd_a.pt", "dckd_b.pt"])
def golden(request, shared) -> Golden:
    vector = torch.load(shared / "golden" / request.param, weights_only=True)
    net = VQGAN(**vector["config"])
    net.load_state_dict(vector["state_dict"], strict=False)
    net.eval().requires_grad_(False)
    student = vector["student"].clone().requires_grad_()
    negatives = torch.cat(vector["negatives"])
    seen = {"student": net(student), "teacher": net(vector["teacher"]), "negatives": net(negatives)}
    return Golden(
        vector,
        student,
        features=seen,
        logits={name: net.code_logits(levels) for name, levels in seen.items()},
    )
