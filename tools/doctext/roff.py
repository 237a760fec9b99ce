r"""Readable paragraphs of manual pages: man(7) in, text out.

    paragraphs(".TH LS 1\n.SH NAME\nls \\- list files\n")      # ["NAME\nls - list files"]

It knows the macros and escapes that manual pages use and no others. Tables and equations are left out; pages in mdoc(7)
give nothing, since they have no .TH.
"""

import re

from doctext.page import Page

# Glyphs by their names in groff_char(7); the last character of each entry is the glyph.
_GLYPHS = {
    entry[:-1]: entry[-1]
    for entry in """em— en– bu• aq' cq’ oq‘ lq“ rq” dq" co© rs\\ ha^ ti~ ga` mi- mu× <=≤ >=≥ ->→ <-← +-± de° ssß :aä
 :oö :uü :AÄ :OÖ :UÜ Fo« Fc» Bq„ or| ba| ul_ at@ sh# hy- la< ra> lB[ rB] lC{ rC} sq' tm™ rg® L" R" C` C' --— Aq'
 'eé""".split()
}
_ESCAPE = re.compile(
    r"""\\(?:["#].*|\*?(?:\((?P<two>..)|\[(?P<name>[^\]]*)\])|\*.|[fFmMngk](?:\(..|\[[^\]]*\]|[+-]?.)|s[+-]?\d\d?"""
    r"""|[whvlLoDXZAbNS]'[^']*'|(?P<one>.)|$)"""
)
_TITLE = re.compile(r"(?m)^[.']\s*TH\b.*\n")
_BREAKS = frozenset("SH SS TP TQ IP PP P LP HP sp Sp RS RE nf fi EX EE Vb Ve YS".split())
_FONTS = frozenset("B I SM SB BI BR IB IR RB RI SY OP UR MT UE ME URL MTO".split())
_LEFT_OUT = {"TS": ".TE", "EQ": ".EN", "de": "..", "de1": "..", "am": "..", "ig": ".."}  # from macro to its end
_BULLETS = frozenset("•-*o ")


def paragraphs(raw: str) -> list[str]:
    """The paragraphs of a page; a heading is the first line of the paragraph behind it."""
    body = "".join(_TITLE.split(raw, maxsplit=1)[1:]).replace("\\\n", "")
    page = _ManPage()
    for line in body.split("\n"):
        page.read(line)
    return page.end()


def plain(text: str) -> str:
    """An input line, or an argument of a macro, without its escapes."""

    def replacement(match: re.Match[str]) -> str:
        glyph, one = match["two"] or match["name"] or "", match["one"] or ""
        if re.fullmatch(r"u[0-9A-F]{4,5}", glyph):
            return chr(int(glyph[1:], 16))
        spelled = {"e": "\\", "0": " ", "~": " ", "t": "\t"}.get(one, one if one in "- \\'`._" else "")
        return _GLYPHS.get(glyph, "") or spelled

    return _ESCAPE.sub(replacement, text)


def _arguments(rest: str) -> list[str]:
    pairs = re.findall(r'"((?:[^"]|"")*)"?|((?:\\ |\S)+)', re.sub(r'\\["#].*', "", rest))
    return [plain(quoted.replace('""', '"') or bare) for quoted, bare in pairs]


class _ManPage:
    """What the lines read so far have made, and in which mode the next one is read."""

    def __init__(self) -> None:
        self.page = Page()
        self.parts: list[str] = []  # of the paragraph under way
        self.fill = True  # False between .nf and .fi, where line ends count
        self.heading = False  # whether the next text is a heading: behind .TP, or an .SH of its own
        self.skip_to = ""

    def read(self, line: str) -> None:
        if self.skip_to:
            if line.replace(" ", "").startswith(self.skip_to):
                self.skip_to = ""
            return
        if not line.startswith((".", "'")):
            self._add(plain(line), blank=not line.strip())
            return
        macro, _, rest = line[1:].strip().partition(" ")
        if macro in _FONTS:
            self._add(_in_fonts(macro, _arguments(rest)))
        elif macro in ("if", "ie", "el"):
            # Conditions of one line only set strings; of the blocks those for terminals (n) are kept.
            if "\\{" in line and not re.match(r".\s*i[fe]\s+n\b", line):
                self.skip_to = ".\\}"
        elif macro in _LEFT_OUT:
            self.skip_to = _LEFT_OUT[macro]
        elif macro in _BREAKS:
            self._break(macro, rest)

    def end(self) -> list[str]:
        self._flush()
        return self.page.paragraphs

    def _add(self, text: str, blank: bool = False) -> None:
        self.parts.append(text)
        if (self.heading and text) or blank:
            self._flush(heading=self.heading)
            self.heading = False

    def _break(self, macro: str, rest: str) -> None:
        self._flush()
        if macro in ("nf", "EX", "Vb"):
            self.fill = False
        elif macro in ("fi", "EE", "Ve", "SH", "SS"):
            self.fill = True
        arguments = _arguments(rest) if macro in ("SH", "SS", "IP") else []
        title = " ".join(arguments[:1] if macro == "IP" else arguments)
        if not set(title) <= _BULLETS:
            self.page.add(title, heading=True)
        self.heading = macro in ("TP", "TQ") or (macro in ("SH", "SS") and not arguments)

    def _flush(self, heading: bool = False) -> None:
        filled = " ".join(" ".join(self.parts).split())
        self.page.add(filled if self.fill else "\n".join(self.parts).strip("\n").rstrip(), heading)
        self.parts.clear()


def _in_fonts(macro: str, arguments: list[str]) -> str:
    """The text of a font macro: those of two fonts (.BR) join their arguments, the others part them by spaces."""
    if macro in ("URL", "MTO") and len(arguments) > 1:  # address, text, punctuation
        return "".join([arguments[1] or arguments[0], *arguments[2:]])
    text = ("" if len(macro) == 2 and set(macro) <= set("BIR") else " ").join(arguments)
    return f"[{text}]" if macro == "OP" else text
