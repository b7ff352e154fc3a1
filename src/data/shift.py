"""Windows of a text that begin at other places in each epoch."""

from torch.utils.data import Dataset

from src.runtime import mix_seed


class ShiftedDataset(Dataset):
    """The windows of a PackedDataset, shifted in each epoch by another number of tokens, less than a window.

    dataset[index, (seed, k)] is window `index` in the epoch of sample k. An epoch has every token as a target once,
    except those before its first window. rows: the PackedDataset, whose figures it keeps."""

    def __init__(self, rows):
        self.rows, self.seq_len, self.pads = rows, rows.seq_len, rows.pads

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        index, (seed, number) = key
        return self.rows.window(index * self.seq_len + self.shift(seed, number // len(self)))

    def shift(self, seed: int, epoch: int) -> int:
        """Returns by how many tokens the windows of an epoch are shifted."""
        return mix_seed(seed, epoch, 2) % self.seq_len

    @property
    def bytes_per_token(self):
        return self.rows.bytes_per_token

    def with_seq_len(self, seq_len):
        """Returns the same text in windows of another length."""
        return ShiftedDataset(self.rows.with_seq_len(seq_len))

    def __str__(self):
        return f"{self.rows}, shifted in each epoch"
