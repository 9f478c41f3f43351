"""Declares the options of the sections that models read: ``train``, ``val``, ``path`` and ``logger``."""

from __future__ import annotations

from kdsr.runtime.declarations import Options, Section, option


class LoopOptions(Options):
    """What BasicSR's loop reads of ``train``, whatever the model."""

    total_iter: int = option(
        None, "Steps of the run: exactly so many, whatever the size of the data.", lowest=1, required="train"
    )
    warmup_iter: int = option(-1, "Steps over which the learning rate rises to its value; -1: none.")


class StockTrainOptions(LoopOptions):
    """What BasicSR's image models and those of kdsr read of ``train``."""

    ema_decay: float = option(  # at 1 what is validated and saved would never change
        0,
        "Above 0, a moving average (EMA) of the student is kept, validated and saved as `params_ema`; it follows about "
        "1 / (1 - decay) iterations behind.",
        lowest=0,
        below=1,
    )
    optim_g: Section = option(
        None, "Optimizer of the student: `type`, any of `torch.optim`, and its arguments.", required="train"
    )
    scheduler: Section = option(
        None,
        "Learning rate schedule: `type`, one of those below, and its arguments.",
        required="train",
    )


class TrainOptions(StockTrainOptions):
    """``train`` of every model of kdsr."""

    ema_warmup: bool = option(
        False,
        "Whether the decay after t iterations is `min(ema_decay, (1 + t) / (10 + t))`, so that the average follows "
        "closely at first; BasicSR has no warm-up.",
    )
    clip_grad_norm: float | None = option(
        None,
        "Maximum 2-norm of the gradients of an optimizer; the norm before clipping is logged as `grad_norm`.",
        above=0,
    )
    use_grad_clip: bool = option(
        None,
        "NAFNet's and Restormer's name of `clip_grad_norm: 0.01`; true by default in `ImageRestorationModel`.",
    )
    max_nonfinite: int = option(
        10, "Skipped updates in a row (NaN or infinite loss or gradient) that end the run.", lowest=1
    )


class StockValOptions(Options):
    """What BasicSR's loop and its models read of ``val``."""

    val_freq: int = option(None, "Steps between validations.", lowest=1, required="train")
    metrics: Section | None = option(
        None,
        "Metrics by name, `NAME: {type: calculate_psnr, ...}` with the metric's arguments, and `better`, `higher` or "
        "`lower`, for a metric that does not declare it.",
    )
    save_img: bool = option(False, "Whether restored images are saved.")
    suffix: str | None = option(
        None, "Ending of the names of saved images in a test; null: the run's name.", one_name=True
    )
    window_size: int = option(
        None,
        "Same as `multiple_of`; the name in DCKD's release.",
        lowest=1,
        shown_default="the network's",
    )
    pbar: bool = option(None, "Accepted from BasicSR's files; has no effect.")


class ValOptions(StockValOptions):
    """``val`` of the models of kdsr."""

    teacher: bool = option(False, "Whether the teacher is validated once before training.")
    teacher_check: bool = option(
        True, "Whether to warn of a teacher that is worse than bicubic upscaling, or than the input itself."
    )
    multiple_of: int = option(
        None,
        "Images are padded to multiples of it, and the result is cropped.",
        lowest=1,
        shown_default="the network's",
    )
    batch_size: int | None = option(
        None,
        "Images of the same size that the network restores at once, at most.",
        lowest=1,
        shown_default="1 on a CPU; on a GPU up to 16, with at most 256×256 LQ pixels together",
    )
    tile: int | None = option(
        None,
        "Side, in LQ pixels, of the tiles in which large images are restored; null: whole images.",
        lowest=1,
    )
    tile_overlap: int | None = option(
        None,
        "Overlap of neighbouring tiles in LQ pixels, at least; below `tile`.",
        lowest=0,
        shown_default="32, or half a tile",
    )
    grids: bool = option(
        False, "Accepted from NAFNet's files; images are restored whole, or in tiles where `tile` says so."
    )
    crop_size_h: int = option(None, "Accepted from NAFNet's files; belongs to `grids`.")
    crop_size_w: int = option(None, "Likewise.")
    crop_size_h_ratio: float = option(None, "Likewise.")
    crop_size_w_ratio: float = option(None, "Likewise.")
    max_minibatch: int = option(None, "Accepted from NAFNet's and Restormer's files; belongs to `grids`.")
    use_image: bool = option(
        True, "Accepted from NAFNet's and Restormer's files; metrics are those of 8-bit images."
    )
    rgb2bgr: bool = option(True, "Accepted from NAFNet's and Restormer's files; images keep their colours.")
    self_ensemble: bool = option(
        False,
        "Whether the result is the mean over the eight flips and rotations of the image (x8, '+' in papers): eight "
        "times as slow.",
    )


class StockPathOptions(Options):
    """What BasicSR reads of ``path``."""

    resume_state: str | None = option(
        None, "A `.state` file to resume from; `--auto_resume` finds the newest by itself."
    )
    ignore_resume_networks: list | str | None = option(
        None,
        "Accepted from BasicSR's files for frozen networks, which are never part of a state.",
    )
    experiments_root: str | None = option(None, "Folder of the runs.", shown_default="experiments")
    results_root: str | None = option(None, "Folder of the tests.", shown_default="results")


class PathOptions(StockPathOptions):
    """``path`` of the models of kdsr."""

    init_from: str | None = option(
        None, "Initial weights of the student: `teacher` (its matching blocks), or a checkpoint."
    )


class NetworkPathOptions(Options):
    """What ``path`` has for each network: ``pretrain_network_g`` and so on."""

    pretrain_network: str | None = option(
        None, "Checkpoint of `network_X`: `.pth`, `.ckpt` or `.safetensors`. A test reads that of `g` only."
    )
    strict_load: bool = option(
        True,
        "Whether the names in the file must be those of the network; shapes must fit in any case.",
    )
    param_key: str | None = option(
        None,
        "Key of the weights in the file; `auto`: the first of `params_ema`, `params`, `state_dict`, else the file "
        "itself; null: the file itself.",
        shown_default="params; in a test auto",
    )


class WandbOptions(Options):
    project: str | None = option(
        None, "Project at Weights & Biases, where that is installed; needs `use_tb_logger: true`."
    )
    resume_id: str | None = option(None, "Run at Weights & Biases to go on with.")


class StockLoggerOptions(Options):
    """What BasicSR reads of ``logger``."""

    print_freq: int = option(
        100, "Steps between log lines; losses are read from the device only then.", lowest=1
    )
    save_checkpoint_freq: int = option(5000, "Steps between checkpoints.", lowest=1)
    use_tb_logger: bool = option(
        False, "Whether TensorBoard logs are written, to `tb_logger/NAME` of the working directory."
    )
    wandb: WandbOptions = option(None, "Weights & Biases.")


class SaveBestOptions(Options):
    set: str | None = option(None, "Name of the validation set by which `net_g_best.pth` is chosen.")
    metric: str | None = option(None, "Metric of `val.metrics` by which it is chosen.")


class LoggerOptions(StockLoggerOptions):
    """``logger`` of the models of kdsr."""

    keep_last: int | None = option(
        3,
        "Number of iterations whose checkpoints and states are kept, beside `latest` and `best`; 0 or null: all.",
        lowest=0,
    )
    save_best: SaveBestOptions = option(None, "Which checkpoint is kept as the best one.")
    save_safetensors: bool = option(
        False,
        "Whether a `net_g_N.safetensors` is written beside each `net_g_N.pth`, with the weights that are tested (the "
        "EMA's where there is one).",
    )
