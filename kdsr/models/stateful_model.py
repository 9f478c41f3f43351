"""StatefulModel: what of a training is saved, and how a run goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch import Tensor, nn

from kdsr.models.evaluation import forget_after, measured_sets
from kdsr.models.measured_model import MeasuredModel
from kdsr.runtime.checkpoint import save_file
from kdsr.runtime.distributed import gather_lists
from kdsr.runtime.errors import CheckpointError


class StatefulModel(MeasuredModel):
    """Saves whole files, the weights of an iteration before the state that names them, and resumes to the bit."""

    ema_decay: float

    def init_state(self) -> None:
        # What the model draws on the host; its state is part of the training state.
        seed = self.opt.get("manual_seed", 0) + self.opt.get("rank", 0)
        self.generator = torch.Generator().manual_seed(seed)
        self.restored_generators: dict[str, Any] | None = None

    def restore_generators_once(self) -> None:
        """At the first batch of a resumed run: the loaders have drawn from the global generators by then."""
        if self.restored_generators is not None:
            self.restore_generators(self.restored_generators)
            self.restored_generators = None

    def state_networks(self) -> dict[str, nn.Module]:
        """Networks that belong to the training state, by attribute name. Frozen teachers do not."""
        names = ("net_g", "net_g_ema") if self.ema_decay > 0 else ("net_g",)
        return {name: getattr(self, name) for name in names}

    def save(self, epoch: int, current_iter: int) -> None:
        """Writes ``net_g_N.pth`` (loadable by stock BasicSR), then the state; ``-1`` stands for the latest."""
        generators = gather_lists([self.generator_states()])
        if self.opt["rank"] != 0:
            return
        weights = {"params": _on_cpu(self.net_g.state_dict())}
        if self.ema_decay > 0:
            weights["params_ema"] = _on_cpu(self.net_g_ema.state_dict())
        label = "latest" if current_iter == -1 else current_iter
        save_file(weights, Path(self.opt["path"]["models"]) / f"net_g_{label}.pth")
        if current_iter != -1:
            state = {**self.training_state(epoch, current_iter), "generators": generators}
            save_file(state, Path(self.opt["path"]["training_states"]) / f"{current_iter}.state")

    def training_state(self, epoch: int, current_iter: int) -> dict[str, Any]:
        """What cannot be derived and all ranks share, as tensors and plain values (read with weights_only)."""
        return {
            "epoch": epoch,
            "iter": current_iter,
            "manual_seed": self.opt.get("manual_seed"),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "networks": {name: _on_cpu(net.state_dict()) for name, net in self.state_networks().items()},
            "best_metric_results": self.best_metric_results,
        }

    def generator_states(self) -> dict[str, Any]:
        """States of all that the model draws from, torch's global generator included (SwinIR's drop path)."""
        states: dict[str, Any] = {"model": self.generator.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def restore_generators(self, states: dict[str, Any]) -> None:
        self.generator.set_state(states["model"].cpu())
        torch.set_rng_state(states["torch"].cpu())
        if self.device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"].cpu(), self.device)

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Restores networks, optimizers, schedulers, generators, best values and which validations were made.

        Raises:
            CheckpointError: When the state is that of another network or optimizer.
        """
        file = self.opt["path"].get("resume_state", "the state")
        saved = resume_state.get("networks", {})
        for name, net in self.state_networks().items():
            if name not in saved:
                raise CheckpointError(
                    f"{file}: holds no {name} (it has: {', '.join(saved) or 'none'}); it was written by another "
                    "kind of run, start this one under another name"
                )
            try:
                net.load_state_dict(saved[name])
            except RuntimeError as error:
                first = str(error).splitlines()[1].strip()
                raise CheckpointError(f"{file}: {name} does not fit: {first}") from error
        for optimizer, state in zip(self.optimizers, resume_state["optimizers"], strict=True):
            wanted, found = (
                groups[0].keys() - {"params"} for groups in (optimizer.param_groups, state["param_groups"])
            )
            if wanted != found:
                raise CheckpointError(
                    f"{file}: was written with another optimizer than {type(optimizer).__name__} "
                    f"(its settings: {', '.join(sorted(found))})"
                )
        super().resume_training(resume_state)
        self.iteration = resume_state["iter"]
        self.best_metric_results = resume_state.get("best_metric_results", {})
        states = resume_state["generators"]
        if len(states) == self.opt["world_size"]:
            # Not yet: the loop still has its loaders to start.
            self.restored_generators = states[self.opt["rank"]]
        else:
            get_root_logger().warning(
                f"{file} was written by {len(states)} processes, these are {self.opt['world_size']}: "
                "the run goes on with fresh generators, and its bits will differ"
            )
        if self.opt["rank"] == 0:
            forget_after(self.metrics_file, resume_state["iter"])
        self._validated = measured_sets(self.metrics_file, resume_state["iter"])


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in state.items()}
