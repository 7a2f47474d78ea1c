"""Pages of HTML, read back."""

from html.parser import HTMLParser


class Checker(HTMLParser):
    """Every element that is opened is closed in its turn; collects text and addresses."""

    VOID = frozenset({"meta", "img", "br", "line", "polyline"})

    def __init__(self):
        super().__init__()
        self.open, self.text, self.addresses = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag, attrs):
        assert tag in self.VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read_page(html, links=()):
    """The texts of a page, which holds pictures and the ``links`` alone."""
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    others = [a for a in checker.addresses if not a.startswith("data:image/png;base64,")]
    assert others == list(links)
    assert "http" not in html
    assert "<script" not in html
    return " ".join(checker.text), checker
