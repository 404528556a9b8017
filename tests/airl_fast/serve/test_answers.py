"""What /score, /rerank and /localize answer is what the judge and the evaluation say of the same traces."""

import json

import numpy as np
import pytest
from fastapi.testclient import TestClient

from airl_fast.cli import main
from airl_fast.data.tags import format_trace
from airl_fast.judge.choose import score_traces
from airl_fast.judge.locate import suspicious_steps
from airl_fast.measures.localise import step_scores
from airl_fast.serve.answers import weighted_vote
from tests.airl_fast.run_cases import small_run
from tests.airl_fast.serve.service_cases import app_with, demonstrations, judge, rows, thresholds


@pytest.fixture(scope="module")
def client():
    with TestClient(app_with()) as client:
        yield client


def direct(texts, examples):
    """The judge's own view, without a service."""
    traces = [judge().trace(example, i, text) for i, (example, text) in enumerate(zip(examples, texts, strict=True))]
    return judge().score(traces, examples)


def test_score_gives_the_judges_numbers(client):
    examples = demonstrations()[:3]
    scored = direct([example.expert for example in examples], examples)
    traces = client.post("/score", json={"traces": rows(3)}).json()["traces"]
    assert [trace["id"] for trace in traces] == [example.id for example in examples]
    np.testing.assert_allclose(
        np.concatenate([trace["token_rewards"] for trace in traces]), scored.reward.values, rtol=0, atol=1e-6
    )
    own = judge().config.evaluate.scorer
    for name, values in score_traces(scored, judge().config).items():
        if name != "logprob":
            key = own if name == "reward" else name.removeprefix("reward_")
            np.testing.assert_allclose([trace["rewards"][key] for trace in traces], values, rtol=0, atol=1e-6)


def test_tokens_and_steps_spell_the_text(client):
    (trace,) = client.post("/score", json={"traces": rows(1)}).json()["traces"]
    text = demonstrations()[0].expert
    chat = judge().maker.chat
    assert "".join(trace["tokens"][:-1]) == text
    assert trace["tokens"][-1] == chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn)
    assert "".join(text[start:end] for start, end in trace["token_spans"]) == text
    assert "".join(step["text"] for step in trace["steps"]) == text
    assert [text[step["start"] : step["end"]] for step in trace["steps"]] == [step["text"] for step in trace["steps"]]
    assert len(trace["steps"]) == len(judge().task.step_ends(text))
    scored = direct([text], demonstrations()[:1])
    means, lows = (step_scores(scored.reward, rule).values for rule in ("mean", "min"))
    np.testing.assert_allclose([step["reward_mean"] for step in trace["steps"]], means, rtol=0, atol=1e-6)
    np.testing.assert_allclose([step["reward_min"] for step in trace["steps"]], lows, rtol=0, atol=1e-6)


def test_steps_are_kept_as_they_were_sent(client):
    """Two of the steps are one line each to the task, and one step to whoever sends them."""
    prompt = demonstrations()[0].prompt
    sent = {"prompt": prompt, "steps": ["1 + 1 = 2\n2 + 1 = 3", "3 + 1 = 4"], "final_answer": 4}
    (trace,) = client.post("/score", json={"traces": [sent]}).json()["traces"]
    assert [step["text"] for step in trace["steps"]] == [
        "<think>\n1 + 1 = 2\n2 + 1 = 3\n",
        "3 + 1 = 4\n</think>\n<answer>4</answer>",
    ]
    assert trace["id"] == "traces.0"
    assert trace["rewards"]["answer"] is not None
    del sent["final_answer"]
    (trace,) = client.post("/score", json={"traces": [sent]}).json()["traces"]
    assert trace["rewards"]["answer"] is None  # JSON has no -inf


@pytest.mark.parametrize("scorer", ["min_step", "mean", "last", "answer", None])
def test_rerank_orders_by_the_scorer(client, scorer):
    example = demonstrations()[0]
    texts = [format_trace("1 + 1 = 2", "2"), example.expert, format_trace("9 - 9 = 0", "0"), "nothing to see"]
    request = {"prompts": [{"id": "p", "prompt": example.prompt, "completions": texts}]}
    body = client.post("/rerank", json=request | ({} if scorer is None else {"scorer": scorer})).json()
    used = scorer or judge().config.evaluate.scorer
    assert body["scorer"] == used
    (ranked,) = body["prompts"]
    scored = score_traces(direct(texts, [example] * 4), judge().config)
    scores = scored["reward" if used == judge().config.evaluate.scorer else f"reward_{used}"]
    assert ranked["order"] == np.argsort(-scores, kind="stable").tolist()
    assert ranked["best"] == ranked["order"][0]
    assert ranked["id"] == "p"
    assert ranked["answers"] == ["2", example.answer, "0", None]
    np.testing.assert_allclose(ranked["scores"]["logprob"], scored["logprob"], rtol=0, atol=1e-5)
    assert ranked["scores"]["answer"][3] is None


def test_rerank_reads_several_prompts_of_any_number(client):
    prompts = [
        {"prompt": each.prompt, "completions": [each.expert] * count}
        for each, count in zip(demonstrations(), (1, 3, 2), strict=False)
    ]
    ranked = client.post("/rerank", json={"prompts": prompts}).json()["prompts"]
    assert [each["order"] for each in ranked] == [[0], [0, 1, 2], [0, 1]]  # equals keep their order
    assert [each["id"] for each in ranked] == ["prompts.0", "prompts.1", "prompts.2"]
    assert [each["vote"]["answers"][0]["candidates"] for each in ranked] == [[0], [0, 1, 2], [0, 1]]


def test_weighted_vote_sums_probabilities():
    vote = weighted_vote(["a", "b", None, "a"], np.array([0.3, 0.5, 0.9, 0.3]), [2, 1, 0, 3])
    assert vote.answer == "a"
    assert vote.best == 0
    assert [(each.answer, each.candidates) for each in vote.answers] == [("a", [0, 3]), ("b", [1])]
    assert vote.answers[0].weight == pytest.approx(0.6)
    tie = weighted_vote(["a", "b", "a"], np.array([0.1, 0.3, 0.2]), [1, 2, 0])
    assert tie.answer == "b"  # 0.1 + 0.2 is 0.3 but for rounding; the best candidate decides
    assert weighted_vote([None, None], np.array([0.5, 0.5]), [0, 1]) is None


def test_localize_follows_the_runs_rule(client):
    examples = demonstrations()[:4]
    scored = direct([example.expert for example in examples], examples)
    suspects = suspicious_steps(scored, judge().config.evaluate, thresholds())
    body = client.post("/localize", json={"traces": rows(4)}).json()
    assert body["rule"] == judge().config.evaluate.localise == "first_below"
    assert body["threshold"] == thresholds()["reward"]
    for i, trace in enumerate(body["traces"]):
        own = slice(suspects.offsets[i], suspects.offsets[i + 1])
        np.testing.assert_allclose([s["suspicion"] for s in trace["steps"]], suspects.values[own], rtol=0, atol=1e-5)
        assert trace["first_wrong_step"] == int(np.argmax(suspects.values[own]))
        assert trace["below_threshold"] == any(s["score"] < body["threshold"] for s in trace["steps"])


def test_localize_by_another_rule(client):
    body = client.post("/localize", json={"traces": rows(3), "rule": "argmin"}).json()
    assert (body["rule"], body["threshold"]) == ("argmin", None)
    for trace in body["traces"]:
        lowest = np.argmin([step["score"] for step in trace["steps"]])
        assert trace["first_wrong_step"] == lowest
        assert trace["below_threshold"] is None


def test_every_example_of_the_openapi_document_is_answered(client):
    document = client.get("/openapi.json").json()
    for path, schema in (("/score", "ScoreRequest"), ("/rerank", "RerankRequest"), ("/localize", "LocalizeRequest")):
        (example,) = document["components"]["schemas"][schema]["examples"]
        assert client.post(path, json=example).status_code == 200
        assert "413" in document["paths"][path]["post"]["responses"]
    for example in document["components"]["schemas"]["TraceIn"]["examples"]:
        assert client.post("/score", json={"traces": [example]}).status_code == 200
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404


def test_the_command_writes_the_same_numbers(client, tmp_path):
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(2)))
    assert main(["score", str(small_run()), str(file), "-o", str(out)]) == 0
    answered = client.post("/score", json={"traces": rows(2)}).json()["traces"]
    for line, trace in zip(out.read_text().splitlines(), answered, strict=True):
        written = json.loads(line)
        assert written["tokens"] == trace["tokens"] and written["token_spans"] == trace["token_spans"]
        assert written.keys() - trace.keys() == {"labels", "run", "reward_sha256"} and trace.keys() <= written.keys()
        np.testing.assert_allclose(written["token_rewards"], trace["token_rewards"], rtol=0, atol=2e-6)
        assert [step["text"] for step in written["steps"]] == [step["text"] for step in trace["steps"]]
