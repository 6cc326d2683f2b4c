"""Downloads that can be trusted: a size limit, a checksum, resume, retries, and archives read without unpacking."""

import bz2
import contextlib
import gzip
import hashlib
import http.client
import io
import os
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

_CHUNK = 1 << 16
_TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 5
_PAUSE = 1.0  # seconds before the second attempt, doubled before each further one


class DownloadError(RuntimeError):
    """A file could not be had, or is not what it should be; the message says what was expected and what came."""


class Remote(NamedTuple):
    """A file of a data set's public home.

    Attributes:
      url: http or https.
      max_bytes: no more are read.
      checksum: `algorithm:hexadecimal digits` as its publisher gives it; "" where none is published.
    """

    url: str
    max_bytes: int
    checksum: str = ""

    @property
    def name(self) -> str:
        """The file's name in the cache."""
        return self.url.rsplit("/", 1)[-1]


def download(remote: Remote, folder: Path, attempts: int = _ATTEMPTS, pause: float = _PAUSE) -> Path:
    """The file in `folder`, downloaded unless it is there; an interrupted download goes on where it ended.

    Args:
      remote: what to download.
      folder: made where it is missing.
      attempts: how often the connection may fail.
      pause: seconds before the second attempt.

    Returns:
      Its path. The file is there only if it is whole and has its checksum.

    Raises:
      DownloadError: no connection, too many bytes, too few of them, or another checksum.
    """
    if not remote.url.startswith(("http://", "https://")):
        raise DownloadError(f"expected an address of http or https; got {remote.url}.")
    target, part = folder / remote.name, folder / f"{remote.name}.part"
    if target.exists():
        _check(target, remote)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _bar(remote.name) as tell:
        for attempt in range(attempts):
            resumed = part.exists()
            try:
                _receive(remote, part, tell)
                _check(part, remote)
                break
            except _ChecksumError:
                # What is there may be of an older version of the file: once more from its beginning.
                if not resumed:
                    raise
            except (OSError, http.client.HTTPException, _TruncatedError) as error:
                if attempt == attempts - 1 or (isinstance(error, urllib.error.HTTPError) and error.code < 500):
                    raise DownloadError(f"{remote.url}: {error}. Run it again to go on from here.") from error
                time.sleep(pause * 2**attempt)
        else:
            raise DownloadError(f"{remote.url}: not whole after {attempts} attempts. Run it again to go on from here.")
    os.replace(part, target)
    return target


class _TruncatedError(RuntimeError):
    """The connection ended early."""


class _ChecksumError(DownloadError):
    """All bytes came, and not the right ones."""


def _receive(remote: Remote, part: Path, tell: Callable[[int, int | None], None]) -> None:
    """Append what is missing to `part`, or write all of it where the server cannot go on from the middle."""
    have = part.stat().st_size if part.exists() else 0
    # Without compression in transit, which would make ranges and lengths those of something else.
    headers = {"User-Agent": "contrastive_meta benchmarks", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        answer = urllib.request.urlopen(urllib.request.Request(remote.url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        total = error.headers.get("Content-Range", "").rpartition("/")[2]
        if total == str(have):
            return
        part.unlink()
        raise _TruncatedError(f"the {have:,} bytes that are here are not a part of the file") from error
    with answer:
        continued = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        if continued and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise _TruncatedError(f"asked for bytes from {have:,}, got {answer.headers.get('Content-Range')}")
        have = have if continued else 0
        length = answer.headers.get("Content-Length")
        total_bytes = None if length is None else have + int(length)
        if (total_bytes or 0) > remote.max_bytes:
            raise DownloadError(f"{remote.url}: expected at most {remote.max_bytes:,} bytes; it has {total_bytes:,}.")
        with part.open("ab" if continued else "wb") as file:
            while chunk := answer.read(_CHUNK):
                have += len(chunk)
                if have > remote.max_bytes:
                    raise DownloadError(f"{remote.url}: expected at most {remote.max_bytes:,} bytes; there are more.")
                file.write(chunk)
                tell(have, total_bytes)
    if total_bytes is not None and have < total_bytes:
        raise _TruncatedError(f"the connection ended after {have:,} of {total_bytes:,} bytes")


def _check(path: Path, remote: Remote) -> None:
    """Raise, and take the file away, where it has another checksum than its publisher says."""
    if not remote.checksum:
        return
    algorithm, _, expected = remote.checksum.partition(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected:
        path.unlink()
        raise _ChecksumError(
            f"{remote.url}: expected {algorithm} {expected}; got {found}. The file was taken away: download it again, "
            "and if that does not help, the set's home has another version of it."
        )


@contextlib.contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int | None], None]]:
    """Bytes so far, in a terminal with a bar, a speed and the time left; elsewhere a line."""
    if not sys.stderr.isatty():
        print(f"downloading {name}", file=sys.stderr, flush=True)
        yield lambda have, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(name, total=None)
        yield lambda have, total: progress.update(task, completed=have, total=total)


def members(path: Path, suffix: str, max_bytes: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the regular files of a zip or tar archive, in the order of their names.

    Nothing is written: a name such as `../x` or a link in the archive has nowhere to lead.

    Args:
      path: of the archive.
      suffix: of the names wanted.
      max_bytes: of all wanted contents together; an archive that claims or has more is refused.

    Raises:
      DownloadError: the archive is damaged, or too large.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                files = [(info.filename, info.file_size, info) for info in archive.infolist() if not info.is_dir()]
                yield from _bounded(path, files, suffix, max_bytes, archive.open)
            return
        with tarfile.open(path) as tar:
            kept = [(info.name, info.size, info) for info in tar if info.isfile()]
            yield from _bounded(path, kept, suffix, max_bytes, tar.extractfile)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DownloadError(f"{path.name} is damaged ({error}): delete {path} and download it again.") from error


def _bounded(
    path: Path, files: list[tuple[str, int, Any]], suffix: str, max_bytes: int, opened: Callable[[Any], Any]
) -> Iterator[tuple[str, bytes]]:
    wanted = sorted((file for file in files if file[0].endswith(suffix)), key=lambda file: file[0])
    claimed = sum(size for _, size, _ in wanted)
    if claimed > max_bytes:
        raise DownloadError(f"{path.name}: expected at most {max_bytes:,} bytes unpacked; it claims {claimed:,}.")
    for name, size, info in wanted:
        with opened(info) as file:
            yield name, _read(path, file, size)


def unpacked(path: Path, max_bytes: int) -> bytes:
    """The contents of a gzip or bzip2 file, or of a plain one.

    Raises:
      DownloadError: it is damaged, or unpacks to more than `max_bytes`.
    """
    with path.open("rb") as file:
        start = file.read(2)
    try:
        with path.open("rb") as raw:
            unpack: Any = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}.get(start)
            return _read(path, raw if unpack is None else unpack(raw), max_bytes)
    except (zlib.error, OSError, EOFError) as error:
        raise DownloadError(f"{path.name} is damaged ({error}): delete {path} and download it again.") from error


def _read(path: Path, file: IO[bytes], max_bytes: int) -> bytes:
    out = io.BytesIO()
    while chunk := file.read(_CHUNK):
        out.write(chunk)
        if out.tell() > max_bytes:
            raise DownloadError(f"{path.name}: expected at most {max_bytes:,} bytes unpacked; there are more.")
    return out.getvalue()
