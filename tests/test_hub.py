"""Uploads to the hub, against a server of our own that answers four requests: create, check, prepare, commit."""

import base64
import functools
import http.server
import json
import threading

import jax
import numpy as np
import pytest
import tiny
from huggingface_hub import ModelCard, constants

from pats_jax import TextClassifier, glue, models
from pats_jax.errors import InputError
from pats_jax.programs import cli
from pats_jax.run.settings import Settings

TOKEN = "hf_of_nobody"


class Hub:
    """What the server holds: commits by repository, each a dict of files, and what was asked of it."""

    def __init__(self):
        self.commits, self.created, self.asked, self.refuses = {}, [], [], None

    def answer(self, path, headers, body):
        """Status and JSON."""
        self.asked.append(path)
        if self.refuses:
            return 403, {"error": self.refuses}
        if headers["Authorization"] != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'me'}/{asked['name']}"
            found = {"url": f"{self.address}/{name}", "id": name}
            if name in self.commits:
                return 409, found
            self.commits[name] = []
            self.created.append(asked)
            return 200, found
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name, _, kind = path.removeprefix("/api/models/").partition("/main")[0].rpartition("/")
        if kind == "preupload":
            paths = [one["path"] for one in json.loads(body)["files"]]
            return 200, {"files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in paths]}
        assert kind == "commit", path
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"
        }
        self.commits[name].append(files)
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}


class Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, hub, *args):
        self.hub = hub
        super().__init__(*args)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status, said = self.hub.answer(self.path.partition("?")[0], self.headers, body)
        text = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    found = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, found))
    found.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", found.address)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny.save_checkpoint(home / "base")
    tiny.write_sst2(home / "data")
    return home


def settings(home, folder, **more):
    given = dict(model_name_or_path=str(home / "base"), task_name="sst2", data_dir=str(home / "data"), max_steps=1)
    given |= dict(max_seq_length=16, per_device_train_batch_size=8, length_buckets=1, num_devices=1, seed=7)
    return Settings(**given, output_dir=str(folder), **more)


@pytest.fixture(scope="module")
def finished(home):
    """A finished run that was not uploaded."""
    glue.run(settings(home, home / "run"))
    (home / "run" / "model" / "notes.env").write_text("SECRET=1")  # what somebody put there
    return home / "run"


def resumed(home, **more):
    return settings(home, home / "run", resume=True, push_to_hub=True, **more)


def test_a_run_uploads_its_model_and_a_card_and_nothing_else(hub, home, finished):
    glue.run(resumed(home, hub_model_id="team/praise", hub_private_repo=True))
    assert hub.created == [{"name": "praise", "organization": "team", "visibility": "private"}]
    (files,) = hub.commits["team/praise"]
    model = {path.name: path.read_bytes() for path in (finished / "model").iterdir() if path.name != "notes.env"}
    card = files.pop("README.md").decode()
    assert files == model and {"config.json", "model.safetensors", "tokenizer_config.json"} <= files.keys()
    everything = card.encode() + b"".join(files.values())
    assert str(home).encode() not in everything and TOKEN.encode() not in everything
    loaded = ModelCard(card)
    assert loaded.data.pipeline_tag == "text-classification" and loaded.data.model_name == "praise"
    assert card.count("team/praise") == 3 and "# praise\n" in card and "| max_steps | `1` |" in card
    assert "base fine-tuned on sst2, by pats-jax with `--method finetune`, seed 7, steps 1." in card


def test_an_upload_is_a_model_that_loads(hub, home, finished, tmp_path):
    glue.run(resumed(home))
    (files,) = hub.commits["me/run"]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    _, params, config = models.from_pretrained(tmp_path)
    _, expected, same = models.from_pretrained(finished / "model")
    assert config == same
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(expected)))


def test_a_second_upload_is_a_second_commit(hub, home, finished):
    glue.run(resumed(home))
    glue.run(resumed(home))
    assert len(hub.commits["me/run"]) == 2 and len(hub.created) == 1


def test_an_estimator_uploads_its_model(hub, home, finished):
    classifier = TextClassifier.load(finished / "model")
    assert classifier.push_to_hub("me/mine", token=TOKEN) == f"{hub.address}/me/mine"
    (files,) = hub.commits["me/mine"]
    assert files["model.safetensors"] == (finished / "model" / "model.safetensors").read_bytes()
    assert "text_estimator.json" not in files and b"Not evaluated." in files["README.md"]
    assert b"do_train" not in files["README.md"]


def refused(args, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    said = capsys.readouterr().err.strip()
    assert caught.value.code == 2 and "\n" not in said
    return said


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--push_to_hub: no token of the hub; run `hf auth login`, or set HF_TOKEN"),
        (["--hub_model_id", "a/b/c"], "--push_to_hub: 'a/b/c' cannot name a repository; write USER/NAME"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_training(flags, message, hub, home, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    args = ["glue", "--task_name", "sst2", "--model_name_or_path", str(home / "base"), "--output_dir"]
    monkeypatch.setattr(glue, "carry_out", None)
    assert refused([*args, str(tmp_path / "run"), "--push_to_hub", *flags], capsys) == f"pats-jax: error: {message}"
    assert not (tmp_path / "run").exists() and hub.asked == []


def test_other_wrong_flags(hub, home, tmp_path, monkeypatch, capsys):
    args = ["glue", "--task_name", "sst2", "--model_name_or_path", str(home / "base")]
    assert "--hub_model_id: needs --push_to_hub" in refused([*args, "--hub_model_id", "a/b"], capsys)
    grid = ["compare", "--methods", "pats", "--tasks", "sst2", "--seeds", "1", "--output_dir", str(tmp_path / "grid")]
    assert "--push_to_hub: upload one run" in refused([*grid, "--push_to_hub"], capsys)
    assert "--push_to_hub: a gym keeps no model to upload" in refused(["gym", "--push_to_hub"], capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "--push_to_hub: HF_HUB_OFFLINE is set" in refused([*args, "--push_to_hub"], capsys)


def test_a_refusal_of_the_hub_leaves_a_complete_run(hub, home, finished, monkeypatch):
    hub.refuses = "You may not write here"
    with pytest.raises(InputError) as caught:
        glue.run(resumed(home))
    said = str(caught.value)
    assert said.startswith("--push_to_hub: the hub refused 'run': ") and "You may not write here" in said
    assert said.endswith(f"; the run is complete in {finished}: repeat it with --resume") and "\n" not in said
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="^--push_to_hub: the hub cannot be reached: "):
        glue.run(resumed(home))
    with pytest.raises(InputError, match="^push_to_hub: no token of the hub"):
        monkeypatch.delenv("HF_TOKEN")
        TextClassifier.load(finished / "model").push_to_hub("me/mine")
