"""Readable paragraphs of HTML pages; menus, navigation, indexes and lists of links are left out."""

import re
from html.parser import HTMLParser

from doctext.page import Page

_SKIPPED_TAGS = frozenset("head script style noscript nav header footer aside svg form select button iframe".split())
_CONTAINERS = frozenset("div table ul ol dl span section".split())
# Classes and roles, ids with a #, of containers without prose. Those in capitals are variants in LibreOffice's help.
_SKIPPED_NAMES = re.compile(
    r"(^|\s)(nav\S*|\S*toc|toc\S*|\S*sidebar\S*|related|\S*breadcrumbs?|headerlink|header|footer\S*|genindex\S*|debug|"
    r"contents (local )?topic|authorgroup|copyright|legalnotice|menu(bar)?|linenos?|prev(ious)?|next|skip\S*|"
    r"revhistory|indextable|translations?|\S*backref|viewcode\S*|"
    r"(?-i:MAC|WIN|UNIX|WRITER|CALC|IMPRESS|DRAW|CHART|MATH|BASE)|"
    r"#(\w*toc|sidebar|header|footer|nav(bar|row\d?|-path)|(Search|Donation)Frame))(\s|$)",
    re.IGNORECASE,
)
_HEADINGS = frozenset("h1 h2 h3 h4 h5 h6 dt".split())
_BLOCKS = _HEADINGS | frozenset(
    "p div pre section article li dd tr table ul ol dl blockquote hr body html caption figure center details"
    " address".split()
)
_CELL, _BREAK = "\ue000", "\ue001"  # private characters: the end of a table's cell, <br>


class _HtmlPage(HTMLParser):
    """Paragraphs of HTML, also of such as closes few of its tags."""

    def __init__(self) -> None:
        super().__init__()
        self.page = Page()
        self.parts: list[str] = []  # of the paragraph under way
        self.heading = self.bullet = ""
        self.skipped, self.skip_depth = "", 0  # the tag of the container that is left out; how deep in such tags
        self.pre = self.link_chars = 0
        self.link = self.cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped and tag != "body":  # a body ends a head that was left open
            self.skip_depth += tag == self.skipped
            return
        self.end_block(tag)
        given = dict(attrs)
        names = f"{given.get('class') or ''} {given.get('role') or ''} #{given.get('id') or ''}"
        if tag in _SKIPPED_TAGS or (tag in _CONTAINERS and _SKIPPED_NAMES.search(names)):
            self.skipped, self.skip_depth = tag, 1
            return
        self.skipped = ""
        self.pre += tag == "pre"
        if tag in _HEADINGS:
            self.heading = tag
        elif tag in ("td", "th"):
            self.cell = True
        elif tag == "li":
            self.bullet = "- "
        elif tag == "a":
            self.link = True
        elif tag == "br":
            self.parts.append(_BREAK)

    def handle_endtag(self, tag: str) -> None:
        if self.skipped:
            self.skip_depth -= tag == self.skipped
            if not self.skip_depth:
                self.skipped = ""
            return
        self.end_block(tag)
        self.pre = max(0, self.pre - (tag == "pre"))
        if tag == self.heading:
            self.heading = ""
        elif tag in ("td", "th"):
            self.parts.append(_CELL)
        elif tag == "tr":
            self.cell = False
        elif tag == "a":
            self.link = False

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.parts.append(data)
            self.link_chars += len(data.strip()) if self.link else 0

    def end_block(self, tag: str) -> None:
        """Ends the paragraph before the tag of a block; short paragraphs in a table's cell stay in their row."""
        if tag not in _BLOCKS:
            return
        if tag in ("p", "div") and self.cell and sum(len(part.strip()) for part in self.parts) < 200:
            self.parts.append(" ")
            return
        raw, links = "".join(self.parts), self.link_chars
        self.parts, self.link_chars = [], 0
        if self.pre:
            self.page.add(raw.replace(_CELL, " ").replace(_BREAK, "\n").strip("\n").rstrip())
        else:
            self._add_text(raw, links)

    def _add_text(self, raw: str, link_chars: int) -> None:
        cells = (" ".join(cell.split()) for cell in raw.replace("¶", "").split(_CELL))
        text = " | ".join(filter(None, cells))
        if not self.heading and len(text) < 300 and link_chars > 0.75 * len(text):
            return
        for part in re.split(rf"{_BREAK}\s*{_BREAK}[\s{_BREAK}]*", text):
            line = re.sub(rf"\s*{_BREAK}\s*", "\n", part).strip()
            if not line:
                continue
            self.page.add(line if self.heading else self.bullet + line, heading=self.heading != "")
            if not self.heading:
                self.bullet = ""


def paragraphs(raw: str) -> list[str]:
    """The paragraphs of an HTML page: cells of a row parted by " | ", items of lists behind "- "."""
    parser = _HtmlPage()
    parser.feed(raw)
    parser.close()
    parser.end_block("html")
    return parser.page.paragraphs
