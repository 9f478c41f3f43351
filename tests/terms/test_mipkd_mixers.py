"""Mixtures of features and of blocks: their values, what the gradient reaches, and pairs that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from torch import nn

from kdsr.distill.adapters import TapPair
from kdsr.runtime.errors import OptionError
from kdsr.terms.mipkd_mixers import BlockMixing, Bridge, FeatureMixing, bridges, draw_mask, mixed

EDSR = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 2, "upscale": 4}
RCAN = {
    "type": "RCAN",
    "num_in_ch": 3,
    "num_out_ch": 3,
    "num_feat": 16,
    "num_group": 2,
    "num_block": 1,
    "upscale": 4,
}
SWINIR = {"type": "SwinIR", "upscale": 4, "in_chans": 3, "img_size": 8, "window_size": 4, "depths": [1, 1],
          "embed_dim": 8, "num_heads": [2, 2], "mlp_ratio": 2, "upsampler": "pixelshuffle",
          "drop_path_rate": 0.0}  # fmt: skip
DEEPER = {"depths": [1, 1, 1], "num_heads": [2, 2, 2], "embed_dim": 12}
# student, what is other in the teacher, pairs
PAIRS: dict[str, Any] = {
    "EDSR": (EDSR, {"num_feat": 12, "num_block": 3}, [("body.0", "body.1"), ("body.1", "body.2")]),
    "RCAN": (RCAN, {"num_block": 2}, [("body.0", "body.0"), ("body.1", "body.1")]),
    "SwinIR": (SWINIR, DEEPER, [("layers.0", "layers.0"), ("layers.1", "layers.2")]),
}


def networks(backbone: str) -> tuple[nn.Module, nn.Module, list[TapPair]]:
    student, other, pairs = PAIRS[backbone]
    torch.manual_seed(4)
    teacher = build_network({**student, **other}).eval().requires_grad_(False)
    return build_network(student), teacher, [TapPair(*pair) for pair in pairs]


def test_a_mask_is_half_the_teachers_and_drawn_from_its_seed() -> None:
    shape, device = torch.Size([4, 8, 16, 16]), torch.device("cpu")
    mask = draw_mask(shape, 0.5, 3, device)
    assert mask.shape == shape and mask.dtype == torch.bool
    assert 0.45 < float(mask.float().mean()) < 0.55
    assert (mask.flatten(2).float().mean(2) - 0.5).abs().max() < 0.2  # every channel has both
    assert torch.equal(mask, draw_mask(shape, 0.5, 3, device))
    assert not torch.equal(mask, draw_mask(shape, 0.5, 4, device))
    assert not draw_mask(shape, 0.0, 3, device).any() and draw_mask(shape, 1.0, 3, device).all()


def test_the_mixture_is_complementary() -> None:
    ours, theirs = torch.zeros(2, 3), torch.ones(2, 3)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert torch.equal(mixed(ours, theirs, mask), mask.float())


def test_features_are_encoded_mixed_and_decoded() -> None:
    torch.manual_seed(1)
    feature, teacher_feature = torch.rand(2, 4, 8, 8), torch.rand(2, 6, 8, 8)
    mask = torch.rand(2, 6, 8, 8) < 0.5
    mixing = FeatureMixing("some", [feature.shape], [teacher_feature.shape])
    mixtures, own = mixing(nn.Identity(), [feature], [teacher_feature], [mask])
    mixer = mixing.mixers[0]
    latent = mixer.teacher(teacher_feature)
    torch.testing.assert_close(own[0], mixer.decoder(latent))
    expected = mixer.decoder(mask * latent + ~mask * mixer.student(feature))
    torch.testing.assert_close(mixtures[0], expected)
    assert mixtures[0].shape == teacher_feature.shape


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_all_of_the_mixers_get_a_gradient_for_any_mask(ratio: float) -> None:
    feature = torch.rand(2, 4, 4, 4, requires_grad=True)
    teacher_feature = torch.rand(2, 6, 8, 8)  # of another size
    mixing = FeatureMixing("some", [feature.shape], [teacher_feature.shape])
    mask = draw_mask(teacher_feature.shape, ratio, 1, teacher_feature.device)
    mixtures, _ = mixing(nn.Identity(), [feature], [teacher_feature], [mask])
    mixtures[0].sum().backward()
    assert all(parameter.grad is not None for parameter in mixing.parameters())
    assert (feature.grad.abs().sum() > 0) == (ratio < 1)


def test_a_bridge_of_tokens_is_that_of_maps() -> None:
    bridge = Bridge(4, 6)
    image = torch.rand(2, 4, 3, 5)
    tokens = image.flatten(2).transpose(1, 2)
    torch.testing.assert_close(bridge(tokens), bridge(image).flatten(2).transpose(1, 2))


def test_bridges_lead_back() -> None:
    there, back = bridges((8, 8), (12, 12))
    x = torch.rand(2, 8, 4, 4)
    torch.testing.assert_close(back(there(x)), x)
    assert all(isinstance(bridge, nn.Identity) for bridge in bridges((8, 8), (8, 8)))


@pytest.mark.parametrize("backbone", PAIRS)
def test_the_drawn_blocks_are_the_teachers(backbone: str) -> None:
    student, teacher, pairs = networks(backbone)
    lq = torch.rand(2, 3, 8, 8)
    mixing = BlockMixing("train.blocks", pairs, student, teacher, lq[:1])
    alone = student(lq)
    torch.testing.assert_close(mixing(student, lq, [False, False]), alone, rtol=0, atol=0)

    # by hand: hooks that replace what the block gave
    blocks, stand_ins = (dict(net.named_modules()) for net in (student, teacher))

    def instead(index: int):
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            x, *others = inputs
            there, back = mixing.there[index], mixing.back[index]
            return back(stand_ins[pairs[index].teacher](there(x), *others))

        return hook

    for taken in ([True, False], [False, True], [True, True]):
        handles = [
            blocks[pair.student].register_forward_hook(instead(index))
            for index, pair in enumerate(pairs)
            if taken[index]
        ]
        expected = student(lq)
        for handle in handles:
            handle.remove()
        out = mixing(student, lq, taken)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        assert not torch.equal(out, alone)
    assert torch.equal(student(lq), alone)  # as it was


@pytest.mark.parametrize("backbone", PAIRS)
@pytest.mark.parametrize("taken", [[False, False], [True, False], [True, True]])
def test_gradients_of_a_mixed_pass(backbone: str, taken: list[bool]) -> None:
    """All bridges have one each time, the student has one through the teacher's blocks, the teacher has none."""
    student, teacher, pairs = networks(backbone)
    mixing = BlockMixing("train.blocks", pairs, student, teacher, torch.rand(1, 3, 8, 8))
    mixing(student, torch.rand(2, 3, 8, 8), taken).square().sum().backward()
    assert all(parameter.grad is not None for parameter in mixing.parameters())
    assert bool(list(mixing.parameters())) == (backbone != "RCAN")  # of one width
    for index, pair in enumerate(pairs):
        block = dict(student.named_modules())[pair.student]
        assert all((parameter.grad is None) == taken[index] for parameter in block.parameters())
        for bridge in (*mixing.there[index].parameters(), *mixing.back[index].parameters()):
            assert (bridge.grad.abs().sum() > 0) == taken[index]
    assert student.conv_first.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teachers_blocks_are_no_part_of_it() -> None:
    student, teacher, pairs = networks("EDSR")
    mixing = BlockMixing("train.blocks", pairs, student, teacher, torch.rand(1, 3, 8, 8))
    assert sorted(mixing.state_dict()) == [
        f"{way}.{index}.{kind}"
        for way in ("back", "there")
        for index in (0, 1)
        for kind in ("bias", "weight")
    ]
    mixing.train()
    assert not any(module.training for module in teacher.modules())


def test_a_failing_pass_leaves_the_student_as_it_was() -> None:
    student, teacher, pairs = networks("EDSR")
    mixing = BlockMixing("train.blocks", pairs, student, teacher, torch.rand(1, 3, 8, 8))
    with pytest.raises(RuntimeError):
        mixing(student, torch.rand(1, 5, 8, 8), [True, True])
    assert all("forward" not in vars(module) for module in student.modules())


@pytest.mark.parametrize(
    ("backbone", "pairs", "message"),
    [
        ("EDSR", [("bdy.0", "body.0")], "train.blocks.student: EDSR has no module 'bdy.0'; did you mean body.0"),
        ("EDSR", [("body.0", "bdy.0")], "train.blocks.teacher: EDSR has no module 'bdy.0'; did you mean body.0"),
        ("EDSR", [("body.0", "body.0"), ("body.0", "body.1")], "lists a block of the student twice"),
        (
            "EDSR",
            [("body.0", "upsample")],
            "the student's body.0 maps 1x8x8x8 to 1x8x8x8, the teacher's upsample 1x12x8x8 to 1x12x32x32; except for",
        ),
        ("SwinIR", [("layers.0", "conv_after_body")], "the student's layers.0 maps 1x64x8 to 1x64x8"),
    ],
)  # fmt: skip
def test_pairs_that_do_not_fit(backbone: str, pairs: list[tuple[str, str]], message: str) -> None:
    student, teacher, _ = networks(backbone)
    with pytest.raises(OptionError) as error:
        BlockMixing("train.blocks", [TapPair(*p) for p in pairs], student, teacher, torch.rand(1, 3, 8, 8))
    assert message in str(error.value)


class Odd(nn.Module):
    """A network with modules that are no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.idle, self.flat = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Flatten()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.flat(self.body(x)).view_as(x)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flat", "flat maps no features to features; give a block of the body"),
        ("idle", "idle was not called"),
    ],
)
def test_modules_that_are_no_blocks(name: str, message: str) -> None:
    student = Odd().train()
    with pytest.raises(OptionError, match=f"train.blocks.student: {message}"):
        BlockMixing("train.blocks", [TapPair(name, "body")], student, Odd(), torch.rand(1, 3, 8, 8))
    assert student.training and not student.flat._forward_hooks
