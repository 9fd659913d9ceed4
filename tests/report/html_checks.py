"""What a page must be: well-formed, complete in itself and labelled; each check returns the faults that it found."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
INLINE = {"a", "b", "code", "i", "span", "strong", "tspan", "wbr"}
LOADING = {"src", "srcset", "poster", "data", "action", "formaction", "background", "xlink:href"}


@dataclass(eq=False)
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    children: list[Element] = field(default_factory=list)
    text: str = ""  # before the first child
    tail: str = ""  # after the element itself

    def walk(self) -> list[Element]:
        return [self, *(e for child in self.children for e in child.walk())]

    def all(self, tag: str) -> list[Element]:
        return [e for e in self.walk() if e.tag == tag]

    @property
    def words(self) -> str:
        """All text below the element in order of the tree, blanks collapsed."""
        return re.sub(r"\s+", " ", self._words()).strip()

    def _words(self) -> str:
        around = "" if self.tag in INLINE else " "
        return around + self.text + "".join(child._words() + child.tail for child in self.children) + around


class Page(HTMLParser):
    """A tree of elements, and what was wrong on the way."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Element("#page", {})
        self.at = self.root
        self.faults: list[str] = []
        self.doctype = ""
        self.feed(text)
        self.close()
        self.faults += [f"<{e.tag}> is never closed" for e in self._open()]

    def _open(self) -> list[Element]:
        chain, at = [], self.at
        while at.parent is not None:
            chain.append(at)
            at = at.parent
        return chain

    def handle_decl(self, decl: str) -> None:
        self.doctype = decl

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        self.faults += [f"<{tag}> has {name} twice" for name in set(names) if names.count(name) > 1]
        element = Element(tag, {name: value or "" for name, value in attrs}, self.at)
        self.at.children.append(element)
        if tag not in VOID:
            self.at = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.at = self.at.parent or self.root

    def handle_endtag(self, tag: str) -> None:
        if self.at.tag != tag:
            self.faults.append(f"</{tag}> closes <{self.at.tag}>")
        elif self.at.parent is not None:
            self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        if self.at.children:
            self.at.children[-1].tail += data
        else:
            self.at.text += data


def form_faults(page: Page) -> list[str]:
    """Unclosed or crossed elements, double identifiers, anchors to nowhere, a missing doctype."""
    ids = [e.attributes["id"] for e in page.root.walk() if "id" in e.attributes]
    faults = page.faults + [f"id {name} stands twice" for name in set(ids) if ids.count(name) > 1]
    targets = [e.attributes.get("href", "") for e in page.root.all("a")]
    targets += [f"#{e.attributes['aria-labelledby']}" for e in page.root.walk() if "aria-labelledby" in e.attributes]
    faults += [f"{target} leads nowhere" for target in targets if target[1:] not in ids]
    return faults if page.doctype.lower() == "doctype html" else [*faults, "no doctype"]


def loads(page: Page) -> list[str]:
    """Everything that would be fetched or run when the page is opened."""
    found = []
    for element in page.root.walk():
        if element.tag in ("script", "link", "iframe", "object", "embed", "img", "base", "form"):
            found.append(f"<{element.tag}>")
        for name, value in element.attributes.items():
            if name in LOADING or name.startswith("on") or (name == "href" and not value.startswith("#")):
                found.append(f"{name}={value}")
            if name == "style" and "url(" in value:
                found.append(value)
        if element.tag == "style":
            found += re.findall(r"@import[^;]*|url\([^)]*\)", element.text)
    return found


def label_faults(page: Page) -> list[str]:
    """Tables without caption or scopes, pictures that are neither labelled nor hidden, headings that skip a level."""
    faults = [f"table {t.words[:30]} has no caption" for t in page.root.all("table") if not t.all("caption")]
    faults += [f"header {h.words} has no scope" for h in page.root.all("th") if "scope" not in h.attributes]
    for picture in page.root.all("svg"):
        inner = picture.parent is not None and picture.parent.tag == "svg"
        hidden = picture.attributes.get("aria-hidden") == "true"
        labelled = picture.attributes.get("role") == "img" and bool(picture.attributes.get("aria-label"))
        if not (inner or hidden or labelled):
            faults.append("a picture has neither a label nor aria-hidden")
    levels = [int(e.tag[1]) for e in page.root.walk() if re.fullmatch(r"h[1-6]", e.tag)]
    faults += [f"h{a} is followed by h{b}" for a, b in pairwise(levels) if b > a + 1]
    return faults if levels.count(1) == 1 else [*faults, f"{levels.count(1)} first headings"]
