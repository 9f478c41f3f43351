"""An exported ONNX file as a network, computed by onnxruntime."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdsr.deploy.network_file import Found, OpenedNetwork, describe, description_of_text, with_description
from kdsr.distill.padding import extended
from kdsr.runtime.errors import CheckpointError, OptionError

PACKAGES = "onnx, onnxscript, onnxruntime and onnxslim"


def require_onnx(purpose: str, *names: str) -> list[Any]:
    """Imports packages that ``pip install '.[export]'`` brings.

    Raises:
        OptionError: One is missing.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise OptionError(
            f"{purpose} needs {error.name}; install {PACKAGES} with pip install '.[export]' in kdsr's folder"
        ) from None


class OnnxNetwork(nn.Module):
    """(N, C, H, W) in [0, 1] -> (N, C', H·scale, W·scale); float32, on the device of the input.

    Args:
        file: The ``.onnx``, or its content.
        device: ``cuda`` needs onnxruntime-gpu.
        threads: CPU threads; None: as many as torch uses.

    Raises:
        CheckpointError: onnxruntime cannot load it, or it has not one image as input and one as output.
        OptionError: onnxruntime is missing, or has no GPU.
    """

    def __init__(
        self, file: Path | bytes, device: str | torch.device = "cpu", threads: int | None = None
    ) -> None:
        super().__init__()
        (runtime,) = require_onnx("an ONNX file", "onnxruntime")
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu and "CUDAExecutionProvider" not in runtime.get_available_providers():
            raise OptionError(
                f"--device {device}: this onnxruntime computes on the CPU only (onnxruntime-gpu)"
            )
        settings = runtime.SessionOptions()
        settings.intra_op_num_threads = threads or torch.get_num_threads()
        settings.log_severity_level = 3  # errors
        providers = [*(["CUDAExecutionProvider"] if on_gpu else []), "CPUExecutionProvider"]
        name = file if isinstance(file, Path) else "the ONNX file"
        try:
            if isinstance(file, Path) and not file.is_file():
                raise CheckpointError(f"{file}: no such file")
            self.session = runtime.InferenceSession(
                file if isinstance(file, bytes) else str(file), settings, providers=providers
            )
        except CheckpointError:
            raise
        except Exception as error:  # onnxruntime's own types, one for each kind of damage
            reason = (str(error).splitlines() or [""])[0]
            raise CheckpointError(f"{name}: onnxruntime cannot load it ({reason})") from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if any(len(sides) != 1 or len(sides[0].shape) != 4 for sides in (inputs, outputs)):
            raise CheckpointError(f"{name}: needs one input and one output of four dimensions (N, C, H, W)")
        self.input_name = inputs[0].name
        self.kind = np.float16 if inputs[0].type == "tensor(float16)" else np.float32
        height, width = inputs[0].shape[2:]  # text where it is free
        self.fixed_size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        described = description_of_text(self.metadata)
        self.multiple_of, self.smallest = (
            int(described.get(key) or 1) for key in ("multiple_of", "smallest")
        )

    def forward(self, x: Tensor) -> Tensor:
        return at_least(self._run, x.detach().cpu(), self.smallest).to(x.device)

    def _run(self, x: Tensor) -> Tensor:
        images = np.ascontiguousarray(x.numpy().astype(self.kind, copy=False))
        (result,) = self.session.run(None, {self.input_name: images})
        return torch.from_numpy(result).float()


def at_least(net: Callable[[Tensor], Tensor], x: Tensor, side: int) -> Tensor:
    """Runs a network on (N, C, H, W), extended at the bottom and right to at least ``side`` pixels; cuts the result."""
    height, width = x.shape[-2:]
    if min(height, width) >= side:
        return net(x)
    taller, wider = max(height, side), max(width, side)
    result = net(extended(x, side)[..., :taller, :wider])
    scale = result.shape[-1] // wider
    return result[..., : height * scale, : width * scale]


def open_onnx(file: Path, device: str | torch.device = "cpu") -> OpenedNetwork:
    """Opens an ONNX file; scale and licence are those of its ``metadata_props``, else what a small image shows.

    Raises:
        CheckpointError: It cannot be loaded or gives no image.
        OptionError: onnxruntime is missing, or has no GPU.
    """
    net = OnnxNetwork(file, device)
    described = description_of_text(net.metadata)
    options = described.get("network")
    kind = options["type"] if options else "a network that the file does not name"
    opened = describe(net, Found(options, f"{kind} in an ONNX file"), file, device, net.fixed_size)
    return with_description(opened, described)
