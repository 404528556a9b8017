"""What multiple-choice tasks share: the options live in the prompt, the answer is a letter."""

import re
from collections.abc import Mapping

from airl_fast.data.tags import extract_answer
from airl_fast.data.task import TextTask
from airl_fast.data.verify import canonical_answer, named_options, option_correct
from airl_fast.types import Example

LETTERS = "ABCDEFGHIJ"

_OPTION = re.compile(r"([A-J])\. (.*)")


def render_prompt(question: str, options: Mapping[str, str]) -> str:
    """The question, a blank line, then one line an option: "A. text". Line breaks inside an option become blanks."""
    lines = [f"{letter}. {' '.join(text.split())}" for letter, text in options.items()]
    return question.strip() + "\n\n" + "\n".join(lines)


def parse_options(prompt: str) -> dict[str, str]:
    """Letter -> text of a prompt that `render_prompt` wrote."""
    block = prompt.rpartition("\n\n")[2]
    return dict(_OPTION.fullmatch(line).groups() for line in block.split("\n"))


class MultipleChoice(TextTask):
    """Right when the answer names the gold option, by letter or full text, and no other."""

    def verify(self, example: Example, text: str) -> bool:
        return option_correct(extract_answer(text), example.answer, parse_options(example.prompt))

    def canonical_answer(self, example: Example, text: str) -> str | None:
        answer = extract_answer(text)
        if answer is None:
            return None
        named = named_options(answer, parse_options(example.prompt))
        return "".join(sorted(named)) or canonical_answer(answer)

    def wrong_options(self, example: Example) -> str:
        return "".join(letter for letter in parse_options(example.prompt) if letter != example.answer)
