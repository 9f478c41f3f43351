"""StudentBundle: the student with its trainable adapters and further passes; what DDP wraps and the optimizer sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdsr.distill.adapters import TapGroup, make_adapter
from kdsr.distill.step import Teacher
from kdsr.distill.taps import FeatureTaps, shapes_of


class BundleOutput(NamedTuple):
    """The output of a bundle: all that a loss may use, so that DDP finds which parameters are used.

    Attributes:
        output: The student's.
        features: Its adapted features, by group.
        results: The results of further passes, by name.
    """

    output: Tensor
    features: dict[str, list[Tensor]]
    results: dict[str, Any]


class StudentBundle(nn.Module):
    """Maps ``lq`` to the student's output, its adapted features, and the results of its further passes.

    Adapters and passes belong to the training state and never to the student's file.

    Args:
        student: The bare network.
        groups: Which features are compared, by name.
        teachers: The teachers by key; their features are tapped.
        lq: A batch of the size used in training, (1, C, H, W); one pass of it gives the shapes of the features.

    Attributes:
        shapes: Of each group's features, the student's and the teacher's.
        passes: Further passes by name, added by the terms: modules that map ``(student, *inputs)`` to a result. They
            run after the student's own pass. One with an attribute ``group`` gets the features of that group as its
            first input.

    Raises:
        OptionError: A module does not exist, its output is no feature map, or no adapter brings it to the teacher's
            size.
    """

    def __init__(
        self, student: nn.Module, groups: Mapping[str, TapGroup], teachers: Mapping[str, Teacher], lq: Tensor
    ) -> None:
        super().__init__()
        self.student = student
        self.passes = nn.ModuleDict()
        self.adapters = nn.ModuleDict()
        self.shapes: dict[str, list[tuple[torch.Size, torch.Size]]] = {}
        self.taps = {
            name: FeatureTaps(student, [pair.student for pair in group.pairs], f"{group.option}.student")
            for name, group in groups.items()
        }
        for name, group in groups.items():
            theirs = teachers[group.teacher].tap(
                name, [pair.teacher for pair in group.pairs], f"{group.option}.teacher", group.view, lq
            )
            ours = shapes_of(student, self.taps[name], lq)
            self.shapes[name] = list(zip(ours, theirs, strict=True))
            self.adapters[name] = nn.Sequential(
                *(
                    make_adapter(group, pair, *sizes)
                    for pair, sizes in zip(group.pairs, self.shapes[name], strict=True)
                )
            )

    def trained_parts(self) -> dict[str, nn.Module]:
        """What is trained beside the student, by its name in the state."""
        parts = {"adapters": self.adapters, "passes": self.passes}
        return {name: part for name, part in parts.items() if next(part.parameters(), None) is not None}

    def forward(self, lq: Tensor, inputs: Mapping[str, tuple[Any, ...]] | None = None) -> BundleOutput:
        """Runs the student, and its further passes with their inputs by name."""
        output = self.student(lq)
        features = {
            name: [
                adapter(feature)
                for adapter, feature in zip(self.adapters[name].children(), taps.take(lq), strict=True)
            ]
            for name, taps in self.taps.items()
        }
        results = {}
        for name, further in self.passes.items():
            given = (inputs or {}).get(name, ())
            group = getattr(further, "group", None)
            if group is not None:
                given = (features[group], *given)
            results[name] = further(self.student, *given)
        if self.passes:  # their features are not used
            self.clear()
        return BundleOutput(output, features, results)

    def clear(self) -> None:
        """Drops the student's features of the last pass."""
        for taps in self.taps.values():
            taps.clear()
