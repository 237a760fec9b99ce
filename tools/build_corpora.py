"""Builds three corpora for studies of continual pre-training from the documentation packages of Debian 12.

python tools/build_corpora.py --out OUT [--cache CACHE] [--only CORPUS] [--max-mb N]

    english_a   manuals of programs, libraries and servers
    english_b   English of another domain, help and handbooks for people at a desktop: a weak shift
    german      German manual pages, help and handbooks: a strong shift

Each becomes OUT/CORPUS.jsonl, a document a line: `text`, `source` (package and file) and `license`, which is what the
package's copyright file says. OUT/SOURCES.md names every package with its version, licence and size. The packages are
downloaded with apt-get (about 400 MB, kept in CACHE; nothing is installed) and read without being unpacked. Documents
stay under the licences of their authors: read those before you pass a corpus on.

A corpus follows from the versions of its packages: documents that are there twice and paragraphs that repeat all over
are left out, as is what is not prose in the corpus's language; the order is a permutation by hash.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import doctext

from megacl.errors import DataError, MegaclError
from megacl.publish import name_beside, publish_text

KDE = "kate5-data kile-doc kmail kmymoney-common krusader"


@dataclass(frozen=True)
class Corpus:
    """A language, and for each pattern of paths inside a package the packages that it holds for."""

    language: str
    files: dict[str, str]

    def packages(self) -> dict[str, str]:
        """Package -> the pattern of its files."""
        return {package: pattern for pattern, names in self.files.items() for package in names.split()}


CORPORA = {
    "english_a": Corpus(
        "english",
        {
            r"/man/man\d/.*\.gz$": "manpages manpages-dev perl-doc",
            r"/html/(?!translations).*\.html$": "linux-doc-6.1 python3.11-doc",
            r"/(manual/en|guides)/.*\.html$": "apache2-doc dpdk-doc",
            r"\.html$": """postgresql-doc-15 git-doc sqlite3-doc cmake-doc llvm-16-doc exim4-doc-html postfix-doc
             python-django-doc erlang-doc nova-doc neutron-doc cinder-doc""",
        },
    ),
    "english_b": Corpus(
        "english",
        {
            r"/HTML/en/.*index\.cache\.bz2$": KDE,
            r"/(en|en-US)/.*\.html$": "debian-handbook installation-guide-amd64 harden-doc",
            r"\.en\.html$": "debian-reference-en",
            r"\.html$": """libreoffice-help-en-us gimp-help-en grass-doc mh-book wireshark-doc jmeter-help povray-doc
             png-definitive-guide doublecmd-help-en fontforge-doc argyll-doc lilypond-doc-html""",
        },
    ),
    "german": Corpus(
        "german",
        {
            r"/man/de/man\d/.*\.gz$": "manpages-de manpages-de-dev apt debhelper devscripts dpkg po4a",
            r"/HTML/de/.*index\.cache\.bz2$": KDE,
            r"(/(de|de-DE)/.*|\.de)\.html$": """debian-handbook installation-guide-amd64 apache2-doc
             lilypond-doc-html-de""",
            r"\.html$": """libreoffice-help-de gimp-help-de debian-reference-de developers-reference-de
             debian-edu-doc-de debian-paketmanagement-buch maint-guide-de udo-doc-de""",
        },
    ),
}

MIN_CHARS, MAX_REPEATS = 300, 20
_SKIPPED_SECTIONS = re.compile(r"(ÜBERSETZUNG|COLOPHON|KOLOPHON|COPYRIGHT|Copyright)\n")
# One-page editions of books that are there by chapter too, generated indexes and listings, licences, change logs.
_SKIPPED_FILES = re.compile(
    r"big-page|/(_sources|_modules|internals|libraries|src|java|old)/|sqlite3/requirements|"
    r"(^|[/_.-])(genindex|py-modindex|index_toc|search|changelog|changes|notes|rel(ease)?-?notes|whatsnew|news|attic|"
    r"contributors|credits|legal|g?fdl|l?gpl|cc-by|licen[sc]es?|copyright|noscript|indices|doc-index|gnu-free-doc|"
    r"(concept|function|variable|lilypond)-index)[^/]*$",
    re.IGNORECASE,
)
# Frequent words, by whose counts a paragraph's language is told.
_WORDS = {
    "english": frozenset(
        "the of and to is that for with this be are by on it as or from you not have which if when at has".split()
    ),
    "german": frozenset(
        """der die das und ist nicht mit von für den dem ein eine einer eines wird werden auf zu im sich des oder wenn
        auch als bei aus dass kann sie nach durch zum zur wie nur""".split()
    ),
}
_LICENSES = {
    "GFDL": r"GNU Free Documentation License|\bGFDL",
    "GPL": r"GNU General Public License|\bGPL",
    "BSD": r"\bBSD\b",
    "LGPL": r"GNU (Lesser|Library) General|\bLGPL",
    "PSF": r"\bPSF\b",
    "MIT": r"\bMIT\b",
    "CC": "Creative Commons",
}


@dataclass(frozen=True)
class Document:
    """A file's prose, or one page of it."""

    source: str
    license: str
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        """The paragraphs, parted by blank lines."""
        return "\n\n".join(self.paragraphs)


# ------------------------------------------------------------------------------------------------ packages


def download(package: str, cache: Path) -> Path:
    """The package's file in the cache, downloaded where it has none. DataError where apt-get does not get it."""
    found = sorted(cache.glob(f"{package}_*.deb"))
    if found:
        return found[-1]
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise DataError(
                f"{program} is not here; corpora are made of Debian's packages, on Debian or in its container."
            )
    beside = name_beside(cache / package)  # apt-get writes under the final name
    beside.mkdir(parents=True)
    try:
        # Without its sandbox's user, who may not write here, it would warn.
        command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package]
        done = subprocess.run(command, cwd=beside, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or "apt-get failed").splitlines()[-1]
            raise DataError(
                f"{package}: not downloaded: {reason}. Run apt-get update first; the names are Debian 12's."
            )
        (file,) = beside.glob("*.deb")
        return file.rename(cache / file.name)
    finally:
        shutil.rmtree(beside)


def version(deb: Path) -> str:
    """The version in the name of a package's file."""
    return deb.name.split("_")[1].replace("%3a", ":")


def members(deb: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes, str]]:
    """(path, content, target if it is a link) of what is inside a package under paths that match."""
    damaged = DataError(f"{deb}: damaged; delete it, so that it is downloaded again.")
    command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as unpacking:
        try:
            with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
                for member in archive:
                    path = member.name.removeprefix(".")
                    if wanted.search(path) and (member.isfile() or member.issym()):
                        file = archive.extractfile(member) if member.isfile() else None
                        yield path, file.read() if file else b"", member.linkname
        except tarfile.ReadError:
            raise damaged from None
    if unpacking.returncode:
        raise damaged


def license_of(package: str, cache: Path) -> str:
    """What the package's copyright file says of its documentation, else of all its files.

    Some packages share the folder of another one, which is downloaded for it.
    """
    folder = f"/usr/share/doc/{package}"
    wanted = re.compile(rf"^{re.escape(folder)}(/copyright)?$")
    for path, content, target in members(download(package, cache), wanted):
        if path == folder:
            return license_of(Path(target).name, cache)
        return named_license(content.decode("utf-8", "replace"))
    raise DataError(f"{package}: it has no {folder}/copyright; take it off the list.")


def named_license(text: str) -> str:
    """The name of the licence in a copyright file: its stanza on the documentation, on *, or names that occur."""
    stanza = r"(?m)^Files:((?:.*\n)(?:[ \t#].*\n)*)(?:(?!License:|\n).*\n)*License:[ \t]*(\S.*)"
    stanzas: list[tuple[str, str]] = re.findall(stanza, text)
    about_docs = [
        name for files, name in stanzas if re.search(r"(?i)\s(\w+/)?(docs?|documentation|manual|help)/\*", files)
    ]
    about_all = [name for files, name in stanzas if "*" in files.split()]
    known = ", ".join(name for name, pattern in _LICENSES.items() if re.search(pattern, text))
    return [*about_docs, *about_all, known or "custom, see its copyright file"][0]


# ------------------------------------------------------------------------------------------------ documents


def prose(paragraphs: Iterable[str], language: str) -> tuple[str, ...]:
    """The paragraphs in the language; none where the page as a whole is not prose (tables, listings, indexes)."""
    kept: list[str] = []
    frequent = words_seen = prose_chars = 0
    for paragraph in paragraphs:
        words = re.findall(r"[^\W\d_]+", paragraph.lower())
        counts = {name: sum(word in known for word in words) for name, known in _WORDS.items()}
        own = counts.pop(language)
        other = max(counts.values())
        # A command or a name in between has no frequent words; it counts as German only among German.
        in_language = other <= own or (language == "english" and other < 2)
        if in_language and not _SKIPPED_SECTIONS.match(paragraph):
            kept.append(paragraph)
            frequent += own
            words_seen += len(words)
            prose_chars += len(paragraph) if own >= 3 else 0
    enough = frequent >= 0.1 * words_seen > 0 and prose_chars >= 0.4 * sum(map(len, kept))
    return tuple(kept) if enough else ()


@dataclass(frozen=True)
class Extraction:
    """What a worker is to read: a package's files that match, in the language of a corpus."""

    package: str
    deb: Path
    license: str
    pattern: str
    language: str


def extract(task: Extraction) -> list[Document]:
    """The documents of a package."""
    found = []
    for path, content, target in members(task.deb, re.compile(task.pattern)):
        if target or _SKIPPED_FILES.search(path):
            continue
        for page, paragraphs in doctext.read_pages(path, content):
            kept = prose(paragraphs, task.language)
            if kept:
                source = f"{task.package}:{path}" + (f"#{page}" if page else "")
                found.append(Document(source, task.license, kept))
    return found


def _digest(text: str) -> bytes:
    return hashlib.blake2b("".join(filter(str.isalnum, text.casefold())).encode(), digest_size=12).digest()


def _unique(documents: Iterable[Document]) -> Iterator[Document]:
    """Documents of some length, the first of each text, whose case and punctuation do not count."""
    seen: set[bytes] = set()
    for document in documents:
        key = _digest(document.text)
        if len(document.text) >= MIN_CHARS and key not in seen:
            seen.add(key)
            yield document


def clean(found: Iterable[Document], max_bytes: float) -> list[Document]:
    """A corpus: without copies and boilerplate, in the order of a hash, up to a size in bytes of text."""
    documents = list(_unique(sorted(found, key=lambda document: document.source)))
    repeats = Counter(key for document in documents for key in set(map(_digest, document.paragraphs)))
    cleaned = (
        replace(document, paragraphs=tuple(p for p in document.paragraphs if repeats[_digest(p)] <= MAX_REPEATS))
        for document in documents
    )
    chosen: list[Document] = []
    size = 0
    for document in sorted(_unique(cleaned), key=lambda document: hashlib.sha256(document.source.encode()).digest()):
        size += len(document.text.encode())
        if size > max_bytes:
            break
        chosen.append(document)
    return chosen


def build(corpus: Corpus, cache: Path, max_bytes: float) -> tuple[list[Document], list[Extraction]]:
    """The documents of a corpus, and what they were made of."""
    tasks = []
    for package, pattern in corpus.packages().items():
        deb = download(package, cache)
        tasks.append(Extraction(package, deb, license_of(package, cache), pattern, corpus.language))
    with ProcessPoolExecutor() as pool:  # the largest first, so that no worker is left with it at the end
        batches = pool.map(extract, sorted(tasks, key=lambda task: -task.deb.stat().st_size))
        return clean((document for batch in batches for document in batch), max_bytes), tasks


# ------------------------------------------------------------------------------------------------ files


def section(name: str, documents: list[Document], tasks: list[Extraction]) -> str:
    """The part of SOURCES.md about one corpus."""
    sizes: dict[str, list[int]] = {}
    for document in documents:
        sizes.setdefault(document.source.split(":")[0], []).append(len(document.text.encode()))
    total = sum(map(sum, sizes.values()))
    rows = [
        f"| {task.package} | {version(task.deb)} | {task.license} | {len(own)} | {sum(own):,} |"
        for task in tasks
        if (own := sizes.get(task.package))
    ]
    head = "| package | version | licence | documents | bytes of text |\n|---|---|---|---:|---:|"
    return "\n".join([f"## {name}\n", f"{len(documents):,} documents, {total:,} bytes of text.\n", head, *rows, ""])


def write(out: Path, name: str, documents: list[Document], tasks: list[Extraction]) -> None:
    """Publishes OUT/NAME.jsonl, and its part of OUT/SOURCES.md beside those of other corpora."""
    rows = ({"text": each.text, "source": each.source, "license": each.license} for each in documents)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    publish_text(out / f"{name}.jsonl", lines, "a corpus")
    page = out / "SOURCES.md"
    old = re.split(r"(?m)^(?=## )", page.read_text())[1:] if page.exists() else []
    sections = {part.split()[1]: part.rstrip("\n") + "\n" for part in old}
    sections[name] = section(name, documents, tasks)
    head = "# Sources\n\nText of Debian packages, by tools/build_corpora.py. Each document names its licence.\n"
    parts = [sections[each] for each in CORPORA if each in sections]
    publish_text(page, "\n".join([head, *parts]), "the list of sources")


def main() -> int:
    """Returns the exit status: 0, or 2 after one line on standard error."""
    parser = argparse.ArgumentParser(description="Build corpora from the documentation packages of Debian 12.")
    parser.add_argument("--out", required=True, type=Path, metavar="OUT", help="the folder for the corpora")
    parser.add_argument("--cache", type=Path, help="the folder for downloaded packages (default: OUT/packages)")
    parser.add_argument("--only", choices=sorted(CORPORA), help="this corpus alone")
    parser.add_argument("--max-mb", type=float, default=float("inf"), metavar="N", help="megabytes of text of each")
    arguments = parser.parse_args()
    cache: Path = arguments.cache or arguments.out / "packages"
    try:
        for folder in (arguments.out, cache):
            folder.mkdir(parents=True, exist_ok=True)
        for name in [arguments.only] if arguments.only else CORPORA:
            documents, tasks = build(CORPORA[name], cache, arguments.max_mb * 1e6)
            write(arguments.out, name, documents, tasks)
            print(
                f"{name}: {len(documents):,} documents, {sum(len(d.text.encode()) for d in documents):,} bytes of text"
            )
    except MegaclError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
