"""A network as a program of ``torch.export``, and that as an ONNX file or a ``.pt2``."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdsr.deploy.exportable import exportable
from kdsr.deploy.network_file import OpenedNetwork
from kdsr.deploy.onnx_network import at_least, require_onnx
from kdsr.runtime.errors import KdsrError

OPSET = 20
ONNX_PACKAGES = ("onnx", "onnxslim", "onnxscript", "onnxruntime")
SMALLEST = 32  # least side, in pixels, of a network that cannot be exported for any size
_AXES = (
    {0: "batch", 2: "height", 3: "width"},
    {0: "batch", 2: "restored_height", 3: "restored_width"},
)
_TRACED = 48  # side of the image that a network is traced with


class ExportError(KdsrError):
    """A network cannot be exported, or what was exported is not the network."""


def traced(opened: OpenedNetwork, size: tuple[int, int] | None, half: bool = False) -> tuple[Any, int]:
    """A ``torch.export.ExportedProgram`` of a network, with a free number of images, and the least side that it takes.

    Args:
        opened: A network of torch.
        size: The only H and W that it will take; None: any multiples of the network's ``multiple_of``.
        half: Whether it computes in float16, from and to float32.

    Raises:
        ExportError: It cannot be traced, or not for free sizes.
    """
    net, multiple = exportable(opened.net).cpu(), opened.multiple_of
    net = Half(net) if half else net
    batch = torch.export.Dim("batch")
    if size is not None:
        return _program(net, (2, opened.channels_in, *size), {0: batch}), 1
    side = -(-_TRACED // multiple) * multiple
    shape = (2, opened.channels_in, side, side + 2 * multiple)
    problem: ExportError | None = None
    for least in (1, -(-SMALLEST // multiple)):
        height, width = (torch.export.Dim(name, min=least) for name in ("height", "width"))
        free = {0: batch, 2: height, 3: width}
        if multiple > 1:
            free |= {2: multiple * height, 3: multiple * width}
        try:
            program = _program(net, shape, free)
        except ExportError as error:
            problem = error
            continue
        if all(isinstance(length, torch.SymInt) for length in _input_shape(program)[2:]):
            return program, least * multiple if least > 1 else 1
        problem = ExportError("the program is that of one size")
    raise ExportError(
        f"{opened.source}: cannot be exported for free sizes, its forward pass computes with the image's size in "
        f"Python ({problem}); --size HEIGHTxWIDTH exports it for one size"
    )


def _program(net: nn.Module, shape: tuple[int, ...], free: Mapping[int, Any]) -> Any:
    try:
        with _quiet(), torch.no_grad():
            example = torch.rand(shape, generator=torch.Generator().manual_seed(0))
            return torch.export.export(net, (example,), dynamic_shapes=[dict(free)])
    except Exception as error:  # of tracing: one for each thing that a forward pass may do
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        reason = next(
            (line for line in lines[1:] if "constant" in line or "guard" in line), "".join(lines[:1])
        )
        raise ExportError(reason or type(error).__name__) from error


def _input_shape(program: Any) -> torch.Size:
    (name,) = program.graph_signature.user_inputs
    node = next(node for node in program.graph.nodes if node.name == name)
    shape: torch.Size = node.meta["val"].shape
    return shape


def onnx_model(program: Any, half: bool, opset: int = OPSET) -> Any:
    """The program as an ``onnx.ModelProto``, made smaller by onnxslim.

    Args:
        program: See ``traced``.
        half: Whether weights and computation are in float16; input and output stay float32.
        opset: Version of the operators.

    Raises:
        ExportError: It cannot be converted.
        OptionError: A package is missing.
    """
    onnx, slim = require_onnx("export to ONNX", *ONNX_PACKAGES)[:2]
    try:
        with _quiet():
            converted: Any = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=["lq"],
                output_names=["restored"],
            )
            model = slim.slim(converted.model_proto)
            if half:
                from onnxruntime.transformers.float16 import convert_float_to_float16

                # slim puts the new nodes, which are at the end, in order
                model = slim.slim(convert_float_to_float16(model, keep_io_types=True))
            for value, names in zip((model.graph.input[0], model.graph.output[0]), _AXES, strict=True):
                for index, name in names.items():
                    dim = value.type.tensor_type.shape.dim[index]
                    if not dim.HasField("dim_value"):
                        dim.dim_param = name
            onnx.checker.check_model(model)
    except Exception as error:  # of the converter, onnxslim and the checker
        reason = (str(error).splitlines() or [""])[0]
        raise ExportError(f"cannot be converted to ONNX ({type(error).__name__}: {reason})") from error
    return model


def onnx_content(model: Any, metadata: Mapping[str, str]) -> bytes:
    """The file of a model, with ``metadata`` as its ``metadata_props``."""
    (onnx,) = require_onnx("export to ONNX", "onnx")
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    content: bytes = model.SerializeToString()
    return content


def pt2_content(program: Any, metadata: Mapping[str, str]) -> bytes:
    """The program as a file of ``torch.export.save``; ``metadata`` are its extra files."""
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer, extra_files=dict(metadata))
    return buffer.getvalue()


class Half(nn.Module):
    """A network that computes in float16 from and to float32."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.half()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x.half()).float()
        return result


class Pt2Network(nn.Module):
    """The program of a ``.pt2``: (N, C, H, W) in [0, 1] -> (N, C', H·scale, W·scale), on the CPU.

    Args:
        content: The file's.
        multiple_of: What H and W must be multiples of.
        smallest: Least H and W; smaller images are extended.
    """

    def __init__(self, content: bytes, multiple_of: int, smallest: int) -> None:
        super().__init__()
        self.multiple_of, self.smallest = multiple_of, smallest
        with _quiet():
            self._program = (
                torch.export.load(io.BytesIO(content)).module(),
            )  # not a child: it has no eval()

    def forward(self, x: Tensor) -> Tensor:
        return at_least(self._program[0], x.cpu(), self.smallest).to(x.device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log lines of the exporters, which are about their own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
