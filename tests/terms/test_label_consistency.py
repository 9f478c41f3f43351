from __future__ import annotations

import pytest
import torch
from skimage import data

from kdsr.runtime.errors import OptionError
from kdsr.terms.label_consistency import AugmentationPlan, LabelConsistency, augment, restore


def masks(samples: int, **indices: list[int]) -> AugmentationPlan:
    chosen = {
        name: torch.zeros(samples, dtype=torch.bool) for name in ("invert", "hflip", "vflip", "transpose")
    }
    for name, index in indices.items():
        chosen[name][index] = True
    return AugmentationPlan(**chosen)


def photographs(samples: int, size: int) -> torch.Tensor:
    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1) / 255
    return torch.stack([image[:, 20 * i : 20 * i + size, 150 : 150 + size] for i in range(samples)])


@pytest.mark.parametrize("name", ["dckd_a.pt", "dckd_b.pt"])
def test_release_augmentation_and_its_inverse(shared, name):
    vector = torch.load(shared / "golden" / name, weights_only=True)["lcr"]
    # its h flips along the height, which is what others call a vertical flip; flips of two axes commute
    names = {"i": "invert", "h": "vflip", "v": "hflip", "t": "transpose"}
    index = {names[key]: value.tolist() for key, value in vector["index"].items()}
    plan = masks(len(vector["lq"]), **index)
    torch.testing.assert_close(augment(vector["lq"], plan), vector["augmented"], rtol=0, atol=1e-7)
    torch.testing.assert_close(restore(vector["augmented"], plan), vector["reverted"], rtol=0, atol=1e-7)


def test_each_augmentation_by_hand():
    x = torch.tensor([[0.1, 0.2], [0.3, 0.4]]).expand(4, 1, 2, 2)
    got = augment(x, masks(4, invert=[0], hflip=[1], vflip=[2], transpose=[3]))
    expected = [
        [[0.9, 0.8], [0.7, 0.6]],
        [[0.2, 0.1], [0.4, 0.3]],
        [[0.3, 0.4], [0.1, 0.2]],
        [[0.1, 0.3], [0.2, 0.4]],
    ]
    torch.testing.assert_close(got[:, 0], torch.tensor(expected))


def test_order_matters_and_is_inverted():
    x = photographs(2, 32)
    plan = masks(2, hflip=[0, 1], transpose=[0])
    got = augment(x, plan)
    assert torch.equal(got[0], x[0].flip(2).transpose(1, 2))
    assert not torch.equal(got[0], x[0].transpose(1, 2).flip(2))
    assert torch.equal(restore(got, plan), x)


def test_any_draw_is_inverted_at_another_resolution():
    x = photographs(16, 12)
    consistency = LabelConsistency(0.5)
    plan = consistency.draw(16, torch.Generator().manual_seed(0))
    assert all(0 < mask.sum() < 16 for mask in (plan.invert, plan.hflip, plan.vflip, plan.transpose))
    larger = x.repeat_interleave(3, 2).repeat_interleave(3, 3)
    of_augmented = consistency.apply(x, plan).repeat_interleave(3, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(consistency.invert(of_augmented, plan), larger, rtol=0, atol=1e-7)


def test_draws_are_independent_have_their_probability_and_repeat():
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    plan = LabelConsistency(0.3).draw(4000, generator)
    drawn = torch.stack([plan.invert, plan.hflip, plan.vflip, plan.transpose]).double()
    torch.testing.assert_close(drawn.mean(1), torch.full((4,), 0.3).double(), rtol=0, atol=0.03)
    correlation = torch.corrcoef(drawn) - torch.eye(4).double()
    assert correlation.abs().max() < 0.06
    generator.set_state(state)
    assert torch.equal(LabelConsistency(0.3).draw(4000, generator).vflip, plan.vflip)


def test_probability_zero_changes_nothing_whatever_the_shape():
    x = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    consistency = LabelConsistency(0)
    plan = consistency.draw(3, torch.Generator().manual_seed(0))
    assert torch.equal(consistency.invert(consistency.apply(x, plan), plan), x)


def test_patches_that_are_not_square_are_refused_at_the_first_batch():
    consistency = LabelConsistency(0.5)
    with pytest.raises(
        OptionError, match="lcr_opt and train.zoom_in_opt transpose.* 8x12; train on square crops"
    ):
        consistency.apply(torch.zeros(1, 3, 8, 12), masks(1))


@pytest.mark.parametrize("prob", [-0.1, 1.5])
def test_what_is_no_probability_is_refused(prob):
    with pytest.raises(OptionError, match="train.noisy.prob"):
        LabelConsistency(prob)
