"""Corpora out of documentation packages: what text is taken from pages, and what becomes of a package's files."""

import bz2
import gzip
import json
import shutil
import subprocess
from pathlib import Path

import build_corpora
import doctext
import numpy as np
import pytest
import shuffle_tokens
from doctext import html, roff

from megacl.data.megatron import open_megatron
from megacl.data.source import open_source
from megacl.errors import DataError

MAN_PAGE = r""".\" a comment
.TH LS 1 "2026" "coreutils"
.SH NAME
ls \- list directory contents
.SH DESCRIPTION
.PP
List information about the
.I files
of
.BR ls (1),
and \fBnothing\fP else.
.TP
\fB\-a\fR, \fB\-\-all\fR
do not ignore entries starting with \(oqdot\(cq
.nf
$ ls
  a  b
.fi
.TS
allbox;
left	out
.TE
.if t .ds x y
.ie n \{\
.PP
For terminals.
.\}
.el \{\
For printers.
.\}
"""


def test_a_manual_page_becomes_paragraphs_behind_their_headings():
    assert roff.paragraphs(MAN_PAGE) == [
        "NAME\nls - list directory contents",
        "DESCRIPTION\nList information about the files of ls(1), and nothing else.",
        "-a, --all\ndo not ignore entries starting with ‘dot’",
        "$ ls\n  a  b",
        "For terminals.",
    ]


def test_german_letters_of_old_manual_pages_come_back():
    assert roff.plain(r"Gr\[:u]\[ss]e \(:ahnlich \[u00D6]l") == "Grüße ähnlich Öl"


def test_a_page_that_is_not_of_man_gives_nothing():
    assert roff.paragraphs(".Dd today\n.Dt LS 1\n.Sh NAME\n.Nm ls\n") == []


def test_html_keeps_prose_lists_tables_and_code_and_leaves_navigation_out():
    page = """<html><head><title>no</title><style>p {}</style></head><body>
    <nav><p>Home</p></nav><div class="sphinxsidebar"><div>deep</div><p>Contents</p></div>
    <h1>Title<a class="headerlink">¶</a></h1><h2>Part</h2>
    <p>One <b>bold</b>
       sentence.<p>Not closed
    <ul><li>first item<li><p>second item</p></ul>
    <p><a href="x">Next</a> <a href="y">Up</a></p>
    <table><tr><th>key</th><th>value</th></tr><tr><td><p>a</p></td><td>1</td></tr></table>
    <pre>x = 1
  y = 2</pre>
    <p>two<br>lines</p>
    </body></html>"""
    assert html.paragraphs(page) == [
        "Title¶\nPart\nOne bold sentence.".replace("¶", ""),
        "Not closed",
        "- first item",
        "- second item",
        "key | value",
        "a | 1",
        "x = 1\n  y = 2",
        "two\nlines",
    ]


def test_a_heading_without_a_paragraph_is_a_table_of_contents():
    assert html.paragraphs("<h1>A</h1><h2>B</h2><h3>C</h3><h4>D</h4><p>Text.</p>") == ["C\nD\nText."]


def test_the_pages_of_a_kde_handbook_have_names():
    cache = (
        '<FILENAME filename="index.html"><html><body><p>First page.</p></body></html>'
        '<FILENAME filename="two.html"><html><body><p>Second page.</p></body></html>'
    )
    pages = list(doctext.read_pages("/usr/share/doc/kde/HTML/en/x/index.cache.bz2", bz2.compress(cache.encode())))
    assert pages == [("", []), ("index.html", ["First page."]), ("two.html", ["Second page."])]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Käse\u00a0und\u200b Brot".encode(), "Käse und Brot"),
        ('<?xml encoding="iso-8859-15"?>5 €'.encode("iso-8859-15"), '<?xml encoding="iso-8859-15"?>5 €'),
        ("5 \u20ac, \u201cso\u201d".encode("cp1252"), "5 €, “so”"),  # names nothing, and is not UTF-8
        ("u\u0308ber".encode(), "über"),
    ],
)
def test_pages_are_decoded_as_they_say_and_normalised(content: bytes, text: str):
    assert doctext.decode(content) == text


def test_the_path_says_what_a_file_is():
    ((_, paragraphs),) = doctext.read_pages("/usr/share/man/man1/ls.1.gz", gzip.compress(MAN_PAGE.encode()))
    assert paragraphs == roff.paragraphs(MAN_PAGE)
    assert list(doctext.read_pages("/usr/share/doc/a.txt", b"one\ntwo\n\nthree")) == [("", ["one two", "three"])]


ENGLISH = "This is the text of a page that is to be read by people, and not by a machine that has it for itself."
GERMAN = "Das ist der Text einer Seite, die von Menschen und nicht nur von einer Maschine gelesen wird, wie auch sonst."


def test_prose_is_kept_in_the_language_of_the_corpus():
    mixed = [ENGLISH, GERMAN, "ls -l", "COPYRIGHT\n" + ENGLISH]
    assert build_corpora.prose(mixed, "english") == (ENGLISH, "ls -l")
    assert build_corpora.prose(mixed, "german") == (GERMAN, "ls -l")


def test_a_page_of_listings_is_no_prose():
    assert build_corpora.prose(["foo_bar = 1", "bar_baz = 2", "x, y, z, w"], "english") == ()


@pytest.mark.parametrize(
    ("copyright_file", "name"),
    [
        ("Files: *\nCopyright: a\nLicense: Expat\n\nFiles: doc/*\nCopyright: b\nLicense: GFDL-1.3+\n", "GFDL-1.3+"),
        ("Files: *\nCopyright: a\nLicense: Expat\n\nFiles: debian/*\nLicense: GPL-2+\n", "Expat"),
        ("It is under the GNU General Public License.", "GPL"),
        ("You may do what you like.", "custom, see its copyright file"),
    ],
)
def test_the_licence_is_what_the_copyright_file_says_of_the_documentation(copyright_file: str, name: str):
    assert build_corpora.named_license(copyright_file) == name


def make_package(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """A package of Debian in the folder, as apt-get download leaves it there."""
    root = folder / f"{name}.root"
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    control = f"Package: {name}\nVersion: 1:2.0-1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: d\n"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(control)
    deb = folder / f"{name}_1%3a2.0-1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(root), str(deb)], check=True, capture_output=True)
    shutil.rmtree(root)


def page(*paragraphs: str) -> bytes:
    return "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs).encode()


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="of machines with Debian's tools")
def test_packages_become_documents_with_source_and_licence(tmp_path: Path):
    doc, license_file = "usr/share/doc/some-doc", b"Files: *\nCopyright: a\nLicense: GFDL-1.3+\n"
    boilerplate = "This is the part that all of the pages of the book have at the end, for it is to be seen by you."
    chapters = {f"{doc}/html/{i}.html": page(f"{ENGLISH} Chapter {i}. " * 3, boilerplate) for i in range(21)}
    make_package(
        tmp_path,
        "some-doc",
        {
            f"{doc}/copyright": license_file,
            **chapters,
            f"{doc}/html/copy.html": page(f"{ENGLISH} chapter 0! " * 3, boilerplate),
            f"{doc}/html/changelog.html": page(ENGLISH * 9),
            f"{doc}/html/short.html": page(ENGLISH),
            f"{doc}/html/deutsch.html": page(GERMAN * 9),
            f"{doc}/other.css": ENGLISH.encode(),
        },
    )
    corpus = build_corpora.Corpus("english", {r"\.html$": "some-doc"})
    documents, tasks = build_corpora.build(corpus, tmp_path, float("inf"))
    assert sorted(document.source for document in documents) == sorted(f"some-doc:/{path}" for path in chapters)
    assert {document.license for document in documents} == {"GFDL-1.3+"}
    assert not any(boilerplate in document.text for document in documents)

    build_corpora.write(tmp_path, "english_a", documents, tasks)
    rows = [json.loads(line) for line in (tmp_path / "english_a.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [document.text for document in documents]
    size = sum(len(row["text"].encode()) for row in rows)
    assert f"| some-doc | 1:2.0-1 | GFDL-1.3+ | 21 | {size:,} |" in (tmp_path / "SOURCES.md").read_text()
    assert build_corpora.build(corpus, tmp_path, float("inf"))[0] == documents
    assert build_corpora.build(corpus, tmp_path, size / 2)[0] == documents[:10]

    damaged = next(tmp_path.glob("*.deb"))
    damaged.write_bytes(damaged.read_bytes()[:-200])
    with pytest.raises(DataError, match="damaged; delete it"):
        build_corpora.build(corpus, tmp_path, float("inf"))


def test_one_corpus_is_built_anew_and_the_list_of_sources_keeps_the_others(tmp_path: Path):
    documents = [build_corpora.Document("a:/x.html", "MIT", (ENGLISH,))]
    task = build_corpora.Extraction("a", Path("a_1_all.deb"), "MIT", "", "english")
    for name in ("german", "english_a", "german"):
        build_corpora.write(tmp_path, name, documents, [task])
    headings = [line for line in (tmp_path / "SOURCES.md").read_text().splitlines() if line.startswith("## ")]
    assert headings == ["## english_a", "## german"]


def test_shuffled_documents_have_the_tokens_of_the_originals_in_another_order(prepared, tmp_path: Path, monkeypatch):
    folder, prefix = prepared.sources["english"], tmp_path / "shuffled"
    monkeypatch.setattr("sys.argv", ["shuffle_tokens.py", str(folder), "--out", str(prefix)])
    assert shuffle_tokens.main() == 0
    source = open_source(folder)
    originals = [
        documents.tokens(index)
        for documents in map(source.train.documents_of, range(len(source.train.shards)))
        for index in range(len(documents))
    ]
    dataset = open_megatron(str(prefix))
    assert len(dataset) == len(originals)
    moved = 0
    for index, original in enumerate(originals):
        tokens = dataset.tokens(index)
        assert tokens[-1] == original[-1] == source.eos_id
        np.testing.assert_array_equal(np.sort(tokens), np.sort(original))
        moved += not np.array_equal(tokens, original)
    assert moved > 0.9 * len(originals)
