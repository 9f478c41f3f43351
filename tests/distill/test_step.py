"""Step: frozen networks see each set of images once, and only what some term asks of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdsr.distill.step import Step, images_per_pass
from kdsr.distill.term import TERM_REGISTRY, Term
from kdsr.models.dckd_model import DCKDModel
from kdsr.models.kd_model import KDModel
from small_runs import complete

L1 = {"type": "L1Loss", "loss_weight": 1.0}


class Extractor(nn.Module):
    """Features at two levels, and a tensor beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 2, stride=2)
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        self.batches.append(len(images))
        first = self.first(images)
        second = self.second(first)
        return [first, second], second.mean((2, 3))


def new_step(samples: int = 2) -> Step:
    lq = torch.rand(samples, 3, 8, 8)
    return Step(1, lq, None, torch.Generator(), nn.Identity())


def flat(answer: Any) -> list[Tensor]:
    return [*answer[0], answer[1]]


@pytest.mark.parametrize("chunk", [None, 1, 2, 3])
def test_sets_of_images_go_through_an_extractor_once(chunk: int | None) -> None:
    step, extractor = new_step(), Extractor().requires_grad_(False)
    a, b, c = (torch.rand(samples, 3, 8, 8) for samples in (2, 4, 1))
    moving = torch.rand(2, 3, 8, 8, requires_grad=True)
    found = step.extract(extractor, a, b, moving, chunk=chunk)
    assert sum(extractor.batches) == 8 and extractor.batches[0] == (chunk or 6)
    again = step.extract(extractor, moving, b, c, a)
    assert sum(extractor.batches) == 9  # c alone is new
    for images, answer in zip((a, b, moving, moving, b, c, a), (*found, *again), strict=True):
        for ours, alone in zip(flat(answer), flat(extractor(images)), strict=True):
            torch.testing.assert_close(ours, alone)
    assert flat(found[2])[0].requires_grad and not flat(found[0])[0].requires_grad
    step.release()
    step.extract(extractor, a)
    assert extractor.batches[-1] == 2


def test_terms_over_one_vqgan_share_its_passes(dckd_options: dict[str, Any]) -> None:
    dckd_options["train"].update(csd_opt={"type": "ContrasLoss", "weights": [1.0] * 5}, lcr_opt=None)
    model = DCKDModel(complete(dckd_options))
    seen: list[int] = []
    coded: list[int] = []
    vqgan = model.networks()["net_vqgan"]
    vqgan.register_forward_hook(lambda net, x, y: seen.append(len(x[0])))
    vqgan.encoder.mid.register_forward_hook(lambda net, x, y: coded.append(len(x[0])))
    model.feed_data({"lq": torch.rand(2, 3, 8, 8), "gt": torch.rand(2, 3, 32, 32)})
    assert {"l_cl", "l_ce", "l_csd"} <= set(model.compute_gradients(1))
    assert sum(seen) == 2 + 2 + 2 + 3 * 2  # student, teacher, blurred inputs and negatives: nothing twice
    assert coded == [2, 2]  # the last blocks only for the student and the teacher, whose codes are compared


@pytest.mark.parametrize(("side", "images"), [(32, 16), (64, 4), (128, 1), (192, 1)])
def test_a_cpu_gets_as_many_images_as_fit_its_caches(side: int, images: int) -> None:
    assert images_per_pass(torch.empty(40, 3, side, side)) == images
    assert images_per_pass(torch.empty(40, 3, side, side, device="meta")) == 40


def test_a_teacher_that_no_term_asks_does_not_run(dckd_options: dict[str, Any]) -> None:
    options = complete(dckd_options)
    options["train"].update(dict.fromkeys(("logits_opt", "lcr_opt", "cl_opt", "ce_opt")))
    model = KDModel(options)
    ran: list[int] = []
    assert model.net_t is not None
    model.net_t.register_forward_hook(lambda *_: ran.append(1))
    model.feed_data({"lq": torch.rand(2, 3, 8, 8), "gt": torch.rand(2, 3, 32, 32)})
    assert set(model.compute_gradients(1)) == {"l_pix"} and ran == []


def test_two_terms_cannot_have_one_key() -> None:
    with pytest.raises(AssertionError, match="train.logits_opt is the key of LogitsTerm already"):

        @TERM_REGISTRY.register()
        class AnotherTerm(Term):
            KEY = "logits_opt"

            def losses(self, step: Step) -> dict[str, Tensor]:
                return {}

    assert "AnotherTerm" not in dict(iter(TERM_REGISTRY))
