"""Option files of stock BasicSR and of DCKD's release run unchanged.

The texts below hold every key of those files (values are small); a key that is refused here breaks somebody's file.
"""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.utils import tensor2img
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from kdsr import test as test_entry
from kdsr import train as train_entry
from kdsr.options.check import check
from kdsr.options.files import load

TRAIN_DATA = """
datasets:
  train:
    name: DIV2K
    type: PairedImageDataset
    dataroot_gt: data/GT
    dataroot_lq: data/LR_x4
    meta_info_file: data/meta_info.txt
    # (for lmdb)
    # dataroot_gt: datasets/DIV2K/DIV2K_train_HR_sub.lmdb
    filename_tmpl: '{}'
    io_backend:
      type: disk
      # (for lmdb)
      # type: lmdb

    gt_size: 32
    use_hflip: true
    use_rot: true
    color: rgb
    mean: [0.0, 0.0, 0.0]
    std: [1.0, 1.0, 1.0]

    # data loader
    num_worker_per_gpu: 0
    batch_size_per_gpu: 2
    dataset_enlarge_ratio: 100
    prefetch_mode: cpu
    num_prefetch_queue: 1
    pin_memory: false

  val:
    name: Set5
    type: PairedImageDataset
    dataroot_gt: data/GT
    dataroot_lq: data/LR_x4
    io_backend:
      type: disk

  val_2:
    name: Set14
    type: PairedImageDataset
    dataroot_gt: data/GT
    dataroot_lq: data/LR_x4
    filename_tmpl: '{}'
    io_backend:
      type: disk
"""
TEST_DATA = """
datasets:
  test_1:  # the 1st test dataset
    name: Set5
    type: PairedImageDataset
    dataroot_gt: data/GT
    dataroot_lq: data/LR_x4
    filename_tmpl: '{}'
    io_backend:
      type: disk
  test_2:  # the 2nd test dataset
    name: Set14
    type: PairedImageDataset
    dataroot_gt: data/GT
    dataroot_lq: data/LR_x4
    io_backend:
      type: disk
"""
TEST_DATA_WITHOUT_GT = """
datasets:
  test_1:
    name: Set5
    type: SingleImageDataset
    dataroot_lq: data/LR_x4
    io_backend:
      type: disk
"""
SWINIR = """
  type: SwinIR
  upscale: 4
  in_chans: 3
  img_size: 48
  window_size: 8
  img_range: 1.
  depths: [2]
  embed_dim: 8
  num_heads: [2]
  mlp_ratio: 2
  upsampler: 'pixelshuffle'
  resi_connection: '1conv'
"""
EDSR = """
  type: EDSR
  num_in_ch: 3
  num_out_ch: 3
  num_feat: 8
  num_block: 1
  upscale: 4
  res_scale: 1
  img_range: 255.
  rgb_mean: [0.4488, 0.4371, 0.4040]
"""
TRAINING = """
train:
  ema_decay: 0.999
  optim_g:
    type: Adam
    lr: !!float 1e-4
    weight_decay: 0
    betas: [0.9, 0.99]

  scheduler:
    type: %s

  total_iter: 2
  warmup_iter: -1  # no warm up

  # losses
  pixel_opt:
    type: L1Loss
    loss_weight: 1.0
    reduction: mean
"""
MULTI_STEP = "MultiStepLR\n    milestones: [200000]\n    gamma: 0.5"
COSINE = (
    "CosineAnnealingRestartLR\n    periods: [2, 2]\n    restart_weights: [1, 1]\n    eta_min: !!float 1e-7"
)
VALIDATION = """
val:
  val_freq: !!float 5e3
  save_img: false
  pbar: False
  suffix: ~
%s
  metrics:
    psnr: # metric name, can be arbitrary
      type: calculate_psnr
      crop_border: 4
      test_y_channel: false
      better: higher  # the higher, the better. Default: higher
    ssim:
      type: calculate_ssim
      crop_border: 4
      test_y_channel: false
      better: higher
"""
LOGGING = """
logger:
  print_freq: 1
  save_checkpoint_freq: !!float 5e3
  use_tb_logger: true
  wandb:
    project: ~
    resume_id: ~

dist_params:
  backend: nccl
  port: 29500
"""
HEAD = (
    "name: {name}\nmodel_type: {model}\nscale: 4\n"
    "num_gpu: {num_gpu}  # set num_gpu: 0 for cpu mode\nmanual_seed: 0\n"
)


def stock_training(model: str, network: str, scheduler: str) -> str:
    return (
        HEAD.format(name="stock", model=model, num_gpu=8)
        + TRAIN_DATA
        + f"\nnetwork_g:{network}\npath:\n  pretrain_network_g: ~\n  strict_load_g: true\n  param_key_g: params\n"
        + "  resume_state: ~\n  ignore_resume_networks: ~\n"
        + TRAINING % scheduler
        + VALIDATION % ""
        + LOGGING
    )


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(photos)
    listing = "".join(f"{file.name} (96,96,3)\n" for file in sorted((photos / "GT").iterdir()))
    Path("meta_info.txt").write_text(listing)


def write(text: str, name: str = "file.yml") -> str:
    Path(name).write_text(text.replace("data/meta_info.txt", "meta_info.txt"))
    return name


@pytest.mark.parametrize(
    ("model", "network", "scheduler"),
    [("SRModel", EDSR, MULTI_STEP), ("SwinIRModel", SWINIR, COSINE)],
    ids=["SRModel", "SwinIRModel"],
)
def test_stock_training_files(
    model: str, network: str, scheduler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(stock_training(model, network, scheduler))
    assert train_entry.main(["-opt", file]) == 0
    saved = torch.load("experiments/stock/models/net_g_latest.pth", weights_only=True)
    assert set(saved) == {"params", "params_ema"}
    log = next(Path("experiments/stock").glob("train_*.log")).read_text()
    assert re.findall(r"iter: +(\d+), lr", log) == ["1", "2"]
    assert log.count("# psnr: ") == 2  # both sets
    if not torch.cuda.is_available():
        assert "num_gpu: 8 was requested, the run uses the CPU" in capsys.readouterr().err
    assert Path("tb_logger/stock").is_dir()


def test_a_stock_run_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    text = stock_training("SRModel", EDSR, MULTI_STEP).replace(
        "save_checkpoint_freq: !!float 5e3", "save_checkpoint_freq: 1"
    )
    file = write(text.replace("total_iter: 2", "total_iter: 1"))
    assert train_entry.main(["-opt", file]) == 0
    file = write(text.replace("total_iter: 2", "total_iter: 3"))
    assert train_entry.main(["-opt", file, "--auto_resume"]) == 0
    assert Path("experiments/stock/training_states/3.state").is_file()
    logs = sorted(Path("experiments/stock").glob("train_*.log"), key=lambda log: log.stat().st_mtime_ns)
    assert re.findall(r"iter: +(\d+), lr", logs[-1].read_text())[-2:] == ["2", "3"]


@pytest.mark.parametrize("kind", ["compiled", "averaged", "safetensors", "state_dict", "bare"])
def test_stock_models_read_what_the_check_has_read(kind: str) -> None:
    """Weights that BasicSR's reader refuses or misreads, in a training and in a test."""
    options = load(write(stock_training("SRModel", EDSR, MULTI_STEP)))
    net = build_network(options["network_g"])
    state, beside, key = net.state_dict(), {"psnr": np.float64(31.5), "seeds": np.arange(3)}, "params"
    if kind == "safetensors":
        save_file(state, "weights.safetensors")
    elif kind == "bare":
        torch.save(state, "weights.pth")
        key = "~"
    elif kind == "state_dict":
        torch.save(
            {"state_dict": {f"module.{name}": value for name, value in state.items()}, **beside},
            "weights.pth",
        )
        key = "auto"
    else:
        wrapped = torch.compile(net) if kind == "compiled" else AveragedModel(torch.compile(net))
        torch.save({"params": wrapped.state_dict(), **beside}, "weights.pth")
    file = "weights.safetensors" if kind == "safetensors" else "weights.pth"
    text = stock_training("SRModel", EDSR, MULTI_STEP).replace(
        "pretrain_network_g: ~", f"pretrain_network_g: {file}"
    )
    text = text.replace("param_key_g: params", f"param_key_g: {key}").replace("lr: !!float 1e-4", "lr: 0")
    assert train_entry.main(["-opt", write(text)]) == 0
    trained = torch.load("experiments/stock/models/net_g_latest.pth", weights_only=True)
    for weights in (trained["params"], trained["params_ema"]):
        torch.testing.assert_close(dict(weights), dict(state))
    text = stock_test("SRModel", EDSR, TEST_DATA_WITHOUT_GT) + "\nval:\n  save_img: true\n  suffix: ~\n"
    text = text.replace("weights.pth", file).replace("param_key_g: params_ema", f"param_key_g: {key}")
    assert test_entry.main(["-opt", write(text)]) == 0


@pytest.mark.parametrize("key", ["auto", "params_ema", "~"])
def test_a_stock_run_resumes_from_its_own_weights_whatever_the_key_of_its_first(key: str) -> None:
    options = load(write(stock_training("SRModel", EDSR, MULTI_STEP)))
    state = build_network(options["network_g"]).state_dict()
    torch.save(state if key == "~" else {"params_ema": state}, "weights.pth")
    text = stock_training("SRModel", EDSR, MULTI_STEP).replace(
        "pretrain_network_g: ~", "pretrain_network_g: weights.pth"
    )
    text = text.replace("param_key_g: params", f"param_key_g: {key}").replace(
        "!!float 5e3\n  use_tb", "1\n  use_tb"
    )
    assert train_entry.main(["-opt", write(text.replace("total_iter: 2", "total_iter: 1"))]) == 0
    file = "experiments/stock/models/net_g_1.pth"
    first = torch.load(file, weights_only=True)
    first["params_ema"]["conv_first.weight"] += 5  # now they cannot be taken for each other
    torch.save(first, file)
    assert train_entry.main(["-opt", write(text), "--auto_resume"]) == 0
    second = torch.load(file.replace("net_g_1", "net_g_2"), weights_only=True)
    for name, weights in first.items():
        torch.testing.assert_close(
            second[name]["conv_first.weight"], weights["conv_first.weight"], rtol=0, atol=0.1
        )


def test_every_loss_of_stock_files_is_known() -> None:
    """perceptual_opt would download VGG; its keys are those of BasicSR's files."""
    perceptual = """
  perceptual_opt:
    type: PerceptualLoss
    layer_weights:
      'conv5_4': 1  # before relu
    vgg_type: vgg19
    use_input_norm: true
    range_norm: false
    perceptual_weight: 1.0
    style_weight: 0
    criterion: l1
"""
    text = stock_training("SRModel", EDSR, MULTI_STEP).replace("\nval:\n", perceptual + "\nval:\n")
    options = load(write(text))
    assert options["train"]["perceptual_opt"]["layer_weights"] == {"conv5_4": 1}
    assert check(options, True) == []


def stock_test(model: str, network: str, data: str) -> str:
    return (
        HEAD.format(name="stock_test", model=model, num_gpu="auto")
        + "crop_border: 4\nsave_img: true\nsuffix: ~\n"  # older files have these at the top
        + data
        + f"\nnetwork_g:{network}\npath:\n  pretrain_network_g: weights.pth\n  strict_load_g: true\n"
        + "  param_key_g: params_ema\n"
    )


@pytest.mark.parametrize(
    ("model", "network"), [("SRModel", EDSR), ("SwinIRModel", SWINIR)], ids=["SRModel", "SwinIRModel"]
)
def test_stock_test_files(model: str, network: str) -> None:
    val = (VALIDATION % "").replace("  val_freq: !!float 5e3\n  save_img: false", "  save_img: true")
    options = load(write(stock_test(model, network, TEST_DATA) + val))
    torch.save({"params_ema": build_network(options["network_g"]).state_dict()}, "weights.pth")
    assert test_entry.main(["-opt", "file.yml"]) == 0
    images = {path.parent.name for path in Path("results/stock_test/visualization").rglob("*.png")}
    assert images == {"Set5", "Set14"}
    log = next(Path("results/stock_test").glob("test_*.log")).read_text()
    assert len(re.findall(r"# psnr: \d+\.\d+", log)) == 2


def test_stock_test_files_without_gt(capsys: pytest.CaptureFixture[str]) -> None:
    text = stock_test("SRModel", EDSR, TEST_DATA_WITHOUT_GT) + "\nval:\n  save_img: true\n  suffix: ~\n"
    options = load(write(text))
    torch.save({"params_ema": build_network(options["network_g"]).state_dict()}, "weights.pth")
    assert test_entry.main(["-opt", "file.yml"]) == 0
    assert len(list(Path("results/stock_test/visualization/Set5").glob("*.png"))) == 4
    # with a metric that wants a GT stock BasicSR ends in a TypeError, after the first image
    write(text + "  metrics:\n    psnr: {type: calculate_psnr, crop_border: 4}\n")
    assert test_entry.main(["-opt", "file.yml"]) == 2
    assert "datasets.test_1: has no GT, which calculate_psnr needs" in capsys.readouterr().err


def test_masters_roots_are_understood() -> None:
    text = stock_training("SRModel", EDSR, MULTI_STEP)
    text = text.replace(
        "  resume_state: ~", "  resume_state: ~\n  experiments_root: out/exp\n  results_root: out/res"
    )
    assert train_entry.main(["-opt", write(text)]) == 0
    assert Path("out/exp/stock/models/net_g_latest.pth").is_file()
    assert not Path("out/res").exists() and not Path("experiments").exists()


RELEASE = (
    HEAD.format(name="release", model="DCKDModel", num_gpu=4)
    + TRAIN_DATA.replace("  val:\n", "  val_1:\n")
    + f"""
network_t:{SWINIR.replace("embed_dim: 8", "embed_dim: 12")}
network_g:{SWINIR}
network_his: true

network_vqgan:
  type: VQGAN
  embed_dim: 8
  n_embed: 16
  ddconfig:
    in_channels: 3
    out_ch: 3
    resolution: 256
    ch: 32
    ch_mult: [1, 1, 1, 1, 1]
    num_res_blocks: 1
    attn_resolutions: [16]
    dropout: 0.0
    double_z: false
    z_channels: 8

path:
  pretrain_network_t: teacher.pth
  strict_load_t: true
  param_key_t: params_ema

  pretrain_network_g: ~
  strict_load_g: true
  param_key_g: params_ema

  pretrain_network_vqgan: vqgan.ckpt
  strict_load_vqgan: false
  param_key_vqgan: state_dict
"""
    + TRAINING % "MultiStepLR\n    milestones: [250000]\n    gamma: 0.1"
    + """
  logits_opt:
    type: L1Loss
    loss_weight: 1.0
    reduction: mean

  lcr_opt:
    type: L1Loss
    loss_weight: 1.0
    reduction: mean
  noisy:
    prob: 0.5

  cl_opt:
    type: ContrasLoss
    d_func: L1
    loss_weight: 0.1
    weights: [0.03125, 0.0625, 0.125, 0.25, 1.0]
  num_neg: 4
  update_decay: 0.1
  step: [1000, 2000, 3000]

  gaussian_blur_prob: 0
  resize_prob: 0
  gaussian_noise_prob: 1.0
  gray_noise_prob: 0.5

  ce_opt:
    type: CELoss
    loss_weight: 0.001
    reduction: mean
"""
    + VALIDATION % "\n  window_size: 8\n"
    + LOGGING
)


def test_the_dckd_release_trains_and_its_student_is_tested(capsys: pytest.CaptureFixture[str]) -> None:
    options = load(write(RELEASE, "release.yml"))
    torch.save({"params": build_network(options["network_t"]).state_dict()}, "teacher.pth")  # no params_ema
    decoder = {"decoder.conv_in.weight": torch.zeros(3), "loss.logvar": torch.zeros(())}
    torch.save({"state_dict": build_network(options["network_vqgan"]).state_dict() | decoder}, "vqgan.ckpt")
    assert train_entry.main(["-opt", "release.yml"]) == 0
    log = next(Path("experiments/release").glob("train_*.log")).read_text()
    for loss in ("l_pix", "l_ts", "l_lcr", "l_cl", "l_ce"):
        assert len(re.findall(rf"\b{loss}: [0-9.e+-]+ ", log)) == 2
    assert "params_ema" in log  # the fallback to params is logged

    text = (
        HEAD.format(name="release_test", model="SRModel", num_gpu=1)
        + TEST_DATA
        + f"\nnetwork_g:{SWINIR}\npath:\n  pretrain_network_g: experiments/release/models/net_g_latest.pth\n"
        + "  strict_load_g: true\n  param_key_g: params_ema\n"
        + (VALIDATION % "").replace("  val_freq: !!float 5e3\n", "")
    )
    assert test_entry.main(["-opt", write(text, "release_test.yml")]) == 0
    assert re.search(r"# ssim: 0\.\d+", next(Path("results/release_test").glob("test_*.log")).read_text())


RELEASE_TEST = (
    HEAD.format(name="SwinIR_SRx4", model="SRModel", num_gpu=1)
    + TEST_DATA.replace("data/LR_x4", "odd/LQ")
    .replace("data/GT", "odd/GT")
    .replace("    filename_tmpl: '{}'\n", "")
    .replace("    io_backend:", "    filename_tmpl: '{}x4'\n    io_backend:")
    + f"\nnetwork_g:{SWINIR}\npath:\n  pretrain_network_g: weights.pth\n  strict_load_g: true\n"
    + "  param_key_g: params_ema\n"
    + """
val:
  save_img: true
  suffix: ~  # add suffix to saved images

  metrics:
    psnr:
      type: calculate_psnr
      crop_border: 2
      test_y_channel: true
    ssim:
      type: calculate_ssim
      crop_border: 2
      test_y_channel: true
"""
)


@pytest.fixture
def odd_weights() -> dict[str, torch.Tensor]:
    """odd/ with images whose LQ sides are no multiples of 8, 5×7 pixels among them, and weights.pth."""
    for number, (height, width) in enumerate([(21, 19), (5, 7), (16, 9), (24, 24)]):
        generator = np.random.default_rng(number)
        for folder, scale, name in (("GT", 4, ""), ("LQ", 1, "x4")):
            Path("odd", folder).mkdir(parents=True, exist_ok=True)
            image = generator.integers(0, 256, (height * scale, width * scale, 3), dtype=np.uint8)
            assert cv2.imwrite(f"odd/{folder}/{number}{name}.png", image)
    torch.manual_seed(5)
    options = load(write(RELEASE_TEST, "release_test.yml"))
    state = build_network(options["network_g"]).state_dict()
    torch.save({"params_ema": state}, "weights.pth")
    return state


def restored(run: str, dataset: str = "Set5") -> list[np.ndarray]:
    files = sorted(Path("results", run, "visualization", dataset).glob("*.png"))
    return [cv2.imread(str(file)) for file in files]


@pytest.mark.parametrize("model", ["SRModel", "SwinIRModel"])
@pytest.mark.parametrize("window", ["", "  window_size: 8\n", "  window_size: 16\n"])
def test_the_releases_test_takes_images_of_any_size(
    model: str, window: str, odd_weights: dict[str, torch.Tensor]
) -> None:
    """BasicSR's models as KDModel does it: padded by reflection, and cropped again."""
    text = RELEASE_TEST.replace("model_type: SRModel", f"model_type: {model}")
    text = text.replace("  save_img: true\n", f"  save_img: true\n{window}")
    assert test_entry.main(["-opt", write(text, "release_test.yml")]) == 0
    ours = text.replace(f"model_type: {model}", "model_type: KDModel").replace("SwinIR_SRx4", "ours")
    assert test_entry.main(["-opt", write(ours, "ours.yml")]) == 0
    assert [image.shape[:2] for image in restored("SwinIR_SRx4")] == [(84, 76), (20, 28), (64, 36), (96, 96)]
    for one, other in zip(restored("SwinIR_SRx4"), restored("ours"), strict=True):
        assert np.array_equal(one, other)
    log, ours_log = (
        re.findall(r"# (?:psnr|ssim): (\S+)", next(Path("results", name).glob("test_*.log")).read_text())
        for name in ("SwinIR_SRx4", "ours")
    )
    assert len(log) == 4 and log == ours_log


def test_images_that_fit_are_as_stock_basicsr_restores_them(odd_weights: dict[str, torch.Tensor]) -> None:
    assert test_entry.main(["-opt", write(RELEASE_TEST, "release_test.yml")]) == 0
    net = build_network(load("release_test.yml")["network_g"]).eval()
    net.load_state_dict(odd_weights)
    lq = torch.from_numpy(cv2.imread("odd/LQ/3x4.png")[..., ::-1].copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = tensor2img([net(lq)])
    assert np.array_equal(restored("SwinIR_SRx4")[3], expected)


def test_a_stock_training_validates_images_of_any_size(odd_weights: dict[str, torch.Tensor]) -> None:
    text = stock_training("SRModel", SWINIR, MULTI_STEP)
    options = load(write(text))
    for name in ("val", "val_2"):
        options["datasets"][name].update(dataroot_gt="odd/GT", dataroot_lq="odd/LQ", filename_tmpl="{}x4")
    Path("file.yml").write_text(yaml.safe_dump(options))
    assert train_entry.main(["-opt", "file.yml"]) == 0
    log = next(Path("experiments/stock").glob("train_*.log")).read_text()
    assert len(re.findall(r"# psnr: \d+\.\d+", log)) == 2


def test_a_model_of_ones_own_keeps_its_test(odd_weights: dict[str, torch.Tensor]) -> None:
    from basicsr.models.sr_model import SRModel
    from basicsr.utils.registry import MODEL_REGISTRY

    class OwnTest(SRModel):
        def test(self) -> None:
            self.output = torch.zeros(1, 3, 4 * self.lq.shape[-2], 4 * self.lq.shape[-1])

    MODEL_REGISTRY.register(OwnTest)
    try:
        text = RELEASE_TEST.replace("model_type: SRModel", "model_type: OwnTest")
        assert test_entry.main(["-opt", write(text, "own.yml")]) == 0
    finally:
        del MODEL_REGISTRY._obj_map["OwnTest"]
    assert all(not image.any() for image in restored("SwinIR_SRx4"))
