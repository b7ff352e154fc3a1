"""Adapter for EleutherAI's lm-evaluation-harness (pip install lm_eval): answers its three kinds of requests.

A task is a name that the harness knows, or a local YAML file next to its data. For example:

    task: capitals
    dataset_path: json
    dataset_kwargs: {data_files: {test: capitals.jsonl}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{question}}"
    doc_to_choice: "{{choices}}"
    doc_to_target: "{{answer}}"
    metric_list: [{metric: acc}]

This task runs without a network (HF_DATASETS_OFFLINE=1). Paths in data_files are relative to the working directory.
"""

import difflib
import itertools
from pathlib import Path

import yaml
from tqdm import tqdm

from src.errors import UserError
from src.evaluation.scoring import encode_pair, score_continuations
from src.exits import ExitRule
from src.runtime import mix_seed
from src.sampling import generate, left_padded
from src.tokenizer import StreamDecoder

VERSION = "0.4.13"  # of lm_eval: the version that this file was written for
MAX_NEW_TOKENS = 256  # if a task sets no limit


class Answers:
    """Answers the requests of lm_eval. It reads only `args` of a request, so tests can use it without lm_eval.

    Every context starts like a training text: with BOS, unless this model's texts begin without it. A context that is
    too long loses its beginning. rule: when a token stops recursing."""

    def __init__(self, model, tokenizer, batch_size: int = 8, rule: ExitRule | None = None):
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.rule = model, tokenizer, batch_size, rule

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns (log-probability in nats, whether greedy decoding writes it) for each (context, continuation)."""
        pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
        return [tuple(answer) for answer in self._score(pairs, disable_tqdm)]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability in nats of each (text,): of all its tokens, given BOS."""
        pairs = [(self.tokenizer.start([]), self.tokenizer.encode(request.args[0])) for request in requests]
        return [answer.logprob for answer in self._score(pairs, disable_tqdm)]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Returns the continuation of each (context, options), up to but without EOS or a stop string of `until`."""
        texts = {}
        with tqdm(total=len(requests), unit="text", disable=disable_tqdm) as bar:
            # requests with equal options share a batch
            alike = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[1]))
            for _, group in itertools.groupby(alike, key=lambda i: repr(requests[i].args[1])):
                group = sorted(group, key=lambda i: len(requests[i].args[0]))
                for start in range(0, len(group), self.batch_size):
                    rows = group[start : start + self.batch_size]
                    contexts = [requests[i].args[0] for i in rows]
                    texts.update(zip(rows, self._write(contexts, requests[rows[0]].args[1], mix_seed(0, rows[0]))))
                    bar.update(len(rows))
        return [texts[i] for i in range(len(requests))]

    def _score(self, pairs, disable_tqdm):
        with tqdm(total=sum(len(ids) for _, ids in pairs), unit="token", disable=disable_tqdm) as bar:
            return score_continuations(self.model, pairs, None, self.batch_size, self.rule, bar)

    def _write(self, contexts, options, seed):
        """Returns the continuations of one batch of contexts with the same options.

        Each batch has a seed of its own, because a task may repeat a request to get several samples of its answer."""
        stops, n_new, choice = read_options(options)
        ids, mask = self._prompts(contexts, n_new)
        ends, decoders, texts = self.tokenizer.end_ids, [StreamDecoder(self.tokenizer) for _ in ids], [""] * len(ids)
        is_open = [True] * len(ids)
        tokens = generate(self.model, ids, n_new, **choice, seed=seed, eos_id=ends, attention_mask=mask, exit=self.rule)
        for column in tokens:
            for row, index in enumerate(column.tolist()):
                if is_open[row]:
                    texts[row] += decoders[row].flush() if index in ends else decoders[row].push(index)
                    is_open[row] = index not in ends and not any(stop in texts[row] for stop in stops)
            if not any(is_open):
                break
        for row, decoder in enumerate(decoders):
            if is_open[row]:  # ended by the token limit
                texts[row] += decoder.flush()
        return [min((text.partition(stop)[0] for stop in stops), key=len, default=text) for text in texts]

    def _prompts(self, contexts, n_new):
        """Returns left-padded ids (B, T) and their mask (B, T), with space left for the new tokens if possible."""
        context = self.model.config.max_seq_len
        longest = max(1, context - n_new, context // 2)  # of a prompt; always at least half the context
        rows = [self.tokenizer.encode(text, bos=True)[-longest:] for text in contexts]
        return left_padded(rows, self.tokenizer.pad_id, self.model.embed.weight.device)


def read_options(options: dict) -> tuple[list[str], int, dict]:
    """Splits a task's generation options into (stop strings, number of new tokens, options of `sampling.generate`)."""
    until = options.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    n_new = next((int(options[k]) for k in ("max_gen_toks", "max_new_tokens", "max_tokens") if options.get(k)), None)
    samples = options.get("do_sample", "temperature" in options)
    choice = {"temperature": float(options.get("temperature", 1.0)) if samples else 0.0}
    return stops, n_new or MAX_NEW_TOKENS, choice | {k: options[k] for k in ("top_k", "top_p") if options.get(k)}


def run_tasks(
    model,
    tokenizer,
    tasks: list[str],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    rule: ExitRule | None = None,
) -> tuple[dict, str]:
    """Runs tasks, given by name, wildcard or YAML file. Returns (figures of each task and group, the harness's table).

    include_path: a folder with more tasks; limit: examples per task. Raises UserError if lm_eval is not installed, if
    it does not know a task, or if a task's data cannot be read."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import LM
        from lm_eval.utils import make_table
    except ImportError as error:
        raise UserError(f"lm-evaluation-harness is not installed ({error}): pip install lm_eval=={VERSION}") from None
    from datasets.exceptions import DatasetsError  # lm_eval reads its data with this package

    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include_path {include_path} is not a folder: give a folder of task YAML files")
    adapter = type("Adapter", (Answers, LM), {})(model, tokenizer, batch_size, rule)
    try:
        manager, names = _find(tasks, include_path)
        results = simple_evaluate(
            adapter,
            tasks=names,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except (OSError, DatasetsError, yaml.YAMLError) as error:
        raise UserError(f"--lm_eval {' '.join(tasks)}: cannot read a task's file or data ({error})") from None
    table = "\n".join(make_table(results, part).rstrip() for part in ("results", "groups") if results.get(part))
    return {part: results[part] for part in ("results", "groups", "versions", "n-shot") if part in results}, table


def _find(tasks, include_path):
    """Returns (the harness's TaskManager, names of the matching tasks). Raises UserError for an unknown task."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path, include_defaults=False)
    found = [_names(task, manager) for task in tasks]
    if not all(found):
        manager = TaskManager(include_path=include_path)  # includes its thousands of built-in tasks: half a minute
        found = [_names(task, manager) for task in tasks]
    for task, names in zip(tasks, found):
        if not names:
            close = difflib.get_close_matches(task, manager.all_tasks, 1)
            advice = f"did you mean {close[0]}?" if close else "give its YAML file, or its folder as --include_path"
            raise UserError(f"--lm_eval {task}: unknown task; {advice}")
    return manager, list(itertools.chain.from_iterable(found))


def _names(task, manager):
    return [task] if Path(task).is_file() else manager.match_tasks([task])
