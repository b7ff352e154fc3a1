"""Hugging Face Llama folders: the same logits as transformers' model in both directions, and refusals."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.checkpoint import load_model, own_state
from src.errors import UserError
from src.interop.formats import read_source, write
from src.interop.hf_llama import _licence, read_hf, write_hf
from src.tokenizer import ByteLevelTokenizer

BYTES = ByteLevelTokenizer()
V = BYTES.vocab_size
TOLERANCE = 1e-4  # fp32: the order of summation differs; the logits have a standard deviation of about 1
CASES = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "two heads a group": {"n_kv_heads": 2},
    "one group": {"n_kv_heads": 1, "tie_embeddings": True},
    "odd sizes": {"d_model": 42, "n_heads": 7, "n_kv_heads": 7, "d_ff": 37, "n_layers": 3},
    "small base": {"rope_theta": 50.0, "norm_eps": 1e-3},
    "large base": {"rope_theta": 500000.0, "n_kv_heads": 2, "max_seq_len": 40},
    "scaled positions": {"rope_scaling": 2.5},
    "YaRN": {"rope_scaling": 2.0, "rope_trained_len": 8},
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture
def plain(tiny):
    return lambda **settings: tiny(**({"recursion": "none", "norm": "pre", "vocab_size": V} | settings))


@pytest.fixture
def folder(plain, tmp_path):
    """A Llama folder of a tiny model."""
    model = plain()
    write_hf(tmp_path / "llama", model.config, own_state(model), BYTES)
    return tmp_path / "llama"


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def llama(**case):
    """Returns a random LlamaForCausalLM with the sizes in `case`; the weights are large, so that the logits vary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    case = {"d_model": 16, "n_heads": 4, "d_ff": 24, "n_layers": 2, "rope_theta": 10000.0, "norm_eps": 1e-5} | case
    rope = {"rope_type": "default", "rope_theta": case["rope_theta"]}
    if scale := case.get("rope_scaling"):
        rope |= {"rope_type": "linear", "factor": scale}
    if trained := case.get("rope_trained_len"):
        rope |= {"rope_type": "yarn", "original_max_position_embeddings": trained}
    config = LlamaConfig(
        vocab_size=V, hidden_size=case["d_model"], intermediate_size=case["d_ff"], num_hidden_layers=case["n_layers"],
        num_attention_heads=case["n_heads"], num_key_value_heads=case.get("n_kv_heads", case["n_heads"]),
        rms_norm_eps=case["norm_eps"], rope_parameters=rope, tie_word_embeddings=case.get("tie_embeddings", False),
        max_position_embeddings=case.get("max_seq_len", 16),
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            is_norm = parameter.dim() == 1
            parameter.uniform_(0.5, 1.5) if is_norm else parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def assert_same_logits(ours, theirs):
    ids = torch.randint(0, V, (2, 16), generator=torch.Generator().manual_seed(1))
    logits, expected = ours(ids).logits, theirs(ids).logits
    assert expected.std() > 0.3
    assert (logits - expected).abs().max() < TOLERANCE


class TestAgainstTransformers:
    @each_case
    def test_read(self, tmp_path, case):
        theirs = llama(**case)
        theirs.save_pretrained(tmp_path / "llama")
        write(read_source(tmp_path / "llama", "byte"), tmp_path / "ours")
        assert_same_logits(load_model(tmp_path / "ours")[0], theirs)

    @each_case
    def test_written(self, plain, tmp_path, case):
        from transformers import LlamaForCausalLM

        ours = plain(**case)
        write_hf(tmp_path / "llama", ours.config, own_state(ours), BYTES)
        theirs, loading = LlamaForCausalLM.from_pretrained(tmp_path / "llama", output_loading_info=True)
        assert not any(loading.values())  # no missing, unexpected or mismatched weight
        assert_same_logits(ours, theirs.eval())

    def test_in_shards_and_in_bf16(self, tmp_path):
        theirs = llama(tie_embeddings=True)
        theirs.to(torch.bfloat16).save_pretrained(tmp_path / "llama", max_shard_size="5KB")
        assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 2
        write(read_source(tmp_path / "llama", "byte"), tmp_path / "ours")
        stored = load_file(tmp_path / "ours" / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        write(read_source(tmp_path / "ours"), tmp_path / "again", "hf")
        assert type(theirs).from_pretrained(tmp_path / "again").dtype == torch.bfloat16
        theirs = type(theirs).from_pretrained(
            tmp_path / "llama", dtype=torch.float32
        )  # loading it again computes the angles in fp32
        assert_same_logits(load_model(tmp_path / "ours")[0], theirs)

    def test_the_tokenizer_is_the_same_there(self, plain, tmp_path):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        from src.tokenizer import HFTokenizer

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>", "he"])}
        tok = Tokenizer(models.BPE(vocab, [("h", "e")]))
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        ours, model = HFTokenizer(tok.to_str().encode(), {}), plain(vocab_size=259)
        write_hf(tmp_path / "llama", model.config, own_state(model), ours)
        theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "llama")
        assert theirs("he said: 1 cafés").input_ids == ours.encode("he said: 1 cafés", bos=True)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id) == (256, 257)
        again = read_source(tmp_path / "llama").tokenizer
        assert again.encode("he said: 1 cafés", bos=True) == ours.encode("he said: 1 cafés", bos=True)


@each_case
def test_a_round_trip_loses_nothing(plain, tmp_path, case):
    model = plain(**case, pad_token_id=3)
    write_hf(tmp_path / "llama", model.config, own_state(model), BYTES)
    config, weights, _ = read_hf(tmp_path / "llama")
    assert config == model.config
    own = own_state(model)
    assert weights.keys() == own.keys() and all(torch.equal(tensor, own[name]) for name, tensor in weights.items())


REFUSED = {
    "another architecture": ({"model_type": "gpt2"}, "only llama"),
    "biases of attention": ({"attention_bias": True}, "attention_bias"),
    "biases of the MLP": ({"mlp_bias": True}, "mlp_bias"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act gelu"),
    "wide heads": ({"head_dim": 8}, "head_dim 8"),
    "part of yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "lacks original_max_position_embeddings"),
    "yarn of its own": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "changed parameters"),
    "llama3": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling llama3"),
    "an old name of it": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling dynamic"),
    "no factor": ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
    "quantized": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "a word for a number": ({"hidden_size": "many"}, "config.json: hidden_size is 'many'"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "sizes that cannot be": ({"num_key_value_heads": 3}, "n_kv_heads"),
    "more layers than weights": ({"num_hidden_layers": 3}, "lacks model.layers.2"),
    "fewer layers than weights": ({"num_hidden_layers": 1}, "contains model.layers.1"),
    "another width": ({"intermediate_size": 25}, "has shape"),
    "tied, but they differ": ({"tie_word_embeddings": True}, "the settings tie the two"),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("num_hidden_layers", size) for size in (2**31, 2**40, 10**30, "2", True, 1.5, -1)),
        *(("hidden_size", size) for size in (2**40, 16.5, [16], None)),
        *(("max_position_embeddings", size) for size in (16.5, "x")),
        *(("vocab_size", 2**40), ("num_key_value_heads", 0.5), ("intermediate_size", float("nan"))),
    ],
)
def test_sizes_that_are_none(folder, name, value):
    """The message names field and value, and comes before anything of that size is allocated."""
    change(folder, **{name: value})
    with pytest.raises(
        UserError, match=re.escape(f"config.json: {name} is {value!r}: it should be a whole number from 1 to")
    ):
        read_hf(folder)


def test_whole_numbers_may_have_a_point(folder):
    before = read_hf(folder)[0]
    change(folder, hidden_size=16.0, num_hidden_layers=2.0)
    assert read_hf(folder)[0] == before and type(before.d_model) is int


@pytest.mark.parametrize(("values", "said"), REFUSED.values(), ids=REFUSED)
def test_refused(folder, values, said):
    change(folder, **values)
    with pytest.raises(UserError, match=said):
        read_hf(folder)


class TestFiles:
    def test_missing_setting(self, folder):
        path = folder / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "vocab_size"}))
        with pytest.raises(UserError, match="lacks vocab_size"):
            read_hf(folder)

    @pytest.mark.parametrize(
        ("text", "said"),
        [("{", "broken JSON"), ("[]", "not a JSON object"), ("\xff", "not UTF-8"), ("[" * 5000, "broken JSON")],
    )
    def test_broken_config(self, folder, text, said):
        (folder / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=f"config.json (is|holds) {said}"):
            read_hf(folder)

    def test_weights_that_could_run_code(self, folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(UserError, match="could run code"):
            read_hf(folder)

    def test_cut_short(self, folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UserError, match="cut short"):
            read_hf(folder)

    def test_no_embedding(self, folder):
        change(folder, tie_word_embeddings=True)
        save_file({"lm_head.weight": torch.ones(V, 16)}, folder / "model.safetensors")
        with pytest.raises(UserError, match="lacks model.embed_tokens.weight"):
            read_hf(folder)

    def test_a_tensor_in_another_shard_than_the_index_says(self, folder):
        tensors = load_file(folder / "model.safetensors")
        name = sorted(tensors)[0]
        save_file({name: tensors[name] + 1}, folder / "b.safetensors")
        shards = dict.fromkeys(tensors, "model.safetensors") | {"lm_head.weight": "b.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(UserError, match=f"contains {name}, but .*index.json does not list it"):
            read_hf(folder)

    def test_weights_that_are_not_finite(self, folder):
        path = folder / "model.safetensors"
        save_file(load_file(path) | {"lm_head.weight": torch.full((V, 16), torch.nan)}, path)
        with pytest.raises(UserError, match="model.safetensors: lm_head.weight holds NaN"):
            read_hf(folder)

    @pytest.mark.parametrize(
        "index", [{}, {"weight_map": {"x": ["a"]}}, {"weight_map": {"lm_head.weight": "../model.safetensors"}}]
    )
    def test_index(self, folder, index):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="weight_map"):
            read_hf(folder)

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("added_tokens.json", {"<|im_end|>": V}),
            ("tokenizer_config.json", {"added_tokens_decoder": {str(V): {"content": "<|im_end|>"}}}),
        ],
    )
    def test_tokens_outside_the_tokenizer_file(self, folder, name, values):
        """The model knows them, so their rows are not spare ones."""
        tensors = load_file(folder / "model.safetensors")
        for table in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[table] = torch.cat((tensors[table], tensors[table][:1]))
        save_file(tensors, folder / "model.safetensors")
        change(folder, vocab_size=V + 1, eos_token_id=V)
        path = folder / name
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | values))
        with pytest.raises(UserError, match=r"adds <\|im_end\|> outside its tokenizer file"):
            read_source(folder)
        change(folder, pad_token_id=V)  # such a token is never written
        assert read_source(folder).config.vocab_size == V

    def test_no_padding_as_early_folders_write_it(self, folder):
        change(folder, pad_token_id=-1)
        assert read_hf(folder)[0].pad_token_id is None

    def test_more_weights_than_a_llama_has(self, folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}, path)
        read_hf(folder)  # the table is ignored, because it is computed anyway
        save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}, path)
        with pytest.raises(UserError, match="q_proj.bias"):
            read_hf(folder)

    def test_integers(self, folder):
        path = folder / "model.safetensors"
        save_file(load_file(path) | {"lm_head.weight": torch.ones(V, 16, dtype=torch.int8)}, path)
        with pytest.raises(UserError, match="lm_head.weight has dtype torch.int8"):
            read_hf(folder)

    def test_older_settings(self, folder):
        """A value that is missing in config.json gets LlamaConfig's default."""
        path = folder / "config.json"
        values = json.loads(path.read_text())
        for name in ("rope_theta", "rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "hidden_act"):
            del values[name]
        path.write_text(json.dumps(values))
        config = read_hf(folder)[0]
        assert (config.rope_theta, config.norm_eps, config.n_kv_heads, config.max_seq_len) == (10000.0, 1e-6, 4, 2048)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ('---\ntags: [a]\nlicense: "apache-2.0"  # a comment\n---\nlicense: no\n', "apache-2.0"),
        ("\ufeff---\nlicense:\n- llama2\n---\n", "llama2"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: {a: [\n---\n", None),
        ("license: mit\n", None),
    ],
)
def test_the_licence_of_a_model_card(tmp_path, card, licence):
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert _licence(tmp_path) == ({} if licence is None else {"license": licence})
