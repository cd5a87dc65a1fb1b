"""Runs that are shared, against a folder, a recorder of uploads, and a hub on a real socket."""

import hashlib
import json
import shutil
import threading
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from offramp.artifacts import write_json
from offramp.errors import ArtifactError, InvalidArgumentError
from offramp.model.checkpoint import save_weights
from offramp.policy.policies import PatiencePolicy, ThresholdPolicy, never_leave
from offramp.recipes.exits import find_recipe
from offramp.runs import hub
from offramp.runs.hub import SHARED_FILES, from_pretrained, pull, push_to_hub, save_pretrained
from offramp.runs.run import load, save, write_policy, write_recipe
from offramp.training import fit
from offramp.training.checkpoint_choice import CHOICE_FILE
from offramp.zoo.mlp import mlp

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FIGURES = {
    "recipe": "digits-mlp",
    "split": "test",
    "num_samples": 450,
    "accuracy": 0.95,
    "mean_macs": 900.0,
    "plain_macs": 1300,
    "final_exit_accuracy": 0.96,
    "plain_accuracy": None,
    "exits": [
        {"index": 0, "accuracy": 0.9, "share": 0.75, "macs": 800},
        {"index": 1, "accuracy": 0.96, "share": 0.25, "macs": 1200},
    ],
}

OF_PICTURES = set(SHARED_FILES) - {"tokenizer.json"}
"""What is shared of a run without a tokenizer of its own."""


def make_run(folder, *, data=None):
    """A run folder with what training, calibrating and exporting leave in it."""
    options = {"in_features": 64, "widths": (16, 8), "num_classes": 10}
    recipe = replace(find_recipe("digits-mlp"), network_options=options)
    (folder / "logs").mkdir(parents=True)
    (folder / "bundle").mkdir()
    for name in ("last.ckpt", "profile.json", "logs/events", "bundle/bundle.json"):
        (folder / name).write_text("stays at home")
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    write_json(folder / CHOICE_FILE, {"by": "ModelCheckpoint by 'val_loss'", "samples": ["0a"]})
    write_recipe(folder, recipe=recipe, class_names=tuple("0123456789"), data=data)
    torch.manual_seed(99)
    save_weights(mlp(**options), folder / "model.safetensors")
    write_policy(folder, ThresholdPolicy((0.75,)))
    return folder


def names_in(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def own_run(network, tmp_path):
    save(tmp_path / "own", network, policy=PatiencePolicy(2, 3), class_names=("a", "b", "c", "d"))
    return tmp_path / "own"


# Folders


def test_metrics_have_the_name_that_training_gives_them():
    assert hub._METRICS_FILE == fit.METRICS_FILE


def test_round_trip_gives_the_same_logits_policy_and_recipe(run, tmp_path):
    saved = save_pretrained(run, tmp_path / "shared")
    assert names_in(saved) == OF_PICTURES
    before, after = load(run), from_pretrained(saved)
    x = torch.randn(5, 64)
    assert all(map(torch.equal, before.network(x), after.network(x)))
    assert not after.network.training
    assert (after.policy, after.recipe) == (before.policy, before.recipe)
    assert after.class_names == before.class_names
    assert after.calibration == before.calibration


def test_a_loaded_run_can_be_saved_and_its_folder_may_be_given_as_text(run, tmp_path):
    saved = save_pretrained(load(run), str(tmp_path / "shared"))
    again = save_pretrained(from_pretrained(str(saved)), tmp_path / "again")
    for name in OF_PICTURES - {"README.md"}:
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_own_network_round_trip(own_run, network, tmp_path):
    saved = save_pretrained(own_run, tmp_path / "shared")
    found = from_pretrained(saved, mlp(in_features=6, widths=(5, 8, 7), num_classes=4))
    x = torch.randn(3, 6)
    assert torch.equal(found.network(x)[-1], network(x)[-1])
    assert found.policy == PatiencePolicy(2, 3)
    with pytest.raises(InvalidArgumentError, match=r"network=\.\.\."):
        from_pretrained(saved)


def test_where_the_data_lay_stays_at_home(tmp_path):
    run = make_run(tmp_path / "run", data="/somewhere/private")
    saved = save_pretrained(run, tmp_path / "shared")
    assert load(saved).data is None
    assert all(b"private" not in path.read_bytes() for path in saved.iterdir())


def test_the_word_that_downloads_the_data_travels(tmp_path):
    run = make_run(tmp_path / "run", data="emnist-balanced")
    recipe = replace(load(run).recipe, data="emnist47")
    write_recipe(run, recipe=recipe, class_names=(), data="emnist-balanced")
    assert load(save_pretrained(run, tmp_path / "shared")).data == "emnist-balanced"


def test_what_is_there_is_kept(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    for folder in (tmp_path / "full", tmp_path / "full" / "letter.txt"):
        with pytest.raises(ArtifactError, match="exists already"):
            save_pretrained(run, folder)
    with pytest.raises(ArtifactError, match="Cannot make"):
        save_pretrained(run, tmp_path / "full" / "letter.txt" / "shared")
    (tmp_path / "empty").mkdir()
    assert names_in(save_pretrained(run, tmp_path / "empty")) == OF_PICTURES


def test_a_failure_half_way_leaves_nothing(run, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copyfile", fail)
    before = names_in(tmp_path)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(run, tmp_path / "shared")
    assert names_in(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.json", None, "Expected a run folder"),
        ("recipe.json", b"{}", "schema_version"),
        ("model.safetensors", None, "not trained to the end|Cannot read the weights"),
        ("model.safetensors", b"\x80\x02pickle", "Cannot read the weights"),
        ("policy.json", b'{"schema_version": 2, "policy": {}}', "damaged"),
        ("policy.json", b"{", "damaged"),
    ],
)
@pytest.mark.parametrize("kind", ["run", "own_run"])
def test_a_damaged_run_is_not_shared(kind, name, content, message, tmp_path, request):
    folder = request.getfixturevalue(kind)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        save_pretrained(folder, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="Expected a run folder"):
        from_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match="Expected a run folder"):
        from_pretrained(tmp_path / "user")  # a Path is never a repository


# Uploads


@pytest.fixture
def uploads(monkeypatch):
    """Stands in for the hub's library; keeps what it was asked for, and the files sent."""
    seen = SimpleNamespace(created=[], sent={}, asked=None, token=None, was_private=True)

    class Recorder:
        def __init__(self, *, token, library_name, library_version):
            seen.token = token

        def create_repo(self, repo_id, *, private, exist_ok):
            seen.created.append((repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

        def model_info(self, repo_id):
            return SimpleNamespace(private=seen.was_private)

        def upload_folder(self, *, folder_path, **asked):
            seen.asked = asked
            seen.sent = {path.name: path.read_bytes() for path in hub.Path(folder_path).iterdir()}
            return SimpleNamespace(commit_url=f"https://hub/{asked['repo_id']}/commit/1")

    monkeypatch.setattr(hub, "HfApi", Recorder)
    return seen


def test_push_sends_what_save_pretrained_writes(run, tmp_path, uploads):
    address = push_to_hub(run, "user/digits", evaluation=FIGURES, private=True, token="secret")
    assert address == "https://hub/user/digits/commit/1"
    assert uploads.token == "secret"
    assert uploads.created == [("user/digits", True, True)]
    assert set(uploads.asked["allow_patterns"]) == set(SHARED_FILES)
    stale = set(uploads.asked["delete_patterns"])
    assert stale == {*SHARED_FILES, "bundle.json"}  # a repository is a run or a bundle
    saved = save_pretrained(run, tmp_path / "shared", evaluation=FIGURES, repo_id="user/digits")
    assert uploads.sent == {path.name: path.read_bytes() for path in saved.iterdir()}
    assert all(b"secret" not in content for content in uploads.sent.values())


def test_card_names_the_repository_in_full(run, uploads):
    push_to_hub(load(run), "digits")
    assert b'from_pretrained("me/digits")' in uploads.sent["README.md"]
    assert uploads.created == [("digits", None, True)]


def test_a_private_run_is_not_sent_to_a_public_repository(run, uploads):
    uploads.was_private = False
    with pytest.raises(ArtifactError, match="already and public"):
        push_to_hub(run, "user/digits", private=True)
    assert uploads.sent == {}


def test_nothing_is_made_on_the_hub_for_a_damaged_run_or_wrong_figures(run, uploads):
    with pytest.raises(InvalidArgumentError, match="figures"):
        push_to_hub(run, "user/digits", evaluation={})
    (run / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError):
        push_to_hub(run, "user/digits")
    assert uploads.created == []


# A hub on a real socket


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does where files of one repository are fetched; refuses to write."""

    files: dict[str, bytes]
    status, code = 200, ""

    def _answer(self, body=b"", *, status=200, etag="", code=""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.asked.append(self.path)
        about, files = "/api/models/user/digits", f"/user/digits/resolve/{COMMIT}/"
        name = self.path.removeprefix(files)
        if self.status != 200:
            self._answer(status=self.status, code=self.code)
        elif self.path in (f"{about}/revision/main", f"{about}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.files]
            state = {"id": "user/digits", "sha": COMMIT, "siblings": siblings}
            self._answer(json.dumps(state).encode())
        elif self.path.startswith(f"{about}/tree/{COMMIT}"):
            entry = {"type": "file", "size": 9, "oid": "1"}
            self._answer(json.dumps([entry | {"path": name} for name in self.files]).encode())
        elif name in self.files:
            etag = hashlib.sha1(self.files[name]).hexdigest()
            self._answer(self.files[name], etag=etag)
        elif self.path.startswith(about):
            self._answer(status=404, code="RevisionNotFound")
        else:
            self._answer(status=404, code="RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        self._answer(status=403)

    def log_message(self, *arguments):
        """Keep the tests quiet."""


@pytest.fixture
def server(run, tmp_path, monkeypatch):
    """A hub with one repository, user/digits, that holds a run and more."""
    saved = save_pretrained(run, tmp_path / "shared", evaluation=FIGURES)
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    files |= {"pytorch_model.bin": b"pickle", "logs/events": b"x"}
    handler = type("OneHub", (Hub,), {"files": files, "asked": []})
    served = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    endpoint = f"http://127.0.0.1:{served.server_port}"
    monkeypatch.setattr(hub, "HfApi", partial(huggingface_hub.HfApi, endpoint=endpoint))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield handler
    huggingface_hub.close_session()
    served.shutdown()
    served.server_close()
    thread.join()


def test_a_run_is_loaded_from_the_hub_and_then_from_its_cache(server, run, tmp_path, monkeypatch):
    found = from_pretrained("user/digits", cache_dir=tmp_path / "here")
    x = torch.randn(5, 64)
    assert all(map(torch.equal, found.network(x), load(run).network(x)))
    assert found.policy == load(run).policy
    assert names_in(found.folder) == OF_PICTURES
    assert not any("pytorch_model" in path or "events" in path for path in server.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert from_pretrained("user/digits", cache_dir=tmp_path / "here").folder == found.folder


def test_pull_makes_a_folder_that_can_be_calibrated_anew(server, tmp_path):
    folder = pull("user/digits", tmp_path / "mine", revision=COMMIT)
    assert names_in(folder) == OF_PICTURES
    assert not any(path.is_symlink() for path in folder.iterdir())
    write_policy(folder, never_leave(2))
    assert load(folder).policy == never_leave(2)
    assert from_pretrained("user/digits").policy == ThresholdPolicy((0.75,))
    with pytest.raises(ArtifactError, match="exists already"):
        pull("user/digits", tmp_path / "mine")


def test_a_repository_without_a_recipe_is_not_downloaded(server):
    del server.files["recipe.json"]
    with pytest.raises(ArtifactError, match="holds no Offramp run"):
        from_pretrained("user/digits")
    assert not any("safetensors" in path for path in server.asked)


def test_a_repository_without_weights_is_no_whole_run(server):
    del server.files["model.safetensors"]
    with pytest.raises(ArtifactError, match=r"no whole run: no model\.safetensors"):
        from_pretrained("user/digits")


def test_a_damaged_run_on_the_hub_is_not_pulled(server, tmp_path):
    server.files["model.safetensors"] = server.files["model.safetensors"][:-9]
    with pytest.raises(ArtifactError, match="Cannot read the weights"):
        pull("user/digits", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("source", "revision", "error", "message"),
    [
        ("user/nothing", None, ArtifactError, "There is no repository user/nothing"),
        ("user/digits", "v9", ArtifactError, "no such revision"),
        ("a/b/c", None, InvalidArgumentError, "'a/b/c', which is neither"),
        ("../digits", None, InvalidArgumentError, "which is neither"),
    ],
)
def test_what_the_hub_does_not_have(server, source, revision, error, message):
    with pytest.raises(error, match=message) as caught:
        from_pretrained(source, revision=revision)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "is gated. Ask for access"),
        (401, "", "auth login"),
        (403, "", "Cannot fetch user/digits .*403"),
    ],
)
def test_what_the_hub_does_not_show(server, status, code, message):
    server.status, server.code = status, code
    with pytest.raises(ArtifactError, match=message) as caught:
        from_pretrained("user/digits")
    assert "\n" not in str(caught.value)


def test_the_hub_refuses_a_push(server, run):
    with pytest.raises(ArtifactError, match=r"refuses user/digits: 403 .*auth login") as caught:
        push_to_hub(run, "user/digits")
    assert "\n" not in str(caught.value)


def test_without_a_network_it_fails_at_once(server, run, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ArtifactError, match=r"Cannot fetch user/digits .*HF_HUB_OFFLINE"):
        from_pretrained("user/digits")
    with pytest.raises(ArtifactError, match=r"about user/digits .*HF_HUB_OFFLINE"):
        push_to_hub(run, "user/digits")
    assert server.asked == []


def test_a_hub_that_is_down(run, tmp_path, monkeypatch):
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(hub, "HfApi", partial(huggingface_hub.HfApi, endpoint=nobody))
    with pytest.raises(ArtifactError, match="Cannot fetch user/digits"):
        from_pretrained("user/digits", cache_dir=tmp_path)
    with pytest.raises(ArtifactError, match="Talking to the hub about user/digits failed"):
        push_to_hub(run, "user/digits")
