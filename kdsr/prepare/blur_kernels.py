"""Reads measured blur kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from kdsr.data.image_files import EXTENSIONS, cannot_read, decode
from kdsr.prepare.synthesis import Floats
from kdsr.runtime.errors import DataError

_ENDINGS = EXTENSIONS | {".npy", ".mat"}
NamedKernel = tuple[str, Floats]


def centred(kernel: NDArray[Any]) -> Floats:
    """Crops zero borders and centres the kernel at the pixel nearest to its centre of mass.

    A blurred image is then aligned with its ground truth to within half a pixel.

    Args:
        kernel: (H, W), not negative, with a positive sum.

    Returns:
        (K, K), float32, K odd, with sum 1.
    """
    weights = np.asarray(kernel, np.float64)
    weights = weights / weights.sum()
    rows, columns = np.nonzero(weights)
    middle = [round(float((weights.sum(axis=1 - axis) * np.arange(weights.shape[axis])).sum()))
              for axis in (0, 1)]  # fmt: skip
    radius = max(
        int(abs(indices - centre).max()) for indices, centre in zip((rows, columns), middle, strict=True)
    )
    result = np.zeros((2 * radius + 1, 2 * radius + 1), np.float32)
    result[rows - middle[0] + radius, columns - middle[1] + radius] = weights[rows, columns]
    return result


def _checked(kernel: NDArray[Any], name: str) -> Floats:
    problem = ""
    if kernel.ndim != 2 or kernel.size == 0 or kernel.dtype.kind not in "buif":
        problem = f"shape {kernel.shape} of {kernel.dtype}; a kernel is (H, W), numeric"
    elif not np.isfinite(kernel).all():
        problem = "values that are not finite"
    elif kernel.min() < 0:
        problem = "negative values; a blur kernel has none"
    elif not kernel.any():
        problem = "only zeros"
    if problem:
        raise DataError(f"--kernels: {name} has {problem}")
    return centred(kernel)


def _matlab_arrays(value: NDArray[Any], name: str) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yields the kernels of a Matlab variable: an array (H, W) or (H, W, N), or a cell array of these."""
    if value.dtype == object:
        for number, cell in enumerate(value.ravel(order="F"), 1):
            yield from _matlab_arrays(np.asarray(cell), f"{name}{{{number}}}")
    elif value.ndim == 3:
        for number in range(value.shape[2]):
            yield f"{name}(:,:,{number + 1})", value[..., number]
    else:
        yield name, value


def _arrays(path: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yields the arrays of a file, each with the path and, if there can be several, its index."""
    if path.suffix.lower() == ".npy":
        array = np.load(path, allow_pickle=False)
        if array.ndim == 3:
            yield from ((f"{path}[{number}]", kernel) for number, kernel in enumerate(array))
        else:
            yield str(path), array
    elif path.suffix.lower() == ".mat":
        for variable, value in loadmat(path).items():
            if not variable.startswith("__"):
                yield from _matlab_arrays(np.asarray(value), f"{path}:{variable}")
    else:
        image = decode(path.read_bytes(), cv2.IMREAD_UNCHANGED, str(path))
        yield str(path), image if image.ndim == 2 else image[..., :3].mean(axis=2)


def read_kernels(paths: Iterable[Path]) -> tuple[NamedKernel, ...]:
    """Reads measured kernels.

    Files are images (grey, 8 or 16 bits), ``.npy`` ((H, W) or (N, H, W)) or ``.mat`` up to version 7 (arrays
    (H, W) or (H, W, N), or cells of them).

    Args:
        paths: Files, or folders of files; other file types in a folder are ignored.

    Returns:
        Name (path and index) and kernel from :func:`centred`, in the order of ``paths``.

    Raises:
        DataError: A file is unreadable or not a kernel, or there is none.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            here = [file for file in sorted(path.iterdir()) if file.suffix.lower() in _ENDINGS]
            if not here:
                raise DataError(f"--kernels: there is no kernel in {path}; looked for images, .npy and .mat")
            files += here
        else:
            files.append(path)
    kernels: list[NamedKernel] = []
    for file in files:
        try:
            arrays = list(_arrays(file))
        except DataError:
            raise
        except OSError as error:
            raise cannot_read(str(file), error) from error
        except NotImplementedError as error:
            raise DataError(
                f"--kernels: {file} is a Matlab 7.3 file; save it with '-v7', or as .npy or PNG files"
            ) from error
        except Exception as error:  # numpy's and scipy's errors for damaged files have no common base
            raise DataError(f"--kernels: cannot read {file}: {error}") from error
        kernels += [(name, _checked(array, name)) for name, array in arrays]
    if not kernels:
        raise DataError(f"--kernels: no array in {', '.join(map(str, files))}")
    return tuple(kernels)
