"""Files that are written whole or not at all: beside their place, then renamed.

    write_whole(path, write)     a file
    new_directory(path)          a directory
    temporary(folder, make)      what both are made of
    alone_in(folder)             no other process writes there
    end(message, code)           how a command ends, whatever its output has become

A process that is killed leaves nothing half-written under a name that anybody reads.
"""

import os
import re
import secrets
import shutil
import sys
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from formats import UserError

try:
    import fcntl
except ImportError:           # Windows
    fcntl = None


PART = re.compile(r"\.part-[0-9a-f]{8}\.new")       # torch.save wants a suffix


def new_name():
    """A name of this form that nobody else has."""
    return f".part-{secrets.token_hex(4)}.new"


@contextmanager
def temporary(folder, make):
    """A path in `folder`, made by make(path), and removed at the end unless it was renamed.

    Its writer holds a lock on it, which the system drops when the process ends, however it ends.
    """
    remove_leftovers(folder)
    with ExitStack() as stack:
        for _ in range(3):                    # another writer may remove a path before it is locked
            path = folder / new_name()
            make(path)
            stack.callback(remove, path)
            if stack.enter_context(locked(path)) or not fcntl:
                break
        yield path


def remove_leftovers(folder):
    """Removes what dead processes left: paths with names of our form that nobody has locked."""
    for old in [path for path in folder.iterdir() if PART.fullmatch(path.name)]:
        with locked(old) as is_mine:
            if is_mine:
                remove(old)


@contextmanager
def locked(path):
    """Locks a file or directory, gives whether that was possible. On Windows it never is."""
    descriptor, is_mine = None, False
    if fcntl:
        with suppress(OSError):               # another process holds it, or has removed it
            descriptor = os.open(path, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_mine = path.exists()
    try:
        yield is_mine
    finally:
        if descriptor is not None:
            os.close(descriptor)


def remove(path):
    """Removes a file or directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def alone_in(folder):
    """Makes a folder that is this process's while the context lasts. UserError if it is taken.

    The system frees it when the process ends, however it ends. On Windows nothing is locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    with ExitStack() as stack:
        if fcntl:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process works in {folder}: wait for its end, or name "
                                "another folder") from None
            except OSError:                   # a file system without locks
                pass
        yield


def write_whole(path, write):
    """Calls write(part) with a name beside `path`, then renames it: old or new, never a half.

    A link stays a link. Devices and pipes, such as /dev/null, are written to directly.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        write(Path(path))
        return
    path = Path(os.path.realpath(path))
    with new_file(path) as part:
        write(part)
        os.replace(part, path)


@contextmanager
def new_file(path):
    """A file beside `path`, to be written and renamed to it. UserError where that fails."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(path.parent, Path.touch) as part:
            yield part
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"cannot write {path}: {reason}") from None


def rename_new(part, path):
    """Renames a file. FileExistsError where there is another one of this name already."""
    try:
        os.link(part, path)
    except OSError:                           # it exists, or the file system has no links
        path.open("x").close()                # takes the name
        try:
            os.replace(part, path)
        except OSError:
            path.unlink()
            raise


def move_files(part, path):
    """Moves all that lies in one directory to another one, over files of the same names."""
    for file in part.iterdir():
        os.replace(file, path / file.name)


@contextmanager
def new_directory(path, replace=False):
    """A directory to write in; its files come to lie in `path` when the block ends well.

    `path` must be new or empty. With `replace` it may hold files. A new directory appears whole; in
    one that exists files appear, or are replaced, one after the other, each of them whole. After an
    error in the block all is as it was.
    """
    path = Path(path)
    taken = path.exists() and (not path.is_dir() or any(
        not PART.fullmatch(file.name) for file in path.iterdir()))
    if taken and not (replace and path.is_dir()):
        raise UserError(f"{path} exists already; name a new directory, or remove it first")
    is_new, made = not path.exists(), [folder for folder in path.parents if not folder.exists()]
    home = path.parent if is_new else path    # on the same file system, whatever is mounted
    try:
        home.mkdir(parents=True, exist_ok=True)
        if not is_new:
            with suppress(OSError):           # a killed process may have begun when path was new
                remove_leftovers(path.parent)
        try:
            with temporary(home, Path.mkdir) as part:
                yield part
                if is_new:
                    os.rename(part, path)
                else:
                    move_files(part, path)
        finally:
            for folder in made:               # those that are still empty
                with suppress(OSError):
                    folder.rmdir()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


# --- The end of a command -------------------------------------------------------------------------


def end(message, code):
    """Ends with a sentence on stderr, where that can still be written to, and an exit code."""
    with suppress(OSError):
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def drop_what_cannot_be_written():
    """Flushes both streams. One that is full or closed gets /dev/null in its place.

    Otherwise Python would try again when it ends, complain, and set another exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
