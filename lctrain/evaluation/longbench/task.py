"""LongBench (Bai et al., arXiv:2308.14508): questions about long texts, read from a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from lctrain.errors import InputError
from lctrain.evaluation.base import SHARE, Quantity, Texts, Tokens
from lctrain.evaluation.generation import Example, Examples, Generation
from lctrain.evaluation.longbench.metrics import METRICS
from lctrain.evaluation.longbench.questions import Question, read_questions
from lctrain.evaluation.prompt import prompt_ids

PLAIN = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")  # LongBench asks these without a chat template


@dataclass(frozen=True, kw_only=True)
class LongBench(Generation):
    """A task of the questions in `path`, a JSONL file of LongBench's, of which the first `num_samples` are asked.

    `prompt` is filled with a question's fields, such as {context} and {input}. A prompt that does not fit
    into a length together with `max_new_tokens` loses tokens in its middle: as many are kept before the gap as after it
    (LongBench's 3,500 tokens are lengths=[3532] with an answer of 32). A score is the best of `metric` over the
    answers; with `first_line` only the reply's first line counts. Deviations: halves that take more tokens once they
    are joined as text are cut further, and the tokens of a chat template are part of the length.
    """

    path: str
    prompt: str
    max_new_tokens: int
    metric: str
    first_line: bool
    chat_template: str | None
    num_samples: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in METRICS:
            raise InputError(f"{self.name} has no metric {self.metric!r}; choose one of {', '.join(METRICS)}")
        if self.max_new_tokens < 1 or (self.num_samples is not None and self.num_samples < 1):
            raise InputError(f"{self.name} max_new_tokens and num_samples must be positive")

    @property
    def quantity(self) -> Quantity:
        return Quantity(self.metric, SHARE)

    @cached_property
    def questions(self) -> list[Question]:
        """Return the questions that are asked, read once."""
        return read_questions(self.path)[: self.num_samples]

    @property
    def num_examples(self) -> int:
        return len(self.questions)

    def documents(self, texts: Texts) -> Sequence[Tokens]:
        return ()

    def check(self, documents: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase) -> None:
        for question in self.questions:
            self.text(question)
            if self.chat_template and question["dataset"].removesuffix("_e") in PLAIN:
                raise InputError(
                    f"{self.path}: {question['dataset']} is asked without a chat template; use chat_template=null"
                )
            if self.metric == "classification" and not question["all_classes"]:
                raise InputError(f"{self.path}: metric=classification needs all_classes; {question['_id']} has none")
        self.ids(tokenizer, self.text(self.questions[0]), self.context_lengths[0])

    def text(self, question: Question) -> str:
        """Return the prompt of a question as text, in full."""
        try:
            return self.prompt.format(**question)
        except (KeyError, IndexError, ValueError) as error:
            raise InputError(f"{self.name} prompt: cannot fill in {error} with {', '.join(question)}") from error

    def ids(self, tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> Tokens:
        """Return the ids of a prompt that leaves room for the answer, without the middle of a text that is too long."""
        room = length - self.max_new_tokens
        ids = prompt_ids(tokenizer, text, chat_template=self.chat_template)
        plain = prompt_ids(tokenizer, text)
        half = (room - len(ids) + len(plain)) // 2
        while len(ids) > room:
            if half < 1:
                raise InputError(f"{self.name}: a length of {length} leaves {room} tokens for a prompt; raise it")
            ends = (tokenizer.decode(part, skip_special_tokens=True) for part in (plain[:half], plain[-half:]))
            ids = prompt_ids(tokenizer, "".join(map(str, ends)), chat_template=self.chat_template)
            half -= 1
        return ids

    def examples(self, tokenizer: PreTrainedTokenizerBase, documents: Sequence[Tokens]) -> Examples:
        return self.batches(lambda length: [self.example(tokenizer, each, length) for each in self.questions])

    def example(self, tokenizer: PreTrainedTokenizerBase, question: Question, length: int) -> Example:
        """Return a question as it is asked at a length."""
        return Example(
            prompt=self.ids(tokenizer, self.text(question), length),
            references=question["answers"],
            num_tokens=self.max_new_tokens,
            classes=question["all_classes"] or (),
        )

    def score(self, reply: str, example: Example) -> float:
        if self.first_line:
            reply = reply.lstrip("\n").split("\n")[0]
        return max(METRICS[self.metric](reply, reference, example.classes) for reference in example.references)
