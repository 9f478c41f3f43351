"""``kdsr export``: every backbone to ONNX and the other formats, and what is refused."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import safetensors
import torch
import yaml
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from kdsr import train as train_entry
from kdsr.deploy.exportable import exportable
from kdsr.deploy.network_file import open_network
from kdsr.deploy.traced import Pt2Network
from small_networks import SMALL

Command = Callable[..., tuple[int, str, str]]
Options = dict[str, Any]

NETWORKS: dict[str, Options] = {
    "EDSR": {"num_in_ch": 3, "num_out_ch": 3, "upscale": 4, **SMALL["EDSR"]},
    "SRVGGNetCompact": {"upscale": 4, **SMALL["SRVGGNetCompact"]},
    "RLFN": {"upscale": 4, **SMALL["RLFN"]},
    "SPAN": {"type": "SpandrelNet", "architecture": "SPAN",
             "parameters": {"num_in_ch": 3, "num_out_ch": 3, "upscale": 4, "feature_channels": 8}},
    "PReNet": {**SMALL["PReNet"]},
    "RCAN": {"num_in_ch": 3, "num_out_ch": 3, "upscale": 4, "squeeze_factor": 4, **SMALL["RCAN"]},
    "NAFNet": {"width": 8, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    "SwinIR": {"upscale": 4, "window_size": 4, "img_size": 24, "img_range": 1.0, "mlp_ratio": 2,
               "upsampler": "pixelshuffledirect", **SMALL["SwinIR"]},
    "Restormer": {"dim": 8, "num_blocks": [1, 0, 0, 1], "num_refinement_blocks": 0},
}  # fmt: skip
HEAVY = ("NAFNet", "SwinIR", "Restormer", "RCAN")
EDSR = {"type": "EDSR", **NETWORKS["EDSR"]}


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def saved(options: Options, file: str = "net.pth") -> nn.Module:
    """Writes a checkpoint that describes its network, with random weights; returns the network."""
    torch.manual_seed(0)
    net: nn.Module = build_network(copy.deepcopy(options)).eval().requires_grad_(False)
    torch.save(
        {"params": net.state_dict(), "network": options, "scale": 4, "run": "tiny", "teacher": "RCAN"}, file
    )
    return net


def folders(photos: Path, scale: int) -> tuple[object, ...]:
    """Images to measure on; for scale 1 the ground truth is the input."""
    lq = photos / (f"LR_x{scale}" if scale > 1 else "GT")
    return ("--images", lq, "--gt", photos / "GT")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in HEAVY else name
                                  for name in NETWORKS])  # fmt: skip
def test_every_backbone_becomes_an_onnx_file_for_any_size(name: str, photos: Path, command: Command) -> None:
    net = saved({"type": name} | NETWORKS[name])
    scale = NETWORKS[name].get("upscale", NETWORKS[name].get("parameters", {}).get("upscale", 1))
    code, out, err = command("export", "net.pth", "-o", "out/net.onnx", *folders(photos, scale))
    assert code == 0, err
    assert "PSNR on" in out and "images of any size" in out
    session = onnxruntime.InferenceSession("out/net.onnx")
    (entry,) = session.get_inputs()
    assert entry.shape == ["batch", 3, "height", "width"]
    multiple = int(session.get_modelmeta().custom_metadata_map["multiple_of"])
    for batch, height, width in ((3, 48, 80), (1, 88, 40)):
        assert height % multiple == width % multiple == 0
        x = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))
        wanted = net(x.clone())
        given = torch.from_numpy(session.run(None, {entry.name: x.numpy()})[0])
        torch.testing.assert_close(given, wanted, rtol=0, atol=float(1e-4 * (wanted.max() - wanted.min())))
    opened = open_network("out/net.onnx")
    assert opened.scale == scale and opened.multiple_of == multiple
    small = torch.rand(1, 3, multiple * 2, multiple * 3)  # less than some are exported for
    assert opened.net(small).shape == (1, 3, multiple * 2 * scale, multiple * 3 * scale)


@pytest.mark.parametrize("end", ["safetensors", "pt2"])
def test_the_other_formats(end: str, photos: Path, command: Command) -> None:
    net = saved(EDSR)
    code, out, err = command("export", "net.pth", "-o", f"net.{end}", *folders(photos, 4), "--licence", "MIT")
    assert code == 0, err
    assert f"wrote net.{end}: " in out
    x = torch.rand(2, 3, 20, 33)
    if end == "pt2":
        given = Pt2Network(Path("net.pt2").read_bytes(), 1, 1)(x)
    else:
        with safetensors.safe_open("net.safetensors", "pt") as file:
            metadata = file.metadata()
        assert json.loads(metadata["network"]) == EDSR
        facts = {key: metadata[key] for key in ("run", "teacher", "licence", "scale", "value_range")}
        assert facts == {
            "run": "tiny",
            "teacher": "RCAN",
            "licence": "MIT",
            "scale": "4",
            "value_range": "[0.0, 1.0]",
        }
        assert "dB on LR_x4" in metadata["psnr"]
        given = open_network("net.safetensors").net(x)
    torch.testing.assert_close(given, net(x))


@pytest.mark.parametrize("end", ["onnx", "safetensors", "pt2"])
def test_half_precision(end: str, photos: Path, command: Command) -> None:
    net = saved(EDSR)
    sizes = {}
    for flags in ((), ("--fp16",)):
        code, out, err = command("export", "net.pth", "-o", f"net.{end}", *folders(photos, 4), *flags)
        assert code == 0, err
        sizes[flags] = Path(f"net.{end}").stat().st_size
    assert sizes["--fp16",] < (1.0 if end == "pt2" else 0.8) * sizes[()] and "float16" in out
    if end == "onnx":
        model = onnx.load("net.onnx")
        assert {one.data_type for one in model.graph.initializer if len(one.dims) == 4} == {
            onnx.TensorProto.FLOAT16
        }
        x = torch.rand(1, 3, 24, 24)
        difference = (open_network("net.onnx").net(x) - net(x)).abs().max()
        assert 0 < difference < 0.01


def test_a_run_is_measured_on_its_validation_set(run_options: Options, command: Command) -> None:
    Path("run.yml").write_text(yaml.safe_dump(run_options), encoding="utf-8")
    assert train_entry.main(["-opt", "run.yml"]) == 0
    before = {file: file.stat().st_mtime_ns for file in Path("experiments").rglob("*")}
    code, out, err = command("export", "experiments/run/models/net_g_latest.pth", "-o", "student.onnx")
    assert code == 0, err
    assert "PSNR on held_out (4 images" in out
    assert open_network("student.onnx").described["run"] == "run"
    assert {file: file.stat().st_mtime_ns for file in Path("experiments").rglob("*")} == before


def test_images_alone_are_reduced(photos: Path, command: Command) -> None:
    saved(EDSR)
    code, out, err = command("export", "net.pth", "-o", "a.safetensors", "--images", photos / "GT")
    assert code == 0, err
    assert "reduced ×4 by Matlab's bicubic" in out


@pytest.fixture
def register() -> Iterator[Callable[[type[nn.Module]], Options]]:
    """Registers a network for a test; gives its options."""
    before = dict(ARCH_REGISTRY._obj_map)

    def add(network: type[nn.Module]) -> Options:
        ARCH_REGISTRY.register(network)
        return {"type": network.__name__}

    yield add
    ARCH_REGISTRY._obj_map.clear()
    ARCH_REGISTRY._obj_map.update(before)


class OfOneSize(nn.Module):
    """Computes with the width as a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) / float(int(x.shape[-1]))


def test_a_network_of_one_size_is_refused_with_what_works(
    register: Any, photos: Path, command: Command
) -> None:
    saved(register(OfOneSize))
    words = ("export", "net.pth", "-o", "net.onnx", *folders(photos, 1))
    code, _, err = command(*words)
    assert code == 1 and "--size HEIGHTxWIDTH" in err and len(err.splitlines()) <= 2
    assert not Path("net.onnx").exists()
    code, out, err = command(*words, "--size", "32x48")
    assert code == 0, err
    assert "4 cuts of 32x48" in out and open_network("net.onnx").fixed_size == (32, 48)


def losing_in_half(file: str) -> None:
    """A network that subtracts two large, nearly equal numbers."""
    options = {"type": "SRVGGNetCompact", "num_feat": 4, "num_conv": 0, "upscale": 4}
    net = build_network(options)
    weights = {name: torch.zeros_like(value) for name, value in net.state_dict().items()}
    weights["body.0.bias"][0] = 1000.0
    weights["body.2.weight"][:, 0, 1, 1] = 0.3001
    weights["body.2.bias"][:] = -300.1
    weights["body.1.weight"][:] = 1.0
    torch.save({"params": weights, "network": options}, file)


def test_a_loss_of_psnr_leaves_no_file(photos: Path, command: Command) -> None:
    losing_in_half("net.pth")
    words = ("export", "net.pth", *folders(photos, 4))
    assert command(*words, "-o", "net.safetensors")[0] == 0
    kept = Path("net.safetensors").read_bytes()
    code, _, err = command(*words, "-o", "net.safetensors", "--fp16")
    assert code == 1 and "loses" in err and "not written" in err
    assert Path("net.safetensors").read_bytes() == kept
    code, _, err = command(*words, "-o", "out/net.onnx", "--fp16")
    assert code == 1 and "not written" in err and not Path("out").exists()


class Deviating(nn.Module):
    """Its exported program computes something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (1.001 if torch.compiler.is_exporting() else 1.0)


def test_another_result_than_pytorch_leaves_no_file(register: Any, photos: Path, command: Command) -> None:
    saved(register(Deviating))
    for end in ("onnx", "pt2"):
        code, _, err = command("export", "net.pth", "-o", f"net.{end}", *folders(photos, 1))
        assert code == 1 and "differs from PyTorch" in err and not Path(f"net.{end}").exists()


def test_without_images_only_on_request(command: Command) -> None:
    saved(EDSR)
    code, _, err = command("export", "net.pth", "-o", "net.onnx")
    assert code == 2 and "--unverified" in err and not Path("net.onnx").exists()
    code, out, err = command("export", "net.pth", "-o", "net.onnx", "--unverified")
    assert code == 0, err
    assert "PSNR was not measured" in out and "psnr" not in open_network("net.onnx").described


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "net.engine"), ".onnx"),
        (("-o", "net.pth"), ".onnx"),
        (("-o", "n.onnx", "--gt", "x"), "--images"),
        (("-o", "n.onnx", "--images", "absent"), "absent"),
        (("-o", "n.onnx", "--images", "empty"), "empty"),
        (("-o", "n.onnx", "--unverified", "--size", "32"), "HEIGHTxWIDTH"),
        (("-o", "n.safetensors", "--unverified", "--size", "32x32"), "--size"),
    ],
)
def test_bad_input(words: tuple[str, ...], message: str, command: Command) -> None:
    saved(EDSR)
    Path("empty").mkdir()
    before = sorted(Path().rglob("*"))
    code, _, err = command("export", "net.pth", *words)
    assert code in (1, 2) and message in err and len(err.splitlines()) <= 2
    assert sorted(Path().rglob("*")) == before


def test_an_onnx_file_is_no_checkpoint(command: Command) -> None:
    saved(EDSR)
    assert command("export", "net.pth", "-o", "net.onnx", "--unverified")[0] == 0
    code, _, err = command("export", "net.onnx", "-o", "again.onnx", "--unverified")
    assert code == 2 and "no weights" in err
    Path("torn.onnx").write_bytes(Path("net.onnx").read_bytes()[:1000])
    code, _, err = command("export", "torn.onnx", "-o", "again.onnx", "--unverified")
    assert code == 2 and "torn.onnx" in err


def test_missing_packages_are_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(EDSR)
    monkeypatch.setitem(sys.modules, "onnxslim", None)
    code, _, err = command("export", "net.pth", "-o", "net.onnx", "--unverified")
    assert code == 2 and "onnxslim" in err and "'.[export]'" in err


@pytest.mark.parametrize("size", [(24, 24), (32, 16)])
def test_the_rewritten_blocks_of_swinir_give_its_result(size: tuple[int, int]) -> None:
    net = build_network({"type": "SwinIR"} | copy.deepcopy(NETWORKS["SwinIR"])).eval()
    x = torch.rand(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(exportable(net)(x), net(x))
