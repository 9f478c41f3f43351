"""StatefulModel: what of a training is saved, and how a run goes on from it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from kdsr.models.measured_model import MeasuredModel
from kdsr.models.metrics_file import forget_after
from kdsr.models.pretrained import export_safetensors
from kdsr.models.retention import drop_old
from kdsr.models.state_validation import refuse_unlike, taken_over
from kdsr.runtime.checkpoint import mismatch, save_file
from kdsr.runtime.distributed import gather_lists, on_first_rank
from kdsr.runtime.errors import CheckpointError

SCHEDULE_KEYS = (
    "optim_",
    "scheduler",
    "warmup_iter",
)  # beginnings of the options that make the learning rate


class StatefulModel(MeasuredModel):
    """Saves whole files, the weights of an iteration before the state that names them, and resumes to the bit.

    What surrounds the loop keeps two attributes up to date, which the state takes in: ``position``, where in the data
    the run is, and ``run_record``, the options and the fingerprints of what they name.
    """

    ema_decay: float

    def init_state(self) -> None:
        # What the model draws on the host; its state is part of the training state.
        seed = self.opt.get("manual_seed", 0) + self.opt.get("rank", 0)
        self.generator = torch.Generator().manual_seed(seed)
        self.restored_generators: dict[str, Any] | None = None
        self.position: dict[str, int] = {"epoch": 0, "samples": 0}
        self.run_record: dict[str, Any] = {}
        self.resumed_from: int | None = None

    # -------------------------------------------------------------------------------------------- saving

    def state_networks(self) -> dict[str, nn.Module]:
        """Networks that belong to the training state, by attribute name. Frozen teachers do not."""
        names = ("net_g", "net_g_ema") if self.ema_decay > 0 else ("net_g",)
        return {name: getattr(self, name) for name in names}

    def extra_state(self) -> dict[str, Any]:
        """What else of the model belongs to the state: tensors and plain values, the same on all ranks."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes back what ``extra_state`` gave."""

    def save(self, epoch: int, current_iter: int) -> None:
        """Writes ``net_g_N.pth`` (loadable by stock BasicSR), then the state; ``-1`` stands for the latest.

        Older files than the last ``logger.keep_last`` (3) are removed after that. All ranks come here.

        Raises:
            TrainingError: On all ranks, when a file cannot be written; those before are untouched.
        """
        generators = gather_lists([self.generator_states()])
        on_first_rank(lambda: self._write(current_iter, generators))

    def _write(self, current_iter: int, generators: list[dict[str, Any]]) -> None:
        models, states = (Path(self.opt["path"][key]) for key in ("models", "training_states"))
        if current_iter == -1:
            self._write_weights(models / "net_g_latest.pth")
            return
        file = models / f"net_g_{current_iter}.pth"
        self._write_weights(file)
        state = self.training_state(current_iter) | {"generators": generators, "weights": [file.name]}
        save_file(state, states / f"{current_iter}.state")
        drop_old(models, states, self.opt["logger"].get("keep_last", 3), current_iter, self.resumed_from)

    def _write_weights(self, file: Path, **more: Any) -> None:
        weights = self.weights()
        save_file({**weights, **more}, file)
        if self.opt["logger"].get("save_safetensors"):
            export_safetensors(weights, file, self.opt["network_g"], self.iteration)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The student alone, by BasicSR's keys."""
        weights = {"params": _on_cpu(self.net_g.state_dict())}
        if self.ema_decay > 0:
            weights["params_ema"] = _on_cpu(self.net_g_ema.state_dict())
        return weights

    def note_best(self, dataset_name: str, values: dict[str, float], current_iter: int) -> None:
        """Also writes ``net_g_best.pth``, where ``logger.save_best`` asks for it and these weights are the best so far.

        Under ``measured`` it says when, where and how good they were.
        """
        super().note_best(dataset_name, values, current_iter)
        wanted = self.opt["logger"].get("save_best") or {}
        if wanted.get("set") != dataset_name or wanted["metric"] not in values:
            return
        best = self.best_metric_results[dataset_name][wanted["metric"]]
        if best["iter"] == current_iter:
            measured = {**wanted, "iteration": current_iter, "value": best["val"]}
            file = Path(self.opt["path"]["models"]) / "net_g_best.pth"
            on_first_rank(lambda: self._write_weights(file, measured=measured))

    def training_state(self, current_iter: int) -> dict[str, Any]:
        """What cannot be derived and all ranks share, as tensors and plain values (read with weights_only)."""
        return {
            "epoch": self.position["epoch"],
            "iter": current_iter,
            "position": dict(self.position),
            "manual_seed": self.opt.get("manual_seed"),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "networks": {name: _on_cpu(net.state_dict()) for name, net in self.state_networks().items()},
            "best_metric_results": self.best_metric_results,
            "extra": self.extra_state(),
            **self.run_record,
        }

    def generator_states(self) -> dict[str, Any]:
        """States of all that the model draws from, torch's global generator included (SwinIR's drop path)."""
        states: dict[str, Any] = {"model": self.generator.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    # -------------------------------------------------------------------------------------------- resuming

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Restores networks, optimizers, schedulers, generators and best values.

        Where the options of the learning rate have changed since, the new ones count: the schedule is replayed up to
        the state's iteration.

        Raises:
            CheckpointError: When the state is that of another network or optimizer.
        """
        file = self.opt["path"].get("resume_state", "the state")
        self.try_state(resume_state, file)
        written_by = len(resume_state["generators"])
        if self.restored_generators is None:
            get_root_logger().warning(
                f"{file} was written by {written_by} processes, these are {self.opt['world_size']}: "
                "the run goes on with fresh generators, and its bits will differ"
            )
        on_first_rank(lambda: forget_after(self.metrics_file, self.iteration))

    def try_state(self, resume_state: dict[str, Any], file: str) -> None:
        """As :meth:`resume_training`, but writes nothing: for a model that only shows whether a state fits.

        Raises:
            CheckpointError: When the state is that of another network or optimizer, or of none.
        """
        with taken_over(file):
            networks = {name: net.state_dict() for name, net in self.state_networks().items()}
            schedulers = self.schedulers if self._keeps_schedule(resume_state) else []
            generators = [*self.generator_states()]
            refuse_unlike(resume_state, file, networks, self.optimizers, schedulers, generators)
            self._take_over(resume_state, file)

    def _take_over(self, resume_state: dict[str, Any], file: str) -> None:
        self._load_networks(resume_state.get("networks", {}), file)
        self._load_optimizers(resume_state, file)
        self.iteration = self.resumed_from = resume_state["iter"]
        self.best_metric_results = resume_state.get("best_metric_results", {})
        self.load_extra_state(resume_state.get("extra", {}))
        states = resume_state["generators"]
        if len(states) == self.opt["world_size"]:
            # Not yet: the loop still has its loaders to start.
            self.restored_generators = states[self.opt["rank"]]

    def _load_networks(self, saved: dict[str, Any], file: str) -> None:
        for name, net in self.state_networks().items():
            if name not in saved:
                raise CheckpointError(
                    f"{file}: holds no {name} (it has: {', '.join(saved) or 'none'}); it was written by another "
                    "kind of run, start this one under another name"
                )
            if problem := mismatch(saved[name], net):
                raise CheckpointError(f"{file}: {name} {problem}")
            net.load_state_dict(saved[name])

    def _keeps_schedule(self, resume_state: dict[str, Any]) -> bool:
        return _schedule(self.opt) == _schedule(resume_state.get("options") or self.opt)

    def _load_optimizers(self, resume_state: dict[str, Any], file: str) -> None:
        saved = len(resume_state["optimizers"])
        if saved != len(self.optimizers):
            raise CheckpointError(f"{file}: holds {saved} optimizers, the run has {len(self.optimizers)}")
        fresh = [[_settings(group) for group in optimizer.param_groups] for optimizer in self.optimizers]
        for optimizer, state in zip(self.optimizers, resume_state["optimizers"], strict=True):
            wanted, found = (
                groups[0].keys() - {"params"} for groups in (optimizer.param_groups, state["param_groups"])
            )
            if wanted != found:
                raise CheckpointError(
                    f"{file}: was written with another optimizer than {type(optimizer).__name__} "
                    f"(its settings: {', '.join(sorted(found))})"
                )
            optimizer.load_state_dict(state)
        if self._keeps_schedule(resume_state):
            for scheduler, state in zip(self.schedulers, resume_state["schedulers"], strict=True):
                scheduler.load_state_dict(state)
            return
        for optimizer, groups in zip(self.optimizers, fresh, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about a schedule that moves without an optimizer
            for iteration in range(1, resume_state["iter"] + 1):
                self.update_learning_rate(iteration, self.opt["train"].get("warmup_iter", -1))

    def restore_generators_once(self) -> None:
        """At the first batch of a resumed run: the loaders have drawn from the global generators by then."""
        if self.restored_generators is not None:
            states, self.restored_generators = self.restored_generators, None
            self.generator.set_state(states["model"].cpu())
            torch.set_rng_state(states["torch"].cpu())
            if self.device.type == "cuda" and "cuda" in states:
                torch.cuda.set_rng_state(states["cuda"].cpu(), self.device)


def _schedule(opt: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in opt["train"].items() if key.startswith(SCHEDULE_KEYS)}


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in state.items()}
