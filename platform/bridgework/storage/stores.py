"""Remote stores by URL: requests with retries and one-line errors, and paths in them.

`connect` finds the file system of a URL. A request to a remote one is repeated after errors that
may pass, such as a timeout or HTTP 503, for at most $BRIDGEWORK_STORE_WAIT_S seconds. All other
errors become a ResourceError with the cause (credentials, bucket, region, endpoint or clock) and
its fix. A request that takes more than 10 s is logged. Listings are never cached, because other
nodes change them.
"""

import io
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, cast

import fsspec

from bridgework.errors import BridgeworkError, DataError, ResourceError, suggest
from bridgework.storage.node_cache import scratch_root, setting

LOCAL = frozenset({"file", "local"})
# Protocols in which an object appears complete or not at all, and folders do not exist.
OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "memory"})
SAY_EVERY_S = 10.0
REPLACED = 5  # times that a file is opened again, because it was replaced before its first read
WAIT_S = 120.0  # default of $BRIDGEWORK_STORE_WAIT_S
# Botocore's own retries would wait 25 minutes for a dead endpoint, without a message.
_TIMEOUTS = {
    "connect_timeout": 10,
    "read_timeout": 60,
    "max_pool_connections": 50,
    "retries": {"total_max_attempts": 1, "mode": "standard"},
}
_S3 = {"use_listings_cache": False, "config_kwargs": _TIMEOUTS}
_OPTIONS: dict[str, dict[str, Any]] = {
    **{protocol: {"use_listings_cache": False} for protocol in OBJECTS - {"memory"}},
    **{protocol: {} for protocol in ("hdfs", "sftp", "smb", "ssh", "webhdfs")},
    "s3": _S3,
    "s3a": _S3,
}
# fmt: off
_REQUESTS = frozenset({
    "cat", "cat_file", "cat_ranges", "copy", "cp_file", "created", "du", "find", "get", "get_file",
    "glob", "info", "ls", "makedirs", "mkdir", "modified", "pipe", "pipe_file", "put", "put_file",
    "rm", "rm_file", "size", "touch", "ukey",
})
# fmt: on
# Codes of S3, Google and Azure in the body of an answer, and names of the clients' exceptions.
_BUCKET = frozenset({"NoSuchBucket", "ContainerNotFound", "InvalidBucketName"})
_CLOCK = frozenset({"RequestTimeTooSkewed", "RequestExpired"})
_REGION = frozenset(
    {
        "AuthorizationHeaderMalformed",
        "PermanentRedirect",
        "IllegalLocationConstraintException",
        "301",
        "NoRegionError",
    }
)
_CREDENTIALS = frozenset(
    {
        "AccessDenied",
        "AllAccessDisabled",
        "AnonymousCredentials",
        "AuthenticationFailed",
        "AuthorizationFailure",
        "AuthorizationPermissionMismatch",
        "ClientAuthenticationError",
        "CredentialRetrievalError",
        "DefaultCredentialsError",
        "ExpiredToken",
        "Forbidden",
        "InvalidAccessKeyId",
        "InvalidToken",
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "RefreshError",
        "SignatureDoesNotMatch",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
        "401",
        "403",
    }
)
_PASSING = frozenset(
    {
        "ClientConnectionError",
        "ClientConnectorDNSError",
        "ClientConnectorError",
        "ClientOSError",
        "ClientPayloadError",
        "ConnectTimeoutError",
        "ConnectionClosedError",
        "ConnectionError",
        "ConnectionRefusedError",
        "ConnectionResetError",
        "EndpointConnectionError",
        "FSTimeoutError",
        "HTTPClientError",
        "IncompleteRead",
        "IncompleteReadError",
        "InternalError",
        "OperationAborted",
        "ReadTimeoutError",
        "RequestTimeout",
        "ResponseParserError",
        "ResponseStreamingError",
        "ServerBusy",
        "ServerDisconnectedError",
        "ServiceRequestError",
        "ServiceResponseError",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "TimeoutError",
        "TooManyRequests",
        "429",
        "500",
        "502",
        "503",
        "504",
    }
)
_ORDINARY = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


class _Access(NamedTuple):
    """Ways to give a cloud's client its credentials and its endpoint."""

    credentials: str
    endpoint: str


_AWS = _Access(
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role of the machine", "AWS_ENDPOINT_URL"
)
_GOOGLE = _Access(
    "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "STORAGE_EMULATOR_HOST",
)
_AZURE = _Access(
    "AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME with `az login`",
    "AZURE_STORAGE_CONNECTION_STRING",
)
_CLOUDS = {
    **dict.fromkeys(("s3", "s3a"), _AWS),
    **dict.fromkeys(("gs", "gcs"), _GOOGLE),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), _AZURE),
}
_OTHER = _Access("the login of its own client", "the host in the URL")
_seen: set[str] = set()  # buckets of Google that exist: its client does not name a missing one

log = logging.getLogger(__name__)
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # tracebacks of errors that it raises too


def access(url: str) -> _Access:
    """Return the ways to give the client of a URL its credentials and its endpoint."""
    return _CLOUDS.get(url.partition("://")[0], _OTHER)


def connect(url: str) -> tuple[Any, str]:
    """Return the file system of a path or URL and the path in it, without a request.

    Raises DataError for an unknown protocol, ResourceError for one whose package is not installed.
    """
    protocol = url.partition("://")[0] if "://" in url else "file"
    try:
        fs, path = fsspec.core.url_to_fs(url, **_options(protocol))
    except ValueError as error:
        if protocol in _OPTIONS:  # Azure's client needs an account before any request
            raise ResourceError(
                f"{url!r}: {str(error).rstrip('.!')}. Fix: set {access(url).credentials}"
            ) from None
        raise DataError(
            f"{url!r}: {error}{suggest(protocol, fsspec.available_protocols())}"
        ) from None
    except ImportError as error:
        raise ResourceError(f"{url!r} needs a package that is not installed: {error}") from None
    return (Store(fs) if protocol in _OPTIONS else fs), path


def _options(protocol: str) -> dict[str, Any]:
    """Return the options of a protocol, without those that the user's fsspec config sets."""
    own = fsspec.config.conf.get(protocol, {})
    return {k: v for k, v in _OPTIONS.get(protocol, {}).items() if k not in own}


class Store:
    """A remote fsspec file system whose requests are repeated, timed and explained.

    All other attributes are those of the file system `fs`.
    """

    def __init__(self, fs: Any) -> None:
        self.fs = fs

    def __getattr__(self, name: str) -> Any:
        if name == "fs":  # while it is unpickled
            raise AttributeError(name)
        value = getattr(self.fs, name)
        return partial(self._request, name, value) if name in _REQUESTS else value

    def _request(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        local_first = name in ("put", "put_file")
        where = self._name(args[1] if local_first else args[0] if args else "")
        return request(partial(call, *args, **kwargs), where, self._precise_code)

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Return True for a file or a folder. Raises ResourceError for a missing bucket."""
        return self._kind(path) is not None

    def isfile(self, path: str) -> bool:
        return self._kind(path) == "file"

    def isdir(self, path: str) -> bool:
        return self._kind(path) == "directory"

    def _kind(self, path: str) -> str | None:
        try:
            return cast(str, self.info(path)["type"])
        except (FileNotFoundError, NotADirectoryError):
            return None

    def mv(self, source: str, dest: str, recursive: bool = False, **kwargs: Any) -> None:
        """Rename; object stores copy and delete, and either step may be repeated."""
        if self.protocol_name not in OBJECTS:
            self._request("mv", self.fs.mv, source, dest, recursive=recursive, **kwargs)
            return
        self.copy(source, dest, recursive=recursive)
        with suppress(FileNotFoundError):  # an earlier attempt deleted it, and its answer was lost
            self.rm(source, recursive=recursive)

    move = rename = mv

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        """Open a file. One that is written is local until it is closed, and then uploaded."""
        text, mode = "b" not in mode, mode.replace("t", "").replace("b", "")
        if mode not in ("r", "w", "x"):
            raise ValueError(f"{self._name(path)}: files of a store cannot be opened for {mode!r}")
        encoding = {k: kwargs.pop(k) for k in ("encoding", "errors", "newline") if k in kwargs}
        if mode == "r":
            where = self._name(path)
            again = partial(self.fs.open, path, "rb", **kwargs)
            raw = request(again, where, self._precise_code)
            file: Any = io.BufferedReader(_Reading(raw, where, again), 1 << 20)
        else:
            file = _Writing(self, path, exclusive=mode == "x")
        return io.TextIOWrapper(file, **encoding) if text else file

    def create(self, path: str, data: bytes) -> None:
        """Write a new object. Raises FileExistsError if there is one already.

        Of several writers exactly one succeeds on stores with conditional writes: S3, Google
        Cloud Storage and Azure.
        """
        try:
            self.pipe_file(path, data, mode="create")
        except FileExistsError:
            # The answer to an earlier attempt may have been lost; contents are unique by a token.
            if self.cat_file(path) != data:
                raise

    @property
    def protocol_name(self) -> str:
        """Usual name of the protocol, the shortest one: s3, gs, az."""
        names = self.fs.protocol
        return cast(str, names if isinstance(names, str) else min(names, key=len))

    def _name(self, path: Any) -> str:
        first = path[0] if isinstance(path, list | tuple) and path else path
        return f"{self.protocol_name}://{str(first).lstrip('/')}"

    def _precise_code(self, where: str, error: Exception) -> str:
        """Ask the store for the cause of a refusal, which some answers do not have.

        S3's answers to HEAD requests have none. Google's client raises the same error for a missing
        object and a missing bucket.
        """
        bucket = where.partition("://")[2].partition("/")[0]
        if isinstance(error, FileNotFoundError):
            google = self.protocol_name == "gs" and bucket and bucket not in _seen
            return self._google_code(bucket) if google else ""
        if not hasattr(self.fs, "call_s3"):
            return ""
        try:
            self.fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
        except Exception as error:
            return next((c for c in _answered(error) if not c.isdecimal()), "")
        return ""

    def _google_code(self, bucket: str) -> str:
        """Return NoSuchBucket for a bucket that cannot be listed, because it does not exist."""
        try:
            self.fs.call("GET", f"b/{bucket}/o", maxResults=1, json_out=True)
        except FileNotFoundError:
            return "NoSuchBucket"
        except Exception:
            return ""  # the error of the request itself says more
        _seen.add(bucket)
        return ""

    def __reduce__(self) -> Any:
        return Store, (self.fs,)


class _Reading(io.RawIOBase):
    """A remote file that is read by ranges; every read is a request.

    One that is replaced between its opening and the first read, such as a growing journal, is
    opened again.
    """

    def __init__(self, file: Any, where: str, again: Callable[[], Any]) -> None:
        self._file, self._where, self._again = file, where, again
        self._began = False
        self.size = file.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        data = request(partial(self._read, len(buffer)), self._where)
        self._began = True
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> Any:
        for _ in range(REPLACED):
            try:
                return self._file.read(size)
            except OSError as error:
                if self._began or type(error).__name__ != "FileExpired":  # of s3fs
                    raise
                position = self._file.tell()
                self._file.close()
                self._file = self._again()
                self._file.seek(position)
                self.size = self._file.size
        return self._file.read(size)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class _Writing(io.BufferedRandom):
    """A local temporary file that is uploaded when it is closed, in parts if it is large."""

    def __init__(self, store: Store, path: str, *, exclusive: bool) -> None:
        self._store, self._path, self._exclusive = store, path, exclusive
        descriptor, self._local = tempfile.mkstemp(dir=scratch_root())
        super().__init__(io.FileIO(descriptor, "r+b"))

    def close(self) -> None:
        if self.closed:
            return
        try:
            super().close()
            if self._exclusive:
                self._store.create(self._path, Path(self._local).read_bytes())
            else:
                self._store.put_file(self._local, self._path)
        finally:
            with suppress(OSError):
                os.unlink(self._local)


# --- requests


def wait_s() -> float:
    """Return the seconds for which a failing request is repeated."""
    return setting("BRIDGEWORK_STORE_WAIT_S", WAIT_S)


def request(
    call: Callable[[], Any],
    where: str,
    precise: Callable[[str, Exception], str] = lambda where, error: "",
) -> Any:
    """Return `call()`, repeated after errors that may pass.

    precise: returns the code of a refusal without a cause. Raises the ordinary errors of files
    (FileNotFoundError ..), and ResourceError for all others.
    """
    import tenacity  # 0.1 s; a local home needs none of it

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=tenacity.wait_random_exponential(0.2, max=10),
        stop=tenacity.stop_after_delay(wait_s()),
        reraise=True,
    )
    with _watched(where):
        try:
            return retrying(call)
        except BridgeworkError:
            raise
        except Exception as error:
            raise explained(error, where, precise) from error


def may_pass(error: BaseException) -> bool:
    """Return True for an error after which the same request may succeed."""
    if isinstance(error, BridgeworkError) or _named(error, _BUCKET | _CREDENTIALS | _REGION):
        return False
    return _named(error, _PASSING) or isinstance(error, ConnectionError | TimeoutError)


def is_of_a_client(error: BaseException) -> bool:
    """Return True for an exception of a store's client library."""
    module = type(error).__module__.split(".")[0]
    return module in ("botocore", "aiobotocore", "s3fs", "gcsfs", "adlfs", "aiohttp", "azure")


def explained(
    error: Exception,
    where: str,
    precise: Callable[[str, Exception], str] = lambda where, error: "",
) -> Exception:
    """Return a failed request's error: an ordinary one, or a ResourceError with cause and fix."""
    codes = _codes(error)
    if codes & {"400", "403", "301"} or isinstance(error, FileNotFoundError):
        codes |= {precise(where, error)} - {""}
    if not codes & _BUCKET and isinstance(error, _ORDINARY):
        return error
    bucket = where.partition("://")[2].partition("/")[0]
    got = f"Got {_summary(error)}"
    fixes = (
        (
            _BUCKET,
            f"the bucket {bucket!r} does not exist",
            "create it, or correct the URL (BRIDGEWORK_HOME)",
        ),
        (
            _CLOCK,
            "the store refuses requests, because this machine's clock is wrong",
            "set the clock (NTP), then run the same command",
        ),
        (
            {"FileExpired"},
            "the object was replaced while it was read",
            "run the same command again",
        ),
        (
            _REGION,
            f"the bucket {bucket!r} is in another region",
            "set AWS_REGION to the region of the bucket, or AWS_ENDPOINT_URL to its endpoint",
        ),
        (
            _CREDENTIALS,
            "the store refuses access",
            "give credentials with read and write access to the bucket: "
            f"{access(where).credentials}",
        ),
        (
            _PASSING,
            f"the store cannot be reached; gave up after {wait_s():g} s",
            f"check that it is up and that its endpoint is right ({access(where).endpoint}); the "
            "same command then resumes",
        ),
    )
    for known, what, fix in fixes:
        if codes & known:
            return ResourceError(f"{where}: {what}. {got}. Fix: {fix}")
    return ResourceError(
        f"{where} cannot be reached. {got}. Fix: check that its store is up and that you have "
        "access"
    )


def _summary(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' + text[:300].rstrip('.') if text else ''}"


def _named(error: BaseException, names: frozenset[str]) -> bool:
    return bool(_codes(error) & names)


def _codes(error: BaseException) -> set[str]:
    """Return the codes and class names of an error and its causes."""
    names = {base.__name__ for at in _chain(error) for base in type(at).__mro__}
    return _answered(error) | names - {"BaseException", "Exception", "OSError", "object"}


def _answered(error: BaseException) -> set[str]:
    """Return the codes in the answers of the store: S3's are in a dict, others' are attributes."""
    found: set[str] = set()
    for at in _chain(error):
        response = getattr(at, "response", None)
        if isinstance(response, dict):
            found.add(str(response.get("Error", {}).get("Code", "")))
        for name in ("error_code", "code", "status", "status_code"):
            value = getattr(at, name, None)
            if isinstance(value, int | str):
                found.add(str(value))
        if str(at).startswith("Forbidden: "):  # of gcsfs, without a code
            found.add("403")
    return found - {""}


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    return chain


class _Watch:
    """Logs requests that take long, from one thread for all requests of the process."""

    def __init__(self) -> None:
        self._open: dict[int, list[Any]] = {}  # number -> [start, place, last message]
        self._number = count()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, where: str) -> int:
        now, number = time.monotonic(), next(self._number)
        with self._lock:
            self._open[number] = [now, where, now]
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._loop, name="stores", daemon=True)
                self._thread.start()
        return number

    def end(self, number: int) -> None:
        self._open.pop(number, None)

    def _loop(self) -> None:
        idle = 0
        while idle < 30:
            time.sleep(1)
            idle = 0 if self._open else idle + 1
            now = time.monotonic()
            for entry in list(self._open.values()):
                if now - entry[2] >= SAY_EVERY_S:
                    entry[2] = now
                    log.warning("%s: waiting for the store (%.0f s)", entry[1], now - entry[0])


_WATCH = _Watch()


@contextmanager
def _watched(where: str) -> Iterator[None]:
    number = _WATCH.begin(where)
    try:
        yield
    finally:
        _WATCH.end(number)


# --- paths


class _StoreMixin:
    """Parts of a UPath that are different here: its file system, folders, copies to Ray."""

    @classmethod
    def _fs_factory(cls, urlpath: str, protocol: str, storage_options: Any) -> Any:
        return _store(protocol)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Create the folder where the store has folders; UPath would create a missing bucket."""
        here = cast(Any, self)
        if here.protocol not in OBJECTS:
            here.fs.makedirs(here.path, exist_ok=True)

    def is_symlink(self) -> bool:
        return False

    def read_bytes(self) -> bytes:
        """Return the content by one request, so that it is of one version of the object."""
        here = cast(Any, self)
        return cast(bytes, here.fs.cat_file(here.path))

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def __reduce__(self) -> Any:
        return store_path, (str(self),)


@cache
def _store(protocol: str) -> Store:
    return Store(fsspec.filesystem(protocol, **_options(protocol)))


@cache
def _path_class(protocol: str) -> type[Any]:
    from upath.registry import get_upath_class, register_implementation

    base = get_upath_class(protocol)
    assert base is not None
    made = type(f"Store{base.__name__}", (_StoreMixin, base), {"__slots__": ()})
    register_implementation(protocol, cast(Any, made), clobber=True)
    return made


def store_path(url: str) -> Path:
    """Return the path of a URL in a remote store, without a request.

    It has the interface of pathlib.Path, so signatures say Path; functions of `os` refuse it.
    """
    connect(url)  # an unknown protocol or a missing package
    return cast(Path, _path_class(url.partition("://")[0])(url))
