"""Files of every kind that kdsr reads: no pickled code runs, and each defect is reported."""

import os
import pickle
import random
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from kdsr.runtime.checkpoint import load_weights, read_checkpoint, save_file, select_weights
from kdsr.runtime.errors import CheckpointError, TrainingError

from basicsr.utils import get_root_logger  # isort: skip (after kdsr, which makes basicsr importable)


def network(width: int = 4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 3, 3))


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture
def lightning(monkeypatch):
    """Lightning's module paths while a file is written; the reader finds no such package."""
    modules = {}
    names = [
        "pytorch_lightning",
        "pytorch_lightning.callbacks",
        "pytorch_lightning.callbacks.model_checkpoint",
        "pytorch_lightning.utilities",
        "pytorch_lightning.utilities.parsing",
    ]
    for name in names:
        modules[name] = types.ModuleType(name)

    class ModelCheckpoint:
        def __init__(self):
            self.monitor, self.best = "val/rec_loss", torch.tensor(0.25)

        def __setstate__(self, state):
            raise AssertionError("the pickled class ran")

    class AttributeDict(dict):
        pass

    for cls, module in ((ModelCheckpoint, names[2]), (AttributeDict, names[4])):
        cls.__module__, cls.__qualname__ = module, cls.__name__
        setattr(modules[module], cls.__name__, cls)

    def write(path, **extra):
        state = OrderedDict((f"{k}", v) for k, v in network().state_dict().items())
        with monkeypatch.context() as patch:
            for name, module in modules.items():
                patch.setitem(sys.modules, name, module)
            torch.save(
                {
                    "epoch": 17,
                    "global_step": 4200,
                    "pytorch-lightning_version": "1.0.8",
                    "state_dict": state,
                    "callbacks": {
                        ModelCheckpoint: {"best_model_score": torch.tensor(0.5), "dirpath": "logs"},
                        "object": ModelCheckpoint(),
                    },
                    "hyper_parameters": AttributeDict(learning_rate=4.5e-6, ddconfig={"ch": 128}),
                    "optimizer_states": [],
                    "lr_schedulers": [],
                    **extra,
                },
                path,
            )
        assert "pytorch_lightning" not in sys.modules

    return write


class Intruder:
    """Pickles to a call that creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


class SneakyIntruder(Intruder):
    def __reduce__(self):
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


def test_basicsr_file_gives_params_or_params_ema(tmp_path):
    plain, ema = network(seed=1), network(seed=2)
    path = tmp_path / "net_g_8.pth"
    torch.save({"params": plain.state_dict(), "params_ema": ema.state_dict()}, path)
    for key, source in (("params", plain), ("params_ema", ema), ("auto", ema)):
        net = network()
        load_weights(net, path, param_key=key)
        assert_same(net.state_dict(), source.state_dict())


def test_bare_state_dict_and_ddp_prefix(tmp_path):
    source = network(seed=1)
    path = tmp_path / "raw.pth"
    torch.save({f"module.{name}": value for name, value in source.state_dict().items()}, path)
    for key in (None, "auto"):
        net = network()
        load_weights(net, path, param_key=key)
        assert_same(net.state_dict(), source.state_dict())
    with pytest.raises(CheckpointError, match="path.param_key_g is params, .* bare state dict"):
        load_weights(network(), path)


def test_legacy_file_format(tmp_path):
    source = network(seed=1)
    path = tmp_path / "old.pth"
    torch.save({"params": source.state_dict()}, path, _use_new_zipfile_serialization=False)
    net = network()
    load_weights(net, path)
    assert_same(net.state_dict(), source.state_dict())


def test_weights_are_cast_to_the_networks_dtype(tmp_path):
    path = tmp_path / "float32.pth"
    torch.save({"params": network(seed=1).state_dict()}, path)
    net = network().double()
    load_weights(net, path)
    assert net[0].weight.dtype == torch.float64
    assert torch.equal(net[0].weight, network(seed=1)[0].weight.double())


def test_params_ema_falls_back_to_params_with_a_warning(tmp_path, caplog, monkeypatch):
    path = tmp_path / "teacher.pth"
    torch.save({"params": network(seed=1).state_dict()}, path)
    monkeypatch.setattr(get_root_logger(), "propagate", True)
    with caplog.at_level("WARNING", logger="basicsr"):
        weights = select_weights(read_checkpoint(path), "params_ema", path, "path.pretrain_network_t")
    assert_same(weights, network(seed=1).state_dict())
    assert "path.param_key_t" in caplog.text and "teacher.pth" in caplog.text


def test_lightning_file_without_lightning(tmp_path, lightning):
    path = tmp_path / "last.ckpt"
    lightning(path)
    checkpoint = read_checkpoint(path)
    assert checkpoint["epoch"] == 17
    assert checkpoint["hyper_parameters"] == {"learning_rate": 4.5e-6, "ddconfig": {"ch": 128}}
    assert vars(checkpoint["callbacks"]["object"]) == {}, "a stub keeps nothing"
    net = network(seed=3)
    load_weights(net, path, param_key="state_dict")
    assert_same(net.state_dict(), network().state_dict())


def test_lightning_stubs_are_gone_after_reading(tmp_path, lightning):
    path = tmp_path / "last.ckpt"
    lightning(path)
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("intruder, name", [(Intruder, "mkdir"), (SneakyIntruder, "exec")])
@pytest.mark.parametrize("kind", ["zip", "zip, protocol 4", "legacy", "pickle", "inside Lightning's"])
def test_pickled_code_is_refused_by_name_and_never_runs(tmp_path, lightning, intruder, name, kind):
    path, target = tmp_path / "bad.ckpt", tmp_path / "created"
    content = {"params": network().state_dict(), "extra": intruder(target)}
    if kind == "zip":
        torch.save(content, path)
    elif kind == "zip, protocol 4":
        torch.save(content, path, pickle_protocol=4)
    elif kind == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"extra": intruder(target)}))
    else:
        lightning(path, extra=intruder(target))
    with pytest.raises(CheckpointError) as caught:
        load_weights(network(), path)
    message = str(caught.value)
    assert name in message and "bad.ckpt" in message and "ModelCheckpoint" not in message
    assert len(message.splitlines()) == 1
    assert not target.exists()
    pickle.loads(pickle.dumps(intruder(target)))  # the trap is a real one
    assert target.exists()


def test_damaged_lightning_file(tmp_path, lightning):
    path = tmp_path / "last.ckpt"
    lightning(path)
    whole, draw = path.read_bytes(), random.Random(5)
    weights = network().state_dict()
    for _ in range(50):
        at = draw.randrange(len(whole))
        flipped = whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
        for damaged in (whole[:at], flipped):
            path.write_bytes(damaged)
            try:
                assert_same(read_checkpoint(path)["state_dict"], weights)
                assert damaged is flipped, "a flipped bit may lie where nothing is"
            except CheckpointError as error:
                assert "last.ckpt" in str(error)


def test_whole_pickled_module_is_refused(tmp_path):
    path = tmp_path / "module.pth"
    torch.save(network(), path)
    with pytest.raises(CheckpointError, match="torch.nn.modules.container.Sequential"):
        read_checkpoint(path)


@pytest.mark.parametrize("kept", [0, 10, 400, 0.5, 0.95])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_file(tmp_path, kept, zipped):
    path = tmp_path / "net_g_latest.pth"
    torch.save({"params": network(32).state_dict()}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(CheckpointError, match="path.pretrain_network_t: .*net_g_latest.pth: cannot be read"):
        load_weights(network(32), path, option="path.pretrain_network_t")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match="path.pretrain_network_t: .*nowhere.pth: no such file"):
        load_weights(network(), tmp_path / "nowhere.pth", option="path.pretrain_network_t")
    with pytest.raises(CheckpointError, match="folder"):
        load_weights(network(), tmp_path)


def test_absent_param_key_lists_the_keys(tmp_path):
    path = tmp_path / "vqgan.ckpt"
    torch.save({"state_dict": network().state_dict(), "epoch": 3}, path)
    with pytest.raises(CheckpointError, match="param_key_vqgan is params_ema.*state_dict, epoch"):
        load_weights(network(), path, param_key="params_ema", option="path.pretrain_network_vqgan")
    with pytest.raises(CheckpointError, match="set path.param_key_g to the key"):
        load_weights(network(), path, param_key=None)
    with pytest.raises(CheckpointError, match="no dict of tensors"):
        load_weights(network(), path, param_key="epoch")


def test_file_without_a_dict(tmp_path):
    path = tmp_path / "tensor.pth"
    torch.save(torch.zeros(3), path)
    with pytest.raises(CheckpointError, match="holds a Tensor"):
        read_checkpoint(path)


@pytest.mark.parametrize("strict", [True, False])
def test_other_shape_names_both_and_changes_nothing(tmp_path, strict):
    path = tmp_path / "wide.pth"
    torch.save({"params": network(8).state_dict()}, path)
    net = network(seed=5)
    with pytest.raises(CheckpointError) as caught:
        load_weights(net, path, strict=strict, option="path.pretrain_network_t")
    message = str(caught.value)
    assert "0.weight (8, 3, 3, 3) in the file, (4, 3, 3, 3) in the network" in message
    assert "path.pretrain_network_t" in message and "wide.pth" in message
    assert message.count("in the network") == 5 and "and 2 more" in message
    assert "2 of the network's 9 tensors match (9 are in the file)" in message
    assert_same(net.state_dict(), network(seed=5).state_dict())


def test_other_names(tmp_path):
    path = tmp_path / "longer.pth"
    torch.save({"params": nn.Sequential(*network(), nn.Conv2d(3, 1, 1)).state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"3.weight \(1, 3, 1, 1\) in the file, not in the network"):
        load_weights(network(), path)
    net = network(seed=3)
    load_weights(net, path, strict=False)
    assert_same(net.state_dict(), network().state_dict())
    longer = nn.Sequential(*network(), nn.Conv2d(3, 1, 1), nn.Conv2d(1, 1, 1))
    with pytest.raises(CheckpointError, match="4.weight is not in the file"):
        load_weights(longer, path)


def test_required_tensors_must_be_loaded_even_when_not_strict(tmp_path):
    path = tmp_path / "partial.pth"
    weights = network().state_dict()
    kept = {name: value for name, value in weights.items() if not name.startswith("1.")}
    torch.save({"params": kept}, path)
    load_weights(network(), path, strict=False, required=("0.", "2."))
    with pytest.raises(CheckpointError, match="1.weight is not in the file"):
        load_weights(network(), path, strict=False, required=("0.", "1."))


def test_not_strict_still_needs_one_common_name(tmp_path):
    path = tmp_path / "foreign.pth"
    torch.save({"params": {"other.weight": torch.zeros(2)}}, path)
    with pytest.raises(
        CheckpointError,
        match="no name in common of the network's 9 and the file's 1; the file has other.weight",
    ):
        load_weights(network(), path, strict=False)


def test_save_file_replaces_whole_files_only(tmp_path):
    path = tmp_path / "run" / "1.state"
    save_file({"iter": 1}, path)
    save_file({"iter": 2, "rng": torch.get_rng_state()}, path)
    assert read_checkpoint(path)["iter"] == 2
    with pytest.raises(AttributeError):  # a local class cannot be pickled: the write breaks off half way

        class Local:
            pass

        save_file({"big": torch.zeros(1000), "bad": Local()}, path)
    assert read_checkpoint(path)["iter"] == 2
    assert [entry.name for entry in path.parent.iterdir()] == ["1.state"]


def test_save_file_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match="cannot be written"):
        save_file({}, tmp_path / "file" / "net.pth")
