"""`type: Spandrel`: checkpoints that spandrel recognises."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import spandrel
import torch
from basicsr.archs import build_network
from safetensors.torch import save_file
from spandrel import MAIN_REGISTRY, Architecture, ArchSupport, ImageModelDescriptor
from spandrel.architectures.DnCNN import DnCNN
from spandrel.architectures.DRUNet import DRUNet
from spandrel.architectures.MixDehazeNet import MixDehazeNet
from torch import Tensor, nn

from kdsr.archs.spandrel_arch import Spandrel
from kdsr.distill.padding import pad_and_restore
from kdsr.distill.taps import FeatureTaps
from kdsr.runtime.errors import CheckpointError
from spandrel_files import TINY, made, plain, write


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def read(file: Path) -> Any:
    return build_network({"type": "Spandrel", "path": str(file)})


@pytest.mark.parametrize("name", TINY)
def test_the_output_is_that_of_the_architecture_itself(name: str, tmp_path: Path) -> None:
    cls, _, scale, size = TINY[name]
    net = read(write(name, tmp_path / "x.pth")).eval()
    channels = 1 if name == "DnCNN" else 3
    lq = images(2, channels, *size)
    before = lq.clone()
    with torch.no_grad():
        output, expected = net(lq), made(name).eval()(lq.clone())
    assert isinstance(net, cls) and type(net).__name__ == cls.__name__
    assert output.shape == (2, channels, size[0] * scale, size[1] * scale)
    assert torch.equal(output, expected)
    assert torch.equal(lq, before)  # spandrel's RCAN overwrites what it is given


@pytest.mark.parametrize("name", [name for name in TINY if name != "DnCNN"])
@pytest.mark.parametrize("size", [(19, 30), (5, 9)])
def test_images_of_any_size_are_restored_as_spandrel_does(
    name: str, size: tuple[int, int], tmp_path: Path
) -> None:
    file = write(name, tmp_path / "x.pth")
    net, scale = read(file).eval(), TINY[name][2]
    size = (70, 100) if name == "Uformer" and size[0] == 19 else size
    lq = images(1, 3, *size)
    with torch.no_grad():
        output = pad_and_restore(net, lq, net.multiple_of, scale)
    expected = plain(file)(lq.clone())
    assert output.shape == expected.shape
    if name != "Uformer" or size[0] == 70:  # beyond a second reflection the padded pixels are others
        torch.testing.assert_close(output.clamp(0, 1), expected, rtol=0, atol=1e-6)


def test_size_requirements_of_architectures(tmp_path: Path) -> None:
    nets = {name: read(write(name, tmp_path / f"{name}.pth")).eval() for name in ("SAFMN", "Uformer", "HAT")}
    assert {name: net.multiple_of for name, net in nets.items()} == {"SAFMN": 8, "Uformer": 128, "HAT": 1}
    with torch.no_grad():
        assert nets["Uformer"](images(1, 3, 128, 256)).shape == (1, 3, 128, 256)  # it takes squares only
        assert nets["HAT"](images(1, 3, 3, 4)).shape == (1, 3, 6, 8)  # and this one 16 pixels at least


@pytest.mark.parametrize("name", [name for name in TINY if name != "DnCNN"])
def test_a_student_can_be_copied_and_gets_gradients(name: str, tmp_path: Path) -> None:
    file = write(name, tmp_path / "x.pth")
    net = read(file).train()
    lq = images(2, 3, *TINY[name][3])
    net(lq).square().mean().backward()
    without = [key for key, parameter in net.named_parameters() if parameter.grad is None]
    original = made(name).train()
    original(lq.clone()).square().mean().backward()
    assert without == [key for key, parameter in original.named_parameters() if parameter.grad is None]
    assert len(without) < 3
    net = net.eval()
    twin = copy.deepcopy(net)
    with torch.no_grad():
        assert torch.equal(twin(lq), net(lq))
        next(net.parameters()).add_(1.0)
        assert not torch.equal(twin(lq), net(lq))
    assert torch.equal(twin(lq), made(name).eval()(lq.clone()))


@pytest.mark.parametrize("name", TINY)
def test_names_are_those_of_the_architecture(name: str, tmp_path: Path) -> None:
    net, original = read(write(name, tmp_path / "x.pth")), made(name)
    assert list(net.state_dict()) == list(original.state_dict())
    assert [key for key, _ in net.named_modules()] == [key for key, _ in original.named_modules()]
    torch.save({"params": net.state_dict()}, tmp_path / "again.pth")
    assert plain(tmp_path / "again.pth").architecture.name == name


@pytest.mark.parametrize("wrapped", [None, "params", "params_ema", "state_dict", "safetensors", "module"])
def test_weights_are_found_where_programs_put_them(wrapped: str | None, tmp_path: Path) -> None:
    state = made("SAFMN").state_dict()
    if wrapped == "safetensors":
        file = tmp_path / "x.safetensors"
        save_file(state, file)
    elif wrapped == "module":
        file = tmp_path / "x.pth"
        torch.save({"params": {f"module.{key}": value for key, value in state.items()}}, file)
    else:
        file = write("SAFMN", tmp_path / "x.pth", key=wrapped)
    found = read(file).state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_the_moving_average_is_preferred(tmp_path: Path) -> None:
    raw, averaged = (made("SAFMN", seed).state_dict() for seed in (1, 2))
    torch.save({"params": raw, "params_ema": averaged}, tmp_path / "x.pth")
    assert torch.equal(read(tmp_path / "x.pth").state_dict()["to_feat.weight"], averaged["to_feat.weight"])


# ------------------------------------------------------------------------------------------------------------ grey


def test_a_grey_network_processes_colours_separately(tmp_path: Path) -> None:
    net = read(write("DnCNN", tmp_path / "x.pth")).eval()
    lq = images(2, 3, 12, 10)
    with torch.no_grad():
        output = net(lq)
        alone = [net(lq[:, colour : colour + 1]) for colour in range(3)]
    torch.testing.assert_close(output, torch.cat(alone, dim=1), rtol=0, atol=1e-6)
    assert net.colour_wise and "colours are processed separately" in net.notes[1]


def test_tapped_features_of_a_grey_network_have_the_colours_as_channels(tmp_path: Path) -> None:
    net = read(write("DnCNN", tmp_path / "x.pth")).eval()
    taps = FeatureTaps(net, ["model.2"], "train.taps.student")
    lq = images(2, 3, 12, 10)
    with torch.no_grad():
        net(lq)
        (features,) = taps.take(lq)
        net(lq[1:, 2:])
        (last,) = taps.take(lq[1:, 2:])
    assert features.shape == (2, 3 * 8, 12, 10)
    torch.testing.assert_close(features[1:, 16:], last, rtol=0, atol=1e-6)


def test_the_published_grey_denoiser(shared: Path) -> None:
    """KAIR's DnCNN for noise of σ = 25, on a photograph in grey and in colour."""
    file = shared / "data" / "weights" / "KAIR_dncnn" / "dncnn_25.pth"
    net = read(file).eval()
    assert (net.facts.architecture, net.facts.scale, net.facts.channels) == ("DnCNN", 1, 1)
    clean = torch.from_numpy(skimage.data.astronaut()[40:104, 180:260]).permute(2, 0, 1)[None].float() / 255
    noisy = clean + 25 / 255 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        restored = net(noisy)
        torch.testing.assert_close(
            net(noisy[:, :1]).clamp(0, 1), plain(file)(noisy[:, :1].clone()), rtol=0, atol=1e-6
        )

    def psnr(image: Tensor) -> float:
        return float(-10 * (image.clamp(0, 1) - clean).square().mean().log10())

    assert psnr(restored) > psnr(noisy) + 6


# --------------------------------------------------------------------------------------------- reduced precision


def dtypes_inside(net: nn.Module, lq: Tensor) -> set[torch.dtype]:
    seen = set()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net(lq)
    return seen


def test_a_network_that_works_in_bfloat16_is_computed_in_it(tmp_path: Path) -> None:
    net = read(write("SAFMN", tmp_path / "x.pth"))
    assert net.not_in == {torch.float16}  # says spandrel
    assert dtypes_inside(net, images(1, 3, 16, 16)) == {torch.bfloat16}


def test_a_network_that_does_not_is_computed_in_float32(tmp_path: Path) -> None:
    net = read(write("SAFMN", tmp_path / "x.pth"))
    net.facts = net.facts._replace(not_in=frozenset({torch.bfloat16}))
    assert dtypes_inside(net, images(1, 3, 16, 16)) == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert net(images(1, 3, 16, 16).bfloat16()).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ bad input


def refusal(file: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        build_network({"type": "Spandrel", "path": str(file)})
    problems = Spandrel.option_problems({"type": "Spandrel", "path": str(file)})
    assert problems == [f"path: {problem}" for problem in caught.value.problems]
    return str(caught.value)


def test_weights_that_spandrel_does_not_know(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3), nn.Conv2d(3, 3, 1))
    torch.save({"params": net.state_dict()}, tmp_path / "own.pth")
    message = refusal(tmp_path / "own.pth")
    assert f"{tmp_path / 'own.pth'}: not of an architecture that spandrel" in message
    assert (
        "It holds 6 tensors: 0.weight (4, 3, 3, 3), 0.bias (4,), 1.weight (3, 4, 3, 3), 1.bias (3,), ..."
        in message
    )
    assert "spandrel knows" in message and "SwinIR" in message and "Uformer" in message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.pth") == f"{tmp_path / 'none.pth'}: no such file"


def test_a_checkpoint_without_weights(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "x.pth")
    assert "holds no weights under a key that spandrel knows" in refusal(tmp_path / "x.pth")
    assert "its first keys are epoch, lr" in refusal(tmp_path / "x.pth")


def test_weights_that_only_look_like_an_architecture(tmp_path: Path) -> None:
    state = made("NAFNet").state_dict()
    state["encoders.0.0.beta"] = torch.zeros(7)
    torch.save({"params": state}, tmp_path / "x.pth")
    assert "looks like NAFNet, but spandrel cannot build it (RuntimeError" in refusal(tmp_path / "x.pth")


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return (open, ("exploded", "w"))


def test_no_code_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"params": made("SAFMN").state_dict(), "more": Bomb()}, "x.pth")
    Path("y.pth").write_bytes(pickle.dumps({"params": {}, "more": Bomb()}))
    assert "refused, it holds pickled code" in refusal("x.pth")
    refusal("y.pth")
    assert not Path("exploded").exists()


def test_networks_that_need_more_than_an_image_are_refused(tmp_path: Path) -> None:
    drunet = DRUNet(in_nc=4, out_nc=3, nc=[8, 8, 8, 8], nb=4)
    torch.save(drunet.state_dict(), tmp_path / "drunet.pth")
    assert "is a DRUNet network, which needs the level of the noise as second input" in refusal(
        tmp_path / "drunet.pth"
    )
    fdncnn = DnCNN(in_nc=4, out_nc=3, nc=8, nb=9, act_mode="R", mode="FDnCNN")
    torch.save(fdncnn.state_dict(), tmp_path / "fdncnn.pth")
    assert "needs the level of the noise" in refusal(tmp_path / "fdncnn.pth")


def test_networks_of_other_channels_than_colours_are_refused(tmp_path: Path) -> None:
    torch.save(DnCNN(in_nc=4, out_nc=4, nc=8, nb=9, act_mode="R").state_dict(), tmp_path / "x.pth")
    assert "has 4 input and 4 output channels; both must be 3 (RGB) or 1 (grey)" in refusal(
        tmp_path / "x.pth"
    )


def test_a_path_that_is_none() -> None:
    assert Spandrel.option_problems({"path": 3}) == ["path: expected the name of a file, got 3"]
    assert Spandrel.option_problems({}) == []  # the signature says it


def test_facts_follow_the_file(tmp_path: Path) -> None:
    options = {"path": str(write("SAFMN", tmp_path / "x.pth"))}
    assert Spandrel.facts(options)[:2] == ("SAFMN", 2)
    write("NAFNet", tmp_path / "x.pth")
    assert Spandrel.facts(options)[:2] == ("NAFNet", 1)


def test_an_architecture_is_called_as_spandrel_calls_it(tmp_path: Path) -> None:
    """MixDehazeNet's output is in [-1, 1], and it needs at least 40 pixels."""
    torch.manual_seed(0)
    net = MixDehazeNet(in_chans=3, out_chans=4, embed_dims=[8, 16, 32, 16, 8], depths=[1, 1, 1, 1, 1])
    torch.save(net.state_dict(), tmp_path / "x.pth")
    lq = images(1, 3, 32, 44)
    found = copy.deepcopy(read(tmp_path / "x.pth").eval())
    with torch.no_grad():
        output = found(lq)
    assert (found.facts.minimum, output.shape) == (40, lq.shape)
    assert torch.equal(output.clamp(0, 1), plain(tmp_path / "x.pth")(lq))


def test_weights_that_spandrel_renames_and_does_not_recognise_are_noted(tmp_path: Path) -> None:
    """A SwinIR with pixel unshuffle: the names that identify it get lost."""
    torch.manual_seed(0)
    cls, arguments, *_ = TINY["SwinIR"]
    net = cls(**arguments | {"upscale": 4, "upsampler": "pixelshuffle", "start_unshuffle": 2})
    state = net.state_dict()
    for part in ("weight", "bias"):
        state[f"conv_first.1.{part}"] = state.pop(f"conv_first.{part}")
    torch.save(state, tmp_path / "x.pth")
    found = read(tmp_path / "x.pth")
    assert not found.facts.reloads and "spandrel has renamed its weights" in found.notes[-1]
    assert read(write("SwinIR", tmp_path / "y.pth")).facts.reloads


class Doubling(Architecture):
    """A user's network, recognised by its only weights."""

    def __init__(self) -> None:
        super().__init__(id="Doubling", detect=lambda state: set(state) == {"0.weight"})

    def load(self, state_dict: dict[str, Any]) -> ImageModelDescriptor:
        net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))
        return ImageModelDescriptor(
            net, state_dict, self, "Restoration", [], supports_half=True, supports_bfloat16=True, scale=1,
            input_channels=3, output_channels=3,
        )  # fmt: skip


def test_architectures_that_are_added_to_spandrel_are_recognised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = MAIN_REGISTRY.copy()
    more.add(ArchSupport.from_architecture(Doubling()))
    monkeypatch.setattr(spandrel, "MAIN_REGISTRY", more)
    torch.save({"0.weight": 2 * torch.eye(3)[..., None, None]}, tmp_path / "x.pth")
    lq = images(1, 3, 4, 5)
    assert torch.equal(read(tmp_path / "x.pth")(lq), 2 * lq)
