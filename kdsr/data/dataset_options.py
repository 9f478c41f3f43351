"""Declares the options of data sets: those of any set, and those of BasicSR's. Classes of kdsr declare their own."""

from __future__ import annotations

from kdsr.runtime.declarations import Options, option


class StageOptions(Options):
    after: int = option(None, "Iterations before the stage begins.", lowest=1, required="always")
    gt_size: int = option(None, "Side of the GT patches from then on.", lowest=1)
    batch_size_per_gpu: int = option(None, "Images per step and process from then on.", lowest=1)


class BackendOptions(Options):
    type: str = option(
        None, "Where the images are: in a folder or in an LMDB.", required="always", choices=("disk", "lmdb")
    )
    db_paths: list | str = option(None, "Filled in by the data set.")
    client_keys: list | str = option(None, "Filled in by the data set.")


class DatasetOptions(Options):
    """Options of any data set. Above the highest numbers a machine only starts processes, or a digit slipped in."""

    name: str = option(
        None,
        "In logs and in `metrics.csv`; for validation and tests also the folder of saved images.",
        required="always",
        one_name=True,
    )
    type: str = option(None, "Class of the data set.")
    io_backend: BackendOptions = option(
        None,
        "`{type: disk}` or `{type: lmdb}`; `ImageFolderDataset` and `LQImageDataset` can tell by the name of the root.",
    )
    batch_size_per_gpu: int = option(
        None,
        "Training: images per step and process; `train.accumulate` makes several such batches one update.",
        lowest=1,
        highest=100_000,
        required="train",
    )
    num_worker_per_gpu: int = option(
        None,
        "Training: processes that load images; 0: the main process loads them.",
        lowest=0,
        highest=256,
        required="train",
    )
    dataset_enlarge_ratio: float = option(
        1, "Training: passes over the images in one epoch, 1 or more, each with other crops.", above=0
    )
    progressive: list[StageOptions] | None = option(
        None,
        "Training: stages with other patches and batches: "
        "`[{after: 92000, gt_size: 160, batch_size_per_gpu: 5}, ...]`.",
    )
    on_bad_image: str = option(
        "stop",
        "Training: whether an image that cannot be read stops the run or is skipped; validation and tests always stop.",
        choices=("stop", "skip"),
    )
    prefetch_mode: str | None = option(
        None,
        "Training: `cuda` copies batches to the GPU ahead (not with `pin_memory: false`); `cpu` is the same as null.",
        choices=("cpu", "cuda"),
    )
    num_prefetch_queue: int = option(
        None,
        "Accepted from BasicSR's files for `prefetch_mode: cpu`; has no effect.",
        lowest=1,
        highest=1000,
    )
    pin_memory: bool = option(
        None,
        "Whether batches are in page-locked memory, from which they are copied to a GPU while it computes; has no "
        "effect on the CPU.",
        shown_default="true for a training set on a GPU",
    )
    persistent_workers: bool = option(True, "Training: whether workers live on between epochs.")
    use_shuffle: bool = option(
        True, "Accepted from BasicSR's older files; training sets are always shuffled."
    )


class StockImageOptions(DatasetOptions):
    """Options that all of BasicSR's image data sets have."""

    dataroot_lq: str = option(None, "Folder or `.lmdb` of the LQ images.", required="always")
    io_backend: BackendOptions = option(None, "`{type: disk}` or `{type: lmdb}`.", required="always")
    meta_info_file: str | None = option(
        None,
        "Text file with the names of the images to use, one a line, relative to `dataroot_gt`; of an LMDB, too.",
    )
    color: str | None = option(  # rgb, as null: BasicSR asks for y alone
        None,
        "`y`: the Y channel (of YCbCr) alone; `rgb` or null: three channels. The same for all sets of a run.",
        choices=("y", "rgb"),
    )
    mean: list[float] | None = option(
        None,
        "Normalisation, one number or one per channel (RGB), with `std`: the network gets `(image - mean) / std`; "
        "metrics and saved images are of the image itself.",
    )
    std: list[float] | None = option(None, "See `mean`.", above=0)


class CacheOptions(DatasetOptions):
    cache: str | None = option(
        None,
        "Training: `ram` decodes all images once, at the start, into memory that the workers of a process share; the "
        "samples are the same.",
        choices=("ram",),
    )


class AliasOptions(DatasetOptions):
    """Names in NAFNet's and Restormer's files, which ``kdsr.options.authors`` translates."""

    use_flip: bool = option(None, "NAFNet's name of `use_hflip`.")
    geometric_augs: bool = option(
        None, "Restormer's name of `use_hflip` and `use_rot` together, the eight flips and rotations."
    )
    iters: list[int] = option(
        None, "Restormer's stages, with `gt_sizes` and `mini_batch_sizes`: see `progressive`.", lowest=1
    )
    gt_sizes: list[int] = option(None, "See `iters`; at most `gt_size`.", lowest=1)
    mini_batch_sizes: list[int] = option(None, "See `iters`; at most `batch_size_per_gpu`.", lowest=1)


class PairedImageOptions(StockImageOptions, CacheOptions, AliasOptions):
    dataroot_gt: str = option(None, "Folder or `.lmdb` of the ground truth.", required="always")
    filename_tmpl: str = option(
        "{}",
        "LQ name from the GT name, for example `'{}x4'`; not for LMDBs, whose images pair by equal keys.",
    )
    gt_size: int = option(
        None,
        "Training: side of the square GT patches; a multiple of `scale`.",
        lowest=1,
        required="train",
    )
    use_hflip: bool = option(None, "Training: whether patches are flipped at random.", required="train")
    use_rot: bool = option(
        None,
        "Training: whether patches are flipped vertically and transposed at random.",
        required="train",
    )
    flips_on_device: bool = option(
        False,
        "Training: whether the device flips and transposes the patches, not the workers; the samples are the same.",
    )


# BasicSR's classes, and one that derives from them; ours have an attribute `options`
STOCK_DATASETS: dict[str, type[DatasetOptions]] = {
    "PairedImageDataset": PairedImageOptions,
    "Dataset_PairedImage": PairedImageOptions,
    "SingleImageDataset": StockImageOptions,
}
PAIRED = ("PairedImageDataset", "Dataset_PairedImage")
MIRRORED = ("Dataset_PairedImage", "Dataset_GaussianDenoising")  # up to a patch, where they are smaller
WITHOUT_GT = ("SingleImageDataset",)  # ours have an attribute GIVES_GT


class FolderOptions(CacheOptions):
    """Options of kdsr's data sets without pairs."""

    gt_size: int | None = option(
        None,
        "Training: side of the square patches; of a set without ground truth the side that its GT patches would have.",
        lowest=1,
    )
    use_hflip: bool = option(True, "Training: whether patches are flipped at random.")
    use_rot: bool = option(True, "Training: whether patches are flipped vertically and transposed at random.")
