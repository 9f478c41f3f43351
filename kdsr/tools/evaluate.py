"""``kdsr evaluate``: networks on benchmarks, in one table, beside bicubic interpolation and published numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pandas as pd
import typer
from torch.utils.data import DataLoader
from tqdm import tqdm

from kdsr.deploy.benchmarks import Benchmark, BenchmarkImages, find_benchmark, published
from kdsr.deploy.inference import Inference, Settings, Word, device_of
from kdsr.deploy.network_file import OpenedNetwork, open_network
from kdsr.deploy.quality_metrics import quality_metrics
from kdsr.models.evaluation import EvaluationSettings
from kdsr.models.evaluation import evaluate as evaluate_network
from kdsr.models.image_metrics import baseline_name
from kdsr.runtime.atomic_files import atomic_write
from kdsr.runtime.errors import OptionError
from kdsr.tools.report import as_markdown, as_text

_DIGITS = {"psnr": 2}  # of the other metrics 4
_FORMAT_OF = {".txt": "text", ".md": "markdown", ".csv": "csv", ".json": "json"}


class TableFormat(StrEnum):
    """Formats of the table."""

    text = "text"
    markdown = "markdown"
    csv = "csv"
    json = "json"


class Value(NamedTuple):
    """A metric of an image, or of a set: ``image`` is empty. ``source``: of a published value."""

    network: str
    scale: int
    parameters: int | None
    set: str
    image: str
    metric: str
    value: float
    source: str = ""


def names_of(files: Sequence[Path]) -> list[str]:
    """Names for the table: the files' names without ending, or the paths where two are the same."""
    stems = [file.stem for file in files]
    return [stem if stems.count(stem) == 1 else str(file) for stem, file in zip(stems, files, strict=True)]


def measure(
    name: str,
    opened: OpenedNetwork,
    inference: Inference,
    benchmark: Benchmark,
    further: dict[str, dict[str, Any]],
    with_baseline: bool,
) -> list[Value]:
    """Measures a network, and the baseline, on a benchmark: values of each image, then their means."""
    metrics = benchmark.metrics | further
    settings = EvaluationSettings(metrics, metrics if with_baseline else None, benchmark.scale, name)
    images: Any = DataLoader(BenchmarkImages(benchmark))
    results = evaluate_network(inference, images, settings, inference.settings.device)
    counted = sum(parameter.numel() for parameter in opened.net.parameters()) or None
    rows = {(name, counted): [(result.image, result.values) for result in results]}
    if with_baseline:
        rows = {(baseline_name(benchmark.scale), None): [(one.image, one.baseline) for one in results]} | rows
    found = []
    for (network, parameters), of_images in rows.items():
        values = [
            Value(network, benchmark.scale, parameters, benchmark.name, image, metric, value)
            for image, of_image in of_images
            for metric, value in of_image.items()
        ]
        means = pd.DataFrame(values).groupby("metric", sort=False)["value"].mean()
        found += values
        found += [values[0]._replace(image="", metric=str(key), value=mean) for key, mean in means.items()]
    return found


def table(values: Sequence[Value], sets: Sequence[str]) -> pd.DataFrame:
    """The means as text: a row per network, a column per set."""
    means = [value for value in values if not value.image]
    metrics = list(dict.fromkeys(value.metric for value in means))
    rows: dict[tuple[str, int, str], dict[str, Any]] = {}
    for value in means:
        row = rows.setdefault((value.network, value.scale, value.source), {"parameters": value.parameters})
        row[f"{value.set} {value.metric}"] = f"{value.value:.{_DIGITS.get(value.metric, 4)}f}"
    shown = pd.DataFrame(
        [
            [
                network,
                f"×{scale}",
                "–" if row["parameters"] is None else f"{row['parameters']:,}",
                *(" / ".join(row.get(f"{name} {metric}", "–") for metric in metrics) for name in sets),
                source,
            ]
            for (network, scale, source), row in rows.items()
        ],
        columns=["network", "scale", "parameters", *sets, "source"],
    ).set_index("network")
    shown.index.name = " / ".join(metric.upper() for metric in metrics)
    return shown if any(shown["source"]) else shown.drop(columns="source")


def written(values: Sequence[Value], sets: Sequence[str], format: str) -> str:
    """The means in a format; CSV and JSON have a row per network, set and metric, in full precision."""
    if format in ("text", "markdown"):
        shown = table(values, sets)
        return as_text(shown, below=0) + "\n" if format == "text" else as_markdown(shown)
    means = pd.DataFrame([value for value in values if not value.image]).drop(columns="image")
    means["parameters"] = means["parameters"].astype("Int64")
    if format == "csv":
        return means.to_csv(index=False)
    return json.dumps(json.loads(means.to_json(orient="records")), indent=1, ensure_ascii=False) + "\n"


def save(file: Path, text: str) -> None:
    atomic_write(file, lambda opened: opened.write(text.encode()))


def evaluate(
    weights: Annotated[list[Path], typer.Argument(metavar="WEIGHTS...", help="Checkpoints or .onnx files.")],
    sets: Annotated[list[str], typer.Option(help="Set5 Set14 ...: known sets, or folders below --data.")],
    data: Annotated[Path, typer.Option(metavar="ROOT", help="Folder of the data sets.")] = Path("datasets"),
    opt: Annotated[
        Path | None,
        typer.Option("-opt", "--opt", help="Option file with the network, if a checkpoint lacks it."),
    ] = None,
    metrics: Annotated[
        list[str] | None, typer.Option(help="Further metrics of the package pyiqa: lpips niqe ...")
    ] = None,
    rgb: Annotated[
        bool | None,
        typer.Option("--rgb/--y", help="Measure colours, or the luminance. Default: as papers do."),
    ] = None,
    with_published: Annotated[
        bool, typer.Option("--published", help="Published numbers of these sets, with their sources.")
    ] = False,
    baseline: Annotated[bool, typer.Option(help="Bicubic interpolation, or the input, as a row.")] = True,
    tile: Annotated[
        int | None,
        typer.Option(
            min=0, help="Side of the tiles in input pixels; 0: whole images. Default: by the free memory."
        ),
    ] = None,
    self_ensemble: Annotated[bool, typer.Option("--self-ensemble", help="Average eight views.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. Default: a GPU where there is one.")
    ] = None,
    precision: Annotated[
        Word, typer.Option(help="auto: bf16 where the device computes in it.")
    ] = Word.float32,
    format: Annotated[TableFormat, typer.Option(help="Of the table that is printed.")] = TableFormat.text,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Also write the table: .txt, .md, .csv or .json.")
    ] = None,
    per_image: Annotated[Path | None, typer.Option(help="CSV file for the values of each image.")] = None,
) -> None:
    """Measure networks on benchmarks: PSNR and SSIM per set, as papers do."""
    if out is not None and out.suffix not in _FORMAT_OF:
        raise OptionError(f"-o {out}: give a file that ends in {', '.join(_FORMAT_OF)}")
    settings = Settings(device_of(device), precision, tile, self_ensemble)
    further = quality_metrics(metrics or (), settings.device)
    networks = dict(
        zip(names_of(weights), [open_network(file, opt, settings.device) for file in weights], strict=True)
    )
    scales = sorted({opened.scale for opened in networks.values()})
    benchmarks, problems = {}, []
    for scale in scales:
        for name in sets:
            try:
                benchmarks[scale, name] = find_benchmark(name, data, scale, rgb)
            except OptionError as error:
                problems += error.problems
    if problems:
        raise OptionError(problems)
    machine_readable = format in (TableFormat.csv, TableFormat.json)
    for text in (
        *(f"{name}: {one.source}" for name, one in networks.items()),
        *map(str, benchmarks.values()),
    ):
        typer.echo(text, err=machine_readable)
    values: list[Value] = []
    with tqdm(total=len(networks) * len(sets), unit="set", disable=None) as bar:
        measured = set()
        for name, opened in networks.items():
            inference = Inference(opened, settings)
            for one in sets:
                first = baseline and (opened.scale, one) not in measured
                bar.set_description(f"{name}, {one}")
                values += measure(name, opened, inference, benchmarks[opened.scale, one], further, first)
                measured.add((opened.scale, one))
                bar.update()
    for row in published(sets, scales) if with_published else ():
        values += [
            Value(row.network, row.scale, None, name, "", metric, number, row.source)
            for name, numbers in row.values.items()
            for metric, number in zip(("psnr", "ssim"), numbers, strict=False)
        ]
    values.sort(
        key=lambda value: (value.scale, bool(value.source), value.network != baseline_name(value.scale))
    )
    if per_image is not None:
        rows = pd.DataFrame([value for value in values if value.image]).drop(columns=["source", "parameters"])
        wide = rows.pivot(index=["network", "scale", "set", "image"], columns="metric", values="value")
        save(per_image, wide.to_csv())
    if out is not None:
        save(out, written(values, sets, _FORMAT_OF[out.suffix]))
    typer.echo(written(values, sets, format), nl=False)
