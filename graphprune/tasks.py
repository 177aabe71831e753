"""A language model and names of benchmark tasks in, their scores out: EleutherAI's lm-eval harness on models of ours.

Needs the extra ``graphprune[tasks]``; nothing else of graphprune imports this room.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel

from graphprune.errors import UserMistake, nearest

METRICS = ("acc_norm,none", "acc,none", "exact_match,none", "word_perplexity,none", "perplexity,none")
"""Which of a task's metrics is its score, the first it has."""


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch: int = 8,
) -> dict[str, dict[str, float]]:
    """Every metric of each task, by task: accuracies from 0 to 1, ``…_stderr`` their standard errors.

    ``include`` is a directory of task descriptions of your own, ``shots`` the examples before each question, ``limit`` the
    questions a task. Raises UserMistake on an unknown task.
    """
    manager = TaskManager(include_path=None if include is None else str(include))
    known = manager.all_tasks
    for task in tasks:
        if task not in known:
            raise UserMistake(f"the harness has no task {task!r}", fix=nearest(task, known))
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    found = simple_evaluate(
        model=wrapped, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    return {
        task: {name: value for name, value in row.items() if isinstance(value, float)} for task, row in found["results"].items()
    }


def headline(scores: dict[str, float]) -> tuple[str, float]:
    """The metric a task is known by, and its value."""
    name = next((metric for metric in METRICS if metric in scores), next(iter(scores)))
    return name.removesuffix(",none"), scores[name]
