"""A run that is stopped by a signal and started again ends in the bits of one that was never stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from basicsr.utils.lmdb_util import make_lmdb_from_imgs

import ranks
from faults.lives import differences
from kdsr import train as train_entry
from kdsr.distill.term import TERM_REGISTRY
from kdsr.models.kd_model import KDModel
from kdsr.tools.teacher_cache import Depth, teacher_cache
from small_networks import small_vqgan
from small_runs import after_steps

Options = dict[str, Any]


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(folder: str, options: Options, *flags: str) -> int:
    """Trains in a folder of its own, so that runs of one name can be compared."""
    write(folder, options)
    with contextlib.chdir(folder):
        return train_entry.main(["-opt", "run.yml", *flags])


def write(folder: str, options: Options) -> None:
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "run.yml").write_text(yaml.safe_dump(options), encoding="utf-8")


@pytest.fixture(autouse=True)
def _algorithms_and_terms_as_they_were() -> Iterator[None]:
    terms = dict(TERM_REGISTRY._obj_map)
    yield
    torch.use_deterministic_algorithms(False)
    TERM_REGISTRY._obj_map.clear()
    TERM_REGISTRY._obj_map.update(terms)
    sys.modules.pop("own_terms", None)


def unlike() -> list[str]:
    return differences(Path("whole/experiments/run"), Path("parted/experiments/run"))


def as_logits(options: Options) -> None:
    options["model_type"] = "KDModel"
    for key in ("network_his", "network_vqgan"):
        del options[key]
    options["path"] = {"pretrain_network_t": options["path"]["pretrain_network_t"]}
    for key in ("cl_opt", "ce_opt", "num_neg", "step"):
        del options["train"][key]
    for key in ("gaussian_blur_prob", "resize_prob", "gaussian_noise_prob"):
        del options["train"][key]


def with_several_teachers(options: Options) -> None:
    as_logits(options)
    options["network_t"] = [options["network_t"], options["network_t"]]
    options["path"]["pretrain_network_t"] = [options["path"]["pretrain_network_t"]] * 2
    options["train"].update(
        teacher_weights=[1, 3],
        wavelet_opt={"type": "WaveletLoss"},
        fft_opt={"type": "FFTLoss", "loss_weight": 0.01},
        masked_opt={"type": "MaskedLoss"},
    )


def with_stored_outputs(options: Options) -> None:
    """Half precision, in an LMDB; all flips."""
    as_logits(options)
    del options["train"]["lcr_opt"]
    options["train"]["teacher_cache"] = str(Path("cache").absolute())
    write(".", options)
    teacher_cache(opt="run.yml", depth=Depth.float16, in_lmdb=True, tile=16, overlap=4)


def as_vqgan(options: Options) -> None:
    as_logits(options)
    for key in ("logits_opt", "lcr_opt"):
        del options["train"][key]
    del options["network_t"]
    images = options["datasets"]["train"]["dataroot_gt"]
    loader = {key: options["datasets"]["train"][key] for key in ("num_worker_per_gpu", "batch_size_per_gpu")}
    options.update(
        model_type="VQGANModel",
        scale=1,
        path={},
        network_g=small_vqgan(3, 32, 32, decoder=True),
        datasets={
            "train": {"name": "photos", "type": "ImageFolderDataset", "dataroot_gt": images, "gt_size": 32, **loader},
            "val": {"name": "held_out", "type": "ImageFolderDataset", "dataroot_gt": images},
        },
    )  # fmt: skip
    options["train"].update(restart_every=3)


def as_dckd(options: Options) -> None:
    pass


def with_terms(options: Options) -> None:
    """DCKD* with features, one of them adapted, a weight that changes on the way, and an EMA that warms up."""
    l1 = {"type": "L1Loss", "loss_weight": 0.5}
    options["train"].update(
        ema_warmup=True,
        zoom_in_opt=dict(l1),
        zoom_out_opt=dict(l1),
        taps=[{"student": "body.0", "teacher": "body.1"}],
        fitnet_opt={"type": "FitNetLoss", "loss_weight": {"ramp": [[2, 0.0], [6, 0.5]]}},
        fakd_opt={"type": "AffinityLoss"},
    )


def as_mipkd(options: Options) -> None:
    """Masks and blocks are drawn, mixers and bridges are trained."""
    as_logits(options)
    options["model_type"] = "MiPKDModel"
    options["train"].update(
        fm_opt={"type": "FitNetLoss"},
        fm_aux_opt={"type": "FitNetLoss"},
        bm_opt={"type": "L1Loss", "loss_weight": 0.1},
        taps=[{"student": "body.0", "teacher": "body.1"}],
        blocks=[{"student": "body.0", "teacher": "body.1"}],
    )


def as_mclir(options: Options) -> None:
    """Two negative models that follow at paces of their own."""
    extractor, file = options["network_vqgan"], options["path"]["pretrain_network_vqgan"]
    as_logits(options)
    options["model_type"] = "MCLIRModel"
    options["network_extractor"] = extractor
    options["path"].update(pretrain_network_extractor=file, param_key_extractor="state_dict")
    options["train"].update(neg_opt={"type": "NegativeLoss", "loss_weight": 0.1}, neg_iter=[2, 3])


def as_restormer(options: Options) -> None:
    """Batches are mixed, and the second cycle of the learning rate begins after four iterations."""
    as_logits(options)
    options["train"].update(
        mixing_augs={"mixup": True, "mixup_beta": 1.2, "use_identity": True},
        use_grad_clip=True,
        scheduler={
            "type": "CosineAnnealingRestartCyclicLR", "periods": [4, 6], "restart_weights": [1, 1],
            "eta_mins": [1e-3, 1e-6],
        },
    )  # fmt: skip


def accumulated(options: Options) -> None:
    """DCKD with two batches in an iteration, and frozen networks in bf16."""
    options["train"]["accumulate"] = 2
    options["precision"] = {"amp": "bf16", "student": "float32", "allow_slow": True}
    options["datasets"]["train"]["batch_size_per_gpu"] = 1


OWN_TERM = """
import copy
import torch
from kdsr.distill.moving_average import blend_weights
from kdsr.distill.term import TERM_REGISTRY, Term
from kdsr.runtime.declarations import Options, loss, option

class OwnOptions(Options):
    own_path_opt: dict | None = loss("A loss.")
    own_noise: float = option(0.1, "Standard deviation.")

@TERM_REGISTRY.register()
class OwnPathTerm(Term):
    KEY = "own_path_opt"
    options = OwnOptions

    def __init__(self, setup):
        super().__init__(setup)
        self.slow = copy.deepcopy(setup.student).eval().requires_grad_(False)

    def before_student(self, step):
        noise = torch.rand(step.lq.shape, generator=step.generator) * self.options.own_noise
        step.kept[self.KEY] = self.slow(step.lq + noise.to(step.lq))

    def losses(self, step):
        return {"l_own": self.loss(step.output, step.kept[self.KEY])}

    def after_step(self, step):
        if step.iteration % 2 == 0:
            blend_weights(self.slow, step.student, 0.5)

    def networks(self):
        return {"net_slow": self.slow}

    state_networks = networks
"""


def with_own_term(options: Options) -> None:
    """A term of a user's module, with a network that is state and draws of its own, beside DCKD's."""
    Path("own_terms.py").write_text(OWN_TERM, encoding="utf-8")
    options.update(import_modules="own_terms", import_path=str(Path.cwd()))
    options["train"].update(own_path_opt={"type": "L1Loss", "loss_weight": 0.1}, own_noise=0.2)


def in_lmdbs(options: Options) -> None:
    """Moves all images into LMDBs."""
    for key, dataset in options["datasets"].items():
        roots = {name: Path(dataset[name]) for name in ("dataroot_gt", "dataroot_lq") if name in dataset}
        for name, root in roots.items():
            database = Path(f"{key}_{name}.lmdb").absolute()
            files = sorted(path.name for path in root.iterdir())
            keys = [Path(file).stem for file in files]
            make_lmdb_from_imgs(str(root), str(database), files, keys, multiprocessing_read=False)
            dataset[name] = str(database)
        dataset["io_backend"] = {"type": "lmdb"}


def stop_at(iteration: int, name: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends the process a signal in the middle of that iteration."""

    def kill(model: Any, current_iter: int) -> None:
        if current_iter == iteration and Path("experiments").exists():
            os.kill(os.getpid(), name)

    after_steps(kill, monkeypatch.setattr)


@pytest.mark.parametrize(
    ("method", "workers", "lmdb", "stops"),
    [
        (as_logits, 0, False, (3, 4)),  # in mid-epoch, and where a validation is due
        (as_logits, 3, True, (5,)),
        (with_several_teachers, 1, False, (4,)),
        (with_stored_outputs, 0, False, (4,)),
        (with_stored_outputs, 2, False, (3,)),
        (as_dckd, 0, True, (2,)),
        (as_dckd, 1, False, (6,)),  # after the last but one step of an epoch
        (as_dckd, 3, False, (1, 7)),  # the first step, the end of an epoch
        (accumulated, 1, False, (3, 6)),
        (with_terms, 1, False, (4,)),
        (with_own_term, 1, False, (4,)),
        (as_mipkd, 0, False, (3,)),
        (as_mipkd, 1, False, (2, 5)),
        (as_mclir, 0, False, (3,)),  # one of the two has just followed
        (as_mclir, 1, False, (5,)),
        (as_restormer, 0, False, (3, 6)),
        (as_restormer, 1, True, (4,)),
        (as_vqgan, 1, True, (3,)),  # codes have just been restarted
        (as_vqgan, 3, False, (4,)),
    ],
)
def test_stopped_runs_end_in_the_same_bits(
    method: Callable[[Options], None],
    workers: int,
    lmdb: bool,
    stops: tuple[int, ...],
    dckd_options: Options,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method(dckd_options)
    if lmdb:
        in_lmdbs(dckd_options)
    # 7 steps an epoch, of 14 positions; validations and saves that fall apart
    dckd_options["datasets"]["train"].update(dataset_enlarge_ratio=3.5, num_worker_per_gpu=workers)
    dckd_options["train"]["total_iter"] = 10
    dckd_options["val"]["val_freq"] = 4
    dckd_options["logger"]["save_checkpoint_freq"] = 10
    assert run("whole", dckd_options) == 0
    for iteration, name in zip(stops, (signal.SIGTERM, signal.SIGUSR1), strict=False):
        with monkeypatch.context() as patch:
            stop_at(iteration, name, patch)
            assert run("parted", dckd_options, "--auto_resume") == 75
        assert Path(f"parted/experiments/run/training_states/{iteration}.state").is_file()
    assert run("parted", dckd_options, "--auto_resume") == 0
    assert unlike() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_end_in_the_same_bits(
    workers: int, dckd_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with ``cache: ram`` and flips on the device, stopped twice, and one that reads the disk."""
    as_logits(dckd_options)
    train = dckd_options["datasets"]["train"]
    train.update(dataset_enlarge_ratio=3.5, num_worker_per_gpu=workers)
    dckd_options["train"]["total_iter"] = 10
    dckd_options["logger"]["save_checkpoint_freq"] = 10
    assert run("whole", dckd_options) == 0
    train.update(cache="ram", flips_on_device=True)
    for iteration in (3, 7):  # in mid-epoch, at the end of an epoch
        with monkeypatch.context() as patch:
            stop_at(iteration, signal.SIGTERM, patch)
            assert run("parted", dckd_options, "--auto_resume") == 75
    assert run("parted", dckd_options, "--auto_resume") == 0
    log = next(Path("parted/experiments/run").glob("*.log")).read_text()
    assert "cache: ram: 8 decoded images in " in log
    options = (".state: options.datasets.train: keys [", ".state: fingerprints.options: ")
    assert [each for each in unlike() if not any(part in each for part in options)] == []


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_growing_patches_end_in_the_same_bits(
    stop: int, dckd_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before, at and after the change of a stage; what a step sees is of that stage's size."""
    as_logits(dckd_options)
    train = dckd_options["datasets"]["train"]
    train.update(
        gt_size=32, batch_size_per_gpu=3, dataset_enlarge_ratio=2, num_worker_per_gpu=1,
        progressive=[{"after": 3, "gt_size": 64, "batch_size_per_gpu": 2}, {"after": 6, "gt_size": 96}],
    )  # fmt: skip
    dckd_options["train"]["total_iter"] = 8
    dckd_options["logger"]["save_checkpoint_freq"] = 8
    seen = []
    feed = KDModel.feed_data

    def feed_data(self: KDModel, data: dict[str, Any]) -> None:
        if Path("experiments").exists():
            seen.append(tuple(data["gt"].shape))
        feed(self, data)

    monkeypatch.setattr(KDModel, "feed_data", feed_data)
    assert run("whole", dckd_options) == 0
    assert seen == [(3, 3, 32, 32)] * 3 + [(2, 3, 64, 64)] * 3 + [(2, 3, 96, 96)] * 2
    seen.clear()
    with monkeypatch.context() as patch:
        stop_at(stop, signal.SIGTERM, patch)
        assert run("parted", dckd_options) == 75
    assert run("parted", dckd_options, "--auto_resume") == 0
    assert unlike() == []


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"after": 1, "gt_size": 50},
            "datasets.train.progressive.0.gt_size: 50 is not a multiple of the scale 4",
        ),
        ({"after": 1, "gt_size": 128}, "gt_size: 128 is larger than"),
        (
            {"after": 1, "batch_size_per_gpu": 9},
            "4 images × dataset_enlarge_ratio 1 are fewer than one batch of 9",
        ),
    ],
)
def test_patches_that_the_data_cannot_give(
    run_options: Options, stage: dict[str, int], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_options["datasets"]["train"]["progressive"] = [stage]
    assert run("whole", run_options) == 2
    assert message in capsys.readouterr().err


def test_deterministic_algorithms_train_here_too(dckd_options: Options) -> None:
    """The CPU ends in the same bits with and without them."""
    dckd_options["logger"]["save_checkpoint_freq"] = 3
    assert run("whole", dckd_options) == 0
    dckd_options["precision"] = {"deterministic": True}
    assert run("parted", dckd_options) == 0
    assert torch.are_deterministic_algorithms_enabled()
    assert {place.split(":")[1].split(".")[0].strip() for place in unlike()} <= {"options", "fingerprints"}


def test_deterministic_and_benchmark_contradict_each_other(
    run_options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    run_options["precision"] = {"deterministic": True, "cudnn_benchmark": True}
    assert run("whole", run_options) == 2
    assert "precision.deterministic: true needs cudnn_benchmark: false" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- two processes


def two_process_options(options: Options) -> Options:
    options["datasets"]["train"].update(dataset_enlarge_ratio=3.5, num_worker_per_gpu=1, batch_size_per_gpu=1)
    options["train"]["total_iter"] = 10
    options["val"]["val_freq"] = 4
    options["logger"]["save_checkpoint_freq"] = 10
    return options


def stop_rank_1_at_5(rank: int) -> None:
    def kill(model: Any, current_iter: int) -> None:
        if rank == 1 and current_iter == 5 and Path("experiments").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    after_steps(kill)


@pytest.mark.slow
@pytest.mark.parametrize("method", [as_dckd, with_terms, as_mipkd, as_mclir, as_vqgan])
def test_two_processes_stop_together_and_end_in_the_same_bits(
    method: Callable[[Options], None], dckd_options: Options, tmp_path: Path
) -> None:
    """A signal to one of them stops both after the same iteration."""
    method(dckd_options)
    for folder in ("whole", "parted"):
        write(folder, two_process_options(dckd_options))
    command = ["-opt", "run.yml", "--auto_resume"]
    assert ranks.run(tmp_path / "whole", command) == [0, 0]
    assert ranks.run(tmp_path / "parted", command, prepare=stop_rank_1_at_5) == [75, 75]
    states = Path("parted/experiments/run/training_states")
    assert [path.name for path in states.iterdir()] == ["5.state"]
    assert ranks.run(tmp_path / "parted", command) == [0, 0]
    assert unlike() == []


@pytest.mark.slow
def test_with_another_number_of_processes_the_data_continue(dckd_options: Options, tmp_path: Path) -> None:
    """5 steps of two processes and batch 1 are 10 positions of 14; one process with batch 2 has two steps left of
    the epoch, and its weights differ from those of two processes by no more than what is drawn and rounded."""
    as_logits(dckd_options)
    del dckd_options["train"]["lcr_opt"]  # what is drawn
    options = two_process_options(dckd_options)
    write("whole", options)
    write("parted", options)
    command = ["-opt", "run.yml", "--auto_resume"]
    shorter = ["--force_yml", "train:total_iter=5", "logger:save_checkpoint_freq=5"]
    assert ranks.run(tmp_path / "whole", command) == [0, 0]
    assert ranks.run(tmp_path / "parted", [*command, *shorter]) == [0, 0]
    options["datasets"]["train"]["batch_size_per_gpu"] = 2
    assert run("parted", options, "--auto_resume") == 0
    log = sorted(Path("parted/experiments/run").glob("*.log"))[-1].read_text()
    assert "was written by 2 processes, these are 1" in log and "its bits will differ" in log
    assert "datasets.train.batch_size_per_gpu: 1 -> 2" in log
    two, one = (
        torch.load(f"{folder}/experiments/run/training_states/10.state", weights_only=True)
        for folder in ("whole", "parted")
    )
    assert two["position"] == one["position"] == {"epoch": 1, "samples": 6}
    for name, value in two["networks"]["net_g"].items():
        torch.testing.assert_close(one["networks"]["net_g"][name], value, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- one GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_that_are_copied_ahead_are_the_same(dckd_options: Options) -> None:
    as_logits(dckd_options)
    dckd_options["precision"] = {"deterministic": True}
    train = dckd_options["datasets"]["train"]
    train.update(gt_size=32, dataset_enlarge_ratio=3.5, num_worker_per_gpu=2, pin_memory=True)
    train["progressive"] = [{"after": 3, "gt_size": 64}]
    dckd_options["train"]["total_iter"] = 10
    dckd_options["logger"]["save_checkpoint_freq"] = 10
    assert run("whole", dckd_options) == 0
    train["prefetch_mode"] = "cuda"
    assert run("parted", dckd_options) == 0
    assert unlike() == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", [as_logits, as_dckd, with_terms, as_mipkd, as_mclir, as_vqgan])
def test_on_a_gpu_with_deterministic_algorithms(
    method: Callable[[Options], None], dckd_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    method(dckd_options)
    dckd_options["precision"] = {"deterministic": True}
    dckd_options["datasets"]["train"].update(dataset_enlarge_ratio=3.5, num_worker_per_gpu=2)
    dckd_options["train"]["total_iter"] = 10
    dckd_options["logger"]["save_checkpoint_freq"] = 10
    assert run("whole", dckd_options) == 0
    with monkeypatch.context() as patch:
        stop_at(6, signal.SIGTERM, patch)
        assert run("parted", dckd_options) == 75
    assert run("parted", dckd_options, "--auto_resume") == 0
    assert unlike() == []
