"""Training windows that start with code retrieved from other files."""

import copy

import numpy as np
import torch

from src.data.samples import Sample, prepare_code_input, window_sample
from src.dataset import PackedDataset
from src.errors import UserError
from src.losses import IGNORE
from src.rag.retriever import RAGRetriever, fit_context
from src.training.rag_config import RagConfig


class RAGDatasetWrapper(torch.utils.data.Dataset):
    """Windows of a PackedDataset whose first `context_tokens` are context: inputs, but not targets.

    The context is the file's own past. If a chunk of another file scores at least `threshold`, the chunk and the marker
    line replace the oldest part of that past. So a window has as many tokens, and as many targets, with retrieved code
    as without. The query is the end of the text before the first target. Every token after the first context is a
    target exactly once. The first window also learns the file's own past in its context, because no window comes
    before it.

    What is retrieved for a window depends on the text, the index, the settings and (seed, window) alone, so a resumed
    run has the same windows. The constructor retrieves chunks for a grid of positions in the text. Windows of another
    length (`with_seq_len`) use the chunks of the last position before their first target, if it is in the same file.
    Raises UserError if the windows have no room for targets.
    """

    pads = False

    def __init__(self, dataset: PackedDataset, retriever: RAGRetriever, tokenizer, config: RagConfig, seed: int = 0):
        self.dataset, self.tokenizer, self.config = dataset, tokenizer, config
        self._check_room()
        self.step = self.new_tokens  # tokens between two positions of the grid
        self.chunks, self.scores, self.near_copies = self._retrieve(retriever, seed)

    def _check_room(self):
        if self.config.context_tokens >= self.dataset.seq_len:
            raise UserError(
                f"rag.context_tokens is {self.config.context_tokens}: set it below the window of {self.dataset.seq_len}"
            )

    def _retrieve(self, retriever, seed):
        """Returns (texts of the chunks of each position, best score or NaN, number of near copies left out)."""
        store, config = self.dataset.store, self.config
        positions = np.arange(config.context_tokens, self.dataset.n_targets, self.step)  # of the last input of a query
        drawn = [np.random.default_rng((seed, number)).random() < config.share for number in range(len(positions))]
        starts = np.concatenate([[0], store.doc_ends])
        queries, excluded, numbers, copies, own = [], [], [], set(), (None, [])
        for number, (position, is_drawn) in enumerate(zip(positions.tolist(), drawn)):
            document = int(store.documents_of(position + 1, position + 2)[0])
            query = store[max(starts[document], position + 1 - config.query_tokens) : position + 1]
            if not is_drawn or not len(query):
                continue
            if own[0] != document:
                text = self.tokenizer.decode(store[starts[document] : int(store.doc_ends[document])].tolist())
                own = document, retriever.near_copies(text)
                copies.update(own[1])
            queries.append(self.tokenizer.decode(query.tolist()))
            excluded.append(own[1])
            numbers.append(number)
        chunks, scores = [()] * len(positions), np.full(len(positions), np.nan, np.float32)
        for number, hits in zip(numbers, retriever.retrieve(queries, config.top_k, excluded)):
            good = [hit for hit in hits if hit.score >= config.threshold]
            chunks[number] = tuple(hit.chunk.text for hit in good)
            scores[number] = hits[0].score if hits else np.nan
        return chunks, scores, len(copies)

    @property
    def seq_len(self):
        return self.dataset.seq_len

    @property
    def new_tokens(self):
        """Targets of a window."""
        return self.dataset.seq_len - self.config.context_tokens

    @property
    def n_targets(self):
        return self.dataset.n_targets

    @property
    def bytes_per_token(self):
        return self.dataset.bytes_per_token

    def __len__(self):
        return max(1, -(-(self.n_targets - self.config.context_tokens) // self.new_tokens))

    def __getitem__(self, index) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        n_context = self.config.context_tokens
        wanted = index % len(self) * self.new_tokens
        start = min(wanted, self.n_targets - self.seq_len)
        context = self._context(start + n_context)
        ids = np.concatenate([context, self.dataset.store[start + len(context) : start + self.seq_len + 1]])
        sample = window_sample(ids, None, self.dataset.bos_eos)
        # the first window has no window before it that would learn its context
        sample.target_ids[: len(context) if wanted == 0 else n_context + wanted - start] = IGNORE
        return sample

    def _context(self, position) -> np.ndarray:
        """Returns the ids of what is retrieved for a window whose first target comes after `position`."""
        number = (position - self.config.context_tokens) // self.step
        before = self.config.context_tokens + number * self.step
        documents = self.dataset.store.documents_of(before + 1, position + 2)
        text = ""
        if documents[0] == documents[-1]:
            text = fit_context(self.tokenizer, self.chunks[number], self.config.context_tokens).text
        ids = self.tokenizer.encode(prepare_code_input(text, "")) if text else []
        return np.array(ids[-self.config.context_tokens :], np.int64)

    def with_seq_len(self, seq_len):
        """Returns the same text in windows of another length."""
        other = copy.copy(self)
        other.dataset = self.dataset.with_seq_len(seq_len)
        other._check_room()
        return other

    def __str__(self):
        share = np.mean([bool(texts) for texts in self.chunks])
        retrieved = f"{100 * share:.0f} % of them with retrieved code (score {self.config.threshold:g} or more)"
        copies = f"{self.near_copies} files are near copies of training files and are not retrieved for them"
        return f"{len(self)} windows of {self.seq_len} tokens, {retrieved}; {copies}"
