"""Downloads from a local server: whole, resumed, cut short, damaged, too large; and archives that mean harm."""

import bz2
import gzip
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import datasets
from benchmarks.__main__ import main
from benchmarks.datasets import DataSet
from benchmarks.download import DownloadError, Remote, download, members, unpacked

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` with ranges, and cuts the first answers short: `cuts` has how many bytes each may send."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {"file.bin": CONTENT}
        self.cuts: list[int] = []
        self.ranges: list[str | None] = []
        self.knows_ranges = True
        self.tells_length = True

    def remote(self, name: str = "file.bin", checksum: str = SHA256, max_bytes: int = 400_000) -> Remote:
        """The file as a remote."""
        return Remote(f"http://127.0.0.1:{self.server_address[1]}/{name}", max_bytes, checksum)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        content = self.server.files.get(self.path[1:])
        if content is None:
            self.send_error(404)
            return
        begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.knows_ranges else 0
        if begin >= len(content) and asked:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        if self.server.tells_length:
            self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        allowed = self.server.cuts.pop(0) if self.server.cuts else len(content)
        self.wfile.write(content[begin : begin + allowed])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_a_whole_file_comes_once(server: Server, tmp_path: Path) -> None:
    path = download(server.remote(), tmp_path / "new")
    assert path.read_bytes() == CONTENT
    assert download(server.remote(), tmp_path / "new") == path
    assert server.ranges == [None]
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["file.bin"]


def test_what_was_cut_short_goes_on_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000, 50_000]
    path = download(server.remote(), tmp_path, pause=0)
    assert path.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.cuts, server.knows_ranges = [100_000], False
    assert download(server.remote(), tmp_path, pause=0).read_bytes() == CONTENT


def test_a_later_run_goes_on(server: Server, tmp_path: Path) -> None:
    server.cuts = [1_000, 2_000]
    with pytest.raises(DownloadError, match=r"ended after 3,000 of 300,000 bytes.*again to go on"):
        download(server.remote(), tmp_path, attempts=2, pause=0)
    assert not (tmp_path / "file.bin").exists()
    assert download(server.remote(), tmp_path).read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=3000-"


def test_a_wrong_checksum_is_refused_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.files["file.bin"] = CONTENT[:-1] + b"x"
    with pytest.raises(DownloadError, match=f"expected sha256 {SHA256[7:]}; got"):
        download(server.remote(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stale_part_is_replaced(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"of an older version")
    assert download(server.remote(), tmp_path, pause=0).read_bytes() == CONTENT
    (tmp_path / "file.bin").unlink()
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"longer than the file")
    assert download(server.remote(), tmp_path, pause=0).read_bytes() == CONTENT


def test_a_part_that_is_already_whole_is_kept(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert download(server.remote(), tmp_path).read_bytes() == CONTENT


def test_a_damaged_file_in_the_cache_is_taken_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"damaged")
    with pytest.raises(DownloadError, match="taken away"):
        download(server.remote(), tmp_path)
    assert download(server.remote(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("tells_length", [True, False])
def test_no_more_bytes_than_allowed(server: Server, tmp_path: Path, tells_length: bool) -> None:
    server.tells_length = tells_length
    with pytest.raises(DownloadError, match="at most 250,000 bytes"):
        download(server.remote(max_bytes=250_000), tmp_path)
    assert not (tmp_path / "file.bin").exists()


def test_what_is_not_there_and_other_schemes_are_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="404"):
        download(server.remote("absent"), tmp_path)
    assert len(server.ranges) == 1  # no second try
    with pytest.raises(DownloadError, match="http or https"):
        download(Remote(f"file://{tmp_path}/x", 1), tmp_path)


def _zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_archives_are_read_without_being_unpacked(tmp_path: Path) -> None:
    files = {"b/2.txt": b"two", "a/1.txt": b"one", "../../escape.txt": b"out", "a/3.png": b"three"}
    found = list(members(_zip(tmp_path / "a.zip", files), ".txt", 100))
    assert found == [("../../escape.txt", b"out"), ("a/1.txt", b"one"), ("b/2.txt", b"two")]
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("a/passwd.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("b.txt"))
    assert list(members(tmp_path / "a.tar.gz", ".txt", 100)) == [("b.txt", b"")]
    assert {file.name for file in tmp_path.iterdir()} == {"a.zip", "a.tar.gz"}


def test_bombs_and_damage_are_refused(tmp_path: Path) -> None:
    bomb = _zip(tmp_path / "bomb.zip", {"x.txt": bytes(1_000_000)})
    with pytest.raises(DownloadError, match="at most 1,000 bytes unpacked; it claims 1,000,000"):
        list(members(bomb, ".txt", 1_000))
    whole = _zip(tmp_path / "whole.zip", {"x.txt": CONTENT[:5_000]}).read_bytes()
    (tmp_path / "damaged.zip").write_bytes(whole[:1_000] + bytes(100) + whole[1_100:])
    with pytest.raises(DownloadError, match="damaged"):
        list(members(tmp_path / "damaged.zip", ".txt", 10_000))
    for pack in (gzip.compress, bz2.compress):
        (tmp_path / "x").write_bytes(pack(bytes(1_000_000)))
        with pytest.raises(DownloadError, match="at most 1,000"):
            unpacked(tmp_path / "x", 1_000)
        (tmp_path / "x").write_bytes(pack(CONTENT)[:-1_000])
        with pytest.raises(DownloadError, match="damaged"):
            unpacked(tmp_path / "x", 400_000)


def _idx(array: Any) -> bytes:
    header = np.array([2048 + array.ndim, *array.shape], ">i4").tobytes()
    return gzip.compress(header + array.tobytes())


def test_mnist_from_its_format(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(256, size=shape).astype(np.uint8) for shape in ((7, 28, 28), (7,), (3, 28, 28), (3,))]
    paths = [tmp_path / str(k) for k in range(4)]
    for path, array in zip(paths, arrays, strict=True):
        path.write_bytes(_idx(array))
    built = datasets._mnist(paths)
    for key, array in zip(("x_train", "y_train", "x_test", "y_test"), arrays, strict=True):
        np.testing.assert_array_equal(built[key], array)


def test_libsvm_lines(tmp_path: Path) -> None:
    (tmp_path / "a.bz2").write_bytes(bz2.compress(b"-1 1:0.5 22:-2\n1 3:1e-3\n"))
    x, y = datasets._libsvm(22, tmp_path / "a.bz2", 1_000)
    assert y.tolist() == [0, 1] and x.shape == (2, 22)
    np.testing.assert_array_equal(x[[0, 0, 1], [0, 21, 2]], np.float32([0.5, -2, 1e-3]))
    assert np.count_nonzero(x) == 3


def test_omniglot_from_its_drawings(tmp_path: Path) -> None:
    from PIL import Image

    raw = io.BytesIO()
    drawing = np.full((105, 105), 255, np.uint8)
    drawing[:, :52] = 0  # ink on the left half
    Image.fromarray(drawing).convert("1").save(raw, "PNG")
    files = {f"images/Greek/character0{c}/{d:02}.png": raw.getvalue() for c in (2, 1) for d in range(2)}
    paths = [
        _zip(tmp_path / f"{k}.zip", {n.replace("Greek", f"Greek{k}"): f for n, f in files.items()}) for k in (0, 1)
    ]
    built = datasets._omniglot(paths)
    assert built["images"].shape == (4, 2, 28, 28)
    assert built["char_split"].tolist() == built["char_alphabet"].tolist() == [0, 0, 1, 1]
    assert built["char_names"][0] == b"Greek0/character01"
    np.testing.assert_array_equal(built["images"][..., :12], 255)
    np.testing.assert_array_equal(built["images"][..., 16:], 0)


def test_cifar_is_balanced_and_its_pickles_can_do_nothing(tmp_path: Path) -> None:
    def tar(batches: dict[str, bytes]) -> Path:
        with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
            for name, raw in batches.items():
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(raw)
                archive.addfile(info, io.BytesIO(raw))
        return tmp_path / "c.tar.gz"

    rng = np.random.default_rng(0)
    batches = {}
    for name in (*[f"data_batch_{k}" for k in range(1, 6)], "test_batch"):
        content = {"data": rng.integers(256, size=(40, 3072)).astype(np.uint8), "labels": list(range(10)) * 4}
        batches[name] = pickle.dumps(content, protocol=2)
    built = datasets._cifar10([tar(batches)])
    assert built["x_train"].shape == (200, 32, 32, 3) and built["i_test"].tolist() == list(range(40))
    first = pickle.loads(batches["data_batch_1"])["data"][0]
    np.testing.assert_array_equal(
        built["x_train"][0, 0, 1], first[[1, 1025, 2049]]
    )  # row 0, column 1: red, green, blue
    with pytest.raises(DownloadError, match=r"asks for builtins\.print|asks for __builtin__\.print"):
        datasets._cifar10([tar(batches | {"data_batch_1": pickle.dumps(print, protocol=2)})])


def test_a_set_is_made_once_and_checked(server: Server, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    server.files["numbers"] = bytes(range(6))

    def build(paths: Any) -> Any:
        return {"y_train": np.frombuffer(paths[0].read_bytes(), np.uint8) % 2}

    remote = server.remote("numbers", "", 10)
    monkeypatch.setitem(datasets.SETS, "mnist", DataSet("n.npz", [remote], build, {"y_train": (6,)}, (3, 3)))
    monkeypatch.setenv(datasets.CACHE_VARIABLE, str(tmp_path))
    for _ in range(2):
        assert main(["data", "mnist"]) == 0
        assert capsys.readouterr().out.strip() == str(tmp_path / "n.npz")
    assert len(server.ranges) == 1
    for shapes, counts, message in (({"y_train": (7,)}, (3, 3), "shape"), ({"y_train": (6,)}, (2, 4), "examples")):
        monkeypatch.setitem(datasets.SETS, "mnist", DataSet("m.npz", [remote], build, shapes, counts))
        assert main(["data", "mnist"]) == 2
        assert f"mnist: expected {'y_train of shape (7,)' if message == 'shape' else '[2, 4] examples'}" in (
            capsys.readouterr().err
        )
    assert not (tmp_path / "m.npz").exists()


def test_the_folder_here_has_what_is_expected(monkeypatch: Any) -> None:
    from benchmarks.data import DataMissingError, find_file

    for name, data_set in datasets.SETS.items():
        try:
            path = find_file(data_set.file, None, "")
        except DataMissingError:
            pytest.skip(f"{data_set.file} is not there: set CONTRASTIVE_META_DATA")
        with np.load(path) as arrays:
            datasets.check(name, dict(arrays))
