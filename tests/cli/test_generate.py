"""`ddkit generate` as a person runs it."""

import json

import processes
import pytest
import torch
from click.testing import CliRunner

from ddkit.cli import main


def test_generate_from_real_writes_the_default_files(colors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["generate", "--dataset", colors, "--from-real", "random", "--ipc", "2", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tensor"] == "submission/colors.pt"
    assert torch.load(tmp_path / "submission" / "colors.pt", weights_only=True).shape == (4, 3, 16, 16)
    assert {path.name for path in (tmp_path / "submission").iterdir()} == {"colors.pt", "colors.json", "colors.png"}
    assert "next: ddkit refine submission/colors.pt" in done.stderr


def test_influence_guidance_is_announced_with_the_training_that_it_begins_with(colors, colors_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "--dataset", colors, "--model", str(colors_model), "--ipc", "1", "--sampling-steps", "2"]
    plain = CliRunner().invoke(main, [*words, "--out", "plain.pt"])
    guided = CliRunner().invoke(main, [*words, "--influence-guidance", "0.05"])
    assert (plain.exit_code, guided.exit_code) == (0, 0), plain.output + guided.output
    announced = "influence guidance 0.05 by a network trained on the real images once"
    assert announced in " ".join(guided.stderr.split()) and "influence guidance" not in plain.stderr
    described = " ".join(CliRunner().invoke(main, ["generate", "--help"]).output.split())
    assert "in minutes on a CPU; --influence-guidance trains another one." in described


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--dataset", "colors", "--ipc", "0"], 2, "0 is not in the range"),
        (["--dataset", "colours"], 2, "Did you mean 'colors'?"),
        (["--dataset", "colors"], 3, "ddkit train"),
        (["--dataset", "colors", "--out", "set.zip", "--from-real", "first"], 2, ".pt"),
        (["--dataset", "colors", "--from-real", "first", "--ipc", "6"], 2, "--ipc 5"),
        (["--dataset", "colors", "--sampler", "heun"], 2, "heun"),
        (["--dataset", "colors", "--select", "herding"], 2, "Selecting by herding needs candidates."),
        (["--dataset", "colors", "--from-real", "random", "--guidance", "3"], 2, "--guidance has no effect with --from-real"),
        (["--dataset", "colors", "--from-real", "first", "--precision", "float32"], 2, "--precision has no effect with"),
        (["--dataset", "colors", "--from-real", "first", "--candidates", "5"], 2, "chooses from all real ones"),
        (["--dataset", "colors", "--from-real", "first", "--select", "herding"], 2, "chooses from all real ones"),
        (["--dataset", "colors", "--from-real", "k-centers"], 2, "Did you mean 'k-center'?"),
        (["--dataset", "colors", "--influence-guidance", "-1"], 2, "--influence-guidance"),
        (["--dataset", "colors", "--from-real", "first", "--influence-guidance", "1"], 2, "--influence-guidance has no effect"),
    ],
)
def test_invalid_options_end_with_one_message(colors, tmp_path, monkeypatch, words, status, said):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["generate", *words])
    assert done.exit_code == status, done.output
    assert said in " ".join(done.output.split()) and "Traceback" not in done.output
    assert not (tmp_path / "submission").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--candidates", "20", "--select", "hering"], "Did you mean 'herding'?"),
        (["--guidance-interval", "0.9", "0.1"], "0.9 to 0.1"),
        (["--influence-guidance", "inf"], "influence_guidance must be a finite number"),
    ],
)
def test_invalid_sampling_ends_with_one_message(colors, colors_model, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["generate", "--dataset", colors, "--model", str(colors_model), *words])
    assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output
    assert not (tmp_path / "submission").exists()


def test_refined_set_is_not_replaced_without_the_option(colors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "--dataset", colors, "--from-real", "first", "--ipc", "2"]
    assert CliRunner().invoke(main, words).exit_code == 0
    facts = tmp_path / "submission" / "colors.json"
    facts.write_text(facts.read_text().replace("first-real", "refined"))
    before = (tmp_path / "submission" / "colors.pt").read_bytes()
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2 and "is a refined set" in done.output and "--out" in done.output
    assert (tmp_path / "submission" / "colors.pt").read_bytes() == before
    assert CliRunner().invoke(main, [*words, "--replace"]).exit_code == 0
    assert "first-real" in facts.read_text()


@pytest.mark.slow
def test_several_processes_make_the_same_sets_as_they_come_and_chosen(colors, colors_model, tmp_path):
    words = ["generate", "--dataset", colors, "--model", str(colors_model), "--ipc", "3", "--sampling-steps", "2"]
    chosen = [*words, "--candidates", "4", "--select", "random"]
    for name, command in (("all", words), ("chosen", chosen)):
        alone = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "alone" / name / "set.pt")])
        assert alone.exit_code == 0, alone.output
    both = "from ddkit.cli import main\n" + "".join(
        f"main({[*command, '--out', f'shared/{name}/set.pt', '--json']}, standalone_mode=False)\n"
        for name, command in (("all", words), ("chosen", chosen))
    )
    (tmp_path / "both.py").write_text(both)
    shared = processes.run_together("both.py", cwd=tmp_path)
    assert [process.returncode for process in shared] == [0, 0], shared
    shown = "".join(process.stdout for process in shared)
    decoder, said, place = json.JSONDecoder(), [], 0
    while place < len(shown.rstrip()):
        one, place = decoder.raw_decode(shown, place)
        said.append(one["tensor"])
        place += 1
    assert said == ["shared/all/set.pt", "shared/chosen/set.pt"], "one of them speaks"
    for name in ("all", "chosen"):
        sets = [torch.load(tmp_path / whose / name / "set.pt", weights_only=True) for whose in ("alone", "shared")]
        # Each process computes with one thread here, and so rounds differently.
        assert (sets[0] - sets[1]).abs().max() < 0.05 and sets[0].std() > 0.1
        assert {path.name for path in (tmp_path / "shared" / name).iterdir()} == {"set.pt", "set.json", "set.png"}


def test_complete_set_is_not_made_again(colors, colors_model, tmp_path):
    words = ["generate", "--dataset", colors, "--model", str(colors_model), "--ipc", "2", "--sampling-steps", "2"]
    words += ["--out", str(tmp_path / "set.pt")]

    def told(*more):
        done = CliRunner().invoke(main, [*words, *more])
        assert done.exit_code == 0, done.output
        return done.stderr

    assert "Sampling" in (first := told()) and "wrote" in first
    assert "Sampling" not in (again := told()) and "nothing was made" in again and "wrote" not in again
    assert "Sampling" in told("--replace")
    assert "Sampling" in told("--guidance", "2.5"), "which is another set"
