"""What a training step reads from the device, and what it copies there."""

from __future__ import annotations

import shutil
import traceback
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdsr.data.patches import to_device
from kdsr.models.kd_model import KDModel
from kdsr.pipeline.run_data import make_dataset
from kdsr.pipeline.training_data import TrainingData
from small_runs import complete

Options = dict[str, Any]
READING = {torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.equal,
           torch.ops.aten.nonzero}  # fmt: skip
SETTINGS: dict[str, Options] = {
    "float32": {},
    "amp bf16": {"precision": {"amp": "bf16"}},
    "amp fp16": {"precision": {"amp": "fp16"}},
    "by network": {"precision": {"teacher": "bf16", "extractor": "bf16", "history": "fp16", "student": "float32"}},
    "accumulate": {"accumulate": 2},
    "accumulate, fp16": {"accumulate": 2, "precision": {"student": "fp16"}},
    "checkpoint_student": {"checkpoint_student": True},
    "all": {"accumulate": 2, "checkpoint_student": True, "precision": {"amp": "bf16"}},
}  # fmt: skip
compiled = pytest.param(
    {"precision": {"compile": "frozen"}},
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    ],
    id="compile",
)


def batch(number: int, bad: bool = False) -> Options:
    generator = torch.Generator().manual_seed(number)
    lq = torch.rand(2, 3, 16, 16, generator=generator)
    if bad:
        lq[1, 0, 3, 3] = torch.nan
    return {"lq": lq, "gt": torch.rand(2, 3, 64, 64, generator=generator)}


def make(options: Options, setting: Options, **derived: Any) -> KDModel:
    options = {**complete(options), "precision": setting.get("precision"), **derived}
    options["train"].update({"clip_grad_norm": 1.0, "ema_warmup": True, "step": 1})
    if "fp16" in str(setting):  # in it their gradients of random networks overflow
        options["train"].update(cl_opt=None, ce_opt=None)
    options["train"].update({key: value for key, value in setting.items() if key != "precision"})
    torch.manual_seed(0)
    return KDModel(options)


class Reads(TorchDispatchMode):
    """Notes every operation that hands a tensor's value to Python: what a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if func.overloadpacket in READING:
            self.found.append("".join(traceback.format_stack(limit=8)))
        return func(*args, **(kwargs or {}))


def reads_of_steps(model: KDModel) -> Reads:
    """Of a step that is not finite and one that is, after a first."""
    model.feed_data(batch(1))
    model.optimize_parameters(1)
    with Reads() as reads:
        for iteration, bad in ((2, True), (3, False)):
            model.feed_data(batch(iteration, bad))
            model.optimize_parameters(iteration)
    assert reads.operations > 100
    return reads


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_fused_step_reads_nothing(dckd_options: Options, setting: Options) -> None:
    """The log is read every ``print_freq`` steps. Nothing is drawn: draws are read, on the CPU (see below)."""
    dckd_options["train"].update(lcr_opt=None, num_neg=0)
    dckd_options["train"]["optim_g"]["fused"] = True
    model = make(dckd_options, setting)
    reads = reads_of_steps(model)
    assert not reads.found, reads.found[0]
    with Reads() as reads:
        assert model.guard.skipped.item() == 1 and model.get_current_log()["l_pix"] > 0
    assert reads.found


def test_an_optimizer_that_is_not_fused_reads(run_options: Options) -> None:
    """So that the other tests see what there is to see."""
    run_options["train"]["optim_g"]["fused"] = False
    assert reads_of_steps(make(run_options, {})).found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "setting", [*(pytest.param(setting, id=name) for name, setting in SETTINGS.items()), compiled]
)
def test_a_step_on_a_gpu_waits_for_nothing(dckd_options: Options, setting: Options) -> None:
    model = make(dckd_options, setting, num_gpu=1)
    assert model.optimizer_g.param_groups[0]["fused"] and not model.guard.reads_on_host
    for iteration, bad in ((1, False), (2, True), (3, False)):
        model.feed_data(batch(iteration, bad))
        before = [
            value.clone() for net in (model.net_g, model.net_g_ema) for value in net.state_dict().values()
        ]
        torch.cuda.set_sync_debug_mode("error" if iteration > 1 else "default")
        try:
            model.optimize_parameters(iteration)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        after = [value for net in (model.net_g, model.net_g_ema) for value in net.state_dict().values()]
        assert all(map(torch.equal, before, after)) is bad
    assert model.guard.skipped.item() == 1 and model.get_current_log()["l_pix"] > 0


# -------------------------------------------------------------------------------------------- copies to the device


class Copies(TorchDispatchMode):
    """Counts the bytes that leave the CPU. Torch's device without data, meta, stands for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            given = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
            if given.device.type == "cpu" and output.device.type == "meta":
                self.bytes.append(given.nbytes)
        return output


def copied(options: Options) -> list[int]:
    """Bytes of each copy for an iteration, from the loader to the model's images."""
    options = complete(options)
    model = KDModel(options)
    train = {**options["datasets"]["train"], "phase": "train", "scale": 4}
    dataset = make_dataset("train", train, 1)
    if train.get("cache"):
        dataset.fill_cache()
    options["datasets"]["train"] = train
    (batch,) = [*TrainingData(options, dataset, None).loader][:1]
    model.device = torch.device("meta")
    with Copies() as copies:
        model.feed_data(to_device(batch, model.device))
    images: list[Tensor] = [model.lq, model.gt]
    assert all(image.is_meta and image.dtype == torch.float32 for image in images)
    assert len(images[0]) == 2 * options["train"].get("accumulate", 1)
    return copies.bytes


@pytest.mark.parametrize("setting", [{}, {"accumulate": 2}, {"checkpoint_student": True}])
def test_the_passes_of_a_step_copy_what_is_drawn_and_read_nothing(
    dckd_options: Options, setting: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward passes of DCKD with all terms; reading a tensor without data is an error."""
    dckd_options["train"]["gaussian_noise_prob"] = 0  # it is drawn on the device, where meta draws nothing
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    model = make(dckd_options, setting)
    model.device = torch.device("meta")
    for net in model.networks().values():
        net.to(model.device)
    images = to_device(batch(1), model.device)
    model.feed_data(images)
    with Copies() as copies:
        losses = model.compute_gradients(1)
    assert losses.keys() == {"l_pix", "l_ts", "l_lcr", "l_cl", "l_ce"}
    assert all(loss.is_meta for loss in losses.values())
    assert all(weight.grad is not None for weight in model.net_g.parameters())
    assert 0 < sum(copies.bytes) < 1024, copies.bytes  # masks and blur kernels
    with pytest.raises(RuntimeError):
        losses["l_pix"].item()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "setting",
    [{}, {"cache": "ram"}, {"cache": "ram", "flips_on_device": True}],
    ids=["files", "ram", "flips"],
)
def test_images_are_copied_once_and_as_whole_numbers(
    run_options: Options, setting: Options, accumulate: int
) -> None:
    """A byte per value, a quarter of float32; three booleans per image where the device flips."""
    run_options["datasets"]["train"].update(setting)
    run_options["train"]["accumulate"] = accumulate
    count = 2 * accumulate
    flips = [count * 3] if "flips_on_device" in setting else []
    assert sorted(copied(run_options)) == sorted([count * 3 * 16 * 16, count * 3 * 64 * 64, *flips * 2])


def test_normalised_images_are_copied_as_floats(run_options: Options) -> None:
    run_options["datasets"]["train"].update(mean=[0.4, 0.5, 0.6], std=[0.5, 0.25, 2.0])
    assert copied(run_options) == [4 * 2 * 3 * 16 * 16, 4 * 2 * 3 * 64 * 64]
