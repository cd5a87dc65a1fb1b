"""The page on architecture shows the code as it is."""

import re
import runpy

import pytest


@pytest.fixture(scope="module")
def page(project):
    return (project / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_the_picture_is_that_of_the_imports(project):
    script = runpy.run_path(str(project / "docs" / "draw_floors.py"))
    drawn = (project / "docs" / "floors.svg").read_text(encoding="utf-8")
    assert script["draw"]() == drawn, "draw it anew: python docs/draw_floors.py"


def test_files_that_the_page_names_exist(project, page):
    named = re.findall(r"`([a-z_/]+\.py)`", page)
    places = [project, project / "src" / "offramp"]
    assert len(named) > 15
    for name in named:
        assert any((place / name).exists() for place in places), name


def test_names_that_the_page_gives_stand_in_those_files(project, page):
    pairs = re.findall(r"`([A-Za-z_]+)(?:\.[a-z_]+)?` \(?(?:in )?`([a-z_/]+\.py)`", page)
    assert len(pairs) > 8
    for name, file in pairs:
        text = (project / "src" / "offramp" / file).read_text(encoding="utf-8")
        assert name in text, (name, file)
