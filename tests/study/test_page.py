import itertools
import re
from html.parser import HTMLParser

import pytest
from synthetic_study import made_up_recipe, made_up_results

from lightning_metaopt.study.gather import gather
from lightning_metaopt.study.page import page
from lightning_metaopt.study.provenance import machine, versions

EVIL = '<script>alert("x")</script> & co'
METHODS = {
    "SGD": (0.6, 0.05, False, 0.1),
    "Adam": (1.0, 0.04, False, 1e-3),
    "L2O, meta-trained": (1.1, 0.1, True, 1e-2),
    EVIL: (0.95, 0.06, False, None),
}
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Reader(HTMLParser):
    """Checks that tags are closed in order, and collects them."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    recipe = made_up_recipe(methods=METHODS)
    recipe.title = f"A title with {EVIL}"
    results = made_up_results(methods=METHODS)
    results["digits"]["L2O, meta-trained"].rules = {0: output / "rules" / "l2o-seed0.safetensors"}
    data = gather(recipe, results, 'lightning-metaopt run "made up.yaml"', output)
    data.record |= {"versions": versions(), "machine": machine()}
    return page(data, "title: a recipe\n")


@pytest.fixture(scope="module")
def read(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_it_needs_nothing_from_elsewhere(text, read):
    assert not [tag for tag, _, _ in read.tags if tag in ("script", "link", "iframe", "img")]
    assert "@import" not in text
    addresses = [value for _, attrs, _ in read.tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
    assert addresses
    assert not [address for address in addresses if re.match(r"(https?:)?//|data:", address)]
    assert not re.search(r"url\((?!#)", text)


def test_names_cannot_break_out(text, read):
    assert "<script" not in text
    assert EVIL in "".join(read.text)


def test_references_inside_the_page_are_right(text, read):
    ids = [attrs["id"] for _, attrs, _ in read.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    inside = [value[1:] for _, attrs, _ in read.tags for key, value in attrs.items() if "href" in key and value.startswith("#")]
    inside += re.findall(r"url\(#([^)]*)\)", text)
    assert set(inside) <= set(ids)
    assert len(inside) > 20


def test_it_can_be_read_without_seeing(read):
    tags = [(tag, attrs) for tag, attrs, _ in read.tags]
    assert [attrs for tag, attrs in tags if tag == "html"] == [{"lang": "en"}]
    assert [tag for tag, _ in tags].count("h1") == [tag for tag, _ in tags].count("main") == 1
    drawings = [attrs for tag, attrs in tags if tag == "svg"]
    assert all(attrs.get("aria-hidden") or (attrs["role"] == "img" and len(attrs["aria-label"]) > 20) for attrs in drawings)
    assert sum(attrs.get("role") == "img" for attrs in drawings) == 6 + 3 + 2 + 6 + 6
    heads = [attrs for tag, attrs in tags if tag == "th"]
    assert {attrs["scope"] for attrs in heads} == {"col", "row"}
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h\d", tag)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_wide_tables_scroll_in_their_own_frame(text, read):
    tables = [number for number, (tag, _, _) in enumerate(read.tags) if tag == "table"]
    assert len(tables) > 10
    for number in tables:
        tag, attrs, _ = read.tags[number - 1]
        assert (tag, attrs["class"], attrs["tabindex"]) == ("div", "scroll", "0")
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", text)
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text
    assert not [attrs for tag, attrs, _ in read.tags if tag == "svg" and attrs.get("role") == "img" and "width" in attrs]


def test_drawings_take_the_colour_and_font_of_the_page(text):
    drawings = re.findall(r'<svg role="img".*?</svg>', text, flags=re.DOTALL)
    colors = {color.lower() for drawing in drawings for color in re.findall(r"(?:fill|stroke): (#\w+)", drawing)}
    assert colors <= {style.lower() for style in re.findall(r'stroke="(#\w+)"', text)}
    assert all("currentColor" in drawing and "font-family" not in drawing and "<style" not in drawing for drawing in drawings)
    assert "prefers-color-scheme: dark" in text


def test_a_method_can_be_picked_out(text, read):
    names = {attrs["class"] for tag, attrs, path in read.tags if tag == "li" and attrs.get("class", "").startswith("method-")}
    assert len(names) == 4
    for name in names:
        assert f".legend .{name}:is(:hover, :focus)" in text
        assert any(tag == "g" and attrs.get("class") == name for tag, attrs, _ in read.tags)


def test_it_says_how_to_get_it_again(read):
    said = "".join(read.text)
    for part in (
        'lightning-metaopt run "made up.yaml"',
        f"torch {versions()['torch']}",
        "made-up digits (CC0-1.0)",
        "title: a recipe",
    ):
        assert part in said, part
    links = [attrs.get("href") for tag, attrs, _ in read.tags if tag == "a"]
    assert {"runs.csv", "summary.csv", "recipe.yaml", "rules/l2o-seed0.safetensors"} <= set(links)
