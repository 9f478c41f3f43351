"""``kdsr bench data``: patches per second of the training loader, against BasicSR's on the same files."""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import pandas as pd
import skimage
import torch
import typer
from basicsr.data import build_dataloader, build_dataset
from basicsr.data.data_sampler import EnlargedSampler

from kdsr.data.dataset_options import PAIRED
from kdsr.data.image_files import read_image
from kdsr.data.lmdb_client import LmdbClient
from kdsr.data.patches import to_device
from kdsr.data.resize import imresize
from kdsr.options.check_data import check_datasets
from kdsr.pipeline.run_data import make_dataset, require_room_for_cache
from kdsr.pipeline.training_data import TrainingData, end_workers
from kdsr.prepare.sample import SOURCES
from kdsr.runtime.errors import OptionError
from kdsr.tools.bench_options import Device, read
from kdsr.tools.machine import machine
from kdsr.tools.report import as_markdown

BASELINE = "BasicSR"
_SIDE, _STEP = 480, 24  # of the sub-images that are made
_EPOCH = 100_000  # patches in an epoch at least, more than are measured at a time
_OURS = ("cache", "flips_on_device", "persistent_workers", "prefetch_mode")  # not for BasicSR's loader here
_Loader = Callable[[], Iterator[dict[str, Any]]]


def write_sub_images(folder: Path, scale: int) -> dict[str, str]:
    """Cuts sub-images of 480×480 from scikit-image's photographs, as PNG with their LQ images; gives their folders."""
    roots = {"dataroot_gt": str(folder / "GT"), "dataroot_lq": str(folder / "LQ")}
    for root in roots.values():
        Path(root).mkdir()
    side, step = _SIDE // scale, max(_STEP // scale, 1)
    for source in SOURCES:
        image = read_image(Path(skimage.__file__).parent / "data" / source.file)
        height, width = (size // scale for size in image.shape[:2])
        gt = image[: height * scale, : width * scale]
        lq = imresize(gt, 1 / scale) if scale > 1 else gt
        for top in range(0, height - side + 1, step):
            for left in range(0, width - side + 1, step):
                for key, whole, factor in (("gt", gt, scale), ("lq", lq, 1)):
                    rows, columns = (slice(at * factor, (at + side) * factor) for at in (top, left))
                    path = f"{roots[f'dataroot_{key}']}/{source.name}_{top}_{left}.png"
                    cv2.imwrite(path, np.ascontiguousarray(whole[rows, columns]))
    return roots


def prepare(opt: dict[str, Any], changes: dict[str, Any], device: Device) -> dict[str, Any]:
    """The options of a loader, of which nothing but ``datasets.train`` is checked.

    Raises:
        OptionError: They are invalid, or the set is not one of pairs.
    """
    train = (opt.get("datasets") or {}).get("train")
    if not isinstance(train, dict) or train.get("type") not in PAIRED:
        raise OptionError(f"datasets.train.type: bench data compares sets of pairs, {' or '.join(PAIRED)}")
    train = {key: value for key, value in train.items() if key != "progressive"} | changes
    problems: list[str] = []
    check_datasets({**opt, "datasets": {"train": train}}, True, problems, [])
    if problems:
        raise OptionError(
            [
                f"{each} (--sample: files made for the measurement)" if "dataroot" in each else each
                for each in problems
            ]
        )
    derived = {"world_size": 1, "rank": 0, "manual_seed": opt.get("manual_seed") or 0, "dist": False}
    train = {**train, "phase": "train", "scale": opt.get("scale") or 1}
    return {**opt, **derived, "num_gpu": int(device == Device.cuda), "datasets": {"train": train}}


def loaders(opt: dict[str, Any]) -> dict[str, _Loader]:
    """What starts the loaders that are compared, by name: BasicSR's, and kdsr's with its settings."""
    train = opt["datasets"]["train"]
    stock_options = {key: value for key, value in train.items() if key not in _OURS}
    stock = build_dataset({**stock_options, "type": "PairedImageDataset"})
    ratio = max(1, _EPOCH // len(stock))
    sampler = EnlargedSampler(stock, 1, 0, ratio)
    stock_loader = build_dataloader(stock, stock_options, num_gpu=0, sampler=sampler, seed=opt["manual_seed"])
    kind = "LMDB" if train["io_backend"]["type"] == "lmdb" else "disk"
    if kind == "LMDB":  # BasicSR's client cannot open what this process has open
        stock.file_client = LmdbClient([train["dataroot_lq"], train["dataroot_gt"]], ["lq", "gt"])
    found: dict[str, _Loader] = {f"{BASELINE}, {kind}": lambda: iter(stock_loader)}
    cache = None
    settings: dict[str, dict[str, Any]] = {
        kind: {"cache": None, "flips_on_device": False},
        "cache: ram": {"cache": "ram", "flips_on_device": False},
        "cache: ram, flips_on_device": {"cache": "ram", "flips_on_device": True},
    }
    for name, setting in settings.items():
        options = {**train, **setting, "dataset_enlarge_ratio": ratio}
        dataset = make_dataset("train", options, opt["manual_seed"])
        if setting["cache"]:
            require_room_for_cache(options, dataset)
            cache = dataset.dataset.cache = cache or dataset.fill_cache()
        every = {**opt, "datasets": {"train": options}, "train": {"total_iter": 1}}
        found[f"kdsr, {name}"] = partial(_start, every, dataset)
    return found


def _start(opt: dict[str, Any], dataset: Any) -> Iterator[dict[str, Any]]:
    return iter(TrainingData(opt, dataset, None).loader)


def measure(start: _Loader, device: torch.device, warmup: int, seconds: float) -> tuple[float, float]:
    """Patches per second, with the conversion to float on the device, and seconds to the first batch."""
    begin = time.perf_counter()
    batches = start()
    try:
        to_device(next(batches), device)
        first = time.perf_counter() - begin
        for _ in range(warmup):
            next(batches)
        begin, patches = time.perf_counter(), 0
        while not patches or time.perf_counter() - begin < seconds:
            patches += len(to_device(next(batches), device)["lq"])
        if device.type == "cuda":
            torch.cuda.synchronize()
        return patches / (time.perf_counter() - begin), first
    finally:
        end_workers(batches)


def summary(rates: dict[str, list[float]], starts: dict[str, list[float]]) -> pd.DataFrame:
    """The table as text, a row per loader; ratios are of the rates of the same round."""
    table = pd.DataFrame(
        columns=["patches/s", "min–max", "× BasicSR", "× min–max", "first batch, s"], dtype=object
    )
    baseline = next(iter(rates.values()))
    for name, values in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(values, baseline, strict=True)]
        table.loc[name] = [
            f"{statistics.median(values):,.0f}",
            f"{min(values):,.0f}–{max(values):,.0f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f}–{max(ratios):.2f}",
            f"{statistics.median(starts[name]):.2f}",
        ]
    table.index.name = "loader"
    return table


def data(
    opt: Annotated[str, typer.Option("-opt", "--opt", help="Option file of a training run.")],
    dataroot_gt: Annotated[
        str | None, typer.Option("--dataroot_gt", "--dataroot-gt", help="In place of the option file's.")
    ] = None,
    dataroot_lq: Annotated[
        str | None, typer.Option("--dataroot_lq", "--dataroot-lq", help="In place of the option file's.")
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", help="Make 480×480 sub-images of scikit-image's photographs for it.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of the main process.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds; each measures every loader once.")] = 7,
    seconds: Annotated[float, typer.Option(min=0, help="Time of a measurement.")] = 2.0,
    device: Annotated[Device, typer.Option(help="Where the batches go.")] = Device.cpu,
    force_yml: Annotated[
        list[str] | None, typer.Option("--force_yml", "--force-yml", help="KEY:KEY=VALUE, as in training.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the table to this Markdown file.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all measured values to this file.")
    ] = None,
) -> None:
    """Patches per second of the training loader, against BasicSR's PairedImageDataset on the same files."""
    logging.getLogger("basicsr").setLevel(logging.WARNING)
    torch.set_num_threads(threads)
    options = read(opt, force_yml or (), device)
    changes: dict[str, Any] = {"num_worker_per_gpu": workers}
    with ExitStack() as stack:
        if sample:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            changes |= write_sub_images(folder, options.get("scale") or 1)
            changes |= {"io_backend": {"type": "disk"}, "meta_info_file": None, "filename_tmpl": "{}"}
        for key, root in (("dataroot_gt", dataroot_gt), ("dataroot_lq", dataroot_lq)):
            if root is not None:
                changes |= {key: root, "io_backend": {"type": "lmdb" if root.endswith(".lmdb") else "disk"}}
        prepared = prepare(options, changes, device)
        started = loaders(prepared)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in started}
        warmup = 3 * workers + 1  # the batches that workers have loaded ahead do not count
        for _ in range(repeat):
            for name, start in started.items():
                found[name].append(measure(start, torch.device(device), warmup, seconds))
    rates, starts = ({name: [each[at] for each in values] for name, values in found.items()} for at in (0, 1))
    train = prepared["datasets"]["train"]
    described = (
        f"{train['gt_size']}×{train['gt_size']} patches, scale {train['scale']}, batch "
        f"{train['batch_size_per_gpu']}, {workers} workers, {repeat} rounds of {seconds:g} s each. "
        f"{machine(device, threads)}."
    )
    text = f"{described}\n\n{as_markdown(summary(rates, starts))}"
    typer.echo(text)
    values = {"setting": described, "patches_per_second": rates, "seconds_to_first_batch": starts}
    for file, content in ((out, text), (json_file, json.dumps(values, indent=1))):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
