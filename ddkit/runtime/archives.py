"""Names of the members of archives."""

from __future__ import annotations

import re
from pathlib import PurePosixPath


def member_path(name: str) -> PurePosixPath:
    """The relative path of an archive's member, whatever program wrote its name.

    Backslashes become slashes, and parts that are "." are left out; "" and "./" give PurePosixPath(".").
    Raises ValueError for an absolute path, one that begins with a drive's letter, and one with a part that is "..": these
    lead out of the folder that the archive is unpacked into.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", str(path)):
        raise ValueError(f"{name!r} leads out of the folder that it is unpacked into")
    return path
