"""convert.py from the command line: what it prints on stdout and stderr, and one clear line for every mistake."""

import pytest
from huggingface_hub import ModelCard

import convert
import generate
from src.checkpoint import save_checkpoint
from src.config import run
from src.interop.formats import read_source
from src.tokenizer import ByteLevelTokenizer


@pytest.fixture
def mine(tiny, tmp_path):
    model = tiny(vocab_size=259, recursion="none", norm="pre")
    save_checkpoint(tmp_path / "mine", model, ByteLevelTokenizer())
    return tmp_path / "mine"


def test_there_and_back_and_a_text(mine, tmp_path, capsys):
    convert.main([str(mine), str(tmp_path / "m.bin"), "--to", "llama2c"])
    out = capsys.readouterr()
    assert out.out == f"{tmp_path / 'm.bin'}\n"
    assert "a checkpoint of this project" in out.err and "none, 12.7K weights, 259 tokens" in out.err
    assert f"{tmp_path / 'm.tokenizer.bin'} is its tokenizer: pass it to run.c with -z" in out.err
    assert "run.c puts a space before a prompt" in out.err
    convert.main([str(tmp_path / "m.bin"), str(tmp_path / "back")])
    assert "a legacy .bin of llama2.c" in capsys.readouterr().err
    texts = []
    for folder, prompt in ((mine, " ab"), (tmp_path / "back", "ab")):
        generate.main([str(folder), "--prompt", prompt, "--max_new_tokens", "9", "--temperature", "0"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == " " + texts[1] and texts[1].startswith("ab")


def test_hub_says_how_to_upload(mine, tmp_path, capsys):
    convert.main([str(mine), str(tmp_path / "hub"), "--to=hub"])
    assert f"hf upload NAME/OF_REPOSITORY {tmp_path / 'hub'}" in capsys.readouterr().err
    assert "license" not in (tmp_path / "hub" / "README.md").read_text()


def test_a_licence_by_flag_stays_with_the_model(mine, tmp_path):
    convert.main([str(mine), str(tmp_path / "hub"), "--to", "hub", "--license", "mit"])
    convert.main([str(tmp_path / "hub"), str(tmp_path / "hf"), "--to", "hf"])
    for folder in ("hub", "hf"):
        assert ModelCard.load(tmp_path / folder / "README.md").data.license == "mit"
    assert read_source(tmp_path / "hf").info["license"] == "mit"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "0 paths given"),
        (["{mine}"], "1 paths given"),
        (["{mine}", "a", "b"], "3 paths given"),
        (["nowhere", "{tmp}/out"], "there is no nowhere"),
        (["{tmp}", "{tmp}/out"], "is neither a checkpoint"),
        (["{mine}", "{mine}"], "mine exists"),
        (["{mine}", "{tmp}/out", "--to", "onnx"], "--to onnx"),
        (["{mine}", "{tmp}/out", "--tokeniser", "byte"], "did you mean --tokenizer"),
        (["{mine}", "{tmp}/out", "--tokenizer", "{tmp}/no.json"], "no.json"),
        (["{mine}/config.json", "{tmp}/out"], "config.json is none of the known formats"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(mine, tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        run(lambda: convert.main([word.format(mine=mine, tmp=tmp_path) for word in words]))
    out = capsys.readouterr()
    assert caught.value.code == 2 and out.out == ""
    assert said in out.err.splitlines()[-1] and out.err.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()
