"""Fetch files from addresses once, unpack archives safely, and find the releases of published corpora."""

import gzip
import hashlib
import logging
import os
import re
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from types import SimpleNamespace

import pooch
import requests
from filelock import FileLock

from cli import InputError, short
from corpora import MOST_GROWTH
from releases import RELEASES, Release, find_release

LARGEST_DOWNLOAD = 64 << 30  # bytes
MOST_MEMBERS = 1_000  # of an archive; a run folder has a dozen
logger = logging.getLogger(__name__)


def download(address: str) -> Path:
    """Fetch ``address`` once into the user's cache folder, with a progress bar, and return the file's path.

    The file is checked against ``#sha256=…`` at the address's end if that is there, else against the MD5 that S3
    publishes as the entity tag, and always against the announced length.
    Raises `InputError` when the address cannot be reached, what came is not what was announced, or it is larger than
    `LARGEST_DOWNLOAD`.
    """
    url, _, fragment = address.partition("#")
    place = _cache_path(url)
    folder, name = place.parent, place.name
    try:
        checksum = fragment.replace("=", ":", 1) or None
        if checksum is None and not place.exists():
            checksum = _published_md5(url)
        pooch.get_logger().setLevel(logging.WARNING)
        fetch = _BoundedDownloader(progressbar=True, timeout=30)
        return Path(pooch.retrieve(url, checksum, fname=name, path=folder, downloader=fetch))
    except requests.RequestException as error:
        raise InputError(f"{url}: cannot be downloaded ({short(str(error))}); check the network, or fetch the file by "
                         "another way and name it with --dataset_path or --model_checkpoint") from None
    except ValueError as error:  # pooch: the hash differs
        raise InputError(f"{url}: {short(str(error))}; try again, or check the address's #sha256=") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); "
                         "set TRANSFERTRANSFO_CACHE to a folder that can") from None


def is_downloaded(address: str) -> bool:
    """Whether `download` would find the address in the cache."""
    return _cache_path(address.partition("#")[0]).exists()


def _cache_path(url: str) -> Path:
    """Where the download of an address is kept."""
    folder = Path(os.environ.get("TRANSFERTRANSFO_CACHE") or pooch.os_cache("transfertransfo"))
    return folder / f"{hashlib.sha256(url.encode('utf-8', 'replace')).hexdigest()[:16]}-{Path(url).name[-80:]}"


class _BoundedDownloader(pooch.HTTPDownloader):
    """pooch's, given up when more comes than there is use for: a server may send without end."""

    def __call__(self, url, output_file, pooch, check_only=False):
        with open(output_file, "wb") as file:
            write = file.write

            def bounded_write(chunk: bytes) -> None:
                write(chunk)
                if file.tell() > LARGEST_DOWNLOAD:
                    raise requests.RequestException(f"more than {LARGEST_DOWNLOAD:,} bytes came")

            return super().__call__(url, SimpleNamespace(write=bounded_write, flush=lambda: None), pooch)


def _published_md5(url: str) -> str | None:
    """``md5:…`` as S3 publishes it in the entity tag of an object uploaded in one part, else None."""
    response = requests.head(url, timeout=30, allow_redirects=True)
    response.raise_for_status()
    tag = response.headers.get("ETag", "").strip('"')
    from_s3 = response.headers.get("Server") == "AmazonS3"
    return f"md5:{tag}" if from_s3 and re.fullmatch("[0-9a-f]{32}", tag) else None


def http_status(url: str, within: float) -> int | None:
    """The HTTP status that a server gives ``url`` within so many seconds; None when it does not answer. Looking up a
    host's name has no time limit of its own, hence the thread."""
    found = Queue()

    def ask() -> None:
        try:
            found.put(requests.head(url, timeout=within, allow_redirects=True).status_code)
        except requests.RequestException:
            found.put(None)

    Thread(target=ask, daemon=True).start()
    try:
        return found.get(timeout=within)
    except Empty:
        return None


def unpack(archive: Path) -> Path:
    """Unpack a tar or zip file, and zip files within, beside itself, once; returns the folder."""
    folder = archive.with_name(archive.name + ".unpacked")
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=archive.parent) as unfinished:
                try:
                    _unpack_into(Path(unfinished, "out"), archive)
                except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, ValueError, RuntimeError,
                        OSError) as error:
                    raise InputError(f"{archive}: not a usable .tar.gz or .zip ({short(str(error))}); "
                                     "delete it and try again") from None
                os.rename(f"{unfinished}/out", folder)
    return folder


class _SmallReads(gzip.GzipFile):
    """A gzipped tar file as tarfile reads it: in small pieces, unless a header announces a name of gigabytes."""

    LARGEST = 16 << 10

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.LARGEST:
            raise tarfile.ReadError("a header of unlikely size")
        return super().read(size)


def _unpack_into(folder: Path, archive: Path, nested: bool = True) -> None:
    """Unpack a ``.tar.gz``, or a ``.zip`` and, if ``nested``, those within, as DailyDialog's.

    Raises ``TarError`` when it holds what no run folder or corpus does, or more.
    """
    folder.mkdir()
    budget = max(100 << 20, MOST_GROWTH * archive.stat().st_size)
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            if sum(member.file_size for member in zipped.infolist()) > budget or len(zipped.infolist()) > MOST_MEMBERS:
                raise tarfile.TarError(f"it holds more than {MOST_MEMBERS:,} files or {MOST_GROWTH} times its size")
            zipped.extractall(folder)  # what lies outside by its name lands inside; links come as files
        for inner in sorted(folder.rglob("*.zip")) if nested else []:
            _unpack_into(inner.with_name(f"{inner.name}.unpacked"), inner, nested=False)
        return
    with _SmallReads(archive) as file, tarfile.open(  # type: ignore[call-overload]  # copybufsize is not in its types
            fileobj=file, mode="r:", copybufsize=file.LARGEST) as tar:
        for number, member in enumerate(tar):
            budget -= member.size
            if budget < 0:
                raise tarfile.TarError(f"it unpacks to more than {MOST_GROWTH} times its size")
            if number == MOST_MEMBERS:
                raise tarfile.TarError(f"it holds more than {MOST_MEMBERS:,} files")
            if not (member.isreg() or member.isdir()):  # without links, no name leads elsewhere than it says
                raise tarfile.TarError(f"{member.name} is neither a file nor a folder")
            tar.extract(member, folder, filter="data")  # refuses names that lie outside


def find_corpus(name: str, data_dir: str) -> tuple[Release, dict[str, list[Path]]]:
    """A published corpus, as `find_release` finds it: under ``data_dir``, its archive there, or else downloaded.

    Raises `InputError` when it is nowhere.
    """
    known = RELEASES[name]
    places = [Path(data_dir, folder) for folder in dict.fromkeys(one for release in known for one in release.folders)]
    archives = [folder / Path(release.address).name for release in known for folder in (Path(data_dir), *places)]
    for folder in places:
        if found := find_release(name, folder):
            return found
    for archive in filter(Path.is_file, archives):
        if found := find_release(name, unpack(archive)):
            return found
    address, files = known[0].address, {split: names.split() for split, names in known[0].files.items()}
    logger.info("%s is not in %s: fetching %s", name, places[0], address)
    try:
        if "{}" in address:
            return known[0], {split: [download(address.format(file)) for file in of_split]
                              for split, of_split in files.items()}
        file = download(address)
    except InputError as error:
        reason = str(error).partition(";")[0]
        raise InputError(f"--dataset {name}: is not in {places[0]}, and {reason}; put the release's files or its "
                         "archive there, or name the folder above it with --data_dir") from None
    if "" in known[0].files:
        return known[0], {"": [file]}
    if found := find_release(name, unpack(file)):
        return found
    raise InputError(f"{file}: has none of {', '.join(known[0].files.values())}; put the release into {places[0]}")
