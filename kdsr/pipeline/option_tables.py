"""The keys that BasicSR's parts read from their options, as tables; our classes declare theirs themselves.

A kind of ``None`` in a tuple is spelt ``NONE``: the key may be there and say nothing.
"""

from __future__ import annotations

from typing import Any

from kdsr.pipeline.option_names import NUMBER

NONE = type(None)

TOP: dict[str, Any] = {
    "name": str,
    "model_type": str,
    "scale": (int, NONE),
    "num_gpu": (int, str),
    "manual_seed": (int, NONE),
    "find_unused_parameters": bool,
    "datasets": dict,
    "path": (dict, NONE),
    "train": (dict, NONE),
    "val": (dict, NONE),
    "logger": (dict, NONE),
    "dist_params": (dict, NONE),
    "stop_signals": list,
    "import_modules": (list, str, NONE),
    "import_path": (list, str, NONE),
    # BasicSR's older test files state these at the top, where nothing reads them
    "crop_border": (int, NONE),
    "save_img": bool,
    "suffix": (str, NONE),
}

PATH: dict[str, Any] = {
    "resume_state": (str, NONE),
    "ignore_resume_networks": (list, str, NONE),
    "experiments_root": (str, NONE),
    "results_root": (str, NONE),
}
# per network X: pretrain_network_X and so on
PATH_OF_NETWORK: dict[str, Any] = {
    "pretrain_network": (str, NONE),
    "strict_load": bool,
    "param_key": (str, NONE),
}

LOGGER: dict[str, Any] = {
    "print_freq": int,
    "save_checkpoint_freq": int,
    "use_tb_logger": bool,
    "wandb": {"project": (str, NONE), "resume_id": (str, NONE)},
}
VAL: dict[str, Any] = {
    "val_freq": int,
    "save_img": bool,
    "suffix": (str, NONE),
    "pbar": bool,
    "metrics": (dict, NONE),
}
DIST_PARAMS: dict[str, Any] = {"backend": str, "port": (int, NONE), "timeout": (*NUMBER, NONE)}

# What RestorationModel and its children read beside their TRAIN_KEYS.
OUR_VAL: dict[str, Any] = {
    "teacher": bool,
    "window_size": int,
    "multiple_of": int,
    "tile": (int, NONE),
    "tile_overlap": (int, NONE),
    "self_ensemble": bool,
}
OUR_LOGGER: dict[str, Any] = {
    "keep_last": (int, NONE),
    "save_best": {"set": (str, NONE), "metric": (str, NONE)},
    "save_safetensors": bool,
}
OUR_PATH: dict[str, Any] = {"init_from": (str, NONE)}

_SR_TRAIN: dict[str, Any] = {
    "total_iter": int,
    "warmup_iter": int,
    "ema_decay": NUMBER,
    "optim_g": dict,
    "scheduler": dict,
    "pixel_opt": (dict, NONE),
    "perceptual_opt": (dict, NONE),
}
_GAN_TRAIN: dict[str, Any] = _SR_TRAIN | {
    "optim_d": dict,
    "ldl_opt": (dict, NONE),
    "gan_opt": (dict, NONE),
    "net_d_iters": int,
    "net_d_init_iters": int,
}
# BasicSR's model class -> keys of train, networks. A class that is neither here nor declares TRAIN_KEYS is
# foreign: its keys are its own business.
STOCK_MODELS: dict[str, tuple[dict[str, Any], frozenset[str]]] = {
    "SRModel": (_SR_TRAIN, frozenset({"g"})),
    "SwinIRModel": (_SR_TRAIN, frozenset({"g"})),
    "SRGANModel": (_GAN_TRAIN, frozenset({"g", "d"})),
    "ESRGANModel": (_GAN_TRAIN, frozenset({"g", "d"})),
}
STOCK_VAL: dict[str, Any] = {"window_size": int}  # theirs too: pad_in_tests reads it
# of their train: what compares with the ground truth
STOCK_GT_KEYS = ("pixel_opt", "perceptual_opt", "ldl_opt", "gan_opt")

LOADER: dict[str, Any] = {
    "num_worker_per_gpu": int,
    "batch_size_per_gpu": int,
    "dataset_enlarge_ratio": NUMBER,
    "prefetch_mode": (str, NONE),
    "num_prefetch_queue": int,
    "pin_memory": bool,
    "persistent_workers": bool,
    "progressive": (list, NONE),
    "use_shuffle": bool,  # in older files of BasicSR; training sets are shuffled in any case
}
ANY_DATASET: dict[str, Any] = LOADER | {"name": str, "type": str, "io_backend": dict, "on_bad_image": str}
IO_BACKEND: dict[str, Any] = {"type": str, "db_paths": (list, str), "client_keys": (list, str)}
IO_BACKENDS = ("disk", "lmdb")

_IMAGES: dict[str, Any] = {
    "dataroot_lq": str,
    "meta_info_file": (str, NONE),
    "color": (str, NONE),
    "mean": (list, NONE),
    "std": (list, NONE),
}
# BasicSR's data set class -> its keys, those it needs, and those it needs in training
STOCK_DATASETS: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "PairedImageDataset": (
        _IMAGES
        | {"dataroot_gt": str, "filename_tmpl": str, "gt_size": int, "use_hflip": bool, "use_rot": bool},
        ("dataroot_gt", "dataroot_lq"),
        ("gt_size", "use_hflip", "use_rot"),
    ),
    "SingleImageDataset": (_IMAGES, ("dataroot_lq",), ()),
}
WITHOUT_GT = ("SingleImageDataset",)  # classes of ours say it themselves (GIVES_GT)
