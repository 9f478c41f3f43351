"""What is tried before anything is written: every checkpoint, and a first step."""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.utils.data import default_collate

from kdsr.distill.step import X
from kdsr.distill.weight_files import weight_files
from kdsr.models.pretrained import load_pretrained, warm_start
from kdsr.models.trainer import LoopInterface
from kdsr.options.check_gt import ground_truth_problems
from kdsr.options.signatures import registered
from kdsr.runtime.errors import CheckpointError, KdsrError, OptionError, is_out_of_memory
from kdsr.runtime.memory import limit_network_size

T = TypeVar("T")
_IMAGE_LOSSES = ("pixel_opt", "logits_opt", "lcr_opt", "zoom_in_opt", "zoom_out_opt", "bm_opt")


def check_sizes(opt: dict[str, Any]) -> None:
    """Builds every network without memory for its weights, to see whether the machine has enough for them.

    Raises:
        OptionError: A network has more layers, or larger weights, than can be.
    """
    for key, options in opt.items():
        if not key.startswith("network_") or not isinstance(options, dict):
            continue
        name = key.removeprefix("network_")
        if not opt["is_train"] and name != "g":
            continue
        copies = 1
        if opt["is_train"] and name in ("g", "d") and opt["num_gpu"] == 0:
            kind = str((opt["train"].get(f"optim_{name}") or {}).get("type"))
            copies = 4 if "Adam" in kind else 2  # with gradients, and Adam's two moments
        with contextlib.suppress(_NotBuilt), torch.device("meta"), limit_network_size(key, copies):
            _build(options, name, _NotBuilt)


class _NotBuilt(Exception):
    """Some networks compute with values while they are built, which need memory; they are watched when they are."""


def check_checkpoints(opt: dict[str, Any]) -> None:
    """Loads every checkpoint that the options of a training name into its network, and forgets both.

    Costs a second, and means that a file that does not fit is found before the run's folder is made and an older run
    of the same name is put aside.

    Raises:
        CheckpointError: With all the files at fault.
    """
    files = opt["path"]
    named = {
        key[len("network_") :]
        for key, value in opt.items()
        if key.startswith("network_") and isinstance(value, dict)
    }
    wanted = sorted(named & weight_files(opt).keys())
    if files.get("init_from"):
        wanted = sorted({*wanted, "g"})
    problems: list[str] = []
    built: dict[str, nn.Module] = {}
    for key in wanted:
        with limit_network_size(f"network_{key}"):
            built[key] = _build(opt[f"network_{key}"], key)
        try:
            load_pretrained(built[key], key, opt)
        except KdsrError as error:
            problems += error.problems
    if not problems and ("t" in built or files.get("init_from") != "teacher"):
        try:
            if "g" in built:
                warm_start(built["g"], opt, built.get("t"))
        except KdsrError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems)


def _build(options: dict[str, Any], key: str, failing: type[Exception] = OptionError) -> nn.Module:
    # Not BasicSR's build_network: it opens the log, whose file does not exist yet.
    arguments = {name: value for name, value in options.items() if name != "type"}
    # initial weights must not depend on whether there was a file to look at
    with torch.random.fork_rng(devices=[]):
        try:
            return registered(ARCH_REGISTRY)[options["type"]](**arguments)
        except KdsrError:
            raise
        except Exception as error:  # whatever an architecture makes of numbers that do not go together
            raise failing(
                f"network_{key}: {options['type']} cannot be built: {describe_error(error)}"
            ) from error


def rehearse(opt: dict[str, Any], model: type, dataset: Any, before_step: Callable[[Any], None]) -> Any:
    """Makes the first step on one or two images with throw-away networks.

    What no look at single options can find shows here, before the run's folder is made: losses that get what they
    cannot take, networks whose outputs differ in size, optimizers that refuse their numbers. Costs one step of a
    small batch; draws nothing from the run's generators.

    Args:
        opt: The parsed options.
        model: The model's class.
        dataset: The training set.
        before_step: Called with the model as it is built.

    Returns:
        The model after its step, to be thrown away.

    Raises:
        OptionError: What went wrong in building the model, in reading the first training images, or in the first step.
    """
    opt = copy.deepcopy(opt)
    opt["train"]["max_nonfinite"] = 2  # a first step that is not finite ends no run
    stage, rehearsed, batch = f"{opt['model_type']} cannot be built", None, None
    try:
        with generators_kept(opt):
            with limit_network_size("the networks"):
                rehearsed = model(opt)
            batch = _first_batch(dataset, opt, issubclass(model, LoopInterface))
            stage = "the rehearsal of validation fails"
            before_step(rehearsed)
            if "gt" not in batch and (problems := ground_truth_problems(opt, model)):
                raise OptionError(problems)
            stage = "the first step fails"
            rehearsed.update_learning_rate(1, warmup_iter=opt["train"].get("warmup_iter", -1))
            rehearsed.feed_data(batch)
            rehearsed.optimize_parameters(1)
        if unlike := _unlike_outputs(rehearsed, opt):  # a loss may have taken one channel for three
            raise OptionError(unlike)
        return rehearsed
    except KdsrError:
        raise
    except Exception as error:
        what: Any = _unlike_outputs(rehearsed, opt) or _at_fault(rehearsed, opt, batch)
        if isinstance(rehearsed, LoopInterface):
            what = rehearsed.builder.precision.problem(error) or what
        raise OptionError(what or f"{stage}: {describe_error(error)}") from error


def build_for_test(opt: dict[str, Any], model: type) -> Any:
    """Builds the model of a test with its weights, to be thrown away; draws nothing from the run's generators.

    Raises:
        OptionError: It cannot be built.
        CheckpointError: Its weights cannot be read, or do not fit.
    """
    logging.disable(logging.WARNING)  # the model that is tested says the same, into the log
    try:
        with generators_kept(opt), limit_network_size("network_g"):
            return model(copy.deepcopy(opt))
    except KdsrError:
        raise
    except Exception as error:
        what = _at_fault(None, opt, None)
        raise OptionError(what or f"{opt['model_type']} cannot be built: {describe_error(error)}") from error
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def generators_kept(opt: dict[str, Any]) -> Iterator[None]:
    """Puts Python's, NumPy's and torch's generators back to where they were."""
    devices = [torch.cuda.current_device()] if opt["num_gpu"] and torch.cuda.is_available() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def first_items(name: str, options: dict[str, Any], load: Callable[[], T]) -> T:
    """What ``load`` reads of the data set ``name``.

    Raises:
        OptionError: The data set fails; an image that cannot be read is a DataError.
    """
    try:
        return load()
    except KdsrError:
        raise
    except Exception as error:
        raise OptionError(
            f"datasets.{name}: {options['type']} fails at its first images: {describe_error(error)}"
        ) from error


def _first_batch(dataset: Any, opt: dict[str, Any], ours: bool) -> Any:
    """One or two training images, as the model is fed them.

    Raises:
        OptionError: The data set gives none, or, for one of our models, something else.
    """
    train = opt["datasets"]["train"]
    samples = min(2, train["batch_size_per_gpu"])
    batch = first_items(
        "train", train, lambda: default_collate([dataset[0, position] for position in range(samples)])
    )
    if ours and not (isinstance(batch, dict) and isinstance(batch.get("lq"), Tensor)):
        found = (
            f"the keys {', '.join(map(str, batch))}"
            if isinstance(batch, dict)
            else f"a {type(batch).__name__}"
        )
        raise OptionError(
            f"datasets.train: {train['type']} gives items that {opt['model_type']} cannot take: {found}; "
            "wanted is a dict with the image lq, and gt where there is one"
        )
    return batch


def _unlike_outputs(model: Any, opt: dict[str, Any]) -> list[str]:
    """Networks that give images of another shape than the ground truth, after a step that was begun."""
    made = vars(model) if isinstance(model, LoopInterface) else {}
    step = made.get("step")
    teacher_output = step.teacher_outputs.get(X) if step is not None else None
    images = {"network_g": made.get("output"), "network_t": teacher_output}
    wanted = next((image for image in (made.get("gt"), *images.values()) if image is not None), None)
    return [
        f"{key}: {opt[key]['type']} gives {_size(image)}, {_size(wanted)} are wanted (channels × height × width): "
        f"another scale than {opt.get('scale', 1)}, or another number of channels"
        for key, image in images.items()
        if image is not None and wanted is not None and image.shape[1:] != wanted.shape[1:]
    ]


def _at_fault(model: Any, opt: dict[str, Any], batch: Any) -> list[str]:
    """After a model that could not be built, or a step that failed: the options that do the same by themselves."""
    if model is None:
        try:
            _build(opt["network_g"], "g")
        except KdsrError as error:
            return error.problems
        return []
    problems = []
    for key in ("g", "t") if hasattr(model, "net_t") else ():  # a VQGANModel's gives more than an image
        net = getattr(model, f"net_{key}", None)
        with contextlib.suppress(Exception), torch.no_grad():  # a net that fails is told of by its own error
            if net is not None and not isinstance(output := net(batch["lq"].to(model.device)), Tensor):
                problems.append(
                    f"network_{key}: {opt[f'network_{key}']['type']} gives a {type(output).__name__}; "
                    "one tensor is wanted, the images"
                )
    for key in _IMAGE_LOSSES:
        loss = model.builder.loss(key) if isinstance(model, LoopInterface) else None
        image = torch.rand(2, 3, 16, 16, device=getattr(model, "device", None))
        try:
            if loss is None or (value := loss(image, image.flip(0))).ndim == 0:
                continue
            said = f"gives {value.numel()} numbers"
        except Exception as error:
            said = describe_error(error)
        problems.append(
            f"train.{key}.type: {opt['train'][key]['type']} does not compare two batches of images ({said}); "
            "L1Loss does"
        )
    return problems


def _size(images: Tensor) -> str:
    return "×".join(map(str, images.shape[1:]))


def describe_error(error: Exception) -> str:
    """The kind and the first line of an error, with the user's own line of code that it came from."""
    if is_out_of_memory(error):
        return "the machine has not enough memory for it; is one of its numbers too large?"
    last = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {last}{_users_line(error)}"


def _users_line(error: Exception) -> str:
    """The last line of the user's own code that the error came through, in brackets."""
    not_theirs = (sysconfig.get_path("stdlib"), str(Path(__file__).parents[1]), "<")
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(not_theirs) and "site-packages" not in frame.filename
    ]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
