"""Download files once, unpack archives safely, and find the releases of published corpora."""

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
MOST_MEMBERS = 1_000  # files in an archive; a run folder has a dozen
logger = logging.getLogger(__name__)


def download(address: str) -> Path:
    """Download ``address`` into the user's cache folder, unless it is there already, and return the file's path.

    The length must be the announced one. The hash is checked if the address ends with ``#sha256=…``; otherwise the MD5
    hash is, if the server is Amazon's S3, which sends it as the entity tag.
    Raises `InputError` when the address cannot be reached, when length or hash differ, or when the file is larger than
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
        raise InputError(f"{url}: {short(str(error))}; try again, or check #sha256=… in the address") from None
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); "
                         "set TRANSFERTRANSFO_CACHE to a folder that you may write") from None


def is_downloaded(address: str) -> bool:
    """Return whether the file at an address is in the cache already."""
    return _cache_path(address.partition("#")[0]).exists()


def _cache_path(url: str) -> Path:
    """Return the path in the cache for an address."""
    folder = Path(os.environ.get("TRANSFERTRANSFO_CACHE") or pooch.os_cache("transfertransfo"))
    return folder / f"{hashlib.sha256(url.encode('utf-8', 'replace')).hexdigest()[:16]}-{Path(url).name[-80:]}"


class _BoundedDownloader(pooch.HTTPDownloader):
    """pooch's downloader, stopped after `LARGEST_DOWNLOAD` bytes, because a server may send without end."""

    def __call__(self, url, output_file, pooch, check_only=False):
        with open(output_file, "wb") as file:
            write = file.write

            def bounded_write(chunk: bytes) -> None:
                write(chunk)
                if file.tell() > LARGEST_DOWNLOAD:
                    raise requests.RequestException(f"more than {LARGEST_DOWNLOAD:,} bytes came")

            return super().__call__(url, SimpleNamespace(write=bounded_write, flush=lambda: None), pooch)


def _published_md5(url: str) -> str | None:
    """Return the MD5 hash of an object in S3, ``md5:…``, if its entity tag is one (it was uploaded whole), or None."""
    response = requests.head(url, timeout=30, allow_redirects=True)
    response.raise_for_status()
    tag = response.headers.get("ETag", "").strip('"')
    from_s3 = response.headers.get("Server") == "AmazonS3"
    return f"md5:{tag}" if from_s3 and re.fullmatch("[0-9a-f]{32}", tag) else None


def http_status(url: str, within: float) -> int | None:
    """Return the HTTP status that a server gives for ``url``, or None if it does not answer within ``within`` seconds.

    A thread asks, because looking up a host's name has no time limit.
    """
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
    """Unpack a tar or zip file beside itself, unless that has been done, and return the folder.

    Zip files in a zip file are unpacked as well. Raises `InputError` for a damaged or hostile archive.
    """
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
    """A gzipped tar file that refuses large reads, because a hostile header may announce a name of gigabytes."""

    LARGEST = 16 << 10

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.LARGEST:
            raise tarfile.ReadError("a header of unlikely size")
        return super().read(size)


def _unpack_into(folder: Path, archive: Path, nested: bool = True) -> None:
    """Unpack a ``.tar.gz`` or a ``.zip`` into a new folder; with ``nested`` also zip files within, as in DailyDialog.

    Raises ``TarError`` for links and devices, for names outside the folder, and beyond the limits on number and size.
    """
    folder.mkdir()
    budget = max(100 << 20, MOST_GROWTH * archive.stat().st_size)
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            if sum(member.file_size for member in zipped.infolist()) > budget or len(zipped.infolist()) > MOST_MEMBERS:
                raise tarfile.TarError(f"it holds more than {MOST_MEMBERS:,} files or {MOST_GROWTH} times its size")
            zipped.extractall(folder)  # keeps names such as ../x inside the folder, and writes links as files
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
            if not (member.isreg() or member.isdir()):  # a link could lead out of the folder
                raise tarfile.TarError(f"{member.name} is neither a file nor a folder")
            tar.extract(member, folder, filter="data")  # which refuses names outside the folder


def find_corpus(name: str, data_dir: str) -> tuple[Release, dict[str, list[Path]]]:
    """Find a published corpus under ``data_dir``, unpacked or as an archive, or download it.

    Returns its release and its files by split, as `find_release`. Raises `InputError` when it can neither be found nor
    downloaded.
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
