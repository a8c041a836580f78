"""Generators and sets go to a hub and come back, over real HTTP to a small hub on the loopback address."""

import json
import shutil
from pathlib import PureWindowsPath

import huggingface_hub.constants
import pytest
import torch
import yaml
from click.testing import CliRunner
from hub_server import READER, WRITER, serve_hub
from PIL import Image

import ddkit
from ddkit.cli import main
from ddkit.errors import HubError, InvalidSubmissionError, MissingDataError, MissingModelError, UsageError
from ddkit.generator.model_facts import find_model
from ddkit.generator.model_folder import load_model
from ddkit.generator.pretrained import load_generator
from ddkit.results import Result, append
from ddkit.runtime.files import sha256_of

SET, MODEL = "team/squares", "team/colors-generator"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with nobody's token, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with serve_hub() as served:
        # The library reads its environment when it is imported, which is long ago.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield served


@pytest.fixture
def made(colors, hub, tmp_path):
    """A set of two blue and two red images."""
    return ddkit.generate("colors", ipc=2, from_real="first", out=tmp_path / "submission" / "colors.pt").path


@pytest.fixture
def log_in(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRITER)


def run(*words):
    done = CliRunner().invoke(main, [str(word) for word in words])
    return done.exit_code, done.stdout, done.stderr


def test_set_comes_back_bit_for_bit_with_its_provenance(hub, log_in, made, tmp_path):
    url = ddkit.push(made, SET, license="cc-by-4.0")
    assert url == f"{hub.url}/datasets/{SET}"
    assert set(hub.files["dataset", SET]) >= {"README.md", "colors.pt", "colors.json", "colors.png"}
    pulled = ddkit.pull(SET, tmp_path / "theirs" / "colors.pt")
    assert pulled.sha256 == sha256_of(made)
    assert pulled.provenance["selection"] == "first" and pulled.provenance["hub"].startswith(f"{SET}@")
    with Image.open(tmp_path / "theirs" / "colors.png") as sheet:
        assert sheet.width > 90


def test_pull_over_a_json_that_is_no_sets_is_refused(hub, log_in, made, tmp_path):
    ddkit.push(made, SET)
    own = tmp_path / "notes.json"
    own.write_text('{"mine": 1}')
    with pytest.raises(UsageError, match="notes.json does not belong to a set"):
        ddkit.pull(SET, tmp_path / "notes.pt")
    assert own.read_text() == '{"mine": 1}'
    assert ddkit.pull(SET, tmp_path / "notes.pt", replace=True).path.exists()


def test_model_on_the_hub_is_sampled_by_its_id(hub, log_in, colors_model, tmp_path):
    (colors_model / "checkpoints").mkdir()
    (colors_model / "checkpoints" / "state.pt").write_bytes(b"pickled")
    ddkit.push(colors_model, MODEL)
    assert not [path for path in hub.files["model", MODEL] if "checkpoints" in path or path.endswith(".pt")]
    words = ("generate", "--dataset", "colors", "--ipc", 2, "--sampling-steps", 2)
    assert run(*words, "--model", MODEL, "--out", "theirs.pt")[0] == 0
    assert run(*words, "--model", colors_model, "--out", "ours.pt")[0] == 0
    assert sha256_of("theirs.pt") == sha256_of("ours.pt")
    model = json.loads((tmp_path / "theirs.json").read_text())["model"]
    assert model.startswith(f"{MODEL}@") and str(tmp_path) not in model
    assert load_generator(MODEL).class_names == load_generator(str(colors_model)).class_names


def test_second_download_takes_the_weights_from_the_cache(hub, log_in, colors_model):
    ddkit.push(colors_model, MODEL)
    first = find_model(MODEL)
    del hub.requests[:]
    assert find_model(MODEL) == first
    assert not [path for _, path in hub.requests if path.endswith(".safetensors")]


def test_model_in_the_cache_needs_no_network(hub, log_in, colors_model, monkeypatch):
    ddkit.push(colors_model, MODEL)
    first = find_model(MODEL)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert find_model(MODEL) == first and load_model(first).facts.dataset == "colors"
    assert find_model(PureWindowsPath(MODEL)) == first, "a path, as the options of commands are"


def test_pushing_again_uploads_only_what_changed(hub, log_in, colors_model):
    ddkit.push(colors_model, MODEL)
    del hub.requests[:]
    ddkit.push(colors_model, MODEL, license="mit")
    assert not [path for method, path in hub.requests if method == "PUT"]
    assert b"license: mit" in hub.files["model", MODEL]["README.md"]


def test_private_repository_is_not_shown_to_others(hub, log_in, made, monkeypatch):
    ddkit.push(made, SET, private=True)
    assert ddkit.pull(SET, "mine.pt", dataset="colors").ipc == 2
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(MissingDataError, match="does not have it, or does not show it to you"):
        ddkit.pull(SET, "theirs.pt")


class TestCards:
    def metadata(self, card):
        _, head, text = card.split("---\n", 2)
        return yaml.safe_load(head), text

    def test_card_of_a_set_has_its_license_scores_and_settings(self, hub, made, tmp_path):
        sha256 = sha256_of(made)
        record = {"name": "ours", "dataset": "colors", "track": 1, "source": "x.pt", "images": 4,
                  "images_per_class": (2, 2), "epochs_setting": 5, "date": "2026-11-28T10:00:00"}  # fmt: skip
        append(Result(**record, sha256=sha256, accuracies=(0.25, 0.35), deviations=("E = 5 | <b>",)), tmp_path / "r.jsonl")
        append(Result(**record, sha256="another", accuracies=(0.9,)), tmp_path / "r.jsonl")
        words = ("push", made, SET, "--license", "cc0-1.0", "--results", tmp_path / "r.jsonl", "--dry-run")
        status, shown, _ = run(*words, "--json")
        assert status == 0 and not hub.requests, "a dry run needs no network"
        head, text = self.metadata(json.loads(shown)["card"])
        assert head["license"] == "cc0-1.0" and head["size_categories"] == ["n<1K"] and "dataset-distillation" in head["tags"]
        assert "| colors | 1 | 30.00 % |" in text and "90.00" not in text
        assert "E = 5 &#124; &lt;b&gt;" in text, "texts of records are escaped"
        assert '"selection": "first"' in text and sha256 in text and "colors.png" in text
        assert "first" in run(*words)[1], "the same card is shown to people"

    def test_card_names_no_folder_of_this_machine(self, hub, log_in, made):
        files = made.with_suffix(".json")
        files.write_text(json.dumps({**json.loads(files.read_text()), "model": str(made.parent / "run"), "seed": 3}))
        ddkit.push(made, SET)
        uploaded = hub.files["dataset", SET]
        assert all(str(made.parent).encode() not in data for data in uploaded.values())
        assert json.loads(uploaded["colors.json"])["model"] == "run"

    def test_recipe_of_a_set_is_uploaded_with_it(self, hub, log_in, made):
        made.with_name("recipe.toml").write_text(f'[sets]\ncolors = "{sha256_of(made)}"\n')
        ddkit.push(made, SET)
        uploaded = hub.files["dataset", SET]
        assert uploaded["recipe.toml"] == made.with_name("recipe.toml").read_bytes()
        assert b"ddkit enter --recipe recipe.toml" in uploaded["README.md"]

    def test_card_of_a_model_lists_the_scores_of_its_sets(self, hub, colors_model, tmp_path):
        from ddkit.generator.model_facts import model_hash

        made_by = {"model_sha256": model_hash(colors_model)}
        result = Result(name="ours", dataset="colors", track=1, sha256="s", source="x.pt", images=4, images_per_class=(2, 2),
                        epochs_setting=5, accuracies=(0.5, 0.6), made_by=made_by)  # fmt: skip
        append(result, tmp_path / "r.jsonl")
        _, shown, _ = run("push", colors_model, MODEL, "--results", tmp_path / "r.jsonl", "--dry-run", "--json")
        card = json.loads(shown)
        head, text = self.metadata(card["card"])
        assert head["license"] == "unknown" and head["library_name"] == "diffusers" and card["kind"] == "model"
        assert "| colors | 1 | 55.00 % |" in text and f"ddkit generate --dataset colors --model {MODEL}" in text


class TestRefusals:
    @pytest.mark.parametrize("words", [("push", "submission/colors.pt", "squares"), ("pull", "a/b/c")])
    def test_text_that_is_no_id_is_wrong_usage(self, hub, made, words):
        status, _, said = run(*words)
        assert status == 2 and "is not an id on the Hugging Face hub" in said and "user/name" in said

    def test_push_without_a_token_says_how_to_log_in(self, hub, made):
        status, _, said = run("push", made, SET)
        assert status == 3 and "not logged in" in said and "hf auth login" in said and not hub.requests

    def test_push_with_a_token_that_may_not_write_says_so(self, hub, made, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", READER)
        with pytest.raises(HubError, match="the hub says: You don't have the rights.*token that may write"):
            ddkit.push(made, SET)

    def test_push_without_a_network_says_so(self, hub, log_in, made, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(HubError, match="'team/squares' cannot be written on the hub.*Run the same command again"):
            ddkit.push(made, SET)

    def test_license_that_the_hub_does_not_know_is_refused_in_its_words(self, hub, log_in, made):
        with pytest.raises(HubError, match="the hub says: .license. must be one of our list.$"):
            ddkit.push(made, SET, license="my own")

    def test_second_set_in_a_repository_is_refused(self, hub, log_in, made):
        hub.files["dataset", SET] = {"cifar100.pt": b""}
        with pytest.raises(UsageError, match="holds another set, cifar100.pt"):
            ddkit.push(made, SET)
        assert set(hub.files["dataset", SET]) == {"cifar100.pt"}

    def test_push_of_a_folder_without_a_model_is_wrong_usage(self, hub, tmp_path):
        with pytest.raises(UsageError, match="holds no generator: it has no ddkit.json"):
            ddkit.push(tmp_path, MODEL)

    def test_pull_of_what_is_no_set_says_what_it_holds(self, hub):
        hub.files["dataset", SET] = {"train.parquet": b"", "README.md": b""}
        with pytest.raises(MissingDataError, match="not one distilled set: it holds no .pt file.*hf download"):
            ddkit.pull(SET)

    def test_pull_of_an_unknown_id_says_so(self, hub):
        status, _, said = run("pull", "nobody/nothing")
        assert status == 3 and "'nobody/nothing' cannot be downloaded: the hub does not have it" in said and "--model" in said

    def test_pull_executes_nothing(self, hub, colors, tmp_path):
        class Hostile:
            def __reduce__(self):
                return (open, (str(tmp_path / "executed"), "w"))

        torch.save([Hostile()], tmp_path / "hostile.pt")
        hub.files["dataset", SET] = {"colors.pt": (tmp_path / "hostile.pt").read_bytes()}
        with pytest.raises(InvalidSubmissionError, match="colors.pt"):
            ddkit.pull(SET)
        assert not (tmp_path / "executed").exists() and not (tmp_path / "submission").exists()

    def test_provenance_that_names_a_folder_as_its_dataset_is_refused(self, hub, log_in, made):
        ddkit.push(made, SET)
        files = hub.files["dataset", SET]
        files["colors.json"] = json.dumps({**json.loads(files["colors.json"]), "dataset": "../../colors"}).encode()
        with pytest.raises(UsageError, match="cannot be a dataset's name"):
            ddkit.pull(SET)

    def test_pull_keeps_another_set_that_is_there(self, hub, log_in, made, tmp_path):
        ddkit.push(made, SET)
        shutil.copy(made, tmp_path / "mine.pt")
        with (tmp_path / "mine.pt").open("ab") as file:
            file.write(b"changed")
        before = sha256_of(tmp_path / "mine.pt")
        with pytest.raises(UsageError, match="mine.pt is another set, which would be lost.*--replace"):
            ddkit.pull(SET, tmp_path / "mine.pt")
        assert sha256_of(tmp_path / "mine.pt") == before
        assert ddkit.pull(SET, tmp_path / "mine.pt", dataset="colors", replace=True).sha256 == sha256_of(made)

    def test_model_id_of_something_else_downloads_no_weights(self, hub):
        hub.files["model", MODEL] = {"model_index.json": b"{}", "vae/diffusion_pytorch_model.safetensors": b"0" * 100}
        with pytest.raises(MissingModelError, match="is not a generator of ddkit: it has no ddkit.json"):
            find_model(MODEL)
        assert not [path for _, path in hub.requests if path.endswith(".safetensors")]

    def test_path_in_a_folder_that_is_here_is_not_looked_up(self, hub, tmp_path):
        (tmp_path / "runs").mkdir()
        with pytest.raises(MissingModelError, match="runs/colours does not hold a complete model"):
            load_model(find_model("runs/colours"))
        assert not hub.requests
