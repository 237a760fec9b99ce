"""Paragraphs in the making."""


class Page:
    """Collects paragraphs; a heading waits for the paragraph that it belongs to."""

    def __init__(self) -> None:
        self.paragraphs: list[str] = []
        self.headings: list[str] = []

    def add(self, text: str, heading: bool = False) -> None:
        if not text.strip():
            return
        if heading:
            self.headings = [*self.headings[-1:], text.strip()]  # a longer run of them is a table of contents
        else:
            self.paragraphs.append("\n".join([*self.headings, text]))
            self.headings = []
