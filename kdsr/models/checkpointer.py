"""Checkpointer: saves a training and resumes it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from kdsr.models.pretrained import description, export_safetensors
from kdsr.models.retention import drop_old
from kdsr.models.sections import LoggerOptions, LoopOptions
from kdsr.models.state_validation import check_state, loading_state
from kdsr.runtime.checkpoint import mismatch, save_file
from kdsr.runtime.distributed import gather_lists, on_first_rank
from kdsr.runtime.errors import CheckpointError
from kdsr.runtime.step_guard import StepGuard

SCHEDULE_KEYS = ("optim_", "scheduler", "warmup_iter")  # prefixes of the options that set the learning rate


class Checkpointer:
    """Saves whole files, the weights of an iteration before the state that names them, and resumes to the bit.

    Args:
        opt: The parsed options.
        device: Where the run computes.
        networks: The networks that change, by name. ``net_g`` and ``net_g_ema`` also go into the file of weights.
        optimizers: Of the training.
        schedulers: One for each optimizer.
        generator: What the model draws from, on the CPU.
        guard: Its counters are part of the state, its ``iteration`` is the last one that was trained.
        best: The best values of the validations so far, by set and metric; changed in place by ``load``.
        update_learning_rate: BasicSR's, called with an iteration and the length of the warm-up.

    Attributes:
        position: Where in the data the run is. What surrounds the loop keeps it up to date.
        run_record: The options, and the fingerprints of the files that they name; set before the first save.
        resumed_from: The iteration of the state that was loaded.
        pending_generators: The states of this rank's generators, from ``load`` until ``restore_generators``.
    """

    def __init__(
        self,
        opt: dict[str, Any],
        device: torch.device,
        *,
        networks: Mapping[str, nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[Any],
        generator: torch.Generator,
        guard: StepGuard,
        best: dict[str, dict[str, Any]],
        update_learning_rate: Callable[[int, int], None],
    ) -> None:
        self.opt = opt
        self.device = device
        self.networks = networks
        self.optimizers = optimizers
        self.schedulers = schedulers
        self.generator = generator
        self.guard = guard
        self.best = best
        self.update_learning_rate = update_learning_rate
        self.position: dict[str, int] = {"epoch": 0, "samples": 0}
        self.run_record: dict[str, Any] = {}
        self.resumed_from: int | None = None
        self.pending_generators: dict[str, Any] | None = None

    # -------------------------------------------------------------------------------------------- saving

    def save(self, iteration: int) -> Path:
        """Writes ``net_g_N.pth``, which stock BasicSR can load, then ``N.state``; returns the latter. Collective.

        The former describes its network (``models.pretrained.description``).
        Older files than the last ``logger.keep_last`` (3) are removed after that.

        Raises:
            TrainingError: On all ranks, when a file cannot be written; those before are untouched.
        """
        generators = gather_lists([self._generator_states()])
        file = Path(self.opt["path"]["training_states"]) / f"{iteration}.state"
        on_first_rank(lambda: self._write(iteration, file, generators))
        return file

    def _write(self, iteration: int, file: Path, generators: list[dict[str, Any]]) -> None:
        weights = self._write_weights(str(iteration))
        state = self._state(iteration) | {"generators": generators, "weights": [weights.name]}
        save_file(state, file)
        keep_last = LoggerOptions.read(self.opt["logger"]).keep_last
        drop_old(weights.parent, file.parent, keep_last, iteration, self.resumed_from)

    def save_weights(self, name: str, **more: Any) -> None:
        """Writes ``net_g_<name>.pth`` alone, with ``more`` beside the weights. Collective."""
        on_first_rank(lambda: self._write_weights(name, **more))

    def save_best(self, measured: dict[str, Any]) -> None:
        """Writes ``net_g_best.pth`` with the entry ``measured``: set, metric, value and iteration. Collective."""
        self.save_weights("best", measured=measured)

    def _write_weights(self, name: str, **more: Any) -> Path:
        file = Path(self.opt["path"]["models"]) / f"net_g_{name}.pth"
        names = {"params": "net_g", "params_ema": "net_g_ema"}  # BasicSR's keys; the student alone
        weights = {
            key: _on_cpu(self.networks[net].state_dict())
            for key, net in names.items()
            if net in self.networks
        }
        described = description(self.opt)
        save_file({**weights, **described, **more}, file)
        if self.opt["logger"].get("save_safetensors"):
            export_safetensors(weights, file, described, self.guard.iteration)
        return file

    def _state(self, iteration: int) -> dict[str, Any]:
        """The state that all ranks share, as tensors and plain values (read with weights_only)."""
        return {
            "epoch": self.position["epoch"],
            "iter": iteration,
            "position": dict(self.position),
            "manual_seed": self.opt.get("manual_seed"),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "networks": {name: _on_cpu(net.state_dict()) for name, net in self.networks.items()},
            "best_metric_results": self.best,
            "extra": {"guard": self.guard.state()},
            **self.run_record,
        }

    def _generator_states(self) -> dict[str, Any]:
        """The states of all generators in use, torch's global one included (SwinIR's drop path)."""
        states: dict[str, Any] = {"model": self.generator.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    # -------------------------------------------------------------------------------------------- resuming

    def resume(self, state: dict[str, Any]) -> None:
        """As ``load``, with a warning where the number of processes has changed."""
        file = self.opt["path"].get("resume_state", "the state")
        self.load(state, file)
        if self.pending_generators is None:
            get_root_logger().warning(
                f"{file} was written by {len(state['generators'])} processes, these are {self.opt['world_size']}: "
                "the run goes on with fresh generators, and its bits will differ"
            )

    def load(self, state: dict[str, Any], file: str) -> None:
        """Loads networks, optimizers, schedulers, generators and best values; writes nothing.

        If the options of the learning rate have changed, the new ones count: the schedule is replayed up to the
        state's iteration.

        Args:
            state: As read.
            file: Where it was read, for messages.

        Raises:
            CheckpointError: The state belongs to another network or optimizer, or is no state.
        """
        with loading_state(file):
            check_state(
                state,
                file,
                {name: net.state_dict() for name, net in self.networks.items()},
                self.optimizers,
                self.schedulers if self._keeps_schedule(state) else [],
                [*self._generator_states()],
            )
            self._load_networks(state.get("networks", {}), file)
            self._load_optimizers(state, file)
            self.best.clear()
            self.best.update(state.get("best_metric_results", {}))
            self.guard.load(state.get("extra", {}).get("guard", {}))
            generators = state["generators"]
            if len(generators) == self.opt["world_size"]:
                # Set later: the loop still has to start its loaders, which draw from them.
                self.pending_generators = generators[self.opt["rank"]]
            self.guard.iteration = self.resumed_from = state["iter"]

    def _load_networks(self, saved: dict[str, Any], file: str) -> None:
        for name, net in self.networks.items():
            if name not in saved:
                raise CheckpointError(
                    f"{file}: holds no {name} (it has: {', '.join(saved) or 'none'}); it was written by another "
                    "kind of run, start this one under another name"
                )
            if problem := mismatch(saved[name], net):
                raise CheckpointError(f"{file}: {name} {problem}")
            net.load_state_dict(saved[name])

    def _keeps_schedule(self, state: dict[str, Any]) -> bool:
        return _schedule(self.opt) == _schedule(state.get("options") or self.opt)

    def _load_optimizers(self, state: dict[str, Any], file: str) -> None:
        saved = len(state["optimizers"])
        if saved != len(self.optimizers):
            raise CheckpointError(f"{file}: holds {saved} optimizers, the run has {len(self.optimizers)}")
        fresh = [[_settings(group) for group in optimizer.param_groups] for optimizer in self.optimizers]
        for optimizer, loaded in zip(self.optimizers, state["optimizers"], strict=True):
            wanted, found = (
                groups[0].keys() - {"params"} for groups in (optimizer.param_groups, loaded["param_groups"])
            )
            if wanted != found:
                raise CheckpointError(
                    f"{file}: was written with another optimizer than {type(optimizer).__name__} "
                    f"(its settings: {', '.join(sorted(found))})"
                )
            optimizer.load_state_dict(loaded)
        if self._keeps_schedule(state):
            for scheduler, loaded in zip(self.schedulers, state["schedulers"], strict=True):
                scheduler.load_state_dict(loaded)
            return
        for optimizer, groups in zip(self.optimizers, fresh, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of scheduler steps without optimizer steps
            for iteration in range(1, state["iter"] + 1):
                self.update_learning_rate(iteration, LoopOptions.read(self.opt["train"]).warmup_iter)

    def restore_generators(self) -> None:
        """Sets the generators to the loaded states; called at the first batch, after the loaders have drawn."""
        if self.pending_generators is not None:
            states, self.pending_generators = self.pending_generators, None
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
