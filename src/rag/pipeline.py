"""Builds retrieval from the section `rag` of a run's settings."""

from src.data.corpus import fingerprint_files
from src.dataset import MixedDataset, PackedDataset
from src.errors import UserError
from src.rag.dataset import RAGDatasetWrapper
from src.rag.index import open_retriever
from src.rag.retriever import RAGRetriever
from src.training.rag_config import RagConfig


class Retrieval:
    """What a training run needs of the section `rag`: a retriever, and windows that use it."""

    def __init__(self, config: RagConfig, retriever: RAGRetriever):
        self.config, self.retriever = config, retriever

    @property
    def fingerprint(self) -> list:
        """The files of the index, in the form of `fingerprint_files`: a run resumes only with the same ones."""
        return fingerprint_files(sorted(source.real_path for source in self.retriever.sources))

    def wrap(self, train_set, tokenizer, seed: int = 0):
        """Returns the training set with retrieved context in its windows.

        Raises UserError for settings of the data that have no such windows."""
        if isinstance(train_set, MixedDataset):
            sets = [self.wrap(each, tokenizer, seed) for each in train_set.datasets]
            return MixedDataset(sets, train_set.weights)
        if not isinstance(train_set, PackedDataset) or train_set.segment:
            raise UserError(
                "rag needs tokenized, packed text: leave out --streaming, --document_mask and --packing false"
            )
        return RAGDatasetWrapper(train_set, self.retriever, tokenizer, self.config, seed)


def build_rag(config: RagConfig, cache_dir=None) -> Retrieval:
    """Returns the retrieval of a run, over the index of config.paths in cache_dir."""
    names = ("method", "dim", "checkpoint", "chunk_lines", "suffixes")
    options = {name: getattr(config, name) for name in names}
    return Retrieval(config, open_retriever(config.paths, cache_dir=cache_dir, **options))
