"""What the service reads. Unknown fields are refused, labels among them: a scorer never sees an answer key."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictInt

from airl_fast.measures.localise import Rule
from airl_fast.measures.rerank import Scorer

# Fields of a trace file that say what is right. They are refused by name, so that nobody believes they were used.
LABELS = frozenset({"answer", "correct", "first_wrong_step", "group", "gold", "is_correct", "label"})

Name = Annotated[str, Field(min_length=1, max_length=512)] | StrictInt
Text = Annotated[str, Field(min_length=1)]
SignalName = Literal["answer", "mean", "min_step", "last", "logprob"]

_PROMPT = "start 7; gain 1; lose 4?"
_RIGHT = "<think>\n7 + 1 = 8\n8 - 4 = 4\n</think>\n<answer>4</answer>"
_WRONG = "<think>\n7 + 1 = 8\n8 - 4 = 5\n</think>\n<answer>5</answer>"
_TRACE = {"id": "a", "prompt": _PROMPT, "completion": _WRONG}
_STEPS = {"prompt": _PROMPT, "steps": ["7 + 1 = 8", "8 - 4 = 5"], "final_answer": "5"}


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TraceIn(Request):
    """One trace, in the layout of a trace file: the text as it was written, or its steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra={"examples": [_TRACE, _STEPS]})

    id: Name | None = Field(None, description="comes back with the result; its place in the request when left out")
    prompt: Text = Field(description="the user's message, without chat template")
    completion: Text | None = Field(None, description="the whole text; give this or `steps`")
    steps: list[str] | None = Field(None, min_length=1, description="one text a step; give this or `completion`")
    final_answer: str | StrictInt | FiniteFloat | None = Field(None, description="goes with `steps`")


class ScoreRequest(Request):
    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra={"examples": [{"traces": [_TRACE]}]})

    traces: list[TraceIn] = Field(min_length=1)


class LocalizeRequest(Request):
    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra={"examples": [{"traces": [_STEPS]}]})

    traces: list[TraceIn] = Field(min_length=1)
    rule: Rule | None = Field(None, description="how the first wrong step is named; the run's `evaluate.localise`")


class Candidates(Request):
    id: Name | None = Field(None, description="comes back with the result; its place in the request when left out")
    prompt: Text
    completions: list[Text] = Field(min_length=1, description="the candidates, whole texts")


class RerankRequest(Request):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"prompts": [{"prompt": _PROMPT, "completions": [_WRONG, _RIGHT]}]}]},
    )

    prompts: list[Candidates] = Field(min_length=1)
    scorer: Scorer | None = Field(None, description="orders and weighs the candidates; the run's `evaluate.scorer`")
