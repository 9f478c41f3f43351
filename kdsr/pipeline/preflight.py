"""What is tried before anything is written: every checkpoint, and a first step."""

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
from torch.utils.data import default_collate

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
CORNER = 64  # pixels of the ground truth's sides that the first step is made on


def build(opt: dict[str, Any]) -> Any:
    """Builds the model of a run, with the weights that the options name.

    Raises:
        OptionError: It cannot be built.
        CheckpointError: With all the files that cannot be read or do not fit.
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
    """After a model that could not be built: its networks one by one.

    Raises:
        OptionError: A network is too large, or cannot be built.
        CheckpointError: With all the files at fault.
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
            if ours:  # BasicSR's models have rules of their own
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
    """A network computes with values while it is built, which the meta device has none of."""


def _called(network: type, options: dict[str, Any], failing: type[Exception], message: str) -> nn.Module:
    try:
        return network(**options)
    except KdsrError:
        raise
    except Exception as error:  # whatever an architecture makes of numbers that do not go together
        raise failing(f"{message}{describe_error(error)}") from error


def _copies(opt: dict[str, Any], key: str) -> int:
    """How often the machine's memory holds the weights of a network."""
    if not opt["is_train"] or opt["num_gpu"] or key not in ("g", "d"):
        return 1
    kind = str((opt["train"].get(f"optim_{key}") or {}).get("type"))
    return 4 if "Adam" in kind else 2  # with gradients, and Adam's two moments


def rehearse(model: Any, opt: dict[str, Any], dataset: Any) -> None:
    """Makes the first step on one or two images, and puts the model back to where it was.

    What no look at single options can find shows here, before the run's folder is made: losses that get what they
    cannot take, networks whose outputs differ in size, optimizers that refuse their numbers. The student sees a whole
    patch. The step is made on corners of patches, which is much faster; where it fails there, on whole ones.

    Args:
        model: The model of the run.
        opt: The parsed options.
        dataset: The training set.

    Raises:
        OptionError: What went wrong in reading the first training images, or in the first step.
    """
    with generators_kept(opt):
        batch = _first_batch(dataset, opt, isinstance(model, LoopInterface))
        if "gt" not in batch and (problems := ground_truth_problems(opt, type(model))):
            raise OptionError(problems)
        corner = _corner(batch, opt)
        if corner is not None and not opt["dist"]:  # a rank must not try again while the others wait for it
            with contextlib.suppress(Exception), left_unchanged(model):
                with torch.no_grad():  # some networks take images of one size only
                    model.net_g(batch["lq"][:1].to(model.device))
                _first_step(model, opt, corner)
                return
        with left_unchanged(model):
            _first_step(model, opt, batch)


def _corner(batch: Any, opt: dict[str, Any]) -> dict[str, Any] | None:
    """The upper left corners of a batch's images; None where they are not larger."""
    scale = opt.get("scale") or 1
    lq, gt = (batch.get(key) for key in ("lq", "gt")) if isinstance(batch, dict) else (None, None)
    side = 16 * math.ceil(CORNER / scale / 16)  # LQ pixels; a multiple of what most networks divide by
    if not (isinstance(lq, Tensor) and lq.ndim == 4 and min(lq.shape[-2:]) > side):
        return None
    corner = {**batch, "lq": lq[..., :side, :side]}
    if isinstance(gt, Tensor):
        corner["gt"] = gt[..., : side * scale, : side * scale]
    return corner


def _first_step(model: Any, opt: dict[str, Any], batch: Any) -> None:
    """
    Raises:
        OptionError: Something went wrong.
    """
    try:
        if isinstance(model, LoopInterface):
            model.trainer.guard.limit = 2  # a first step that is not finite ends no run
        model.update_learning_rate(1, warmup_iter=LoopOptions.read(opt["train"]).warmup_iter)
        model.feed_data(batch)
        model.optimize_parameters(1)
        problems = _unlike_outputs(model, opt)  # a loss may have taken one channel for three
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
        f"{key}: {'each' if isinstance(opt[key], list) else opt[key]['type']} gives {_size(image)}, {_size(wanted)} "
        "are wanted (channels × height × width): "
        f"another scale than {opt.get('scale', 1)}, or another number of channels"
        for key, image in images.items()
        if image is not None and wanted is not None and image.shape[1:] != wanted.shape[1:]
    ]


def _at_fault(model: Any, opt: dict[str, Any], batch: Any) -> list[str]:
    """After a step that failed: the options that do the same by themselves."""
    problems = []
    nets = {"network_g": model.net_g, **model.teachers_by_place()} if isinstance(model, KDModel) else {}
    for key, net in nets.items():  # a VQGANModel's gives more than an image
        with contextlib.suppress(Exception), torch.no_grad():  # a net that fails has an error of its own
            if not isinstance(output := net(batch["lq"].to(model.device)), Tensor):
                problems.append(
                    f"{key}: {each_network(opt)[key]['type']} gives a {type(output).__name__}; "
                    "one tensor is wanted, the images"
                )
    terms = model.terms.items() if isinstance(model, KDModel) else ()
    for key, loss in ((key, term.loss) for key, term in terms if term.COMPARES_IMAGES):
        image = torch.rand(2, 3, 16, 16, device=model.device)
        try:
            if (value := loss(image, image.flip(0))).ndim == 0:
                continue
            reason = f"gives {value.numel()} numbers"
        except Exception as error:
            reason = describe_error(error)
        problems.append(
            f"train.{key}.type: {opt['train'][key]['type']} does not compare two batches of images ({reason}); "
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
