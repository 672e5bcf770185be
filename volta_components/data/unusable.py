# SPDX-License-Identifier: Apache-2.0
"""The error that names a volume file which cannot be used."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from volta_components.errors import InputError


class UnusableVolume(InputError):
    """One volume file that cannot be used.

    Attributes:
        path: the file.
        reason: what is wrong with it, with figures.
        remedy: what the user can do.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, remedy: str) -> None:
        super().__init__(f"{path}: {reason}; {remedy}")
        self.path, self.reason, self.remedy = str(path), reason, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason, self.remedy)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong while a file is opened and read into an UnusableVolume that names it.

    NiBabel raises many kinds of errors at a damaged header. They are all a property of the file here, so none of them
    may end a command that has other files to read.
    """
    try:
        yield
    except UnusableVolume:
        raise
    except FileNotFoundError as error:
        raise UnusableVolume(path, "no such file", "fetch it again or mend the link") from error
    except PermissionError as error:
        raise UnusableVolume(path, "permission denied", "make it readable (chmod u+r)") from error
    except IsADirectoryError as error:
        raise UnusableVolume(path, "a folder, not a file", "give the volume file itself") from error
    except EOFError as error:
        raise UnusableVolume(path, "truncated: the gzip stream ends early", "fetch it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UnusableVolume(path, f"damaged gzip stream ({error})", "fetch it again") from error
    except MemoryError as error:
        raise UnusableVolume(
            path, "does not fit in memory", "use fewer workers, or check the file's dimensions"
        ) from error
    except OSError as error:
        raise UnusableVolume(
            path, f"cannot be read ({error.strerror or error})", "check the disk and the permissions"
        ) from error
    except Exception as error:
        raise UnusableVolume(path, f"damaged header ({one_line(error)})", "fetch it again, or convert it again") from (
            error
        )


def one_line(error: BaseException) -> str:
    """An error's text on one line, not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."
