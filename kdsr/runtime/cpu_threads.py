"""The images of a batch side by side, a CPU thread for each, in a network without gradient.

Threads that share the work of each operation wait for each other after each; those with an image of their own do not.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def by_image(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a frozen network's forward pass share a batch between threads, where it is without gradient on a CPU."""

    @functools.wraps(forward)
    def shared(images: Tensor, *args: Any, **kwargs: Any) -> Any:
        threads = min(torch.get_num_threads(), len(images))
        if threads < 2 or images.device.type != "cpu" or torch.is_grad_enabled():
            return forward(images, *args, **kwargs)

        def part(rows: Tensor) -> Any:
            with torch.no_grad():  # grad mode belongs to a thread
                return forward(rows, *args, **kwargs)

        outputs = _pool(torch.get_num_threads()).map(part, images.tensor_split(threads))
        return tree_map(lambda *parts: torch.cat(parts), *outputs)

    return shared


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that compute on one core each."""
    started = threading.Barrier(threads)
    pool = ThreadPoolExecutor(
        threads, thread_name_prefix="kdsr_image", initializer=torch.set_num_threads, initargs=(1,)
    )
    for waiting in [pool.submit(started.wait) for _ in range(threads)]:
        waiting.result()
    torch.set_num_threads(threads)  # what they set is also the default of threads to come
    return pool


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it everything runs on the calling thread: for torch's modes that see the operations of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
