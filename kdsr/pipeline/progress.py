"""A progress bar, and the prefetchers of training batches."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from basicsr.utils import MessageLogger
from basicsr.utils.dist_util import get_dist_info
from tqdm import tqdm


class _AboveBar:
    """A stream that prints above the progress bar."""

    def write(self, text: str) -> None:
        if text.strip():
            tqdm.write(text.rstrip("\n"), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


class Progress:
    """A bar with iterations, rate, ETA and the last losses; on rank 0, if stderr is a terminal."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def start(self, name: str, done: int, total: int) -> None:
        rank, _ = get_dist_info()
        self.bar = tqdm(
            desc=name, initial=done, total=total, unit="it", dynamic_ncols=True, smoothing=0.05,
            disable=rank != 0 or not sys.stderr.isatty(),
        )  # fmt: skip
        if self.bar.disable:
            return
        for handler in logging.getLogger("basicsr").handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(_AboveBar())

    def advance(self) -> None:
        if self.bar is not None and self.bar.total is not None and self.bar.n < self.bar.total:
            self.bar.update(1)

    def show(self, values: dict[str, float]) -> None:
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Batches:
    """Like BasicSR's CPUPrefetcher, but does not start the workers twice before the first epoch."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.iterator: Iterator[dict[str, Any]] = iter(())

    def reset(self) -> None:
        self.iterator = iter(self.loader)

    def next(self) -> dict[str, Any] | None:
        return next(self.iterator, None)


class CudaBatches:
    """Like BasicSR's CUDAPrefetcher: copies a batch to the GPU while the previous one is trained on.

    BasicSR's starts an unused epoch before the first, which would count for growing batches. It also frees a batch's
    memory while the GPU may still use it, so that its copy stream can overwrite it.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.stream = torch.cuda.Stream()
        self.iterator: Iterator[dict[str, Any]] = iter(())
        self.ahead: dict[str, Any] | None = None

    def reset(self) -> None:
        self.iterator = iter(self.loader)
        self._fetch()

    def next(self) -> dict[str, Any] | None:
        current = torch.cuda.current_stream()
        current.wait_stream(self.stream)
        batch = self.ahead
        for value in (batch or {}).values():
            if torch.is_tensor(value):
                value.record_stream(current)
        self._fetch()
        return batch

    def _fetch(self) -> None:
        self.ahead = next(self.iterator, None)
        if self.ahead is not None:
            with torch.cuda.stream(self.stream):
                self.ahead = {
                    key: value.to("cuda", non_blocking=True) if torch.is_tensor(value) else value
                    for key, value in self.ahead.items()
                }


class ProgressMessageLogger(MessageLogger):
    """BasicSR's message logger; also shows the losses in the progress bar."""

    def __init__(self, opt: dict[str, Any], start_iter: int, tb_logger: Any, progress: Progress) -> None:
        super().__init__(opt, start_iter, tb_logger)
        self.max_iters += 1  # BasicSR's ETA is one iteration short: "-1 day" at the last one
        self.progress = progress
        progress.start(opt["name"], start_iter, int(opt["train"]["total_iter"]))

    def __call__(self, log_vars: dict[str, Any]) -> None:
        self.progress.show({name: value for name, value in log_vars.items() if name.startswith("l_")})
        super().__call__(log_vars)
