"""A shard folder behind a URL (s3://, gs://, https://, ... whatever fsspec knows), mirrored file by file as it is needed.

    mirror = Mirror.open("https://example.org/shards", "~/.cache/heartspeed", 50)
    path = mirror.fetch("train-000017.tar", size, sha256)      # downloaded by the first of a node's processes that asks

The mirror is `CACHE/<16 hex digits of the url and index.json>`, so a remote folder that changed is another mirror and never served from old bytes.
A file has its name in the mirror only after size and sha256 were found right. Of the whole cache, the tars used longest ago are deleted when it grows
beyond its limit; it should hold all shards of a run, as a random order over more than that downloads a shard for nearly every sample.
"""

import contextlib
import errno
import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
from filelock import FileLock

from toolkit.errors import UserError, first_line
from toolkit.files import whole_file
from toolkit.shards.writer import sha256_of

CACHE, CACHE_GB = "~/.cache/heartspeed", 50.0


def is_url(folder: str | Path) -> bool:
    return isinstance(folder, str) and "://" in folder


@dataclass(frozen=True)
class Mirror:
    """`folder` has index.json from the start, other files after `fetch`."""

    url: str
    folder: Path
    limit: int  # bytes of tars in the whole cache; while several processes download, at most a shard each more
    flag: str

    @classmethod
    def open(cls, url: str, cache: str | Path = CACHE, gigabytes: float = CACHE_GB, flag: str = "--shards") -> "Mirror":
        """Fetch index.json, always anew. Raises UserError naming `flag`, or --shard_cache if that cannot be written."""
        url = url.rstrip("/")
        if urlsplit(url).password or "?" in url or (urlsplit(url).username and url.startswith("http")):  # it would be written to logs and arguments.json
            raise UserError(f"{flag}: a password or signature in the address; put it into the configuration of its protocol instead (fsspec, aws, gcloud)")
        try:
            fs, root = fsspec.core.url_to_fs(url)
            index = fs.cat_file(f"{root}/index.json")
        except Exception as error:  # every protocol has its own errors, and a protocol without its package an ImportError or ValueError
            what = f"{type(error).__name__}: {first_line(error)}"
            raise UserError(f"{flag}: {url}/index.json cannot be read ({what}); check the address, or install what it lacks") from error
        folder = Path(cache).expanduser().absolute() / hashlib.sha256(url.encode() + b"\n" + index).hexdigest()[:16]
        try:
            (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
            with whole_file(folder / "index.json") as file:
                file.write(index)
        except OSError as error:
            raise UserError(f"--shard_cache: {cache} cannot be written ({error.strerror}); name another folder") from error
        return cls(url, folder, int(gigabytes * 1e9), flag)

    def fetch(self, name: str, size: int | None, sha256: str, recheck: bool = False) -> Path:
        """The local path of a file of the folder, downloaded if it is not there; size None: not known.

        recheck: compute the sha256 of a file that is there as well, and download it anew if it is wrong.
        Raises UserError if it cannot be had with this size and sha256 at the second try.
        """
        path = self.folder / name
        if not recheck and path.is_file():
            with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                os.utime(path)  # used now, as eviction sees it
                return path
        with FileLock(path.with_name(f".{path.name}.lock")):
            if path.is_file():  # another process was faster
                if not recheck or sha256_of(path) == sha256:
                    os.utime(path)
                    return path
                path.unlink()
            for left in path.parent.glob(f".{path.name}.*.partial"):  # by a killed process: we hold the lock
                left.unlink()
            fault = self._download(name, path, size, sha256) and self._download(name, path, size, sha256)
            if fault:
                raise UserError(f"{self.flag}: {self.url}/{name} {fault}, twice; upload it again from the folder it was made in")
        return path

    def _download(self, name: str, path: Path, size: int | None, sha256: str) -> str:
        """'' and the file at `path`, or what was wrong with it."""
        self._make_room(size or 0)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        try:
            fs, root = fsspec.core.url_to_fs(self.url)
            fs.get_file(f"{root}/{name}", str(partial))
            if size not in (None, partial.stat().st_size):
                return f"has {partial.stat().st_size:,} bytes, not {size:,}"
            if sha256_of(partial) != sha256:
                return "has another sha256 than index.json says"
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
            return ""
        except Exception as error:  # as in `open`
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise UserError(f"--shard_cache: {path} cannot be written ({error.strerror}); name another folder or a smaller --shard_cache_gb") from error
            return f"cannot be read ({type(error).__name__}: {first_line(error)})"
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Delete the tars used longest ago until `size` bytes more are within the limit, or none is left."""
        cache = self.folder.parent
        with FileLock(cache / ".evict.lock"):
            tars = []
            for path in cache.glob("*/*.tar"):
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    tars.append((stat.st_mtime_ns, stat.st_size, path))
            held = sum(bytes_ for _, bytes_, _ in tars)
            for _, bytes_, path in sorted(tars):
                if held + size <= self.limit:
                    break
                path.unlink(missing_ok=True)
                held -= bytes_
