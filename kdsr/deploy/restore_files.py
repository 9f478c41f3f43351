"""Restores image files: reading, an opened network, writing, one file after the other and beside each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import cv2

from kdsr.data.image_info import ImageInfo
from kdsr.deploy.inference import Inference
from kdsr.deploy.pictures import Format, Picture, Result, read_picture, write_result
from kdsr.models.restored_images import ahead, free_threads
from kdsr.runtime.errors import KdsrError, is_out_of_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """An image file and the file of its result."""

    source: Path
    target: Path
    format: Format


@dataclass(frozen=True)
class Done:
    """What has become of a job.

    Attributes:
        job: The job.
        info: Header of the input; None if it could not be read.
        value: What ``finish`` gave; None after an error.
        problems: Why there is no result, or why ``finish`` failed; empty otherwise.
    """

    job: Job
    info: ImageInfo | None = None
    value: Any = None
    problems: tuple[str, ...] = ()


def restore_files(
    inference: Inference, jobs: Iterable[Job], finish: Callable[[Job, Result], Any]
) -> Iterator[Done]:
    """Restores files; reading, writing and ``finish`` run beside the network where there are free cores.

    An image that fails does not stop the others.

    Args:
        inference: The network.
        jobs: The files.
        finish: Called with each result once it is written; its value is in ``Done``.
    """

    def read(job: Job) -> tuple[Done, Picture | None]:
        return _attempt(Done(job), lambda: read_picture(job.source))

    def restore(before: tuple[Done, Picture | None]) -> tuple[Done, Result | None]:
        done, picture = before
        if picture is None:
            return done, None
        return _attempt(replace(done, info=picture.info), lambda: inference.result(picture))

    def write(before: tuple[Done, Result | None]) -> Done:
        done, result = before
        if result is None:
            return done

        def run() -> Any:
            write_result(result, done.job.target, done.job.format)
            return finish(done.job, result)

        done, value = _attempt(done, run)
        return replace(done, value=value)

    threads = free_threads(inference.settings.device)
    with ThreadPoolExecutor(1) as reading, ThreadPoolExecutor(threads or 1) as writing:
        pictures = ahead(reading if threads else None, read, jobs)
        yield from ahead(writing if threads else None, write, map(restore, pictures))


def _attempt(done: Done, run: Callable[[], T]) -> tuple[Done, T | None]:
    """``done``, and what ``run`` returns, or None after an error, which is then in ``done`` with the file's name."""
    try:
        return done, run()
    except KdsrError as error:
        problems = error.problems
    except (
        RuntimeError,
        ValueError,
        OSError,
        MemoryError,
        cv2.error,
    ) as error:  # of the network, or an encoder
        text = (str(error).splitlines() or [type(error).__name__])[0]
        problems = ["out of memory" if is_out_of_memory(error) else text]
    names = str(done.job.source), str(done.job.target)
    problems = [text if any(name in text for name in names) else f"{names[0]}: {text}" for text in problems]
    return replace(done, problems=tuple(problems)), None
