"""The keys that BasicSR's parts read from their options, as tables; our classes declare theirs themselves.

A kind of ``None`` in a tuple is spelt ``NONE``: the key may be there and say nothing. Where not every value of a kind
has a meaning, the entry is an :class:`~kdsr.runtime.option_values.Allowed`.
"""

from __future__ import annotations

from typing import Any

from kdsr.options.signatures import NUMBER
from kdsr.runtime.option_values import NONE, Allowed, count, number, word

TOP: dict[str, Any] = {
    "name": str,
    "model_type": str,
    "scale": count(null=True),
    "num_gpu": (int, str),
    # NumPy's seeds have 32 bits; each rank adds its number
    "manual_seed": count(0, 2**32 - 1024, null=True),
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
    "suffix": Allowed((str, NONE), one_name=True),
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
    "print_freq": count(),
    "save_checkpoint_freq": count(),
    "use_tb_logger": bool,
    "wandb": {"project": (str, NONE), "resume_id": (str, NONE)},
}
VAL: dict[str, Any] = {
    "val_freq": count(),
    "save_img": bool,
    "suffix": Allowed((str, NONE), one_name=True),
    "pbar": bool,
    "metrics": (dict, NONE),
}
BETTER = word("higher", "lower")
DIST_PARAMS: dict[str, Any] = {
    "backend": str,
    "port": count(1, 65535, null=True),
    "timeout": Allowed((*NUMBER, NONE), lowest=1),
}

# What KDModel and VQGANModel read beside their TRAIN_KEYS.
OUR_VAL: dict[str, Any] = {
    "teacher": bool,
    "teacher_check": bool,
    "window_size": count(),
    "multiple_of": count(),
    "tile": (int, NONE),
    "tile_overlap": (int, NONE),
    "self_ensemble": bool,
}
OUR_LOGGER: dict[str, Any] = {
    "keep_last": count(0, null=True),
    "save_best": {"set": (str, NONE), "metric": (str, NONE)},
    "save_safetensors": bool,
}
OUR_PATH: dict[str, Any] = {"init_from": (str, NONE)}

# What BasicSR's loop reads of train, whatever the model.
LOOP_TRAIN: dict[str, Any] = {"total_iter": count(), "warmup_iter": int}

_SR_TRAIN: dict[str, Any] = LOOP_TRAIN | {
    "ema_decay": number(lowest=0, below=1),
    "optim_g": dict,
    "scheduler": dict,
    "pixel_opt": (dict, NONE),
    "perceptual_opt": (dict, NONE),
}
_GAN_TRAIN: dict[str, Any] = _SR_TRAIN | {
    "optim_d": dict,
    "ldl_opt": (dict, NONE),
    "gan_opt": (dict, NONE),
    "net_d_iters": count(),
    "net_d_init_iters": count(0),
}
# BasicSR's model class -> keys of train, networks. A class that is neither here nor declares TRAIN_KEYS is
# foreign: its keys are its own business.
STOCK_MODELS: dict[str, tuple[dict[str, Any], frozenset[str]]] = {
    "SRModel": (_SR_TRAIN, frozenset({"g"})),
    "SwinIRModel": (_SR_TRAIN, frozenset({"g"})),
    "SRGANModel": (_GAN_TRAIN, frozenset({"g", "d"})),
    "ESRGANModel": (_GAN_TRAIN, frozenset({"g", "d"})),
}
STOCK_VAL: dict[str, Any] = {"window_size": count()}  # theirs too: pad_in_tests reads it
# of their train: what compares with the ground truth
STOCK_GT_KEYS = ("pixel_opt", "perceptual_opt", "ldl_opt", "gan_opt")

# Beyond the highest numbers a machine is busy with starting processes, or a number has slipped.
LOADER: dict[str, Any] = {
    "num_worker_per_gpu": count(0, 256),
    "batch_size_per_gpu": count(1, 100_000),
    "dataset_enlarge_ratio": number(above=0),
    "prefetch_mode": word("cpu", "cuda", null=True),
    "num_prefetch_queue": count(1, 1000),
    "pin_memory": bool,
    "persistent_workers": bool,
    "progressive": (list, NONE),
    "use_shuffle": bool,  # in older files of BasicSR; training sets are shuffled in any case
}
ANY_DATASET: dict[str, Any] = LOADER | {
    "name": Allowed((str,), one_name=True),
    "type": str,
    "io_backend": dict,
    "on_bad_image": word("stop", "skip"),
}
IO_BACKENDS = ("disk", "lmdb")
IO_BACKEND: dict[str, Any] = {
    "db_paths": (list, str),
    "client_keys": (list, str),
}

_IMAGES: dict[str, Any] = {
    "dataroot_lq": str,
    "meta_info_file": (str, NONE),
    "color": word("y", "rgb", null=True),  # rgb, as null: BasicSR asks for y alone
    "mean": (list, NONE),
    "std": (list, NONE),
}
# BasicSR's data set class -> its keys, those it needs, and those it needs in training
STOCK_DATASETS: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "PairedImageDataset": (
        _IMAGES
        | {"dataroot_gt": str, "filename_tmpl": str, "gt_size": count(), "use_hflip": bool, "use_rot": bool},
        ("dataroot_gt", "dataroot_lq"),
        ("gt_size", "use_hflip", "use_rot"),
    ),
    "SingleImageDataset": (_IMAGES, ("dataroot_lq",), ()),
}
WITHOUT_GT = ("SingleImageDataset",)  # classes of ours say it themselves (GIVES_GT)

# What the schedulers read as numbers: (of the value itself, of each item of a list).
SCHEDULER_NUMBERS: dict[str, Allowed] = {"gamma": number(above=0), "eta_min": number(lowest=0)}
SCHEDULER_ITEMS: dict[str, Allowed] = {
    "milestones": count(),  # a scheduler looks for the very number of the iteration
    "restarts": count(0),
    "periods": count(),
    "restart_weights": number(lowest=0),
}
# Arguments of BasicSR's metrics. Images are passed as (H, W, C), or (H, W) where they are grey.
_COMPARISON: dict[str, Any] = {"crop_border": count(0), "input_order": word("HWC"), "test_y_channel": bool}
STOCK_METRICS: dict[str, dict[str, Any]] = {
    "calculate_psnr": _COMPARISON,
    "calculate_ssim": _COMPARISON,
    "calculate_niqe": {
        "crop_border": count(0),
        "input_order": word("HWC"),
        "convert_to": word("y", "gray"),
    },
}
