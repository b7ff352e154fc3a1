"""The settings of serve.py."""

import re
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ServeConfig:
    """What to serve, where, and within which bounds.

    Args:
        checkpoint: checkpoint folder, or run folder (its best checkpoint is used); the flag name may be left out. If
            not given, the released checkpoint is used
        onnx: folder written by export_onnx.py, to run with ONNX Runtime instead of a checkpoint
        puzzle: checkpoint folder of a puzzle model, whose boards the page solves; `none` serves no puzzles. If not
            given, checkpoints/sudoku is used if it exists
        name: name of the model in the API; default: the name of its folder
        host: address to listen on. The default is this machine only; give --api_key with any other
        port: TCP port to listen on; 0 chooses a free one
        api_key: key that clients must send, as OpenAI's clients do (Authorization: Bearer ...)
        allowed_hosts: further host names under which clients may reach the server, such as my-machine.local. Names of
            this machine and IP addresses are always allowed
        max_rows: most texts that are written at once; others wait
        max_queue: most texts that wait; further requests get status 429
        max_prompts: most prompts in one request
        max_n: most choices for each prompt (n)
        max_tokens: most new tokens of one text
        max_depth: most recursion steps that a request may ask for
        max_steps: most supervision steps that a request for a puzzle may ask for
        max_seconds: most seconds that a text may take, waiting included; then it ends as at max_tokens
        max_body_kib: most KiB of a request's body
        body_seconds: most seconds that a client may take to send the headers of a request, and as many for its body
        prefill_tokens: most tokens of waiting prompts that are encoded between two tokens of the running texts
        max_cache_gib: most GiB of key/value cache of the texts that are written; lowers max_rows if needed. Prompts
            that are being read, and a batch while it grows, come on top
        grace_seconds: at SIGTERM and Ctrl-C, running texts may be written for this many more seconds; then they end
        log_texts: write prompts and texts to stderr; by default, no text is logged
        device: device to run on: auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, ..., or mps
        precision: number format of weights and arithmetic; int8 stores the weights in 8 bits and runs on a CPU only
    """

    checkpoint: str | None = None
    onnx: str | None = None
    puzzle: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allowed_hosts: list[str] = field(default_factory=list)
    max_rows: int = 64
    max_queue: int = 256
    max_prompts: int = 128
    max_n: int = 16
    max_tokens: int = 4096
    max_depth: int = 64
    max_steps: int = 128
    max_seconds: float = 600.0
    max_body_kib: int = 1024
    body_seconds: float = 20.0
    prefill_tokens: int = 256
    max_cache_gib: float = 2.0
    grace_seconds: float = 5.0
    log_texts: bool = False
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "fp32"

    def __post_init__(self):
        bounds = {"port": (0, 65535), "max_rows": (1, 4096), "max_queue": (1, 10**6), "max_prompts": (1, 10_000)}
        bounds |= {"max_n": (1, 1000), "max_tokens": (1, 10**6), "max_depth": (1, 1000), "max_steps": (1, 100_000)}
        bounds |= {"max_seconds": (0.1, 1e6), "max_body_kib": (1, 2**20), "body_seconds": (0.1, 3600)}
        bounds |= {"prefill_tokens": (1, 10**6), "max_cache_gib": (0.001, 10**4), "grace_seconds": (0, 3600)}
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}: set it from {low:,} to {high:,}")
        if self.onnx is not None and (self.checkpoint is not None or self.precision != "fp32"):
            raise ValueError("--onnx has its own weights and precision: leave out checkpoint and --precision")
        if self.api_key is not None and not re.fullmatch(r"[!-~]{1,200}", self.api_key):
            raise ValueError("api_key must be 1 to 200 printable ASCII characters without spaces: choose another")
        if self.name is not None and not re.fullmatch(r"[\w.:/@+-]{1,100}", self.name):
            raise ValueError(f"name is {self.name!r}: use up to 100 letters, digits and . : / @ + - _")
        for host in self.allowed_hosts:
            if not re.fullmatch(r"[\w.-]{1,253}", host):
                raise ValueError(f"allowed_hosts has {host!r}: give host names alone, such as my-machine.local")

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine can reach the server."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")
