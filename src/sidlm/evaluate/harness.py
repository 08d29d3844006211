"""lm-evaluation-harness on a model that is already loaded: its tasks, with the likelihood of the right answers.

The harness gives accuracies and the like. What scaling work reads, the negative log-likelihood of the right answer, is
only in its samples; it is taken from there, for every task whose answers are scored and not generated.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidlm.errors import SidError
from sidlm.evaluate.harness_data import RECORDS, write_records

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASK_FILES = Path(__file__).parent / "harness_tasks"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric of the harness and the half-width of its 95% interval, 1.96 sqrt(S (1 - S) / N) (Llama 3, section 5.1);
    None for one that is no mean of numbers from 0 to 1 over the questions."""

    value: float
    ci95: float | None


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """One task. ``nll`` is the mean over questions of the right answer's summed NLL in nats, None where answers are
    generated; ``nll_ci95`` is 1.96 standard errors of that mean. ``cut``: prompts that lost their beginning to fit."""

    questions: int
    shots: int | None
    nll: float | None = None
    nll_ci95: float | None = None
    nll_per_byte: float | None = None
    cut: int = 0
    metrics: dict[str, Metric] = field(default_factory=dict)


def evaluate_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    shots: int | None = None,
    limit: int | None = None,
    max_len: int | None = None,
) -> dict[str, HarnessResult]:
    """Run tasks; the result is by task name, groups after their tasks.

    Args:
        model, tokenizer: a causal language model, where and in the dtype it is to run, and its tokenizer.
        tasks: each ``NAME=FILE`` or ``NAME=FILE,SHOTS_FILE`` for a task of ours (gsm8k, mmlu, mmlu_pro, mbpp) on a
            .jsonl or .jsonl.zst file, with few-shot examples from another one; the path of a task's .yaml file; or a
            name that the harness knows, whose data it may download.
        shots: examples before each question, for tasks that do not fix them at 0; default: each task's own.
        limit: only the first so many questions of each task.
        max_len: longest prompt with its answer, in tokens; default: the model's ``max_position_embeddings``. A longer
            prompt loses its beginning after the begin-of-text token, as in `score_task`.

    Raises:
        SidError: the harness is not installed, an unknown task, a malformed file, data that cannot be had, an answer
            longer than ``max_len``.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
        from lm_eval import evaluator
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SidError(f"lm-evaluation-harness is not installed ({error}): pip install 'sidlm[eval]'") from error
    from sidlm.evaluate.harness_model import HarnessModel

    if not tasks:
        raise SidError("no tasks for the harness")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # it asks git about the working folder, which complains on stderr where that is no repository; unused here
    evaluator.get_git_commit_hash = lambda: None
    datasets.disable_progress_bars()
    harness_model = HarnessModel(model, tokenizer, batch_size, max_len or model.config.max_position_embeddings)
    with tempfile.TemporaryDirectory() as folder:
        # reading the names of all the harness's own tasks takes seconds
        theirs = [task for task in tasks if "=" not in task and task not in RECORDS and not _is_file(task)]
        folders = {str(Path(task).resolve().parent) for task in tasks if _is_file(task)}
        manager = TaskManager(include_defaults=bool(theirs), include_path=sorted(folders) or None)
        specs = [_spec(task, Path(folder) / str(i), shots, manager.all_tasks) for i, task in enumerate(tasks)]
        names = [spec if isinstance(spec, str) else spec["task"] for spec in specs]
        if len(set(names)) < len(names):
            raise SidError(f"{max(names, key=names.count)} is asked for twice: the results are by name")
        simple_evaluate: Any = evaluator.simple_evaluate  # its decorator hides its type
        try:
            out = simple_evaluate(
                model=harness_model,
                tasks=specs,
                num_fewshot=shots,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=True,
            )
        except (ConnectionError, DatasetsError, FileNotFoundError) as error:
            raise SidError(f"the data of {', '.join(tasks)} cannot be read: {error}") from error
    assert out is not None  # only other ranks of a distributed run get nothing
    return _results(dict(out), harness_model)


def _spec(task: str, folder: Path, shots: int | None, known: Sequence[str]) -> str | dict[str, Any]:
    """What the harness is asked for: a config of our own, or the name or path as it is."""
    name, equals, files = task.partition("=")
    if equals:
        return _local(name, files, folder, shots)
    if name in RECORDS:
        raise SidError(f"task {name} needs a file: {name}=FILE.jsonl, or {name}=FILE.jsonl,SHOTS.jsonl")
    if _is_file(name):
        return _name_in(Path(name))
    if name not in known:
        near = difflib.get_close_matches(name, [*known, *RECORDS], n=1, cutoff=0.6)
        raise SidError(f"the harness has no task {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return name


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _name_in(path: Path) -> str:
    """The name of the group or task that a file describes; the harness finds the file by it in its folder."""
    if not path.is_file():
        raise SidError(f"no such task file: {path}")
    # not a YAML loader: the file may hold tags of the harness
    found = dict(re.findall(r"""^(group|task):\s*["']?([^\s"'\[{]+)""", path.read_text(encoding="utf-8"), re.MULTILINE))
    if not found:
        raise SidError(f"{path}: names no task: it has neither a line 'task: NAME' nor 'group: NAME'")
    return found.get("group") or found["task"]


def _local(name: str, files: str, folder: Path, shots: int | None) -> dict[str, Any]:
    import yaml

    if name not in RECORDS:
        raise SidError(f"no task {name!r} takes a file; there are {', '.join(RECORDS)}, or a .yaml file of your own")
    test, _, fewshot = files.partition(",")
    folder.mkdir()
    paths = {"test": str(folder / "test.jsonl")}
    count = write_records(test, name, folder / "test.jsonl")
    config = yaml.safe_load((TASK_FILES / f"{name}.yaml").read_text(encoding="utf-8"))
    if fewshot:
        paths["fewshot"] = str(folder / "fewshot.jsonl")
        examples = write_records(fewshot, name, folder / "fewshot.jsonl")
    else:
        # from the questions themselves: the harness leaves out the one that is asked
        config["fewshot_split"], examples = "test", count - 1
    # here and not only as the harness's argument, which does not count against a 0 in the file
    shots = int(config["num_fewshot"] if shots is None else shots)
    if examples < shots:
        raise SidError(f"{fewshot or test}: {shots} examples before each question need more than {examples} others")
    return config | {"num_fewshot": shots, "dataset_kwargs": {"data_files": paths, "cache_dir": str(folder / "cache")}}


def _results(out: dict[str, Any], model: Any) -> dict[str, HarnessResult]:
    found: dict[str, HarnessResult] = {}
    for name, metrics in out["results"].items():
        members = _leaves(name, out.get("group_subtasks", {}))  # of a group; of a task, itself
        samples = [out["samples"].get(task, []) for task in members]
        rows = [row for part in samples for row in _rows(part)]
        answers = [answer for row in rows if (answer := _right_answer(row)) is not None]
        found[name] = HarnessResult(
            questions=len(rows),
            shots=out["n-shot"].get(name),
            **(_likelihood(answers) if answers and len(answers) == len(rows) else {}),
            cut=sum(any(pair in model.cut for pair in _arguments(row)) for row in rows),
            metrics=_metrics(metrics, [sample for part in samples for sample in part]),
        )
    return found


def _leaves(name: str, children: dict[str, list[str]]) -> list[str]:
    below = children.get(name, [])
    return [leaf for child in below for leaf in _leaves(child, children)] if below else [name]


def _rows(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for a question: a task with several filters repeats its questions for each."""
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        rows.setdefault(sample["doc_id"], sample)
    return list(rows.values())


def _arguments(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(prompt, answer) of each request for the likelihood of an answer; others have other arguments."""
    return [tuple(a) for a in row["arguments"] if len(a) == 2 and isinstance(a[1], str)]


def _right_answer(row: dict[str, Any]) -> tuple[float, int] | None:
    """(NLL in nats, bytes) of the right answer; None where it was not scored."""
    arguments, scores = _arguments(row), row["filtered_resps"]
    if not arguments or not all(isinstance(s, list | tuple) and len(s) == 2 for s in scores):
        return None
    right = 0 if len(scores) == 1 else row["target"]
    if not isinstance(right, int) or not 0 <= right < len(scores) or len(scores) != len(arguments):
        return None
    return -float(scores[right][0]), len(arguments[right][1].encode())


def _likelihood(answers: list[tuple[float, int]]) -> dict[str, float]:
    nlls = [nll for nll, _ in answers]
    count, mean = len(nlls), math.fsum(nlls) / len(nlls)
    variance = math.fsum((nll - mean) ** 2 for nll in nlls) / max(count - 1, 1)
    return {
        "nll": mean,
        "nll_ci95": 1.96 * math.sqrt(variance / count),
        "nll_per_byte": math.fsum(nlls) / max(sum(size for _, size in answers), 1),
    }


def _metrics(metrics: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Metric]:
    """The harness's own numbers; their keys are "metric,filter"."""
    found = {}
    for key, value in metrics.items():
        name, comma, chosen = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        own = [sample.get(name) for sample in samples if sample.get("filter") == chosen]
        ci95 = 1.96 * math.sqrt(value * (1 - value) / len(own)) if _is_mean_share(value, own) else None
        found[name if chosen == "none" else f"{name} ({chosen})"] = Metric(value=float(value), ci95=ci95)
    return found


def _is_mean_share(value: float, own: list[Any]) -> bool:
    """Whether the interval of a share holds: not for a mean of means, nor for other aggregates."""
    if not own or not all(isinstance(v, int | float) and 0 <= v <= 1 for v in own):
        return False
    return math.isclose(value, math.fsum(own) / len(own), abs_tol=1e-9)
