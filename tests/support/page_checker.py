"""Reads a page as a browser would: what it fetches, its ids and links, its text, and whether its tags close."""

from html.parser import HTMLParser

VOID = {"meta", "br", "path", "use", "rect", "line"}


class Checker(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.fetched, self.links, self.ids, self.open, self.words = [], [], [], [], []
        self.feed(page)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag in {"script", "img", "iframe", "link", "source"}:
            self.fetched += [found[key] for key in ("src", "href") if key in found]
        if tag == "a":
            self.links.append(found["href"])
        if "id" in found:
            self.ids.append(found["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        if "id" in dict(attributes):
            self.ids.append(dict(attributes)["id"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, text):
        if self.open and self.open[-1] not in {"style", "script"}:
            self.words.append(text)
