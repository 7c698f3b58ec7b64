"""Contextual cloze tasks (definitions in evals/tasks): prompts cut to the context length around the answer.

lm-eval cuts a long prompt on the left, which may cut the answer away and then measures nothing. Here the passage is cut
before the prompt is built, to a window around the first place that holds an answer.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

logger = logging.getLogger(__name__)

ANSWER_TOKENS = 50  # room for the answer, as in arXiv 2407.05483

_context: ContextVar[tuple[Any, int] | None] = ContextVar("context", default=None)


@contextmanager
def context_length(tokenizer: Any, tokens: int) -> Iterator[None]:
    """Within the block, prompts of the cloze tasks fit into `tokens` tokens of `tokenizer`, answer included; without a
    tokenizer (None) they are left whole."""
    token = _context.set((tokenizer, tokens))
    try:
        yield
    finally:
        _context.reset(token)


def prepare(dataset: Any) -> Any:
    """Documents {context, question, answers} with the context cut; those without an answer are left out."""
    import datasets

    setting = _context.get()
    if setting is None:
        logger.warning("contexts are not cut, for no context length is known; `t2r eval` sets it")
    tokenizer, tokens = setting or (None, 0)
    documents = []
    for document in dataset:
        answers = [answer for answer in document["answers"] if len(answer) > 1]
        if not answers:
            continue
        question = document["question"].strip()
        context = _clean(document["context"], question)
        if tokenizer is not None:
            room = tokens - ANSWER_TOKENS - len(tokenizer(question)["input_ids"]) - 2
            context = cut(tokenizer, context, answers, room)
        documents.append({"context": context, "question": question, "answers": answers})
    return datasets.Dataset.from_list(documents)


def cut(tokenizer: Any, context: str, answers: Sequence[str], room: int) -> str:
    """At most `room` tokens of `context`, around the first place where one of `answers` stands (the start where none
    does)."""
    spans = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(spans) <= room:
        return context
    places = [match.start() for answer in answers if (match := re.search(re.escape(answer), context, re.IGNORECASE))]
    place = min(places, default=0)
    answer = next((index for index, (_, end) in enumerate(spans) if end > place), 0)
    first = min(max(answer - room // 2, 0), len(spans) - room)
    return context[spans[first][0] : spans[first + room - 1][1]]


def prompt(document: dict[str, Any]) -> str:
    """The context as a sentence, then the question that is to be completed."""
    return f"{document['context'].strip().strip('.')}. {document['question']}"


def contains_any(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the generated text contains one of the answers, whatever the case."""
    found = any(answer.lower() in results[0].lower() for answer in document["answers"])
    return {"contains": float(found)}


def _clean(context: str, question: str) -> str:
    """Without the marks of TriviaQA's source, and without the question where the passage already ends in it."""
    text = re.sub(r"\[(PAR|DOC|TLE)\]", "", context).strip()
    while question and text.lower().endswith(question.lower()):
        text = text[: -len(question)].strip()
    return text
