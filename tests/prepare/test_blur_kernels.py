"""Measured kernels: files of all kinds become centred kernels of sum 1."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.io import savemat

from kdsr.prepare.blur_kernels import centred, read_kernels
from kdsr.runtime.errors import DataError

HOOK = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [2, 4, 2, 0]], float)
# centre of mass: row 1.7, column 0.8; so the 4 comes into the middle
HOOK_CENTRED = np.zeros((5, 5))
HOOK_CENTRED[:3, 1:4] = HOOK[:, :3] / 10


def test_centre_of_mass_comes_into_the_middle() -> None:
    np.testing.assert_allclose(centred(HOOK), HOOK_CENTRED)
    np.testing.assert_allclose(centred(np.pad(HOOK, ((7, 2), (0, 5)))), HOOK_CENTRED)
    np.testing.assert_array_equal(centred(np.array([[0, 0], [0, 9.0]])), [[1]])
    np.testing.assert_allclose(centred(np.ones((1, 3))), [[0] * 3, [1 / 3] * 3, [0] * 3])


def test_even_sizes() -> None:
    kernel = centred(np.ones((4, 4)))
    assert kernel.shape == (5, 5) and kernel.sum() == pytest.approx(1)
    assert np.count_nonzero(kernel) == 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One kernel in every format; files with two kernels have another one second."""
    cv2.imwrite(str(tmp_path / "a.png"), (HOOK * 20).astype(np.uint8))
    cv2.imwrite(str(tmp_path / "b.png"), (HOOK * 9000).astype(np.uint16))
    cv2.imwrite(str(tmp_path / "c.png"), np.repeat((HOOK * 20).astype(np.uint8)[..., None], 3, axis=2))
    np.save(tmp_path / "d.npy", HOOK)
    np.save(tmp_path / "e.npy", np.stack([HOOK, HOOK[::-1]]))
    cells = np.empty((1, 2), object)
    cells[0, 0], cells[0, 1] = HOOK, HOOK[::-1]
    savemat(tmp_path / "f.mat", {"kernels": cells})
    savemat(tmp_path / "g.mat", {"k": np.stack([HOOK, HOOK[::-1]], axis=2)})
    savemat(tmp_path / "h.mat", {"k": HOOK.astype(np.float32)})
    (tmp_path / "SOURCE.txt").write_text("no kernel")
    return tmp_path


def test_all_formats(folder: Path) -> None:
    kernels = read_kernels([folder])
    assert [name.removeprefix(f"{folder}/") for name, _ in kernels] == [
        "a.png", "b.png", "c.png", "d.npy", "e.npy[0]", "e.npy[1]", "f.mat:kernels{1}", "f.mat:kernels{2}",
        "g.mat:k(:,:,1)", "g.mat:k(:,:,2)", "h.mat:k"]  # fmt: skip
    for name, kernel in kernels:
        flipped = name.endswith(("[1]", "{2}", ",2)"))
        expected = centred(HOOK[::-1]) if flipped else HOOK_CENTRED
        np.testing.assert_allclose(kernel, expected, atol=1e-6, err_msg=name)


def test_files_are_read_in_the_order_given(folder: Path) -> None:
    names = [Path(name).name for name, _ in read_kernels([folder / "d.npy", folder / "a.png"])]
    assert names == ["d.npy", "a.png"]


@pytest.mark.parametrize(("array", "message"), [
    (np.array([[1.0, -0.1]]), "negative values"),
    (np.array([[1.0, np.inf]]), "not finite"),
    (np.zeros((3, 3)), "only zeros"),
    (np.ones(5), r"shape \(5,\)"),
    (np.ones((2, 2, 2, 2)), r"shape \(2, 2, 2, 2\)"),
    (np.array([["a"]]), "numeric"),
    (np.ones((0, 3)), r"shape \(0, 3\)"),
])  # fmt: skip
def test_arrays_that_are_not_kernels(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(DataError, match=rf"--kernels: .*a.npy has .*{message}"):
        read_kernels([tmp_path])


@pytest.mark.parametrize("ending", ["png", "npy", "mat"])
@pytest.mark.parametrize("content", [b"", b"neither of them" * 20])
def test_damaged_files(tmp_path: Path, ending: str, content: bytes) -> None:
    (tmp_path / f"a.{ending}").write_bytes(content)
    with pytest.raises(DataError, match=rf"annot read .*a.{ending}"):
        read_kernels([tmp_path])


@pytest.mark.parametrize("name", ["e.npy", "a.png"])
def test_files_with_damage_anywhere(folder: Path, name: str) -> None:
    """Read or refused."""
    content = (folder / name).read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content)
        for place in generator.integers(0, len(content), 3):
            damaged[place] = generator.integers(256)
        (folder / name).write_bytes(bytes(damaged))
        try:
            read_kernels([folder / name])
        except DataError as error:
            refused += str(folder / name) in str(error)
    assert refused >= 10


@pytest.mark.parametrize("name", ["f.mat", "e.npy", "a.png"])
def test_files_that_end_early(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for length in range(1, len(content) - 100, 37):
        (folder / name).write_bytes(content[:length])
        with pytest.raises(DataError, match=name):
            read_kernels([folder / name])


def test_absent_and_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no kernel in"):
        read_kernels([tmp_path])
    with pytest.raises(DataError, match="Cannot read .*absent.npy: No such file"):
        read_kernels([tmp_path / "absent.npy"])
    np.save(tmp_path / "none.npy", np.ones((0, 3, 3)))
    with pytest.raises(DataError, match="no array in .*none.npy"):
        read_kernels([tmp_path / "none.npy"])


def test_measured_kernels(shared: Path) -> None:
    folder = shared / "data" / "blur_kernels"
    kernels = read_kernels([folder / "kernels_12.mat", folder / "k_large_1.png", folder / "k_large_2.png"])
    assert len(kernels) == 14
    for _, kernel in kernels:
        assert kernel.sum() == pytest.approx(1, abs=1e-4)
        offsets = np.arange(len(kernel)) - len(kernel) // 2
        assert max(abs((kernel.sum(axis=axis) * offsets).sum()) for axis in (0, 1)) <= 0.501
    with pytest.raises(DataError, match="Levin09.mat is a Matlab 7.3 file; save it with '-v7'"):
        read_kernels([folder / "Levin09.mat"])
    assert len(read_kernels([shared / "data" / "Levin_deblur" / "kernel"])) == 8
