"""The page's files, without a browser: they are installed, small, and load nothing from elsewhere."""

import html.parser
import re
import tomllib

import pytest
from conftest import ROOT

PAGE = ROOT / "jaxmodels" / "serving" / "page"
FILES = sorted(PAGE.iterdir())


class Elements(html.parser.HTMLParser):
    """All elements of a document, as (name, attributes)."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


ELEMENTS = Elements((PAGE / "index.html").read_text()).found


def test_all_files_are_installed():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["jaxmodels"]
    installed = {path for pattern in patterns for path in (ROOT / "jaxmodels").glob(pattern)}
    assert set(FILES) <= installed and {path.suffix for path in FILES} == {".html", ".css", ".js", ".svg"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_comes_from_another_host(path):
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")  # a name, which is not loaded
    assert not re.search(r"""https?:|@import|url\(|["'(]//""", text)
    assert len(text) < 20_000


def test_the_policy_forbids_what_the_page_does_not_need():
    (policy,) = (attributes["content"] for name, attributes in ELEMENTS if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "*" not in policy
    for name, attributes in ELEMENTS:
        assert name != "style" and "style" not in attributes and not any(key.startswith("on") for key in attributes), "an inline style or script"
        assert name != "script" or attributes["src"] == "page.js"
    scripts = "".join(path.read_text() for path in FILES if path.suffix == ".js")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", scripts)


def test_the_script_finds_every_element_that_it_names():
    known = {attributes["id"] for _, attributes in ELEMENTS if "id" in attributes}
    used = set(re.findall(r'\bat\("(\w+)"\)', (PAGE / "page.js").read_text())) | {"temperature", "top_p", "max_tokens", "seed"}
    assert used <= known
