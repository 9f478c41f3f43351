"""``kdsr infer``: every kind of file that the data sets read, folders, tiles, ground truth, bad input."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import build_network
from numpy.typing import NDArray
from PIL import Image, ImageCms

from kdsr.models.psnr_ssim import psnr, ssim
from kdsr.models.restorer import Restorer
from kdsr.runtime.run_lock import RunLock
from small_runs import run

Make = Callable[..., Path]
Command = Callable[..., tuple[int, str, str]]
TURNED = {2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
          6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}  # fmt: skip


def noise(*shape: int, dtype: Any = np.uint8, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def write(path: Path, image: NDArray[Any]) -> NDArray[Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return image


def read(path: Path) -> NDArray[Any]:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image is not None
    return image


def repeated(image: NDArray[Any], scale: int) -> NDArray[Any]:
    return image.repeat(scale, 0).repeat(scale, 1)


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------------- kinds of files


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_all_bits_are_kept(nearest: Make, command: Command, dtype: Any) -> None:
    image = write(Path("in/a.png"), noise(9, 7, 3, dtype=dtype))
    assert command("infer", nearest(2), "in", "-o", "out")[0] == 0
    result = read(Path("out/a.png"))
    assert result.dtype == dtype and np.array_equal(result, repeated(image, 2))


def test_twelve_bits_become_sixteen(nearest: Make, command: Command) -> None:
    pixels = noise(5, 6, dtype=np.uint16) >> 4
    Path("in.pgm").write_bytes(b"P5 6 5 4095\n" + pixels.astype(">u2").tobytes())
    assert command("infer", nearest(1), "in.pgm", "-o", "out.png")[0] == 0
    assert np.array_equal(read(Path("out.png"))[..., 1], np.rint(pixels / 4095 * 65535))


def test_grey_is_three_equal_channels_as_in_training(nearest: Make, command: Command) -> None:
    image = write(Path("in/a.png"), noise(9, 7))
    assert command("infer", nearest(2), "in", "-o", "out")[0] == 0
    assert np.array_equal(read(Path("out/a.png")), repeated(np.dstack([image] * 3), 2))


def test_a_network_for_grey_images_keeps_grey_and_restores_each_colour(
    nearest: Make, command: Command
) -> None:
    grey, colour = write(Path("in/grey.png"), noise(9, 7)), write(Path("in/colour.png"), noise(9, 7, 3))
    assert command("infer", nearest(2, channels=1), "in", "-o", "out")[0] == 0
    assert np.array_equal(read(Path("out/grey.png")), repeated(grey, 2))
    assert np.array_equal(read(Path("out/colour.png")), repeated(colour, 2))


def test_a_palette_is_read_as_its_colours(nearest: Make, command: Command) -> None:
    palette = Image.fromarray(noise(9, 7, 3)).quantize(16)
    Path("in").mkdir()
    palette.save("in/a.png")
    assert command("infer", nearest(2), "in", "-o", "out")[0] == 0
    colours = np.asarray(palette.convert("RGB"))[..., ::-1]
    assert np.array_equal(read(Path("out/a.png")), repeated(colours, 2))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_is_kept(nearest: Make, command: Command, dtype: Any) -> None:
    image = write(Path("in/a.png"), noise(9, 7, 4, dtype=dtype))
    assert command("infer", nearest(1), "in", "-o", "same")[0] == 0
    assert np.array_equal(read(Path("same/a.png")), image)
    code, _, err = command("infer", nearest(2), "in", "-o", "large")
    assert code == 0 and "alpha" not in err
    enlarged = read(Path("large/a.png"))
    assert np.array_equal(enlarged[..., :3], repeated(image[..., :3], 2))
    wanted = cv2.resize(image[..., 3], (14, 18), interpolation=cv2.INTER_CUBIC)
    assert enlarged.dtype == dtype and np.array_equal(enlarged[..., 3], wanted)


def test_transparent_colours_of_palettes_and_grey_images_are_kept(nearest: Make, command: Command) -> None:
    palette = Image.fromarray(noise(9, 7, 3)).quantize(16)
    grey = Image.fromarray(noise(9, 7, 2), "LA")
    Path("in").mkdir()
    palette.save("in/palette.png", transparency=3)
    grey.save("in/grey.png")
    assert command("infer", nearest(1), "in", "-o", "out")[0] == 0
    wanted = np.where(np.asarray(palette) == 3, 0, 255)
    assert np.array_equal(read(Path("out/palette.png"))[..., 3], wanted)
    assert np.array_equal(read(Path("out/grey.png"))[..., 3], np.asarray(grey)[..., 1])


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["png", "webp", "tif"])
def test_the_orientation_is_applied_and_its_tag_left_out(
    nearest: Make, command: Command, orientation: int, kind: str
) -> None:
    stored = noise(6, 9, 4)
    tag = Image.Exif()
    tag[0x0112] = orientation
    exact = {"lossless": True, "exact": True} if kind == "webp" else {}
    Image.fromarray(stored, "RGBA").save(f"in.{kind}", exif=tag, **exact)
    assert command("infer", nearest(1), f"in.{kind}", "-o", "out.png")[0] == 0
    wanted = TURNED[orientation](stored)
    assert np.array_equal(read(Path("out.png")), wanted[..., [2, 1, 0, 3]])
    assert 0x0112 not in Image.open("out.png").getexif()


def test_a_colour_profile_is_kept(nearest: Make, command: Command) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Path("in").mkdir()
    Image.fromarray(noise(9, 7, 3)).save("in/a.png", icc_profile=profile)
    for kind in ("png", "jpg"):
        assert command("infer", nearest(1), "in", "-o", kind, "--format", kind)[0] == 0
        assert Image.open(f"{kind}/a.{kind}").info["icc_profile"] == profile


def test_what_is_lost_is_said_once(nearest: Make, command: Command) -> None:
    Path("in").mkdir()
    frames = [Image.fromarray(noise(9, 7, 3, seed=seed)) for seed in range(2)]
    for name in "ab":
        frames[0].save(f"in/{name}.gif", save_all=True, append_images=frames[1:])
    code, _, err = command("infer", nearest(1), "in", "-o", "out")
    assert code == 0
    assert err.count("more than one frame or page, of which the first is read") == 1


def test_jpeg_refuses_what_it_cannot_hold_by_name(nearest: Make, command: Command) -> None:
    write(Path("in/alpha.png"), noise(9, 7, 4))
    write(Path("in/deep.png"), noise(9, 7, 3, dtype=np.uint16))
    write(Path("in/plain.png"), noise(9, 7, 3))
    code, out, err = command("infer", nearest(1), "in", "-o", "out", "--format", "jpg")
    assert code == 1 and "1 image restored" in out and "2 failed" in out
    assert "out/alpha.jpg: its input has an alpha channel" in err
    assert "out/deep.jpg: its input has more than 8 bits" in err
    assert [path.name for path in Path("out").iterdir()] == ["plain.jpg"]


# ---------------------------------------------------------------------------------------------------- files and folders


def test_files_that_fail_are_named_and_the_rest_goes_on(nearest: Make, command: Command) -> None:
    write(Path("in/a.png"), noise(30, 30, 3))
    Path("in/cut.png").write_bytes(Path("in/a.png").read_bytes()[:100])
    Path("in/text.jpg").write_text("no image")
    Path("in/empty.png").touch()
    image = write(Path("in/z.png"), noise(9, 7, 3))
    code, out, err = command("infer", nearest(2), "in", "-o", "out")
    assert code == 1 and "2 images restored" in out and "3 failed" in out
    assert sorted(line.split()[5].rstrip(":") for line in err.splitlines()) == [
        "in/cut.png",
        "in/empty.png",
        "in/text.jpg",
    ]
    assert "Traceback" not in err
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.png", "z.png"]
    assert np.array_equal(read(Path("out/z.png")), repeated(image, 2))


def test_sub_folders_are_kept_and_other_files_left_out(nearest: Make, command: Command) -> None:
    for name in ("in/a.png", "in/x/a.PNG", "in/x/y/b.bmp"):
        write(Path(name), noise(9, 7, 3))
    Path("in/notes.txt").write_text("")
    code, _, err = command("infer", nearest(2), "in", "-o", "out")
    assert code == 0 and "left out of in" in err and "notes.txt" in err
    made = sorted(str(path.relative_to("out")) for path in Path("out").rglob("*.*"))
    assert made == ["a.png", "x/a.png", "x/y/b.png"]


def test_files_and_folders_together(nearest: Make, command: Command) -> None:
    for name in ("in/a.png", "b.png", "c.ppm"):
        write(Path(name), noise(9, 7, 3))
    assert command("infer", nearest(2), "in", "b.png", "c.ppm", "-o", "out")[0] == 0
    assert sorted(path.name for path in Path("out").iterdir()) == ["a.png", "b.png", "c.png"]


def test_results_are_replaced_unless_resumed(nearest: Make, command: Command) -> None:
    image = write(Path("in/a.png"), noise(9, 7, 3))
    write(Path("in/b.png"), image)
    old = write(Path("out/a.png"), noise(4, 4, 3))
    code, out, _ = command("infer", nearest(2), "in", "-o", "out", "--resume")
    assert code == 0 and "1 image restored" in out and "1 there already" in out
    assert np.array_equal(read(Path("out/a.png")), old)
    assert command("infer", nearest(2), "in", "-o", "out")[0] == 0
    assert np.array_equal(read(Path("out/a.png")), repeated(image, 2))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none", "-o", "out"], "there is no file or folder none"),
        (["empty", "-o", "out"], "there is no image in empty"),
        (["in", "-o", "in"], "is in the input in"),
        (["in", "-o", "in/out"], "is in the input in"),
        (["in/a.png", "-o", "in"], "would overwrite the inputs (in/a.png)"),
        (["in/a.png", "-o", "in/a.png"], "would overwrite the inputs"),
        (["in", "twin", "-o", "out"], "in/a.png and twin/a.bmp: results of both would be called out/a"),
        (["in", "-o", "in/a.png"], "is in the input"),
        (["in", "-o", "file.txt"], "is a file; give a folder"),
        (["in", "-o", "out", "--gt", "none"], "--gt: There is no folder none"),
        (["in", "-o", "gt", "--gt", "gt"], "--gt gt: results would be written into it"),
        (["in", "-o", "out", "--gt", "gt"], "gt has no image of the name of in/a.png"),
        (["in", "-o", "out", "--device", "cuda"], "--device cuda: torch finds no GPU"),
        (["in", "-o", "out", "--device", "tpu9"], "--device tpu9: is no device"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    nearest: Make, command: Command, words: list[str], message: str
) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    write(Path("in/a.png"), noise(9, 7, 3))
    write(Path("twin/a.bmp"), noise(9, 7, 3))
    write(Path("gt/other.png"), noise(18, 14, 3))
    Path("empty").mkdir()
    Path("file.txt").touch()
    weights = nearest(2)
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    code, _, err = command("infer", weights, *words)
    assert code == 2 and message in err and len(err.splitlines()) <= 2
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


@pytest.mark.parametrize("content", [b"no checkpoint", b""])
def test_a_file_that_is_no_checkpoint(command: Command, content: bytes) -> None:
    write(Path("in/a.png"), noise(9, 7, 3))
    Path("net.pth").write_bytes(content)
    code, _, err = command("infer", "net.pth", "in", "-o", "out")
    assert code == 2 and "net.pth" in err and not Path("out").exists()


def test_a_checkpoint_that_needs_its_option_file(command: Command, run_options: dict[str, Any]) -> None:
    """A network that neither its tensors nor spandrel tell."""
    network = {"type": "RLFN", "feature_channels": 8, "num_blocks": 1, "esa_channels": 4, "upscale": 2}
    torch.save({"params": build_network(network).state_dict()}, "net.pth")
    write(Path("in/a.png"), noise(20, 17, 3))
    Path("net.yml").write_text(yaml.safe_dump({"network_g": network, "name": "net", "scale": 2}))
    assert command("infer", "net.pth", "in", "-o", "out", "--opt", "net.yml")[0] == 0
    assert read(Path("out/a.png")).shape == (40, 34, 3)


# ---------------------------------------------------------------------------------------------------- how it computes


@pytest.fixture
def edsr() -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    net = build_network(
        {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 1, "upscale": 2}
    )
    torch.save({"params": net.state_dict()}, "edsr.pth")
    return Path("edsr.pth"), net.eval()


@pytest.mark.parametrize(
    ("flags", "val"),
    [
        ((), {}),
        (("--tile", "32"), {"tile": 32}),
        (("--self-ensemble",), {"self_ensemble": True}),
        (("--tile", "0"), {}),
    ],
)
def test_the_result_is_the_restorers(
    command: Command, edsr: tuple[Path, torch.nn.Module], flags: tuple[str, ...], val: dict[str, Any]
) -> None:
    image = write(Path("in/a.png"), noise(70, 50, 3))
    assert command("infer", edsr[0], "in", "-o", "out", *flags)[0] == 0
    lq = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        wanted = Restorer({"scale": 2, "val": val})(edsr[1], lq)
    wanted = wanted[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()[..., ::-1]
    assert np.array_equal(read(Path("out/a.png")), wanted)


@pytest.mark.parametrize("size", [(), ("--size", "64x64")])
def test_an_exported_file_restores_as_its_checkpoint_does(
    command: Command, edsr: tuple[Path, torch.nn.Module], size: tuple[str, ...]
) -> None:
    """Also one for images of a single size, which gets tiles of it."""
    for package in ("onnx", "onnxruntime", "onnxscript", "onnxslim"):
        pytest.importorskip(package)
    assert command("export", edsr[0], "-o", "edsr.onnx", "--unverified", *size)[0] == 0
    for name, sides in {"small": (10, 9), "large": (70, 130)}.items():
        write(Path(f"in/{name}.png"), noise(*sides, 3))
    assert command("infer", "edsr.onnx", "in", "-o", "onnx")[0] == 0
    assert command("infer", edsr[0], "in", "-o", "torch")[0] == 0
    for name in (
        ("large",) if size else ("small", "large")
    ):  # a small one is extended to the size, by reflection
        both = [read(Path(folder, f"{name}.png")).astype(int) for folder in ("onnx", "torch")]
        close = np.abs(both[0] - both[1])
        assert close.max() <= 1 and (close == 0).mean() > 0.99
    assert read(Path("onnx/small.png")).shape == (20, 18, 3)
    code, _, err = command("infer", "edsr.onnx", "in", "-o", "other", "--precision", "bf16")
    assert code == 2 and "--precision bf16: an exported file computes in the precision of its export" in err


def test_weights_that_are_not_finite_fail_by_name(
    command: Command, edsr: tuple[Path, torch.nn.Module]
) -> None:
    weights = edsr[1].state_dict()
    weights["conv_last.bias"].fill_(math.nan)
    torch.save({"params": weights}, "nan.pth")
    write(Path("in/a.png"), noise(9, 7, 3))
    code, _, err = command("infer", "nan.pth", "in", "-o", "out")
    assert code == 1 and "in/a.png: the network's output is not finite" in err
    assert not Path("out").exists()


def test_smaller_tiles_where_memory_runs_out(edsr: tuple[Path, torch.nn.Module]) -> None:
    """In a process with a limit on its memory: the whole image does not fit, tiles do."""
    write(Path("in/huge.png"), noise(1500, 1500, 3))
    program = (
        "import resource, sys, torch, kdsr; kdsr.register(); import kdsr.tools.infer, kdsr.deploy.inference as engine\n"
        "engine.available = lambda device: None  # no estimate: only the error of the allocator\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (900 << 20), ) * 2)\n"
        "sys.argv = ['kdsr', 'infer', 'edsr.pth', 'in', '-o', 'out']\n"
        "from kdsr import cli; cli.main()"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr
    assert read(Path("out/huge.png")).shape == (3000, 3000, 3)


# ---------------------------------------------------------------------------------------------------- ground truth


def test_psnr_and_ssim_per_image_and_mean(nearest: Make, command: Command) -> None:
    truths = {}
    for number, name in enumerate(("a", "sub/b")):
        gt = write(Path(f"gt/{name}.png"), noise(33, 41, 3, seed=number))  # one more than twice the LQ image
        write(Path(f"in/{name}.jpg"), cv2.resize(gt, (20, 16), interpolation=cv2.INTER_AREA))
        truths[name] = gt[:32, :40]
    code, out, _ = command("infer", nearest(2), "in", "-o", "out", "--gt", "gt")
    assert code == 0
    with open("out/metrics.csv", newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    values = []
    for name, gt in truths.items():
        image = read(Path(f"out/{name}.png"))
        values.append((psnr(image, gt, 2, True), ssim(image, gt, 2, True)))
        assert [float(rows[name][key]) for key in ("psnr", "ssim")] == pytest.approx(values[-1], abs=1e-9)
    mean = np.mean(values, axis=0)
    assert f"mean of 2  {mean[0]:.2f}  {mean[1]:.4f}".split() == out.splitlines()[-2].split()
    assert (
        command("infer", nearest(2), "in", "-o", "out", "--gt", "gt", "--resume")[1].count("2 there already")
        == 1
    )
    with open("out/metrics.csv", newline="") as file:
        assert {row["image"]: row for row in csv.DictReader(file)} == rows


def test_ground_truth_of_another_scale_fails_by_name(nearest: Make, command: Command) -> None:
    write(Path("in/ax4.png"), noise(16, 16, 3))
    write(Path("gt/ax4.png"), noise(64, 64, 3))
    code, _, err = command("infer", nearest(2), "in", "-o", "out", "--gt", "gt")
    assert code == 1 and "gt/ax4.png: has 64x64 pixels, the restored image 32x32; another scale?" in err


def test_names_of_lq_images_may_end_in_the_scale(nearest: Make, command: Command) -> None:
    write(Path("in/0801x2.png"), noise(16, 16, 3))
    write(Path("gt/0801.png"), noise(32, 32, 3))
    code, out, _ = command("infer", nearest(2), "in", "-o", "out", "--gt", "gt")
    assert code == 0 and "mean of 1" in out


# ---------------------------------------------------------------------------------------------------- beside a training


def test_a_run_is_read_and_not_touched(command: Command, run_options: dict[str, Any], photos: Path) -> None:
    """Its folder is locked, as while it trains."""
    assert run(run_options) == 0
    lock = RunLock(Path("experiments/run"))
    assert lock.take() is None

    def files() -> dict[Path, tuple[int, bytes]]:
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes())
            for path in Path("experiments").rglob("*")
            if path.is_file()
        }

    before = files()
    weights = "experiments/run/models/net_g_latest.pth"
    assert command("infer", weights, photos / "LR_x4", "-o", "out")[0] == 0
    assert command("evaluate", weights, "--sets", photos.name, "--data", photos.parent)[0] == 0
    assert files() == before
    lock.release()
