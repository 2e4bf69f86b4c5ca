"""Question answering: RULER's qa.py, documents among which one or some answer a question."""

from __future__ import annotations

from ic.evaluation.ruler.questions import Question, Questions
from ic.evaluation.ruler.task import Draw, Prompt, Task

TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question "
    "based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}"
)
ANSWER_PREFIX = " Answer:"
DOCUMENT = "Document {i}:\n{document}"


class QuestionAnswering(Task):
    """Sample i asks question i; a unit is a document. Too few documents are repeated."""

    tokens_to_generate = 32
    metric = "part"

    def __init__(self, questions: Questions) -> None:
        self.questions = questions.questions
        self.documents = questions.documents

    def question(self, index: int) -> Question:
        return self.questions[index % len(self.questions)]

    def least_units(self, index: int) -> int:
        return len(self.question(index).documents)

    def prompt(self, draw: Draw, units: int) -> Prompt:
        question = self.question(draw.index)
        documents = self._documents(draw, question, units)
        draw.shuffle(documents)
        context = "\n\n".join(
            DOCUMENT.format(i=i, document=document) for i, document in enumerate(documents, start=1)
        )
        longest = max(question.outputs, key=len)
        text = TEMPLATE.format(context=context, query=question.query)
        return Prompt(text, ANSWER_PREFIX, question.outputs, f" {longest}")

    def _documents(self, draw: Draw, question: Question, units: int) -> list[str]:
        """Those that answer, then those of the same article, then any.

        RULER draws as many as it needs; here all are drawn and then cut, so that more units are
        more text.
        """
        own, related = question.documents, question.related
        if units >= len(self.documents):
            repeats = -(-units // len(self.documents))
            return (self.documents * repeats)[:units]
        wanted = units - len(own)
        if wanted <= len(related):
            more = draw.words.sample(related, len(related))[:wanted]
        else:
            taken = {*own, *related}
            others = [index for index in range(len(self.documents)) if index not in taken]
            drawn = draw.words.sample(others, len(others))
            more = [*related, *drawn[: wanted - len(related)]]
        return [self.documents[index] for index in [*own, *more]]
