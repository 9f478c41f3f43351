"""Weights saved from inside DDP, torch.compile and AveragedModel load into the unwrapped network."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from kdsr.archs.spandrel_arch import Spandrel
from kdsr.models.pretrained import warm_start
from kdsr.runtime.checkpoint import load_weights, unwrapped_weights
from kdsr.runtime.errors import CheckpointError
from spandrel_files import made

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "compile": lambda net: torch.compile(net),  # type: ignore[dict-item]  # compiles at the first call only
    "average": AveragedModel,
}


def chains(names: list[str], length: int) -> st.SearchStrategy[list[str]]:
    """Wrappers, innermost first; torch.compile twice adds only one."""
    drawn = st.lists(st.sampled_from(names), max_size=length)
    return drawn.filter(lambda chain: ("compile", "compile") not in zip(chain, chain[1:], strict=False))


CHAINS = chains(["ddp", "compile", "average"], 4)
FILES = st.sampled_from(["zip", "legacy", "safetensors"])
TRY = settings(deadline=None, derandomize=True, max_examples=25, database=None)


@pytest.fixture(autouse=True, scope="module")
def _one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 3, 1)


class Inside(nn.Module):
    """A network whose names all begin like DDP's."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Plain()


class Beside(nn.Module):
    """A network with a module of that name among others, and another inside."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.tail = Plain(), nn.Sequential(nn.Conv2d(3, 3, 1))
        self.tail.module = nn.Conv2d(3, 2, 1)


class Counting(nn.Module):
    """A network with its own counter of the name that AveragedModel uses."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Plain()
        self.register_buffer("n_averaged", torch.tensor(7))


NETWORKS: list[type[nn.Module]] = [Plain, Inside, Beside, Counting]


def built(network: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = network()
    with torch.no_grad():
        for value in net.state_dict().values():
            value.add_(torch.randn(value.shape).mul(10).to(value.dtype))
    return net


def wrapped(net: nn.Module, chain: list[str]) -> nn.Module:
    for name in chain:
        net = WRAPPERS[name](net)
    return net


def write(weights: dict[str, Tensor], folder: str, kind: str) -> Path:
    file = Path(folder) / ("net.safetensors" if kind == "safetensors" else "net.pth")
    if kind == "safetensors":
        save_file({name: value.clone() for name, value in weights.items()}, file)
    else:
        torch.save({"params": weights}, file, _use_new_zipfile_serialization=kind == "zip")
    return file


def assert_same(net: nn.Module, source: nn.Module) -> None:
    found, wanted = net.state_dict(), source.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@TRY
@given(st.sampled_from(NETWORKS), CHAINS, chains(["ddp", "compile"], 2), FILES)
def test_a_wrapped_network_is_loaded_into_the_bare_one(
    network: type[nn.Module], chain: list[str], inner: list[str], kind: str
) -> None:
    source, expected = built(network, 1), built(network, 1)
    if network is Plain:  # of the others a wrapped part could be the network's own
        source.encoder = wrapped(source.encoder, inner)
    weights = wrapped(source, chain).state_dict()
    assert not chain or weights.keys() != expected.state_dict().keys()
    with tempfile.TemporaryDirectory() as folder:
        file = write(weights, folder, kind)
        net = built(network, 2)
        load_weights(net, file)
        assert_same(net, expected)
        net = built(network, 3)
        warm_start(net, {"path": {"init_from": str(file)}}, None)
        assert_same(net, expected)


@TRY
@given(st.sampled_from(["SAFMN", "NAFNet"]), CHAINS, FILES)
def test_spandrel_recognises_a_wrapped_network(name: str, chain: list[str], kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = write(wrapped(made(name, 1), chain).state_dict(), folder, kind)
        assert_same(Spandrel(str(file)), made(name, 1))


@TRY
@given(st.sampled_from(NETWORKS), CHAINS, st.data())
def test_a_wrapper_is_around_all_of_a_network(network: type[nn.Module], chain: list[str], data: Any) -> None:
    """With a name without the prefix, or another kind of counter, nothing is removed."""
    weights = {
        f"module.{name}": value for name, value in wrapped(built(network, 1), chain).state_dict().items()
    }
    odd = data.draw(st.sampled_from(["other.weight", "modules.weight", "n_averaged", "xmodule.bias"]))
    weights[odd] = torch.zeros(3)
    found = unwrapped_weights(weights)
    assert odd in found and all(name == odd or name.startswith("module.") for name in found)
    assert len(found) == len(weights)


def test_two_names_that_would_become_one_stay_two() -> None:
    weights = {"_orig_mod.a.weight": torch.zeros(1), "a.weight": torch.ones(1)}
    assert unwrapped_weights(weights) == weights
    assert unwrapped_weights(weights, ["a.weight"]) == weights


def test_names_of_nothing_but_wrappers_and_endless_chains() -> None:
    for name in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod", "module"):
        assert len(unwrapped_weights({name: torch.zeros(1)})) == 1
        assert "" not in unwrapped_weights({name: torch.zeros(1)})
    deep = {"module." * 100_000 + "a": torch.zeros(1), "n_averaged": torch.tensor(1)}
    assert len(unwrapped_weights(deep, ["a"])) == 1


def test_no_other_prefix_is_removed(tmp_path: Path) -> None:
    """Other programs' prefixes remain errors that name them."""
    for prefix in ("model.", "net.", "generator.", "_fsdp_wrapped_module.", "_orig_model.", "module_."):
        torch.save(
            {f"{prefix}{name}": value for name, value in built(Plain, 1).state_dict().items()}, tmp_path / "x"
        )
        with pytest.raises(CheckpointError, match=f"no name in common .*; the file has {prefix}"):
            load_weights(Plain(), tmp_path / "x", param_key=None)
