"""Shared set-up: annotations of `src` are checked while tests run, and one builder of tiny models with lively weights."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny tensors lose time to thread hand-over
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jaxtyping  # noqa: E402
from beartype import BeartypeConf, beartype  # noqa: E402

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float: temperature=0
jaxtyping.install_import_hook("src", f"{__name__}.typechecker")  # before anything of src is imported

import pytest  # noqa: E402
import torch  # noqa: E402

from src.model import TRMConfig, TRMModel  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes several seconds")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers, whatever ran before it."""
    torch.manual_seed(1234)


@pytest.fixture
def unchecked():
    """Annotations are not checked inside this test: torch.compile cannot trace the checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


TINY = {"vocab_size": 23, "d_model": 16, "n_heads": 4, "n_layers": 2, "d_ff": 24, "max_seq_len": 16}


def build(seed=0, dtype=torch.float32, **settings):
    """A tiny TRMModel in eval mode. All weights are random: norms are not 1, halting is not 0, gates are half open,
    so that a term that is left out or swapped shows."""
    torch.manual_seed(seed)
    model = TRMModel(TRMConfig(**{**TINY, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        if model.config.recursion == "trm":
            model.q_head.weight.normal_(std=0.5)
            model.q_head.bias.fill_(0.1)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def tiny():
    """`build`, as a fixture."""
    return build
