"""How good is a model: bits per byte of held-out text, and the likelihood of answers."""

from sidlm.evaluate.nll import DomainNLL, bits_per_byte, span_nll
from sidlm.evaluate.tasks import Question, TaskResult, read_task, score_task

__all__ = ["DomainNLL", "Question", "TaskResult", "bits_per_byte", "read_task", "score_task", "span_nll"]
