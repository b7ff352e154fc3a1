"""Code from a repository in front of a prompt, for generate.py --rag."""

import functools
import sys

from src.data.samples import prepare_code_input
from src.errors import few
from src.rag.embedder import terms_of
from src.rag.index import open_retriever
from src.rag.retriever import fit_context
from src.training.rag_config import RagConfig

QUERY_TOKENS = RagConfig.query_tokens  # at the end of the prompt: they are compared with the index, as in training
DEEPER = 4  # times top_k: so many chunks are looked at, because some have no name in common with the prompt
SENTINELS = 3  # tokens around a prompt and its suffix
LEAST_NEW = 8  # an eighth of the model's context stays free for new tokens


class PromptContext:
    """Puts code from files and folders before a prompt, as in training with the section `rag`.

    tokens: most tokens of retrieved code; default: half of the model's context. suffix: the text that follows what the
    model writes, if any. Other arguments as in `open_retriever`."""

    def __init__(
        self, paths, tokenizer, max_seq_len, tokens=None, top_k=1, method="tfidf", checkpoint=None, suffix=None
    ):
        self.tokenizer, self.max_seq_len, self.top_k, self.suffix = tokenizer, max_seq_len, top_k, suffix
        self.tokens = max_seq_len // 2 if tokens is None else tokens
        self.by_names = method in ("tfidf", "bm25")
        self.retriever = open_retriever(paths, method, checkpoint=checkpoint)
        self.with_code = functools.cache(self._with_code)  # several samples of a prompt are reported once

    def _with_code(self, prompt: str) -> str:
        """Returns the prompt with code before it. Prints on stderr what was retrieved, and from where."""
        ids = self.tokenizer.encode(prompt)
        query = self.tokenizer.decode(ids[-QUERY_TOKENS:])
        room = self.max_seq_len - self.max_seq_len // LEAST_NEW - len(ids) - 1
        if self.suffix is not None:
            room -= len(self.tokenizer.encode(self.suffix)) + SENTINELS
        budget = min(self.tokens, room)
        copies = self.retriever.near_copies(f"{prompt}\n{self.suffix or ''}")
        hits = self.retriever.retrieve([query], DEEPER * self.top_k, [copies])[0] if query.strip() else []
        # names that share a hash give a chunk without a common name a score, too
        names = set(terms_of(query)) if self.by_names else None
        hits = [h for h in hits if h.score > 0 and (names is None or names & set(terms_of(h.chunk.text)))][: self.top_k]
        if copies:
            names = few(self.retriever.sources[number].path for number in copies)
            print(f"not retrieved from {names}: near copies of the prompt's own file", file=sys.stderr)
        context, kept = fit_context(self.tokenizer, [hit.chunk.text for hit in hits], budget)
        if not context:
            why = "no chunk has a name in common with the prompt"
            if hits:
                why = f"{'rag_tokens' if self.tokens <= room else 'the prompt'} leaves no room for it"
            print(f"nothing retrieved: {why}", file=sys.stderr)
            return prompt
        used = len(self.tokenizer.encode(context))
        print(f"retrieved {'; '.join(hit.where(n) for hit, n in zip(hits, kept) if n)}; {used} tokens", file=sys.stderr)
        return prepare_code_input(context, prompt)
