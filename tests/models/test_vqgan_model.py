"""VQGANModel on real photographs: it learns, codes come alive, its file is a network_vqgan, a run resumes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from basicsr.archs import build_network
from torch import Tensor
from torch.utils.data import DataLoader

from kdsr.archs.vqgan_arch import VQGAN
from kdsr.models.code_usage import CodeUsage
from kdsr.models.vqgan_model import VQGANModel
from kdsr.options.files import load
from kdsr.runtime.checkpoint import load_weights, read_checkpoint

DISCRIMINATOR = {
    "network_d": {"type": "PatchDiscriminator", "num_feat": 8, "num_layers": 2},
    "train": {
        "gan_opt": {"type": "GANLoss", "gan_type": "hinge", "loss_weight": 0.5},
        "optim_d": {"type": "Adam", "lr": 1e-3},
        "gan_start": 2,
    },
}


@pytest.fixture
def options(vqgan_options: dict[str, Any]) -> dict[str, Any]:
    return vqgan_options


def build(options: dict[str, Any], seed: int = 0) -> VQGANModel:
    torch.manual_seed(seed)
    return VQGANModel(copy.deepcopy(options))


def crops(size: int = 32) -> Tensor:
    """Eight crops of photographs, (8, 3, size, size) in [0, 1]."""
    photos = (skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket())
    cut = [photo[y : y + size, 150 : 150 + size] for photo in photos for y in (60, 200)]
    return torch.stack([torch.from_numpy(crop.copy()).permute(2, 0, 1) for crop in cut]).float() / 255


def step(model: VQGANModel, iteration: int, images: Tensor) -> dict[str, float]:
    model.feed_data({"gt": images, "lq": torch.zeros_like(images)})  # the target is what it learns from
    model.optimize_parameters(iteration)
    return {name: float(value) for name, value in model.get_current_log().items()}


def test_it_learns_photographs(options: dict[str, Any]) -> None:
    model = build(options)
    images = crops()
    log = [step(model, iteration, images) for iteration in range(1, 31)]
    assert set(log[0]) == {"l_pix", "l_commit", "l_codebook", "perplexity", "codes_used"}
    assert sum(entry["l_pix"] for entry in log[-5:]) < 0.6 * sum(entry["l_pix"] for entry in log[:5])
    assert 1 <= log[-1]["perplexity"] <= 32 and 0 < log[-1]["codes_used"] <= 1
    mean_colour = (images - images.mean((0, 2, 3), keepdim=True)).abs().mean().item()
    assert log[-1]["l_pix"] < mean_colour, "it is better than a flat image"


def test_first_an_autoencoder(options: dict[str, Any]) -> None:
    options["train"]["vq_start"] = 2
    model, images = build(options), crops()
    logs = [step(model, iteration, images) for iteration in (1, 2, 3)]
    assert ["l_commit" in log for log in logs] == [False, False, True]
    assert all(log["l_codebook"] > 0 for log in logs)
    model.reconstructor.quantize = False
    unquantized = model.reconstructor(images)
    torch.testing.assert_close(unquantized, model.net_g.decode(model.net_g.encoding(model.net_g(images))))
    torch.testing.assert_close(model.restore(images), model.net_g.reconstruct(images).image)


def test_dead_codes_restart_where_the_encodings_are(options: dict[str, Any]) -> None:
    options["train"]["restart_every"] = 3
    model, images = build(options), crops()
    codebook = model.net_g.quantize.embedding.weight
    codebook.data[4:] += 100.0  # far from every encoding: never used
    step(model, 1, images)
    step(model, 2, images)
    assert (model.usage.idle[4:] == 2).all() and (codebook[4:] > 50).all()
    kept = codebook[:4].detach().clone()
    step(model, 3, images)
    encoded = model.reconstructor.result.encoding.detach().permute(0, 2, 3, 1).reshape(-1, 8)
    differences = (codebook[4:, None].detach() - encoded).abs().amax(2).min(1).values
    assert (differences == 0).all(), "each restarted code is an encoder output"
    assert (model.usage.idle[4:] == 0).all(), "restarted codes have time to be used"
    assert (codebook[:4] - kept).abs().max() < 0.1, "the others stay where they are"
    result = model.net_g.reconstruct(images)
    assert result.codes.unique().numel() > 4


def test_usage_statistics() -> None:
    usage = CodeUsage(4)
    usage.update(torch.tensor([0, 1, 2, 3]))
    values = usage.statistics()
    assert values["perplexity"].item() == pytest.approx(4) and values["codes_used"].item() == 1
    for _ in range(2000):
        usage.update(torch.tensor([[0, 1], [1, 0]]))
    values = usage.statistics()
    assert values["perplexity"].item() == pytest.approx(2, rel=1e-3)
    assert values["codes_used"].item() == 0.5
    assert usage.idle.tolist() == [0, 0, 2000, 2000]


def test_usage_can_leave_out_a_step() -> None:
    usage = CodeUsage(4)
    usage.update(torch.tensor([2, 2]), torch.tensor(False))
    assert {name: value.item() for name, value in usage.statistics().items()} == {
        "perplexity": 1,
        "codes_used": 0,
    }
    usage.update(torch.tensor([0, 1]), torch.tensor(True))
    before = copy.deepcopy(usage.state_dict())
    usage.update(torch.tensor([2, 2]), torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in usage.state_dict().items())
    usage.idle.fill_(9)
    codebook, encoding = torch.zeros(4, 3), torch.full((1, 3, 2, 2), torch.nan)
    usage.restart_idle(codebook, encoding, 5, torch.Generator(), torch.tensor(False))
    assert (codebook == 0).all() and (usage.idle == 9).all()
    usage.restart_idle(codebook, torch.ones(1, 3, 2, 2), 5, torch.Generator(), torch.tensor(True))
    assert (codebook == 1).all() and (usage.idle == 0).all()


def test_restarts_draw_from_the_models_generator_only() -> None:
    codebooks = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        usage, codebook = CodeUsage(16), torch.zeros(16, 3)
        usage.idle.fill_(5)
        encoding = torch.linspace(0, 1, 3 * 64).reshape(1, 3, 8, 8)
        usage.restart_idle(codebook, encoding, 5, torch.Generator().manual_seed(7))
        codebooks.append(codebook)
    assert torch.equal(*codebooks) and codebooks[0].unique(dim=0).shape[0] > 8


@pytest.mark.parametrize("ema_decay", [0, 0.9])
def test_saved_file_is_a_network_vqgan(options: dict[str, Any], tmp_path: Path, ema_decay: float) -> None:
    options["train"]["ema_decay"] = ema_decay
    model = build(options)
    for iteration in (1, 2):
        step(model, iteration, crops())
    model.save(0, 2)
    extractor = build_network({key: v for key, v in options["network_g"].items() if key != "decoder"})
    load_weights(
        extractor,
        tmp_path / "net_g_2.pth",
        strict=False,
        option="path.pretrain_network_vqgan",
        required=VQGAN.required_prefixes,
    )
    extractor.to(memory_format=extractor.memory_format_on_cpu)
    features, theirs = extractor(crops()), model.net_g(crops())
    assert torch.equal(features[2], theirs[2])
    assert torch.equal(extractor.code_logits(features), model.net_g.code_logits(theirs))
    assert ("params_ema" in read_checkpoint(tmp_path / "net_g_2.pth")) == (ema_decay > 0)


@pytest.mark.parametrize("adversarial", [False, True])
def test_resumed_run_goes_on_as_the_uninterrupted_one(
    options: dict[str, Any], tmp_path: Path, adversarial: bool
) -> None:
    if adversarial:
        options["network_d"] = DISCRIMINATOR["network_d"]
        options["train"].update(DISCRIMINATOR["train"], gan_start=0)
    options["train"]["restart_every"] = 2
    images = crops()
    model = build(options)
    model.net_g.quantize.embedding.weight.data[8:] += 100.0
    for iteration in (1, 2, 3):
        step(model, iteration, images)
    model.save(0, 3)
    expected = [step(model, iteration, images) for iteration in (4, 5)]

    state = read_checkpoint(tmp_path / "3.state")
    resumed = build(options, seed=99)
    resumed.opt["path"]["resume_state"] = str(tmp_path / "3.state")
    resumed.resume_training(state)
    assert [step(resumed, iteration, images) for iteration in (4, 5)] == expected
    for name, value in model.net_g.state_dict().items():
        assert torch.equal(value, resumed.net_g.state_dict()[name]), name


def test_validation_measures_the_reconstruction_of_any_size(options: dict[str, Any]) -> None:
    model = build(options)
    image = crops(31)[:1]
    model.net_g.train()
    restored = model.restore(image)
    assert restored.shape == image.shape and model.net_g.training
    padded = torch.nn.functional.pad(image, (0, 1, 0, 1), mode="reflect")
    torch.testing.assert_close(restored, model.net_g.reconstruct(padded).image[..., :31, :31])

    from basicsr.data.paired_image_dataset import PairedImageDataset

    loader = DataLoader(PairedImageDataset(copy.deepcopy(options["datasets"]["val"])))
    assert 3 < model.validator.validate(loader, 1, None)["psnr"] < 20


def test_discriminator_joins_at_its_iteration(options: dict[str, Any]) -> None:
    options["network_d"] = DISCRIMINATOR["network_d"]
    options["train"].update(DISCRIMINATOR["train"])
    model, images = build(options), crops()
    assert model.net_d is not None
    before = copy.deepcopy(model.net_d.state_dict())
    logs = [step(model, iteration, images) for iteration in (1, 2, 3, 4)]
    assert all("l_d" not in log and "l_g_gan" not in log for log in logs[:2])
    assert all({"l_d", "l_g_gan"} <= log.keys() for log in logs[2:])
    weights = [name for name in before if name.endswith(("original", "0.weight"))]
    assert all(not torch.equal(before[name], model.net_d.state_dict()[name]) for name in weights)
    assert all(parameter.grad is not None for parameter in model.net_d.parameters())
    model.optimizers[0].param_groups[0]["lr"] = 0.0  # a generator that stands still is found out
    for iteration in range(5, 15):
        last = step(model, iteration, images)
    assert last["l_d"] < 0.9 * logs[2]["l_d"]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_not_finite_moves_nothing(options: dict[str, Any], fused: bool) -> None:
    """Neither network, nor the codebook, nor its histogram; unused codes go to no encoding that is no number."""
    options["network_d"] = DISCRIMINATOR["network_d"]
    options["train"].update(
        copy.deepcopy(DISCRIMINATOR["train"]), gan_start=0, restart_every=3, ema_decay=0.9
    )
    for key in ("optim_g", "optim_d"):
        options["train"][key]["fused"] = fused
    model, images = build(options), crops()
    assert model.net_d is not None
    model.net_g.quantize.embedding.weight.data[8:] += 100.0  # never used
    for iteration in (1, 2):
        step(model, iteration, images)
    nets = [model.net_g, model.net_d, model.net_g_ema, model.usage]
    model.usage.idle[8:] = 10  # their restart is due in the very step that is not finite
    before = copy.deepcopy([net.state_dict() for net in nets])
    drawn = model.generator.get_state()
    bad = images.clone()
    bad[2, 0, 5, 5] = torch.nan
    log = step(model, 3, bad)
    assert not any(torch.tensor(log[name]).isfinite() for name in ("l_pix", "l_commit", "l_g_gan", "l_d"))
    assert log["perplexity"] > 0
    for net, old in zip(nets, before, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in net.state_dict().items())
    assert not torch.equal(model.generator.get_state(), drawn), "draws do not depend on what became of a step"
    assert model.guard.skipped.item() == 1
    for iteration in (4, 5, 6):
        step(model, iteration, images)
    assert (model.net_g.quantize.embedding.weight.abs() < 50).all(), (
        "they restart at the next finite occasion"
    )
    assert not any(
        torch.equal(net.state_dict()[name], old[name])
        for net, old in zip(nets[:2], before[:2], strict=True)
        for name in list(old)[:1]
    )


def test_the_discriminators_gradient_is_clipped_too(options: dict[str, Any]) -> None:
    options["network_d"] = DISCRIMINATOR["network_d"]
    options["train"].update(copy.deepcopy(DISCRIMINATOR["train"]), gan_start=1, clip_grad_norm=1e-3)
    model = build(options)
    logs = [step(model, iteration, crops()) for iteration in (1, 2)]
    assert "grad_norm" in logs[0] and "grad_norm_d" not in logs[0]
    for name, net in (("grad_norm", model.net_g), ("grad_norm_d", model.net_d)):
        assert logs[1][name] > 1e-3
        left = torch.stack([p.grad.norm() for p in net.parameters() if p.grad is not None]).norm()
        assert left.item() == pytest.approx(1e-3, rel=2e-3)


@pytest.mark.parametrize("adaptive", [False, True])
def test_loss_weight_scales_the_adversarial_term(options: dict[str, Any], adaptive: bool) -> None:
    options["network_d"] = DISCRIMINATOR["network_d"]
    options["train"].update(copy.deepcopy(DISCRIMINATOR["train"]), gan_start=0, gan_adaptive_weight=adaptive)
    logs = []
    for weight in (0.5, 1.0, 0.0, [[0, 0.5], [9, 1.0]]):
        options["train"]["gan_opt"]["loss_weight"] = weight
        logs.append(step(build(options), 1, crops()))
    assert logs[0]["l_g_gan"] != 0
    assert logs[1]["l_g_gan"] == pytest.approx(2 * logs[0]["l_g_gan"])
    assert logs[2]["l_g_gan"] == 0 and logs[2]["l_d"] == logs[0]["l_d"]
    assert logs[3] == logs[0]  # a schedule is the generator's too, and leaves the discriminator alone


def test_reduced_precision(options: dict[str, Any]) -> None:
    options["precision"] = {"amp": "bf16"}
    model = build(options)
    logs = [step(model, iteration, crops()) for iteration in range(1, 11)]
    assert logs[-1]["l_pix"] < logs[0]["l_pix"]
    assert model.output.dtype == torch.float32


@pytest.mark.slow
def test_perceptual_term_with_vgg_weights(options: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    from torchvision.models import vgg11

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    cache = tmp_path / "hub" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(vgg11(weights=None).state_dict(), cache / "vgg11-8a719046.pth")
    options["train"]["perceptual_opt"] = {
        "type": "PerceptualLoss", "vgg_type": "vgg11", "layer_weights": {"relu2_1": 1.0},
    }  # fmt: skip
    assert VQGANModel.check_options(options) == []
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # the file is there: nothing may be fetched
    model = build(options)
    with_term = step(model, 1, crops())
    assert with_term["l_percep"] > 0
    assert "l_style" not in with_term


def test_extractor_that_ships_is_the_network_that_was_trained() -> None:
    """Shapes would not tell: the groups of the normalisation and the input's range are in no weight."""
    folder = Path(__file__).resolve().parents[2] / "options"
    trained = load(folder / "train" / "VQGAN_f16_small.yml")["network_g"]
    used = load(folder / "_base_" / "extractors" / "VQGAN_f16_small.yml")["network_vqgan"]
    assert trained.pop("decoder") is True
    assert used == trained
