"""Tries every checkpoint and a first training step before anything is written."""

from __future__ import annotations

import contextlib
import math
import random
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from basicsr.models import build_model
from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY
from torch import Tensor, nn

from kdsr.data.patches import collate, to_device
from kdsr.data.stored_outputs import KEY
from kdsr.distill.step import X
from kdsr.distill.weight_files import each_network
from kdsr.models.kd_model import KDModel
from kdsr.models.pretrained import load_pretrained, warm_start
from kdsr.models.sections import LoopOptions
from kdsr.models.trainer import LoopInterface
from kdsr.options.check_gt import ground_truth_problems
from kdsr.options.signatures import registered
from kdsr.runtime.errors import CheckpointError, KdsrError, OptionError, is_out_of_memory
from kdsr.runtime.memory import limit_network_size, require_memory
from kdsr.runtime.snapshot import left_unchanged

T = TypeVar("T")
CORNER = 64  # side of the ground truth in the first step, in pixels


def build(opt: dict[str, Any]) -> Any:
    """Builds the model of a run with its pretrained weights.

    Raises:
        OptionError: It cannot be built.
        CheckpointError: All files that cannot be read or do not fit.
    """
    try:
        with limit_network_size("the networks"):
            model = build_model(opt)
    except Exception as error:
        with generators_kept(opt):
            _explain(opt)
        if isinstance(error, KdsrError):
            raise
        raise OptionError(f"{opt['model_type']} cannot be built: {describe_error(error)}") from error
    for key in ("g", "d"):
        require_memory(getattr(model, f"net_{key}", None), f"network_{key}", _copies(opt, key))
    return model


def _explain(opt: dict[str, Any]) -> None:
    """Builds the networks of a failed model one by one, to find the cause.

    Raises:
        OptionError: A network is too large, or cannot be built.
        CheckpointError: All files that cannot be read or do not fit.
    """
    ours = issubclass(registered(MODEL_REGISTRY)[opt["model_type"]], LoopInterface)
    opt = each_network(opt)
    keys = [key for key, value in opt.items() if key.startswith("network_") and isinstance(value, dict)]
    problems: list[str] = []
    built: dict[str, nn.Module] = {}
    for place in keys if opt["is_train"] else ["network_g"]:
        name, options = place.removeprefix("network_"), dict(opt[place])
        network = registered(ARCH_REGISTRY)[kind := options.pop("type")]
        with (
            contextlib.suppress(_NoValues),
            torch.device("meta"),
            limit_network_size(place, _copies(opt, name)),
        ):
            _called(network, options, _NoValues, "")
        with limit_network_size(place):
            built[name] = _called(network, options, OptionError, f"{place}: {kind} cannot be built: ")
        try:
            if ours:  # BasicSR's models load weights in other ways
                load_pretrained(built[name], name, opt)
        except KdsrError as error:
            problems += error.problems
    if not problems and ("t" in built or opt["path"].get("init_from") != "teacher"):
        try:
            warm_start(built["g"], opt, built.get("t"))
        except KdsrError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems)


class _NoValues(Exception):
    """A network needs values while it is built, which the meta device does not have."""


def _called(network: type, options: dict[str, Any], failing: type[Exception], message: str) -> nn.Module:
    try:
        return network(**options)
    except KdsrError:
        raise
    except Exception as error:  # any error of an architecture
        raise failing(f"{message}{describe_error(error)}") from error


def _copies(opt: dict[str, Any], key: str) -> int:
    """Returns how many copies of a network's weights the machine's memory holds."""
    if not opt["is_train"] or opt["num_gpu"] or key not in ("g", "d"):
        return 1
    kind = str((opt["train"].get(f"optim_{key}") or {}).get("type"))
    return 4 if "Adam" in kind else 2  # gradients, and Adam's two moments


def rehearse(model: Any, opt: dict[str, Any], dataset: Any) -> None:
    """Runs the first step on one or two images, then restores the model.

    Finds errors that the check of single options cannot find, before the run's folder is created: losses that do not
    fit their inputs, networks with outputs of different sizes, values that an optimizer refuses. The step uses crops of
    the patches, which is much faster; if it fails, it is repeated with whole patches. The student always gets a whole
    patch.

    Args:
        model: The model of the run.
        opt: The parsed options.
        dataset: The training set.

    Raises:
        OptionError: The first training images cannot be read, or the first step fails.
    """
    with generators_kept(opt):
        batch = _first_batch(dataset, opt, isinstance(model, LoopInterface), model.device)
        if "gt" not in batch and (problems := ground_truth_problems(opt, type(model))):
            raise OptionError(problems)
        corner = _corner(batch, opt)
        if corner is not None and not opt["dist"]:  # no second try on one rank while the others wait
            with contextlib.suppress(Exception), left_unchanged(model):
                with torch.no_grad():  # some networks take images of one size only
                    model.net_g(batch["lq"][:1].to(model.device))
                _first_step(model, opt, corner)
                return
        with left_unchanged(model):
            _first_step(model, opt, batch)


def _corner(batch: Any, opt: dict[str, Any]) -> dict[str, Any] | None:
    """Crops the images of a batch to their upper left corners; None if they are not larger."""
    scale = opt.get("scale") or 1
    lq = batch.get("lq") if isinstance(batch, dict) else None
    side = 16 * math.ceil(CORNER / scale / 16)  # LQ pixels; a multiple of 16 suits most networks
    if not (isinstance(lq, Tensor) and lq.ndim == 4 and min(lq.shape[-2:]) > side):
        return None
    corner = {**batch, "lq": lq[..., :side, :side]}
    for key in ("gt", KEY):
        if isinstance(batch.get(key), Tensor):
            corner[key] = batch[key][..., : side * scale, : side * scale]
    return corner


def _first_step(model: Any, opt: dict[str, Any], batch: Any) -> None:
    """Runs one training step.

    Raises:
        OptionError: The step fails.
    """
    try:
        if isinstance(model, LoopInterface):
            model.trainer.guard.limit = 2  # a first step that is not finite does not end the run
        if isinstance(model, KDModel):
            model.accumulate = 1  # a batch of one or two images is not split
        model.update_learning_rate(1, warmup_iter=LoopOptions.read(opt["train"]).warmup_iter)
        model.feed_data(batch)
        with (
            model.builder.precision.eager() if isinstance(model, LoopInterface) else contextlib.nullcontext()
        ):
            model.optimize_parameters(1)
        problems = _unlike_outputs(model, opt)  # a loss may have broadcast one channel to three
    except KdsrError:
        raise
    except Exception as error:
        what: Any = _unlike_outputs(model, opt) or _at_fault(model, opt, batch)
        if isinstance(model, LoopInterface):
            what = model.builder.precision.problem(error) or what
        raise OptionError(what or f"the first step fails: {describe_error(error)}") from error
    if problems:
        raise OptionError(problems)


@contextlib.contextmanager
def generators_kept(opt: dict[str, Any]) -> Iterator[None]:
    """Restores the states of Python's, NumPy's and torch's generators at the end."""
    devices = [torch.cuda.current_device()] if opt["num_gpu"] and torch.cuda.is_available() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def first_items(name: str, options: dict[str, Any], load: Callable[[], T]) -> T:
    """Calls ``load``, which reads from the data set ``name``.

    Raises:
        OptionError: The data set fails.
        DataError: An image cannot be read.
    """
    try:
        return load()
    except KdsrError:
        raise
    except Exception as error:
        raise OptionError(
            f"datasets.{name}: {options['type']} fails at its first images: {describe_error(error)}"
        ) from error


def _first_batch(dataset: Any, opt: dict[str, Any], ours: bool, device: torch.device) -> Any:
    """Returns a batch of one or two training images.

    Raises:
        OptionError: The data set fails, or gives items that kdsr's models cannot take.
    """
    train = opt["datasets"]["train"]
    samples = min(2, train["batch_size_per_gpu"])
    batch = first_items(
        "train", train, lambda: collate([dataset[0, position] for position in range(samples)])
    )
    batch = to_device(batch, device)
    if ours and not (isinstance(batch, dict) and isinstance(batch.get("lq"), Tensor)):
        found = (
            f"the keys {', '.join(map(str, batch))}"
            if isinstance(batch, dict)
            else f"a {type(batch).__name__}"
        )
        raise OptionError(
            f"datasets.train: {train['type']} gives items that {opt['model_type']} cannot take: {found}; "
            "expected a dict with the image lq, and gt if there is one"
        )
    return batch


def _unlike_outputs(model: Any, opt: dict[str, Any]) -> list[str]:
    """Returns the networks whose output in the step has another shape than the ground truth."""
    made = vars(model) if isinstance(model, LoopInterface) else {}
    step = made.get("step")
    teacher_output = step.teacher_outputs.get(X) if step is not None else None
    images = {"network_g": made.get("output"), "network_t": teacher_output}
    wanted = next((image for image in (made.get("gt"), *images.values()) if image is not None), None)
    return [
        f"{key}: {'each' if isinstance(opt[key], list) else opt[key]['type']} gives {_size(image)}, expected "
        f"{_size(wanted)} (channels × height × width): "
        f"another scale than {opt.get('scale', 1)}, or another number of channels"
        for key, image in images.items()
        if image is not None and wanted is not None and image.shape[1:] != wanted.shape[1:]
    ]


def _at_fault(model: Any, opt: dict[str, Any], batch: Any) -> list[str]:
    """Finds the options at fault after a failed step, by trying networks and losses one by one."""
    problems = []
    nets = {"network_g": model.net_g, **model.teachers_by_place()} if isinstance(model, KDModel) else {}
    for key, net in nets.items():  # a VQGANModel's network returns more than an image
        with contextlib.suppress(Exception), torch.no_grad():  # reported by the failed step
            if not isinstance(output := net(batch["lq"].to(model.device)), Tensor):
                problems.append(
                    f"{key}: {each_network(opt)[key]['type']} gives a {type(output).__name__}; "
                    "expected one tensor, the images"
                )
    terms = model.terms.items() if isinstance(model, KDModel) else ()
    for key, loss in ((key, term.loss) for key, term in terms if term.COMPARES_IMAGES):
        image = torch.rand(2, 3, 16, 16, device=model.device)
        try:
            if (value := loss(image, image.flip(0))).ndim == 0:
                continue
            reason = f"gives {value.numel()} values"
        except Exception as error:
            reason = describe_error(error)
        problems.append(
            f"train.{key}.type: {opt['train'][key]['type']} does not compare two batches of images ({reason}); "
            "use a loss such as L1Loss"
        )
    return problems


def _size(images: Tensor) -> str:
    return "×".join(map(str, images.shape[1:]))


def describe_error(error: Exception) -> str:
    """Returns the type and first line of an error, with the line of the user's code that raised it."""
    if is_out_of_memory(error):
        return "the machine has too little memory for it; check its options for large numbers"
    last = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {last}{_users_line(error)}"


def _users_line(error: Exception) -> str:
    """Returns the last line of the user's code in the traceback, in brackets."""
    not_theirs = (sysconfig.get_path("stdlib"), str(Path(__file__).parents[1]), "<")
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(not_theirs) and "site-packages" not in frame.filename
    ]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
