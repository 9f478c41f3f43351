"""Keys that the chosen model does not read: the models that do are named."""

from __future__ import annotations

from typing import Any

import pytest
from basicsr.utils.registry import MODEL_REGISTRY

from kdsr.models.kd_model import KDModel
from kdsr.options.check import check
from kdsr.runtime.declarations import Section, option

Options = dict[str, Any]


@pytest.mark.parametrize(
    ("model_type", "place", "value", "message"),
    [
        ("VQGANModel", "train.num_neg", 3, "train.num_neg: VQGANModel does not read it; DCKDModel, FACDModel, "),
        ("SRModel", "network_vqgan", None, "network_vqgan: SRModel does not read it; DCKDModel, FACDModel, "),
        ("SRModel", "path.pretrain_network_t", None, "path.pretrain_network_t: SRModel does not read it; DCKDModel, "),
        ("KDModel", "train.gan_opt", None,
         "train.gan_opt: KDModel does not read it; ESRGANModel, SRGANModel and VQGANModel do"),
        ("SRModel", "val.teacher", True, "val.teacher: SRModel does not read it; "),
        ("SRModel", "train.logits_opt", None, "train.logits_opt: SRModel does not read it; DCKDModel, FACDModel, "),
        ("VQGANModel", "train.logits_opt", None, "train.logits_opt: VQGANModel does not read it; DCKDModel, "),
        # what no model reads is misspelt
        ("KDModel", "train.logit_opt", None, "train.logit_opt: unknown key; did you mean logits_opt"),
        ("KDModel", "network_vqgn", None, "network_vqgn: unknown key; "),
    ],
)  # fmt: skip
def test_who_reads_a_key(run_options: Options, model_type: str, place: str, value: Any, message: str) -> None:
    run_options["model_type"] = model_type
    *above, last = place.split(".")
    section = run_options
    for key in above:
        section = section[key]
    section[last] = value
    found = [problem for problem in check(run_options, True) if problem.startswith(f"{place}:")]
    assert len(found) == 1 and found[0].startswith(message), found


def test_a_model_of_the_users_own_is_named_too(run_options: Options) -> None:
    class OwnOptions(KDModel.train_options):  # type: ignore[name-defined]
        own_opt: Section = option(None, "A loss.")

    class OwnModel(KDModel):
        train_options = OwnOptions

    MODEL_REGISTRY._obj_map["OwnModel"] = OwnModel
    try:
        run_options["train"]["own_opt"] = {"type": "L1Loss"}
        assert check(run_options, True) == ["train.own_opt: KDModel does not read it; OwnModel does"]
    finally:
        del MODEL_REGISTRY._obj_map["OwnModel"]


def test_an_unknown_type_may_be_the_users_own(run_options: Options) -> None:
    run_options["network_g"] = {"type": "QuiteAnother"}
    run_options["train"]["optim_g"]["type"] = "Zzzzzz"
    network, optimizer = sorted(check(run_options, True))
    assert network.startswith("network_g.type: 'QuiteAnother' is not known; valid: ")
    assert network.endswith(" (for a type of your own, add its module to import_modules)")
    assert (
        optimizer.startswith("train.optim_g.type: 'Zzzzzz' is not known; valid: ")
        and "import_" not in optimizer
    )
