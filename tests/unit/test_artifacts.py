import json

import pytest

from offramp.artifacts import SCHEMA_VERSION, atomic_path, read_json, write_json
from offramp.errors import ArtifactError


def test_content_comes_back_without_the_version(tmp_path):
    content = {"name": "é", "values": [1, 2.5, None], "deep": {"a": True}}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    assert json.loads((tmp_path / "a.json").read_text())["schema_version"] == SCHEMA_VERSION


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_json_has_not_are_refused_before_anything_is_written(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"value": value})
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_keeps_the_old_content_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("{")
            assert temporary.parent == tmp_path
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert read_json(path) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_written_file_can_be_read_by_others(tmp_path):
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(ArtifactError, match="Choose a folder that can be written"):
        write_json(tmp_path / "missing" / "a.json", {})


def test_path_that_cannot_be_replaced(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ArtifactError, match="Cannot write"):
        write_json(tmp_path / "a.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged or no JSON"),
        ('{"schema_version": 1', "damaged or no JSON"),
        ("\udcff", "damaged or no JSON"),
        pytest.param("[" * 100_000, "damaged or no JSON", id="deep"),
        ('{"schema_version": 1, "a": NaN}', "damaged or no JSON"),
        ('{"schema_version": 1, "schema_version": 2}', "'schema_version' is there twice"),
        ("{}", "not an Offramp file"),
        ('{"schema_version": true}', "not an Offramp file"),
        ("[1]", "not an Offramp file"),
        ('{"schema_version": "1"}', "not an Offramp file"),
        (json.dumps({"schema_version": SCHEMA_VERSION + 1}), "pip install --upgrade offramp"),
    ],
)
def test_damaged_foreign_and_newer_files_are_refused(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtifactError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ArtifactError, match=r"Expected the file .*nowhere\.json, found none"):
        read_json(tmp_path / "nowhere.json")


def test_folder_in_place_of_a_file(tmp_path):
    with pytest.raises(ArtifactError, match="Cannot read"):
        read_json(tmp_path)
