"""Files that may be odd: absent and unreadable are two things, a log never stops a run, a full disk has a name.

pathlib's `glob`, `exists` and `is_dir` take what this user may not look at for absent, some of them always, some since
a later Python. Whoever asks them starts anew over a run that is there; whoever asks here gets an error that says what
to do.
"""

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

_SHARED_MEMORY = "/dev/shm"
_ON_FILE_SYSTEM = "is on the file system"
_NEARLY_FULL = 16 * 2**20  # bytes


# ---- what is there ---------------------------------------------------------------------------------------------------


def mode_of(path: Path) -> int | None:
    """The mode of what is at a path, behind links; None where nothing is.

    Raises:
        ValueError: that cannot be found out, or a link leads nowhere.
    """
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise ValueError(
                f"expected something behind the link {path}, found nothing; mount what it leads to, or remove it"
            ) from None
        return None
    except OSError as error:
        raise unreadable(path, error) from None


def is_folder(path: Path) -> bool:
    """Whether a folder is there; raises as `mode_of`."""
    mode = mode_of(path)
    return mode is not None and stat.S_ISDIR(mode)


def paths_in(directory: Path, pattern: str = "*") -> list[Path]:
    """List the paths in a folder that match the pattern, in order; none where there is no folder.

    Raises:
        ValueError: it cannot be read.
    """
    if mode_of(directory) is None:
        return []
    try:
        return sorted(directory / name for name in os.listdir(directory) if fnmatch.fnmatchcase(name, pattern))
    except OSError as error:
        raise unreadable(directory, error) from None


def unreadable(path: Path, error: OSError) -> ValueError:
    """Build the error for something that exists and cannot be read."""
    return ValueError(
        f"expected to read {path}, got: {error.strerror}; let this user read it, or move it away: what is in it is not "
        "known, so nothing was changed"
    )


def refuse_unreadable(error: OSError) -> None:
    """Raise for `os.walk`, which otherwise passes over folders that it cannot read."""
    raise unreadable(Path(error.filename), error) from None


def read_file(path: Path) -> bytes:
    """The bytes of a regular file. A pipe, which would keep its reader waiting, is refused.

    Raises:
        OSError: as `open`.
        ValueError: something else is there.
    """
    with contextlib.suppress(IsADirectoryError), open(path, "rb", opener=_without_waiting) as stream:
        if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            return stream.read()
    raise ValueError(f"expected a file at {path}, found something else; move it away")


def _without_waiting(name: str, flags: int) -> int:
    return os.open(name, flags | os.O_NONBLOCK)


def read_document(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: as `open`.
        ValueError: it holds something else.
    """
    content = read_file(path)
    try:
        document = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({_short(error)})") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds {type(document).__name__}, expected a JSON object")
    return document


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of a file that may be anybody's: brackets a hundred thousand deep are a ValueError, too, and a
    whole number that no int64 holds is a float, which no count, step or label is.
    """
    try:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))
    except RecursionError:
        raise ValueError("expected JSON, got brackets thousands deep; make or copy the file again") from None


# ---- writing and removing --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def publish(path: Path, *, flush_folder: bool = True) -> Iterator[IO[bytes]]:
    """Publish a file atomically: written to a temporary one, flushed to disk, renamed to `path`.

    An interrupted block leaves no file named `path`; a killed process leaves at most `path` with
    suffix `.tmp-PID`. Without `flush_folder` the next file that is published beside it makes the new name durable.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if flush_folder:
        flush(path.parent)


def publish_text(path: Path, text: str) -> None:
    """Write a text file, as `publish` does."""
    with publish(path) as stream:
        stream.write(text.encode())


def flush(path: Path) -> None:
    """Bring a file or a folder's names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Remove whatever is at a path: a folder with all that is in it, a file, a link; nothing is fine, too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- logs of one JSON object a line ----------------------------------------------------------------------------------


class Log(NamedTuple):
    """The lines of a log, without their ends."""

    records: list[tuple[bytes, dict[str, Any]]]
    odd: list[tuple[int, bytes, str]]
    """Number of the line, from 1, the line, and what is wrong with it."""
    is_whole: bool
    """Whether the last line was written to its end; one that a kill cut short is neither here nor there."""


def read_log(path: Path, fields: Mapping[str, type]) -> Log:
    """Read a log, of whose records each has at least these fields; an absent one is empty. Odd lines are no error.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        content = read_file(path)
    except FileNotFoundError:
        content = b""
    except OSError as error:
        raise unreadable(path, error) from None
    whole = content.endswith(b"\n") or not content
    lines = content.split(b"\n")
    log = Log([], [], whole)
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            wrong = [name for name, kind in fields.items() if type(record.get(name)) is not kind]
            if not wrong:
                log.records.append((line, record))
                continue
            problem = f"no {wrong[0]!r} in it"
        except (ValueError, AttributeError) as error:
            if not line.strip() or (number == len(lines) and not whole):
                continue
            problem = _short(error)
        log.odd.append((number, line, problem))
    return log


def mend_log(
    path: Path, fields: Mapping[str, type], *, keep: Callable[[dict[str, Any]], bool] = lambda record: True
) -> list[str]:
    """Repair a log for appending: a line that a kill cut short is dropped, odd lines move to `NAME.odd`, and of the
    others those stay that `keep` wants. Returns messages.

    Raises:
        ValueError: the file cannot be read. OSError: it cannot be written.
    """
    log = read_log(path, fields)
    kept = [line for line, record in log.records if keep(record)]
    messages = []
    if log.odd:
        aside = path.with_name(f"{path.name}.odd")
        with aside.open("ab") as stream:
            stream.writelines(line + b"\n" for _, line, _ in log.odd)
        number, _, problem = log.odd[0]
        more = f" and {len(log.odd) - 1} more" if len(log.odd) > 1 else ""
        messages = [f"{path}: line {number}{more} cannot be used ({problem}): passed over, now in {aside.name}"]
    if log.odd or not log.is_whole or len(kept) < len(log.records):
        with publish(path) as stream:
            stream.writelines(line + b"\n" for line in kept)
    return messages


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:120]


# ---- disks that are full ---------------------------------------------------------------------------------------------


def describe_error(error: BaseException, *paths: Path) -> str:
    """Describe an error in one line; where a disk is full, also which one, and the remedy. `paths` are those that it
    concerns, where the caller names them.
    """
    text = str((paths and getattr(error, "strerror", None)) or error)
    if not is_about_space(text) or _ON_FILE_SYSTEM in text:
        return text
    return f"{text.strip().splitlines()[-1]}; {describe_full_disks(error, *paths)}"


def is_about_space(text: str) -> bool:
    """Whether an error's text says that a disk, or shared memory, is full."""
    known = (
        "No space left",
        os.strerror(errno.EDQUOT),
        "out of shared memory",
        "is the disk full",
        "PytorchStreamWriter",
    )
    return any(words in text for words in known)


def describe_full_disks(error: BaseException, *paths: Path) -> str:
    """Describe the full file systems among those that an error or `paths` name, or else among all that this process has
    files on; with their numbers and the remedy.
    """
    named = [name for name in (getattr(error, "filename", None), *paths) if name is not None]
    if "shared memory" in str(error) or "</torch_" in str(error):
        named = [_SHARED_MEMORY]
    by_root: dict[Path, tuple[bool, str]] = {}
    for place in map(Path, map(os.fsdecode, named or [*_open_files(), tempfile.gettempdir(), _SHARED_MEMORY, "."])):
        with contextlib.suppress(OSError):
            there = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
            root = _file_system(there)
            space = os.statvfs(root)
            free, files = space.f_bavail * space.f_frsize, space.f_favail
            is_full = free < _NEARLY_FULL or (space.f_files > 0 and files == 0)
            text = f"{there} {_ON_FILE_SYSTEM} {root}, which has {free:,} of {space.f_blocks * space.f_frsize:,} "
            text += f"bytes and {files:,} of {space.f_files:,} files left"
            if str(root) == _SHARED_MEMORY and (is_full or named):
                text += (
                    ": shared memory, through which ranks and data loading processes talk; give it more (docker run "
                    "--shm-size=8g, mount -o remount,size=8g /dev/shm), or lower data.num_workers"
                )
            by_root.setdefault(root, (is_full, text))
    full = [text for is_full, text in by_root.values() if is_full]
    if full:
        return f"{'; '.join(full)}; make room there and start again"
    return f"nothing is full now: {'; '.join(text for _, text in by_root.values())}; make room or raise the quota"


def _open_files() -> list[str]:
    """Paths of the files that this process has open."""
    with contextlib.suppress(OSError):
        targets = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        return [target for target in targets if target.startswith("/") and not target.startswith(("/dev/", "/proc/"))]
    return []


def _file_system(path: Path) -> Path:
    """Mount point of the file system of a path."""
    return next(place for place in (path.resolve(), *path.resolve().parents) if place.is_mount())
