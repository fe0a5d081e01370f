"""Which requirements does the running interpreter lack? Standard library only: it runs before anything is installed.

    python RWKV-v7/requirements_met.py requirements.txt [more files]

prints one line for each requirement that is missing or out of range and exits 1; exits 0 when all are met. Versions are read
from the installed metadata, so that nothing is imported (importing torch alone takes seconds).
"""

from __future__ import annotations

import operator
import re
import sys
from importlib import metadata
from pathlib import Path

COMPARE = {">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt}


def version_key(version: str) -> tuple[tuple[int, ...], int]:
    """Release numbers without trailing zeros, then 0 for a pre-release and 1 otherwise; a local part ("+cpu") does not count."""
    match = re.match(r"[vV]?(\d+(?:\.\d+)*)(.*)", version.strip().partition("+")[0])
    if not match:
        raise ValueError(f"{version!r} is not a version number")
    release = [int(part) for part in match[1].split(".")]
    while release and release[-1] == 0:
        release.pop()
    return tuple(release), 0 if re.match(r"[-_.]?(a|b|c|rc|alpha|beta|pre|preview|dev)", match[2], re.I) else 1


def in_range(version: str, specifiers: str) -> bool:
    """Whether `version` meets a comma-separated list of comparisons such as ">=2.11,<3"."""
    for specifier in filter(None, (part.strip() for part in specifiers.split(","))):
        sign, bound = re.match(r"(>=|<=|==|!=|>|<)\s*(\S+)$", specifier).groups()
        if not COMPARE[sign](version_key(version), version_key(bound)):
            return False
    return True


def lacking(lines: list[str]) -> list[str]:
    """The requirements that this interpreter does not meet, each with the reason.

    lines: 'name>=1,<2', with or without one condition '; python_version < "3.14"', the only kind that is known; comments allowed.
    """
    reasons = []
    for line in (line.partition("#")[0].strip() for line in lines):
        if not line:
            continue
        requirement, _, pythons = line.partition(";")
        if not in_range(f"{sys.version_info.major}.{sys.version_info.minor}", re.sub(r"python_version|[\s\"']", "", pythons)):
            continue
        name, specifiers = re.match(r"([A-Za-z0-9._-]+)\s*(.*)$", requirement).groups()
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            reasons.append(f"{line} (not installed)")
            continue
        if not in_range(version, specifiers):
            reasons.append(f"{line} (installed: {version})")
    return reasons


if __name__ == "__main__":
    missing = lacking([line for path in sys.argv[1:] for line in Path(path).read_text().splitlines()])
    print(*missing, sep="\n", end="\n" if missing else "")
    sys.exit(bool(missing))
