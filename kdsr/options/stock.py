"""Declares the top level of an option file, and the options of BasicSR's models, schedulers and metrics."""

from __future__ import annotations

from kdsr.models.sections import StockTrainOptions
from kdsr.models.trainer import LoopInterface
from kdsr.runtime.declarations import Network, Option, Options, Section, loss, option


class TopOptions(Options):
    """The top level, without the networks."""

    name: str = option(
        None,
        "Name of the run and of its folder: no path, at most 200 bytes. With `debug` in it every step is logged, and "
        "validation and checkpoints come every 8 steps.",
        required="always",
    )
    model_type: str = option(None, "`KDModel`, one of its presets, `VQGANModel`, or a model of BasicSR.")
    scale: int | None = option(1, "Upscaling factor; networks and data must agree with it.", lowest=1)
    num_gpu: int | str = option(
        "auto", "`auto`: one GPU, or the CPU where there is none; 0: the CPU; more need a launcher.", lowest=0
    )
    manual_seed: int | None = option(
        None,
        "Seed of the order of the data, of crops and flips, and of a model's random numbers.",
        lowest=0,
        highest=2**32 - 1024,  # NumPy's seeds have 32 bits; each rank adds its rank
        shown_default="random",
    )
    find_unused_parameters: bool = option(
        False, "Option of DDP, for networks with parameters that get no gradient."
    )
    datasets: Section = option(None, "The data sets.", required="always")
    path: Section | None = option(None, "Files and folders.")
    train: Section | None = option(None, "The training.", required="train")
    val: Section | None = option(None, "Validation and tests.", required="test")
    logger: Section | None = option(None, "Logs and checkpoints.")
    dist_params: Section | None = option(None, "Distributed training.")
    stop_signals: list[str] = option(
        ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"],
        "Signals on which a training saves its state and stops; SIGHUP, SIGQUIT and SIGXCPU are valid too.",
    )
    import_modules: list[str] | str | None = option(
        None,
        "Modules of your own that register networks, losses, terms, data sets, metrics or models; importing them runs "
        "their code.",
    )
    import_path: list[str] | str | None = option(
        None, "Folders that are searched for these modules before the working directory."
    )
    crop_border: int | None = option(
        None, "Accepted from BasicSR's older test files if `val` has the same value; has no effect."
    )
    save_img: bool = option(None, "Accepted from BasicSR's older test files, likewise.")
    suffix: str | None = option(None, "Accepted from BasicSR's older test files, likewise.", one_name=True)


class SROptions(StockTrainOptions):
    """``train`` of BasicSR's SRModel and SwinIRModel."""

    pixel_opt: Section | None = loss("Loss against the ground truth, `l_pix`.")
    perceptual_opt: Section | None = loss("BasicSR's `PerceptualLoss`, `l_percep` and `l_style`.")


class GANOptions(SROptions):
    """``train`` of BasicSR's SRGANModel and ESRGANModel."""

    optim_d: Section = option(None, "Optimizer of the discriminator, as `optim_g`.")
    ldl_opt: Section | None = loss("Locally discriminative learning, `l_g_ldl`.")
    gan_opt: Section | None = loss("BasicSR's `GANLoss`, `l_g_gan`, `l_d_real` and `l_d_fake`.")
    net_d_iters: int = option(1, "Steps between two updates of the generator.", lowest=1)
    net_d_init_iters: int = option(0, "Steps before the first update of the generator.", lowest=0)


_STUDENT = LoopInterface.NETWORKS
_GAN = _STUDENT | {"d": Network("The discriminator.", in_state=True)}
# BasicSR's model class -> its options of train, and its networks. kdsr's models declare theirs as attributes; keys of
# other models are not checked.
STOCK_MODELS: dict[str, tuple[type[StockTrainOptions], dict[str, Network]]] = {
    "SRModel": (SROptions, _STUDENT),
    "SwinIRModel": (SROptions, _STUDENT),
    "SRGANModel": (GANOptions, _GAN),
    "ESRGANModel": (GANOptions, _GAN),
}
# keys of train that need ground truth
STOCK_GT_KEYS = ("pixel_opt", "perceptual_opt", "ldl_opt", "gan_opt")


class MultiStepOptions(Options):
    milestones: list[int] = option(  # the scheduler compares with exact iterations
        None, "Iterations at which the learning rate is multiplied by `gamma`.", lowest=1, required="always"
    )
    gamma: float = option(0.1, "Factor of the learning rate.", above=0)
    restarts: list[int] = option([0], "Iterations at which the schedule starts again.", lowest=0)
    restart_weights: list[float] = option([1], "Factor of the initial learning rate, per restart.", lowest=0)


class CosineOptions(Options):
    periods: list[int] = option(
        None, "Iterations of each cosine, `total_iter` in all.", lowest=1, required="always"
    )
    restart_weights: list[float] = option([1], "Factor of the initial learning rate, per period.", lowest=0)
    eta_min: float = option(0, "Learning rate at the end of a period.", lowest=0)


class TrueCosineOptions(Options):
    T_max: int = option(
        None, "Iterations of the cosine; the rate rises again after them.", lowest=1, required="always"
    )
    eta_min: float = option(0, "Learning rate at its end.", lowest=0)


class CyclicOptions(Options):
    periods: list[int] = option(
        None, "Iterations of each cosine, `total_iter` in all.", lowest=1, required="always"
    )
    restart_weights: list[float] = option([1], "Factor of the initial learning rate, per period.", lowest=0)
    eta_mins: list[float] = option([0], "Learning rate at the end of each period.", lowest=0)


STOCK_SCHEDULERS: dict[str, type[Options]] = {
    "MultiStepLR": MultiStepOptions,
    "MultiStepRestartLR": MultiStepOptions,
    "CosineAnnealingRestartLR": CosineOptions,
}
# for kdsr's models
SCHEDULERS = STOCK_SCHEDULERS | {
    "TrueCosineAnnealingLR": TrueCosineOptions,
    "CosineAnnealingRestartCyclicLR": CyclicOptions,
}
# for every optimizer; torch's annotation also allows a tensor
LEARNING_RATE = {"lr": Option("Learning rate.", (int, float), required="always")}


class MetricOptions(Options):
    """Options of every metric, in addition to the arguments of its function."""

    better: str = option(
        None,
        "Which values are better, for a metric that does not declare it.",
        choices=("higher", "lower"),
    )


class StockMetricOptions(MetricOptions):
    crop_border: int = option(None, "Pixels at each border that are left out.", lowest=0, required="always")
    # images are passed as (H, W, C), or (H, W) where they are grey
    input_order: str = option("HWC", "Order of the dimensions; always `HWC`.", choices=("HWC",))


class ComparisonOptions(StockMetricOptions):
    test_y_channel: bool = option(False, "Whether the Y channel (of YCbCr) alone is compared.")


class NIQEOptions(StockMetricOptions):
    convert_to: str = option(
        "y", "Whether the metric uses the Y channel or grey values.", choices=("y", "gray")
    )


STOCK_METRICS: dict[str, type[MetricOptions]] = {
    "calculate_psnr": ComparisonOptions,
    "calculate_ssim": ComparisonOptions,
    "calculate_niqe": NIQEOptions,
}
