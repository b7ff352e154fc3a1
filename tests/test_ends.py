"""Begin and end tokens come from the tokenizer: every front end stops at any of its end tokens, and prints none."""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from texts import BYTE
from transformers import AutoConfig

import generate
import train_classifier
from src.checkpoint import load_model, own_state, save_checkpoint
from src.data.tokenizer_training import train_sentencepiece
from src.errors import UserError
from src.evaluation.evaluation import sample_text
from src.evaluation.harness import Answers
from src.evaluation.scoring import Size, corpus_windows, encode_pair, score_corpus
from src.evaluation.trace import Trace
from src.interop.formats import read_source, write
from src.interop.hf_llama import write_hf
from src.tasks.classification import Example, encode
from src.tokenizer import ByteLevelTokenizer, HFTokenizer, read_tokenizer

N, END = 9, 3  # number of new tokens, and index of the one that is an end token


@pytest.fixture
def ends_early(tiny):
    """Returns (model, tokenizer, text): the fourth token after "ab" is an end token; text is "ab" and three tokens."""
    model = tiny(vocab_size=259, recursion="none", norm="pre", seed=4, embed_mean=0.0)
    prompt = torch.tensor([BYTE.encode("ab", bos=True)])
    new = model.generate(prompt, N, temperature=0)[0, 3:].tolist()
    assert new[END] not in new[:END]
    return model, ByteLevelTokenizer().set_ends(ends=[new[END]]), "ab" + BYTE.decode(new[:END])


@pytest.fixture
def folder(ends_early, tmp_path):
    save_checkpoint(tmp_path / "model", *ends_early[:2])
    return tmp_path / "model"


class TestEveryFrontEnd:
    @pytest.mark.parametrize("others", [[], ["ab", "longer text"]])
    def test_generate(self, ends_early, folder, others, capsys):
        words = ["--max_new_tokens", str(N), "--temperature", "0", "--prompt", "ab"]
        generate.main([str(folder), *words, *others])
        assert capsys.readouterr().out.split("\n\n")[0].removesuffix("\n") == ends_early[2]

    def test_trace(self, ends_early):
        model, tokenizer, _ = ends_early
        trace, ids = Trace(tokenizer), torch.tensor([tokenizer.encode("ab", bos=True)] * 2)
        model.generate(ids, N, temperature=0, thoughts=trace)  # no eos_id: does not stop at the end
        assert len(trace) == END + 1 and trace[-1]["token"] == tokenizer.end_ids[1]

    def test_harness(self, ends_early):
        model, tokenizer, text = ends_early
        request = SimpleNamespace(args=("ab", {"max_gen_toks": N}))
        assert Answers(model, tokenizer).generate_until([request], disable_tqdm=True) == [text[2:]]

    def test_classifier(self, ends_early, folder, tmp_path, capsys):
        outs = {f"generated_sentence_{t}_temp_out": tmp_path / t for t in ("low", "high")}
        config = SimpleNamespace(checkpoint=str(folder), prompt="ab", max_new_tokens=N, **outs)
        train_classifier.write_sentences(config, torch.device("cpu"), "fp32")
        assert (tmp_path / "low").read_text(encoding="utf-8") == ends_early[2] + "\n"

    def test_a_sample_while_training(self, tiny):
        model, prompt = tiny(vocab_size=259), torch.tensor([BYTE.encode("ab", bos=True)])
        new = model.generate(prompt, N, temperature=0.8, top_p=0.95, seed=1)[0, 3:].tolist()
        assert new[END] not in new[:END]
        tokenizer = ByteLevelTokenizer().set_ends(ends=[new[END]])
        assert sample_text(model, tokenizer, "ab", N, seed=1) == "ab" + BYTE.decode(new[:END])

    def test_rows_are_filled_up_after_any_end(self, ends_early):
        model, tokenizer, _ = ends_early
        ids = torch.tensor([tokenizer.encode("ab", bos=True), tokenizer.encode("xy", bos=True)])
        rows = model.generate(ids, N, temperature=0, eos_id=tokenizer.end_ids)
        assert rows.shape == (2, 3 + N) and set(rows[0, 4 + END :].tolist()) == {tokenizer.eos_id}
        alone = model.generate(ids[:1], N, temperature=0, eos_id=tokenizer.end_ids[1])
        assert alone[0, 3 : 4 + END].tolist() == rows[0, 3 : 4 + END].tolist()


class TestTokenizer:
    @pytest.mark.parametrize("kind", ["byte", "sentencepiece", "hf"])
    def test_kept_in_a_folder_and_in_a_pickle(self, kind, tmp_path):
        from test_tokenizer import TEXTS, byte_level

        made = {"byte": ByteLevelTokenizer, "sentencepiece": lambda: train_sentencepiece(TEXTS, vocab_size=420)}
        tokenizer = made.get(kind, lambda: HFTokenizer(byte_level(["</s>", "<s>"]), {}))()
        fingerprint, files = tokenizer.fingerprint, {}
        tokenizer.save(tmp_path / "plain")
        files = {path.name for path in (tmp_path / "plain").iterdir()}
        assert files == {"byte": {"tokenizer_config.json"}, "sentencepiece": {"tokenizer.model"}}.get(
            kind, {"tokenizer.json", "tokenizer_config.json"}
        )
        assert (tokenizer.end_ids, tokenizer.add_bos) == ((tokenizer.eos_id,), True)
        tokenizer.set_ends(add_bos=False, ends=[7, tokenizer.eos_id, 10**9, -1, None, "x", True])
        tokenizer.save(tmp_path / "saved")
        for again in (read_tokenizer(tmp_path / "saved"), pickle.loads(pickle.dumps(tokenizer))):
            assert (again.end_ids, again.add_bos) == ((tokenizer.eos_id, 7), False)
            assert again.fingerprint == fingerprint and again.encode("a b") == tokenizer.encode("a b")

    def test_a_text_without_bos(self):
        tokenizer = ByteLevelTokenizer().set_ends(add_bos=False)
        assert tokenizer.encode("ab", bos=True, eos=True) == [97, 98, 258]
        assert tokenizer.encode("", bos=True) == [257] == tokenizer.start([])  # a model needs one token to start


class TestScoringWithoutBos:
    def test_the_first_token_is_not_scored(self, tiny):
        model, tokenizer = tiny(vocab_size=259, n_layers=1), ByteLevelTokenizer().set_ends(add_bos=False)
        texts = ["The quick brown fox jumps", "x", "", "yz"]
        score = score_corpus(model, tokenizer, texts)
        ids = [list(text.encode()) for text in texts if len(text) > 1]
        logprobs = [
            model(torch.tensor([row[max(0, t - 16) if t < 17 else 8 : t]])).logits[0, -1].log_softmax(-1)[row[t]].item()
            for row in ids
            for t in range(1, len(row))
        ]
        assert (score.size.tokens, score.size.bytes, score.size.documents) == (25, 25, 4)
        assert score.figures.loss == pytest.approx(-sum(logprobs) / 25, rel=1e-4)

    def test_a_bound_in_tokens_holds(self, tiny):
        size, tokenizer = Size(), ByteLevelTokenizer().set_ends(add_bos=False)
        list(corpus_windows(tiny(vocab_size=259).config, tokenizer, ["abcdef", "ghijkl", "m"], size, max_tokens=7))
        assert (size.tokens, size.bytes, size.documents) == (7, 7, 2)

    def test_pairs_and_examples(self):
        tokenizer = ByteLevelTokenizer().set_ends(add_bos=False)
        assert encode_pair(tokenizer, "ab", "c") == ([97, 98], [99])
        assert encode_pair(tokenizer, "", "c") == ([257], [99])
        samples, cut = encode([Example("abc", 1), Example("abcd", 0), Example("", 0)], tokenizer, 3)
        assert [sample.input_ids.tolist() for sample in samples] == [[97, 98, 99], [98, 99, 100], [257]] and cut == 1


class TestFromElsewhere:
    @pytest.fixture
    def llama(self, tiny, tmp_path):
        model = tiny(vocab_size=259, recursion="none", norm="pre")
        write_hf(tmp_path / "llama", model.config, own_state(model), BYTE)
        return tmp_path / "llama"

    @staticmethod
    def change(path, **values):
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))

    def test_the_ends_of_both_settings_files(self, llama):
        self.change(llama / "config.json", eos_token_id=[258, 4])
        self.change(llama / "generation_config.json", eos_token_id=9)
        assert read_source(llama).tokenizer.end_ids == (258, 4, 9)
        (llama / "generation_config.json").unlink()
        assert read_source(llama).tokenizer.end_ids == (258, 4)

    @pytest.mark.parametrize("said", [True, False])
    def test_add_bos_token(self, llama, said, tmp_path):
        self.change(llama / "tokenizer_config.json", add_bos_token=said)
        write(read_source(llama), tmp_path / "ours")
        assert load_model(tmp_path / "ours")[1].add_bos == said

    @pytest.mark.parametrize(
        ("puts", "more", "expected"), [(True, {"x": 9}, True), (False, {"x": 9}, False), (False, {}, True)]
    )
    def test_a_post_processor(self, llama, puts, more, expected):
        """If add_bos_token is not set, the post-processor decides. Exception: folders that this project wrote before,
        whose settings name four special tokens and nothing else."""
        from test_tokenizer import byte_level
        from tokenizers.processors import TemplateProcessing

        begin = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
        parts = {"post_processor": begin} if puts else {}
        (llama / "tokenizer.json").write_bytes(byte_level(["<s>", "</s>", "x"], **parts))
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (llama / "tokenizer_config.json").write_text(json.dumps(names | more))
        assert read_source(llama).tokenizer.add_bos == expected

    def test_rows_beyond_the_tokenizer_are_left_out(self, llama, tmp_path, capsys):
        """The embedding was padded to a multiple of 64: 320 rows for 259 tokens."""
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForCausalLM

        tensors = load_file(llama / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            extra = 9 * torch.ones(61, 16) * torch.tensor([1, -1] * 8)  # large: they win
            tensors[name] = torch.cat((tensors[name], extra))
        save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
        self.change(llama / "config.json", vocab_size=320, pad_token_id=300)
        write(read_source(llama), tmp_path / "ours")
        assert "320 rows for 259 tokens; unused rows are dropped" in capsys.readouterr().err
        model, tokenizer = load_model(tmp_path / "ours")
        assert model.config.vocab_size == tokenizer.vocab_size == 259 and model.config.pad_token_id is None
        ids = torch.randint(0, 259, (2, 9))
        expected = AutoModelForCausalLM.from_pretrained(llama)(ids).logits
        assert (expected.argmax(-1) > 258).any() and (model(ids).logits - expected[..., :259]).abs().max() < 1e-4
        write(read_source(tmp_path / "ours"), tmp_path / "again", "hf")
        assert AutoConfig.from_pretrained(tmp_path / "again").vocab_size == 259
        write(read_source(llama, "byte"), tmp_path / "with its tokenizer given")
        assert load_model(tmp_path / "with its tokenizer given")[0].config.vocab_size == 259

    @pytest.mark.parametrize(("rows", "given"), [(258, None), (258, "byte"), (259 + 128, "byte")])
    def test_of_another_model(self, llama, rows, given):
        from safetensors.torch import load_file, save_file

        tensors = load_file(llama / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.cat((tensors[name],) * 2)[:rows].clone()
        save_file(tensors, llama / "model.safetensors")
        self.change(llama / "config.json", vocab_size=rows, pad_token_id=None)
        with pytest.raises(UserError, match=f"has 259 tokens, but the model has {rows}: .*--tokenizer"):
            read_source(llama, given)
