"""Real text of many languages for bench/make_data.py: documentation, manual pages and message catalogues of Debian packages.

    python bench/text.py --folder ~/bench-text          (Debian or Ubuntu; downloads about 90 MB, installs nothing)

Writes FOLDER/text.jsonl, one {"text": ...} a file or catalogue, without duplicates, in the order of the package names, then of the
paths. HTML and mallard pages lose their tags. Prints what each package gave; --out writes that as JSON.
"""

from __future__ import annotations

import argparse
import gettext
import gzip
import hashlib
import html
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "aptitude-common aspell-doc coreutils debian-policy debian-reference-de debian-reference-fr debian-reference-ja "
    "debian-reference-zh-cn developers-reference-ja erlang-doc git-doc gnome-user-docs installation-guide-amd64 iso-codes "
    "libglib2.0-data libgtk-3-common libreoffice-help-el libreoffice-help-hi libreoffice-help-ja libreoffice-help-ko "
    "libreoffice-help-ru libreoffice-help-vi libreoffice-help-zh-cn manpages manpages-de manpages-dev manpages-es manpages-fr "
    "manpages-it manpages-ja manpages-pl manpages-ru manpages-tr manpages-uk manpages-zh postgresql-doc-15 python3.11-doc"
).split()
HIDDEN = re.compile(r"<(script|style)\b.*?</\1>|<!--.*?-->", re.S | re.I)
TAG = re.compile(r"<[^<>]*>")
BLANK = re.compile(r"\s*\n\s*")


def text_of(name: str, data: bytes) -> str:
    """The text of one file of a package, or nothing when it is of another kind."""
    if name.endswith(".gz"):
        name, data = name[:-3], gzip.decompress(data)
    if name.endswith(".mo"):
        catalogue = gettext.GNUTranslations(io.BytesIO(data))
        return "\n".join(line for line in catalogue._catalog.values() if isinstance(line, str))
    kind = name.rpartition(".")[2]
    if kind in ("html", "xhtml", "page", "xml"):
        return BLANK.sub("\n", html.unescape(TAG.sub("", HIDDEN.sub("", data.decode("utf-8")))))
    if kind in ("txt", "md", "rst", "adoc") or "/man/" in name and kind[:1].isdigit():
        return data.decode("utf-8")
    return ""


def texts(package: Path) -> Iterator[str]:
    unpack = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
    with tarfile.open(fileobj=unpack.stdout, mode="r|") as files:
        found = {m.name: text_of_member(files, m) for m in files if m.isfile()}
    unpack.wait()
    yield from (found[name] for name in sorted(found))


def text_of_member(files: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    try:
        return text_of(member.name, files.extractfile(member).read()).strip()
    except (UnicodeDecodeError, OSError, IndexError):  # the last: a catalogue with a damaged header
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", required=True, type=Path, help="where packages and text go; outside the repository")
    parser.add_argument("--out", type=Path, help="JSON file for the list of packages")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    listed, seen = [], set()
    with open(args.folder / "text.jsonl", "w", encoding="utf-8") as file:
        for name in PACKAGES:
            if not list(args.folder.glob(f"{name}_*.deb")):
                subprocess.run(["apt-get", "-q", "download", name], cwd=args.folder)
            found = sorted(args.folder.glob(f"{name}_*.deb"))
            if not found:
                print(f"{name}: not in this distribution, left out")
                continue
            documents = size = 0
            for text in texts(found[0]):
                digest = hashlib.sha256(text.encode()).digest()
                if text and digest not in seen:
                    seen.add(digest)
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    documents, size = documents + 1, size + len(text.encode())
            listed.append({"package": found[0].stem, "documents": documents, "text_bytes": size})
            print(listed[-1], flush=True)
    total = sum(entry["text_bytes"] for entry in listed)
    print(f"{args.folder / 'text.jsonl'}: {total} bytes of text in {sum(entry['documents'] for entry in listed)} documents")
    if args.out:
        args.out.write_text(json.dumps(listed, indent=1) + "\n")


if __name__ == "__main__":
    main()
