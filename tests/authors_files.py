"""The option files of NAFNet and Restormer, key for key: what is common, and what each file has of its own."""

from __future__ import annotations

import copy
from typing import Any

Options = dict[str, Any]


def changed(options: Options, changes: Options) -> Options:
    """A copy after ``{"train.optim_g.lr": 1}`` and the like; ``...`` takes a key out."""
    options = copy.deepcopy(options)
    for place, value in changes.items():
        *above, last = place.split(".")
        section = options
        for key in above:
            section = section.setdefault(key, {})
        if value is ...:
            del section[last]
        else:
            section[last] = copy.deepcopy(value)
    return options


# ------------------------------------------------------------------------------------------------------------- NAFNet

_METRICS = {
    name: {"type": f"calculate_{name}", "crop_border": 0, "test_y_channel": False}
    for name in ("psnr", "ssim")
}
_DIST = {"backend": "nccl", "port": 29500}
_LOGGER = {"use_tb_logger": True, "wandb": {"project": None, "resume_id": None}}


def _in_lmdb(name: str, gt: str, lq: str) -> Options:
    return {
        "name": name,
        "type": "PairedImageDataset",
        "dataroot_gt": f"./datasets/{gt}.lmdb",
        "dataroot_lq": f"./datasets/{lq}.lmdb",
        "io_backend": {"type": "lmdb"},
    }


_HELD_OUT = {
    "GoPro": _in_lmdb("gopro-test", "GoPro/test/target", "GoPro/test/input"),
    "SIDD": _in_lmdb("SIDD_val", "SIDD/val/gt_crops", "SIDD/val/input_crops"),
    "REDS": _in_lmdb("reds-val300-test", "REDS/val/sharp_300", "REDS/val/blur_300"),
}
_TRAINED_ON = {
    "GoPro": _in_lmdb("gopro-train", "GoPro/train/sharp_crops", "GoPro/train/blur_crops"),
    "SIDD": _in_lmdb("SIDD", "SIDD/train/gt_crops", "SIDD/train/input_crops"),
    "REDS": _in_lmdb("reds-train", "REDS/train/train_sharp", "REDS/train/train_blur_jpeg"),
}
_DEEP = {"enc_blk_nums": [1, 1, 1, 28], "middle_blk_num": 1, "dec_blk_nums": [1, 1, 1, 1]}
_WIDE = {"enc_blk_nums": [2, 2, 4, 8], "middle_blk_num": 12, "dec_blk_nums": [2, 2, 2, 2]}


def _nafnet_network(data: str, width: int) -> Options:
    return {
        "type": "NAFNet" if data == "SIDD" else "NAFNetLocal",
        "width": width,
        **(_WIDE if data == "SIDD" else _DEEP),
    }


def _nafnet_training(data: str, width: int) -> Options:
    images, flips = width // 8, data != "SIDD"
    options: Options = {
        "name": f"NAFNet-{data}-width{width}",
        "model_type": "ImageRestorationModel",
        "scale": 1,
        "num_gpu": 8,
        "manual_seed": 42 if (data, width) == ("GoPro", 32) else 10,
        "datasets": {
            "train": {
                **_TRAINED_ON[data],
                "filename_tmpl": "{}",
                "gt_size": 256,
                "use_flip": flips,
                "use_rot": flips,
                "use_shuffle": True,
                "num_worker_per_gpu": images,
                "batch_size_per_gpu": images,
                "dataset_enlarge_ratio": 1,
                "prefetch_mode": None,
            },
            "val": _HELD_OUT[data],
        },
        "network_g": _nafnet_network(data, width),
        "path": {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None},
        "train": {
            "optim_g": {
                "type": "AdamW",
                "lr": 1e-3,
                "weight_decay": 1e-3 if flips else 0.0,
                "betas": [0.9, 0.9],
            },
            "scheduler": {"type": "TrueCosineAnnealingLR", "T_max": 6250 * width, "eta_min": 1e-7},
            "total_iter": 6250 * width,
            "warmup_iter": -1,
            "pixel_opt": {"type": "PSNRLoss", "loss_weight": 1, "reduction": "mean"},
        },
        "val": {"val_freq": 2e4, "save_img": False, "metrics": _METRICS},
        "logger": {"print_freq": 200, "save_checkpoint_freq": 5e3, **_LOGGER},
        "dist_params": _DIST,
    }
    return changed(options, {} if flips else {"val.use_image": False})


def _nafnet_test(data: str, width: int) -> Options:
    name = f"NAFNet-{data}-width{width}"
    options: Options = {
        "name": f"{name}-test",
        "model_type": "ImageRestorationModel",
        "scale": 1,
        "num_gpu": 1,
        "manual_seed": 10,
        "datasets": {"val" if data == "SIDD" else "test": _HELD_OUT[data]},
        "network_g": _nafnet_network(data, width),
        "path": {
            "pretrain_network_g": f"experiments/pretrained_models/{name}.pth",
            "strict_load_g": True,
            "resume_state": None,
        },
        "val": {"save_img": True, "grids": False, "metrics": _METRICS},
        "dist_params": _DIST,
    }
    return changed(options, {"val.use_image": False} if data == "SIDD" else {})


_OF_NAFNET = [("GoPro", 32), ("GoPro", 64), ("SIDD", 32), ("SIDD", 64), ("REDS", 64)]
NAFNET_TRAINING = {f"train/{data}/width{width}": _nafnet_training(data, width) for data, width in _OF_NAFNET}
NAFNET_TESTS = {f"test/{data}/width{width}": _nafnet_test(data, width) for data, width in _OF_NAFNET}

# ---------------------------------------------------------------------------------------------------------- Restormer

_DERAINING: Options = {
    "name": "Deraining_Restormer",
    "model_type": "ImageCleanModel",
    "scale": 1,
    "num_gpu": 8,
    "manual_seed": 100,
    "datasets": {
        "train": {
            "name": "TrainSet",
            "type": "Dataset_PairedImage",
            "dataroot_gt": "./Deraining/Datasets/train/Rain13K/target",
            "dataroot_lq": "./Deraining/Datasets/train/Rain13K/input",
            "geometric_augs": True,
            "filename_tmpl": "{}",
            "io_backend": {"type": "disk"},
            "use_shuffle": True,
            "num_worker_per_gpu": 8,
            "batch_size_per_gpu": 8,
            "mini_batch_sizes": [8, 5, 4, 2, 1, 1],
            "iters": [92000, 64000, 48000, 36000, 36000, 24000],
            "gt_size": 384,
            "gt_sizes": [128, 160, 192, 256, 320, 384],
            "dataset_enlarge_ratio": 1,
            "prefetch_mode": None,
        },
        "val": {
            "name": "ValSet",
            "type": "Dataset_PairedImage",
            "dataroot_gt": "./Deraining/Datasets/test/Rain100L/target",
            "dataroot_lq": "./Deraining/Datasets/test/Rain100L/input",
            "io_backend": {"type": "disk"},
        },
    },
    "network_g": {
        "type": "Restormer",
        "inp_channels": 3,
        "out_channels": 3,
        "dim": 48,
        "num_blocks": [4, 6, 6, 8],
        "num_refinement_blocks": 4,
        "heads": [1, 2, 4, 8],
        "ffn_expansion_factor": 2.66,
        "bias": False,
        "LayerNorm_type": "WithBias",
        "dual_pixel_task": False,
    },
    "path": {"pretrain_network_g": None, "strict_load_g": True, "resume_state": None},
    "train": {
        "total_iter": 300000,
        "warmup_iter": -1,
        "use_grad_clip": True,
        "scheduler": {
            "type": "CosineAnnealingRestartCyclicLR",
            "periods": [92000, 208000],
            "restart_weights": [1, 1],
            "eta_mins": [0.0003, 0.000001],
        },
        "mixing_augs": {"mixup": False, "mixup_beta": 1.2, "use_identity": True},
        "optim_g": {"type": "AdamW", "lr": 3e-4, "weight_decay": 1e-4, "betas": [0.9, 0.999]},
        "pixel_opt": {"type": "L1Loss", "loss_weight": 1, "reduction": "mean"},
    },
    "val": {
        "window_size": 8,
        "val_freq": 4e3,
        "save_img": False,
        "rgb2bgr": True,
        "use_image": True,
        "max_minibatch": 8,
        "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 0, "test_y_channel": True}},
    },
    "logger": {"print_freq": 1000, "save_checkpoint_freq": 4e3, **_LOGGER},
    "dist_params": _DIST,
}


def _pairs(task: str, train: str, val: str, gt: str = "target_crops", lq: str = "input_crops") -> Options:
    return {
        "datasets.train.dataroot_gt": f"./{task}/Datasets/train/{train}/{gt}",
        "datasets.train.dataroot_lq": f"./{task}/Datasets/train/{train}/{lq}",
        "datasets.val.dataroot_gt": f"./{task}/Datasets/val/{val}/{gt}",
        "datasets.val.dataroot_lq": f"./{task}/Datasets/val/{val}/{lq}",
        "val.metrics.psnr.test_y_channel": False,
    }


_DENOISING = {
    "network_g.LayerNorm_type": "BiasFree",
    "train.mixing_augs.mixup": True,
    "val.use_image": False,
    "val.metrics.psnr.test_y_channel": False,
}


def _gaussian(colour: str, sigma: int | None) -> Options:
    channels = 3 if colour == "Color" else 1
    options = {
        **_DENOISING,
        "name": f"Gaussian{colour}Denoising_Restormer" + (f"Sigma{sigma}" if sigma else ""),
        "datasets.train.type": "Dataset_GaussianDenoising",
        "datasets.train.sigma_type": "constant" if sigma else "random",
        "datasets.train.sigma_range": sigma or [0, 50],
        "datasets.train.in_ch": channels,
        "datasets.train.dataroot_gt": "./Denoising/Datasets/train/DFWB",
        "datasets.train.dataroot_lq": "none",
        "datasets.val.type": "Dataset_GaussianDenoising",
        "datasets.val.sigma_test": sigma or 25,
        "datasets.val.in_ch": channels,
        "datasets.val.dataroot_gt": f"./Denoising/Datasets/test/{'C' if channels == 3 else ''}BSD68",
        "datasets.val.dataroot_lq": "none",
        "network_g.inp_channels": channels,
        "network_g.out_channels": channels,
    }
    return options


RESTORMER = {
    options["name"]: options
    for options in [
        _DERAINING,
        changed(
            _DERAINING, {"name": "Deblurring_Restormer", **_pairs("Motion_Deblurring", "GoPro", "GoPro")}
        ),
        changed(
            _DERAINING,
            {
                "name": "DefocusDeblur_Single_8bit_Restormer",
                **_pairs("Defocus_Deblurring", "DPDD", "DPDD", lq="inputC_crops"),
                "val.use_image": False,
            },
        ),
        changed(
            _DERAINING,
            {"name": "RealDenoising_Restormer", **_pairs("Denoising", "SIDD", "SIDD"), **_DENOISING},
        ),
        *(
            changed(_DERAINING, _gaussian(colour, sigma))
            for colour in ("Color", "Gray")
            for sigma in (None, 15, 25, 50)
        ),
    ]
}
