"""Pages as a browser reads them: valid, whole in themselves, and set as in print."""

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The text a page shows, the files it would fetch, and its tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.links, self.ids, self.headings = [], [], [], []
        self.alts, self.wrong, self.words, self._open = [], [], "", []
        self.feed(text)
        self.wrong += self._open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if len(given) < len(attrs) or (tag == "img" and not given.get("alt")):
            self.wrong.append((tag, attrs))
        self.sources += [given["src"]] if "src" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.ids += [given["id"]] if "id" in given else []
        self.alts += [given["alt"]] if "alt" in given else []
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.words += data
        if "h2" in self._open and self._open[-1] == "h2":
            self.headings.append(data)


def check(text):
    """A page with its contents, whole in itself: returned as `Page`."""
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert not page.wrong
    assert len(set(page.ids)) == len(page.ids)
    assert page.links == [f"#{i}" for i in page.ids]
    assert len(page.links) == len(page.headings) > 0
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "width=device-width" in text
    assert "prefers-color-scheme: dark" in text
    # Subscripts and signs, not what stands for them on a terminal.
    assert not re.search(r"\b[A-Za-z]_\w|<=|\be-\d", page.words + "".join(page.alts))
    return page
