"""An exported ONNX file as a network, computed by onnxruntime."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdsr.deploy.network_file import Found, OpenedNetwork, describe, description_of_text, notes_of
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
        self.multiple_of = int(description_of_text(self.metadata).get("multiple_of") or 1)

    def forward(self, x: Tensor) -> Tensor:
        images = x.detach().cpu().numpy().astype(self.kind, copy=False)
        (result,) = self.session.run(None, {self.input_name: images})
        return torch.from_numpy(result).float().to(x.device)


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
    return replace(opened, notes=notes_of(described), licence=described.get("licence"))
