"""Checkpoint folders with wrong settings, tensors or state. They must be refused quickly, with a one-line message."""

import json
import math
import time
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from src import checkpoint
from src.checkpoint import check_tensors, load_config, load_model, load_state, read_weights, save_checkpoint
from src.errors import UserError
from src.tokenizer import ByteLevelTokenizer


@pytest.fixture
def saved(tiny, tmp_path):
    """A valid checkpoint folder with averaged weights and a training state."""
    tokenizer = ByteLevelTokenizer()
    model = tiny(vocab_size=tokenizer.vocab_size, d_model=8, n_heads=2, d_ff=16)
    save_checkpoint(tmp_path / "whole", model, tokenizer, checkpoint.own_state(model), {"step": 3}, {"step": 3})
    return tmp_path / "whole"


def rewrite(folder, **settings):
    """Changes settings of the model in a checkpoint's config.json."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["model"] |= settings
    path.write_text(json.dumps(values))


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"causal": "false"}, "config.json: causal is 'false': give it true or false"),
            ({"d_model": "8"}, "config.json: d_model is '8': give it a whole number"),
            ({"n_heads": True}, "config.json: n_heads is True: give it a whole number"),
            ({"max_seq_len": 16.5}, "config.json: max_seq_len is 16.5: give it a whole number"),
            ({"rope_theta": None}, "config.json: rope_theta is left empty .null.: give it a value"),
            ({"pad_token_id": []}, r"config.json: pad_token_id is \[\]: give it a whole number or nothing"),
            ({"n_lyers": 2}, "config.json: there is no setting n_lyers"),
        ],
    )
    def test_of_the_wrong_kind(self, saved, settings, said):
        rewrite(saved, **settings)
        with pytest.raises(UserError, match=said):
            load_config(saved)

    def test_a_whole_number_may_have_a_point(self, saved):
        rewrite(saved, max_seq_len=16.0, dropout=0)
        config = load_config(saved)
        assert (config.max_seq_len, type(config.max_seq_len), type(config.dropout)) == (16, int, float)

    @pytest.mark.parametrize("name", ["n_layers", "prelude_layers", "coda_layers", "d_model", "supervision_steps"])
    @pytest.mark.parametrize("size", [2**31, 2**40, 10**30])
    def test_sizes_before_sense(self, saved, name, size):
        rewrite(saved, **{name: size})
        start = time.process_time()
        with pytest.raises(UserError, match=f"config.json: {name} is {size}: set it to [0-9,]* or less"):
            load_model(saved)
        assert time.process_time() - start < 1

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"n_layers": 1000}, "has 18 tensors, too few for n_layers 1000 in its config.json"),
            ({"d_model": 2**20}, "does not fit its config.json"),
            ({"supervision_steps": 9000, "deep_steps": 9000}, "would pass through .* blocks, over 16,384"),
        ],
    )
    def test_sizes_beyond_the_weights(self, saved, settings, said):
        """Sizes are compared with the weights before memory is allocated. 2**20 squared would be 4 TiB."""
        rewrite(saved, **settings)
        with pytest.raises(UserError, match=said):
            load_model(saved)

    @pytest.mark.parametrize(
        "text", ["[" * 5000, '{"model": ' * 200 + "1" + "}" * 200, '{"model": {"causal": "\\ud800"}}']
    )
    def test_json_of_other_kinds(self, saved, text):
        (saved / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json"):
            load_config(saved)


class TestTensors:
    @pytest.mark.parametrize(
        ("broken", "said"),
        [
            (lambda t: t.index_fill(0, torch.tensor([1]), math.nan), "embed.weight holds NaN, infinity"),
            (lambda t: t.index_fill(0, torch.tensor([1]), -math.inf), "embed.weight holds NaN, infinity"),
            (lambda t: t * 1e30, "embed.weight holds NaN, infinity or a number above 1e6"),
            (lambda t: t.to(torch.int8), "embed.weight has dtype torch.int8"),
            (lambda t: t.bool(), "embed.weight has dtype torch.bool"),
            (lambda t: t.to(torch.complex64), "embed.weight has dtype torch.complex64"),
            (lambda t: t.to(torch.float8_e4m3fn), "embed.weight has dtype torch.float8_e4m3fn"),
        ],
    )
    def test_weights_that_are_none(self, saved, broken, said):
        path = saved / "ema.safetensors"
        weights = read_weights(path)
        save_file(weights | {"embed.weight": broken(weights["embed.weight"])}, path)
        with pytest.raises(UserError, match=f"ema.safetensors: {said}"):
            load_model(saved)

    @pytest.mark.parametrize(
        "broken", [None, 3, torch.ones(2).to_sparse(), torch.ones(2, device="meta"), torch.ones(1).expand(10**9, 10**9)]
    )
    def test_what_a_pt_can_hold(self, broken):
        with pytest.raises(UserError, match="m.pt: w (is not a dense tensor|stores fewer numbers)"):
            check_tensors({"v": torch.ones(2), "w": broken}, "m.pt")

    def test_other_precisions_are_weights(self):
        tensors = {str(dtype): torch.ones(2, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)}
        tensors["empty"] = torch.ones(0)
        assert check_tensors(tensors, "m") is tensors

    def test_offsets_that_overlap(self, saved):
        """The safetensors library refuses them."""
        path = saved / "ema.safetensors"
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header["head.weight"]["data_offsets"] = header["embed.weight"]["data_offsets"]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        with pytest.raises(UserError, match="ema.safetensors is broken or cut short"):
            load_model(saved)

    def test_a_state_of_compressed_parts(self, saved, tmp_path):
        """A compressed part could be a thousand times as large in memory, so none is accepted."""
        path = saved / "state" / "training.pt"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name) + bytes(10_000))
        (tmp_path / "new").replace(path)
        with pytest.raises(UserError, match="training.pt is broken"):
            load_state(saved)
