"""Every term in every model that has terms: two steps, all names in the log, all gradients finite."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs import build_network
from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.distill.term import Term, all_terms
from kdsr.losses.slkd_loss import edge_texture_distance
from kdsr.models.kd_model import KDModel
from kdsr.options.check import check
from small_networks import small_vqgan

Options = dict[str, Any]
L1 = {"type": "L1Loss", "loss_weight": 1.0, "reduction": "mean"}
MODELS = sorted(name for name, model in MODEL_REGISTRY if issubclass(model, KDModel))
LOSSES = {
    "fitnet_opt": "FitNetLoss",
    "at_opt": "AttentionTransferLoss",
    "fakd_opt": "AffinityLoss",
    "rkd_opt": "RKDLoss",
    "csd_opt": "ContrasLoss",
    "facd_opt": "FACDLoss",
    "kl_opt": "SpatialKLLoss",
    "nc_opt": "NaturalSceneLoss",
    "et_opt": "EdgeTextureLoss",
    "cl_opt": "ContrasLoss",
    "ce_opt": "CELoss",
    "fm_opt": "FitNetLoss",
    "neg_opt": "NegativeLoss",
    "wavelet_opt": "WaveletLoss",
    "fft_opt": "FFTLoss",
    "fft_gt_opt": "FFTLoss",
    "masked_opt": "MaskedLoss",
}
WITH_PIXEL_LOSSES = {"pixel_opt", "logits_opt", "lcr_opt", "zoom_in_opt", "zoom_out_opt", "bm_opt"}
# what a term says where the scale is none of its own
REFUSED = {
    "zoom_out_opt": "train.zoom_out_opt: downsamples x by the scale, which is 1; it is for super-resolution only",
    "et_opt": "scale: train.et_opt gives Teacher B the clean image instead of the degraded one, so both must "
    "have the same size: set 1, not 4",
}
NAFNET = {"type": "NAFNet", "width": 4, "enc_blk_nums": [1, 1], "middle_blk_num": 1, "dec_blk_nums": [1, 1]}
VQGAN = small_vqgan(3)
TAPS = {
    "EDSR": [{"student": "body.0", "teacher": "body.1"}],
    "NAFNet": [{"student": "encoders.0", "teacher": "encoders.0"}],
}


def saved(network: Options, file: str, key: str = "params") -> str:
    torch.manual_seed(7)
    net = build_network(copy.deepcopy(network))
    for parameter in net.parameters():  # NAFNet's blocks begin as the identity
        torch.nn.init.normal_(parameter, std=0.1)
    torch.save({key: net.state_dict()}, file)
    return file


def as_kd(options: Options) -> None:
    options["train"]["logits_opt"] = dict(L1)


def as_dckd(options: Options) -> None:
    options.update(network_his=True, network_vqgan=copy.deepcopy(VQGAN))
    options["path"].update(pretrain_network_vqgan=saved(VQGAN, "vqgan.ckpt"))
    options["train"].update(
        logits_opt=dict(L1),
        cl_opt={"type": "ContrasLoss", "loss_weight": 0.1, "d_func": "L1", "weights": [0.25, 0.5, 1.0]},
        ce_opt={"type": "CELoss", "loss_weight": 0.001},
        num_neg=1,
    )


def as_facd(options: Options) -> None:
    options["train"].update(facd_opt={"type": "FACDLoss"}, gate="soft", taps=TAPS["EDSR"])


def as_slkd(options: Options) -> None:
    options.update(scale=1, network_g=dict(NAFNET), network_t={**NAFNET, "width": 6})
    options["path"]["pretrain_network_t"] = saved(options["network_t"], "teacher.pth")
    for dataset in options["datasets"].values():
        dataset["dataroot_lq"] = dataset["dataroot_gt"]
    options["train"].update(
        nc_opt={"type": "NaturalSceneLoss"},
        et_opt={"type": "EdgeTextureLoss"},
        encoder_taps=TAPS["NAFNet"],
        decoder_taps=[{"student": "decoders.1", "teacher": "decoders.1"}],
    )


def as_mipkd(options: Options) -> None:
    options["train"].update(
        logits_opt=dict(L1),
        fm_opt={"type": "FitNetLoss"},
        fm_aux_opt={"type": "FitNetLoss"},
        taps=TAPS[options["network_g"]["type"]],
        bm_opt=dict(L1),
        blocks=[{"student": "body.0", "teacher": "body.1"}],
    )


def as_mclir(options: Options) -> None:
    with_extractor(options)
    options["train"].update(neg_opt={"type": "NegativeLoss", "weights": [0.2, 0.3, 0.5]}, neg_iter=[1, 2])


def with_extractor(options: Options) -> None:
    options["network_extractor"] = copy.deepcopy(VQGAN)
    options["path"]["pretrain_network_extractor"] = saved(VQGAN, "extractor.ckpt")


MAKE: dict[str, Callable[[Options], None]] = {
    "KDModel": as_kd,
    "ImageCleanModel": as_kd,
    "ImageRestorationModel": as_kd,
    "DCKDModel": as_dckd,
    "FACDModel": as_facd,
    "SLKDModel": as_slkd,
    "MiPKDModel": as_mipkd,
    "MCLIRModel": as_mclir,
}


@pytest.fixture
def options(run_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    monkeypatch.chdir(tmp_path)
    run_options["network_t"] = {**run_options["network_g"], "num_feat": 12, "num_block": 2}
    run_options["path"]["pretrain_network_t"] = saved(run_options["network_t"], "teacher.pth")
    run_options["datasets"]["train"].update(batch_size_per_gpu=3, gt_size=32)
    return run_options


def switched_on(options: Options, term: type[Term]) -> None:
    train, taps = options["train"], TAPS[options["network_g"]["type"]]
    if not train.get(term.KEY):
        train[term.KEY] = {"type": LOSSES[term.KEY]} if term.KEY in LOSSES else dict(L1)
    for option in ("taps", "encoder_taps", "decoder_taps", "blocks"):
        if option in term.options.declared():
            train.setdefault(option, taps)
    if term.KEY in ("csd_opt", "neg_opt"):
        with_extractor(options)
    if term.KEY in ("cl_opt", "ce_opt"):
        options["network_vqgan"] = copy.deepcopy(VQGAN)
        options["path"].update(pretrain_network_vqgan=saved(VQGAN, "vqgan.ckpt"))
    if term.KEY in ("cl_opt", "csd_opt", "neg_opt"):
        train[term.KEY]["weights"] = [0.25, 0.5, 1.0]


def built(options: Options) -> Any:
    return dict(iter(MODEL_REGISTRY))[options["model_type"]](
        {**copy.deepcopy(options), "num_gpu": 0, "dist": False, "rank": 0, "world_size": 1, "is_train": True}
    )


def logged_in_two_steps(options: Options) -> set[str]:
    model = built(options)
    names: set[str] = set()
    for step in (1, 2):
        torch.manual_seed(step)
        gt = torch.rand(3, 3, 32, 32)
        model.feed_data({"lq": gt[..., :: options["scale"], :: options["scale"]].clone(), "gt": gt})
        model.optimize_parameters(step)
        assert model.guard.made
        unreached = [name for name, parameter in model.bundle.named_parameters() if parameter.grad is None]
        assert unreached == []  # DDP without find_unused_parameters counts on it
        assert all(parameter.grad.isfinite().all() for parameter in model.bundle.parameters())
        frozen = [net for name, net in model.networks().items() if name != "net_g"]
        assert all(parameter.grad is None for net in frozen for parameter in net.parameters())
        log = model.get_current_log()
        assert all(abs(value) < 1e6 for value in log.values())
        names |= set(log)
    return names


def logged(term: type[Term]) -> str:
    return {"pixel_opt": "l_pix", "logits_opt": "l_ts"}.get(term.KEY, "l_" + term.KEY.removesuffix("_opt"))


def test_all_models_and_terms_are_covered():
    assert set(MODELS) == set(MAKE)
    assert set(all_terms()) == set(LOSSES) | WITH_PIXEL_LOSSES


@pytest.mark.parametrize("term", all_terms().values(), ids=all_terms())
@pytest.mark.parametrize("name", MODELS)
def test_a_term_in_a_model(options: Options, name: str, term: type[Term]):
    options["model_type"] = name
    MAKE[name](options)
    switched_on(options, term)
    if (options["scale"] == 1) == (term.KEY == "zoom_out_opt") and term.KEY in REFUSED:
        assert check(options, is_train=True) == [REFUSED[term.KEY]]
        return
    assert check(options, is_train=True) == []
    assert logged(term) in logged_in_two_steps(options)


RANDOM = {"lcr_opt", "zoom_in_opt", "cl_opt", "fm_opt", "bm_opt"}  # they draw for each batch
# what compares samples of a batch, or is no mean over samples (docs/running.md)
OVER_THE_BATCH = {"rkd_opt", "csd_opt", "facd_opt", "nc_opt", "et_opt"}


@pytest.mark.parametrize("key", sorted(all_terms().keys() - RANDOM))
def test_which_losses_accumulate_to_the_large_batch(options: Options, key: str):
    if key in ("nc_opt", "et_opt", "kl_opt"):
        as_slkd(options)
        options["train"].update(nc_opt=None, et_opt=None)
    options["model_type"] = "KDModel"
    options["train"].update({"pixel_opt": None, key: None, "gate": "soft"})
    switched_on(options, all_terms()[key])
    gt = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images = {"lq": gt[..., :: options["scale"], :: options["scale"]].clone(), "gt": gt}
    found = []
    for batches in (1, 2):
        options["train"]["accumulate"] = batches
        torch.manual_seed(0)
        model = built(options)
        model.feed_data(images)
        loss = model.compute_gradients(1)[logged(all_terms()[key])]
        gradients = [part.grad.flatten() for part in model.bundle.parameters() if part.grad is not None]
        found.append(torch.cat([loss.detach().reshape(1), *gradients]))
    difference = ((found[0] - found[1]).norm() / found[0].norm()).item()
    assert (difference < 1e-4) == (key not in OVER_THE_BATCH)


@pytest.mark.parametrize("name", MODELS)
def test_a_preset_computes_what_kdmodel_does(options: Options, name: str):
    """To the bit: a preset adds no arithmetic."""
    MAKE[name](options)
    results = []
    for model_type in (name, "KDModel"):
        options["model_type"] = model_type
        torch.manual_seed(0)
        model = built(options)
        for step in (1, 2, 3):
            torch.manual_seed(step)
            gt = torch.rand(3, 3, 32, 32)
            model.feed_data({"lq": gt[..., :: options["scale"], :: options["scale"]].clone(), "gt": gt})
            model.optimize_parameters(step)
        networks = {key: net.state_dict() for key, net in model.state_networks().items()}
        results.append((model.get_current_log(), networks))
    (log, networks), (same_log, same_networks) = results
    assert log == same_log
    assert networks.keys() == same_networks.keys()
    for key, weights in networks.items():
        assert all(torch.equal(value, same_networks[key][part]) for part, value in weights.items())


@pytest.mark.parametrize("scale", [1, 4])
def test_all_terms_at_once(options: Options, scale: int):
    """DCKD + MCLIR + SLKD + FACD, and everything else."""
    if scale == 1:
        as_slkd(options)
    unfit = "zoom_out_opt" if scale == 1 else "et_opt"
    terms = [term for term in all_terms().values() if unfit != term.KEY]
    for term in terms:
        switched_on(options, term)
    assert check(options, is_train=True) == []
    assert {logged(term) for term in terms} <= logged_in_two_steps(options)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", ["KDModel", "MiPKDModel"])  # with further passes of the student, and without
def test_teacher_b_sees_the_clean_image(options: Options, name: str, own: bool):
    as_slkd(options)
    MAKE[name](options)
    options["model_type"] = name
    if name == "MiPKDModel":
        options["train"]["blocks"] = TAPS["NAFNet"]
    if own:
        options["network_tb"] = {**NAFNET, "width": 5}
        options["path"]["pretrain_network_tb"] = saved(options["network_tb"], "teacher_b.pth")
    assert check(options, is_train=True) == []
    model = built(options)
    torch.manual_seed(1)
    model.feed_data({"lq": torch.rand(3, 3, 32, 32), "gt": torch.rand(3, 3, 32, 32)})
    loss = model.compute_gradients(1)["l_et"]
    teacher_b = model.teachers["tb" if own else "t"].net
    kept: list[torch.Tensor] = []
    teacher_b.decoders[1].register_forward_hook(lambda module, x, output: kept.append(output))
    with torch.no_grad():
        teacher_b(model.gt)
    torch.testing.assert_close(loss, edge_texture_distance(model.step.student_features["et_opt"], kept, [1]))
