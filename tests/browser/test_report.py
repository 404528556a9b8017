"""`airl-fast report` as a reader meets it: plots, tokens, filters, keys, themes, speed."""

import json
import re
from pathlib import Path

import pytest

from airl_fast.evaluate.record import read_record, record_path
from airl_fast.report.page import write_report
from airl_fast.report.tokens import group_statistics
from tests.airl_fast.report.report_cases import HOSTILE, STEPS, write_run

# For 500 traces, far above what two quiet cores take: other work may run beside the tests.
MOST_SECONDS = {"ready": 5.0, "plotted": 40.0, "busy": 4.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def one(root: Path) -> Path:
    write_report([write_run(root, "one")], root / "one.html")
    return root / "one.html"


@pytest.fixture(scope="module")
def two(root: Path, one: Path) -> Path:
    write_report([root / "one", write_run(root, "two", prompts=3, gamma=0.5)], root / "two.html")
    return root / "two.html"


@pytest.fixture(scope="module")
def traces(root: Path, one: Path) -> list:
    return read_record(record_path(root / "one", "test"))[1]


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def tip(page) -> dict[str, str]:
    rows = page.locator("#tip tr").all()
    return {row.locator("th").text_content(): row.locator("td").text_content() for row in rows}


def listed(page) -> list[int]:
    return [int(chip.get_attribute("data-trace")) for chip in page.locator("#prompts .chip").all()]


def panes(page) -> list[int]:
    return [int(pane.get_attribute("data-trace")) for pane in page.locator(".pane").all()]


# ---------------------------------------------------------------------------------------------- plots


def test_every_plot_draws_every_point_it_was_given(one, visit) -> None:
    page = visit(one).page
    drawn = page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll(".plot")].map((plot) => [plot.id, {
            lines: plot.querySelectorAll(".scatterlayer path.js-line").length,
            points: plot.querySelectorAll(".scatterlayer path.point").length,
            bars: plot.querySelectorAll(".barlayer .point path").length,
            cells: plot.querySelectorAll(".heatmaplayer image").length,
            whiskers: plot.querySelectorAll(".errorbar").length,
            shapes: plot.querySelectorAll(".shapelayer path").length,
            x: plot.calcdata.map((trace) => trace.length),
        }]))"""
    )
    curves = [name for name in drawn if name.startswith("plot-curve-")]
    assert len(curves) == 6
    for name in curves:
        assert drawn[name]["lines"] == 2 and drawn[name]["x"] == [STEPS, STEPS], name
    assert drawn["plot-curve-accuracy"]["shapes"] == 1
    assert (drawn["plot-pass-at-k"]["lines"], drawn["plot-pass-at-k"]["points"]) == (4, 6)
    assert (drawn["plot-rerank"]["lines"], drawn["plot-rerank"]["points"]) == (6, 9)  # the fourth is hidden
    assert drawn["plot-distribution-0"]["bars"] == sum(drawn["plot-distribution-0"]["x"]) == 80
    assert drawn["plot-distribution-0"]["shapes"] == 2
    assert drawn["plot-correlation-0"]["cells"] == 1
    for name in ("plot-localise-hit-at-1", "plot-localise-hit-within-1", "plot-localise-mrr"):
        assert (drawn[name]["bars"], drawn[name]["whiskers"], drawn[name]["shapes"]) == (3, 3, 2)
    assert drawn["plot-phases-0"]["x"] == [STEPS, STEPS]
    assert drawn["plot-throughput"]["lines"] == 2
    assert len(drawn) == 15


def test_hovering_a_curve_shows_its_value(one, visit) -> None:
    page = visit(one).page
    plot = page.locator("#plot-curve-mean-length")
    plot.scroll_into_view_if_needed()
    box = plot.locator(".nsewdrag").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
    hover = plot.locator(".hoverlayer .legendtext")
    hover.first.wait_for()
    assert hover.all_text_contents() == ["one : 80"]  # 40 + step 40


def test_a_hidden_line_is_shown_by_its_name(one, visit) -> None:
    page = visit(one).page
    page.evaluate("""Plotly.restyle("plot-rerank", {visible: true})""")
    assert page.locator("#plot-rerank .scatterlayer path.point").count() == 12


def test_runs_are_overlaid_and_their_differences_listed(two, visit) -> None:
    page = visit(two).page
    assert page.locator("#plot-curve-entropy path.js-line").count() == 4
    assert page.locator(".differences tbody tr").all_text_contents() == ["advantage.gamma0.90.5"]
    assert page.locator(".summary").first.locator("thead th").all_text_contents() == ["", "one", "two"]
    page.select_option("#view", label="two")
    assert page.locator("#listed").text_content() == "18 of 18 traces, 3 of 3 prompts (the first 3 of 5 prompts)"


# ---------------------------------------------------------------------------------------------- tokens


def test_hovering_a_token_shows_its_values(one, visit, traces) -> None:
    page = visit(one).page
    shown = panes(page)[0]
    trace = traces[shown]
    last = [t.reward[-1] for t in traces if t.prompt == trace.prompt and t.kind == "sample"]
    mean, scale = group_statistics(last, read_record_reward(one))
    standardised = [(reward - mean) / scale for reward in trace.reward]
    at = trace.step_ends[0] + 2
    discounted = sum(0.9 ** (i - at) * standardised[i] for i in range(at, len(standardised)))
    page.locator(".pane").first.locator(".token").nth(at).hover()
    values = tip(page)
    assert json.loads(values["token"]) == trace.text[slice(*trace.spans[at])]
    assert values["step"] == "2 of 3"
    assert number(values["reward"]) == pytest.approx(trace.reward[at], abs=6e-4)
    assert number(values["standardised"]) == pytest.approx(standardised[at], abs=6e-4)
    assert number(values["discounted"]) == pytest.approx(discounted, abs=6e-4)
    assert number(values["log-probability"]) == pytest.approx(trace.logprob[at], abs=6e-5)
    page.mouse.move(2, 2)
    assert page.locator("#tip").is_hidden()


def read_record_reward(file: Path):
    return read_record(record_path(file.with_suffix(""), "test"))[0].reward


def test_colours_follow_the_value_that_is_chosen(one, visit, traces) -> None:
    page = visit(one).page

    def strengths() -> list[float]:
        read = "tokens => tokens.map(t => t.style.getPropertyValue('--strength') * (t.matches('.pos') ? 1 : -1))"
        return page.locator(".pane").first.locator(".token").evaluate_all(read)

    trace = traces[panes(page)[0]]
    first = strengths()
    assert len(first) == len(trace.reward)
    mean = sum(t.reward[-1] for t in traces if t.prompt == trace.prompt and t.kind == "sample") / 5
    assert [s >= 0 for s in first] == [reward >= mean for reward in trace.reward]
    page.check("input[value=discounted]", force=True)
    second = strengths()
    assert second != first and page.locator("#scale-name").text_content() == "discounted reward"
    assert max(map(abs, second)) <= 1


def test_steps_and_the_predicted_and_true_first_wrong_step_are_marked(one, visit, traces) -> None:
    page = visit(one).page
    for index in (0, 1, 5):  # wrong, correct, perturbed
        page.locator(f"#prompts [data-trace='{index}']").click()
        trace, pane = traces[index], page.locator(f".pane[data-trace='{index}']").first
        steps = pane.locator(".step")
        assert steps.count() == len(trace.step_ends)
        classes = [step.get_attribute("class").split()[1:] for step in steps.all()]
        assert [i for i, names in enumerate(classes) if "predicted" in names] == [trace.predicted]
        assert [i for i, names in enumerate(classes) if "true" in names] == ([trace.truth] if trace.truth >= 0 else [])
        score = steps.nth(1).locator(".gutter small").text_content()
        assert number(score) == pytest.approx(trace.step_scores[1], abs=6e-3)
        words = pane.locator(".located").text_content()
        assert f"predicted step {trace.predicted + 1}" in words
        assert f"true {'none' if trace.truth < 0 else f'step {trace.truth + 1}'}" in words


def test_a_trace_of_markup_stays_text_and_shared_characters_show_once(one, visit, traces) -> None:
    page = visit(one).page
    page.locator("#prompts [data-trace='0']").click()
    pane = page.locator(".pane[data-trace='0']").first
    shown = "".join(pane.locator(".token:not(.end)").all_text_contents())
    assert shown.replace("▯", "").replace("↵\n", "↵").replace("↵", "\n") == traces[0].text
    assert HOSTILE.replace("🙂", "🙂▯") in shown and shown.count("🙂") == 1
    assert pane.locator(".token.end").text_content() == "<|end|>"
    assert page.locator("#tokens img").count() == 0 and page.title() == "airl-fast: one"
    assert page.locator(".row .heading").first.text_content() == "What is <b>0</b> plus a number?"


def test_filters_and_search_list_what_they_say(one, visit, traces) -> None:
    page = visit(one).page

    def kinds() -> set[str]:
        return {"perturbed" if traces[i].kind == "perturbed" else str(traces[i].correct) for i in listed(page)}

    assert len(listed(page)) == len(traces) == 24
    assert [page.locator(f"#count-{k}").text_content() for k in ("correct", "wrong", "perturbed")] == ["8", "12", "4"]
    page.uncheck("input[value=wrong]")
    assert len(listed(page)) == 12 and kinds() == {"True", "perturbed"}
    page.uncheck("input[value=perturbed]")
    assert len(listed(page)) == 8 and kinds() == {"True"}
    assert page.locator("#listed").text_content() == "8 of 24 traces, 4 of 4 prompts (the first 4 of 6 prompts)"
    page.fill("#search", "is <B>2")
    assert {traces[i].prompt for i in listed(page)} == {2} and len(listed(page)) == 2
    page.fill("#search", "case/3")
    assert {traces[i].prompt for i in listed(page)} == {3}
    page.fill("#search", "nothing of the kind")
    assert listed(page) == [] and page.locator("#listed").text_content().startswith("No trace is like that")
    page.fill("#search", "")
    for kind in ("wrong", "perturbed"):
        page.check(f"input[value={kind}]")
    for outcome in ("found", "missed"):
        page.select_option("#outcome", outcome)
        wanted = [i for i, t in enumerate(traces) if t.truth >= 0 and (t.predicted == t.truth) == (outcome == "found")]
        assert sorted(listed(page)) == wanted and wanted


def test_samples_stand_in_the_order_of_their_reward(one, visit, traces) -> None:
    page = visit(one).page
    for row in page.locator(".row").all():
        shown = [traces[int(chip.get_attribute("data-trace"))] for chip in row.locator(".chip").all()]
        rewards = [trace.scores["reward"] for trace in shown if trace.kind == "sample"]
        assert rewards == sorted(rewards, reverse=True) and len(rewards) == 5
        assert [trace.kind for trace in shown][-1] == "perturbed"


def test_two_samples_of_a_prompt_side_by_side(one, visit, traces) -> None:
    page = visit(one).page
    left, right = panes(page)
    assert traces[left].prompt == traces[right].prompt and not traces[left].correct and traces[right].correct
    boxes = [pane.bounding_box() for pane in page.locator(".pane").all()]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"] and abs(boxes[0]["y"] - boxes[1]["y"]) < 2
    page.locator("#prompts [data-trace='8']").click(modifiers=["Shift"])  # another prompt, on the right
    assert panes(page)[1] == 8 and traces[panes(page)[0]].prompt == 1
    page.locator(".pane").first.locator("select").select_option("6")
    assert panes(page) == [6, 8]
    assert page.locator("#prompts .chip[aria-pressed=true]").count() == 2
    page.uncheck("#beside")
    assert panes(page) == [6] and page.locator("#prompts .chip[aria-pressed=true]").count() == 1


def test_everything_is_reached_by_keys(one, visit, traces) -> None:
    page = visit(one).page
    page.locator("#beside").focus()
    page.keyboard.press("Tab")
    here = "document.activeElement"
    assert page.evaluate(f"{here}.className").startswith("chip")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    wanted = int(page.locator(".row").nth(1).locator(".chip").nth(1).get_attribute("data-trace"))
    assert int(page.evaluate(f"{here}.dataset.trace")) == wanted
    page.keyboard.press("Enter")
    assert panes(page)[0] == wanted
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+Enter")
    assert panes(page) == [wanted, int(page.evaluate(f"{here}.dataset.trace"))]
    page.locator(".pane").first.locator("select").focus()
    page.keyboard.press("Tab")
    assert page.evaluate(f"{here}.dataset.token") == "0" and page.locator("#tip").is_visible()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    first_end = traces[wanted].step_ends[0]
    assert int(page.evaluate(f"{here}.dataset.token")) == first_end + 2
    assert tip(page)["step"] == "2 of 3" and page.evaluate(f"{here}.getAttribute('aria-describedby')") == "tip"
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


# ---------------------------------------------------------------------------------------------- looks


def luminance(colour: str) -> float:
    parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_and_the_switch_with_every_plot(one, visit, scheme) -> None:
    page = visit(one, scheme=scheme).page
    other = {"light": "dark", "dark": "light"}[scheme]

    def colours() -> tuple[str, str]:
        text = page.locator("#plot-curve-entropy .xtick text").first.evaluate("n => getComputedStyle(n).fill")
        return page.evaluate("getComputedStyle(document.body).backgroundColor"), text

    def readable() -> None:
        back, text = map(luminance, colours())
        assert (max(back, text) + 0.05) / (min(back, text) + 0.05) > 7

    before = colours()
    readable()
    page.check(f"#theme input[value={other}]", force=True)
    page.wait_for_selector(f"html[data-theme={other}][data-plotted={other}]")
    assert all(a != b for a, b in zip(before, colours(), strict=True))
    readable()
    page.check("#theme input[value=auto]", force=True)
    page.wait_for_selector(f"html[data-plotted={scheme}]")
    assert colours() == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tokens_are_legible_at_full_colour(one, visit, scheme) -> None:
    page = visit(one, scheme=scheme).page
    for sign in ("pos", "neg"):
        painted = page.evaluate(
            """(sign) => {
                const probe = document.createElement("span");
                probe.className = `token ${sign}`;
                probe.style.setProperty("--strength", 1);
                document.querySelector(".line").append(probe);
                const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
                const [r, g, b, a] = numbers(getComputedStyle(probe).backgroundColor);
                const under = numbers(getComputedStyle(document.querySelector(".card")).backgroundColor);
                const over = [r, g, b].map((value, i) => Math.round(a * value + (1 - a) * under[i]));
                const ink = getComputedStyle(probe).color;
                probe.remove();
                return [`${over}`, ink];
            }""",
            sign,
        )
        back, text = map(luminance, painted)
        assert (max(back, text) + 0.05) / (min(back, text) + 0.05) > 4.5, (scheme, sign, painted)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (800, "dark")])
def test_screenshots_and_nothing_wider_than_the_page(two, visit, scheme, width) -> None:
    watched = visit(two, width=width, scheme=scheme)
    page = watched.page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    for section in ("summary", "tokens", "Training", "pass-at-k", "Reward-and-correctness", "First-wrong-step", "Time"):
        page.evaluate("id => document.getElementById(id).scrollIntoView()", section)
        file = watched.screenshot(f"report-{section}-{scheme}-{width}")
        assert file.stat().st_size > 10_000


# ---------------------------------------------------------------------------------------------- speed


def test_it_opens_fast_with_500_traces(root, visit) -> None:
    write_report([write_run(root, "many", prompts=50, samples=9)], root / "many.html")
    page = visit(root / "many.html").page
    assert page.locator("#prompts .chip").count() == 500
    read = "name => performance.getEntriesByName(name)[0].startTime / 1000"
    ready, plotted = (page.evaluate(read, f"report-{name}") for name in ("ready", "plotted"))
    # Seconds of the processor, which other work beside the tests does not stretch as it does the clock's.
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.reload()
    page.wait_for_selector("html[data-plotted]", timeout=60_000)
    measured = {each["name"]: each["value"] for each in session.send("Performance.getMetrics")["metrics"]}
    busy = measured["TaskDuration"]
    size = (root / "many.html").stat().st_size / 1e6
    print(
        f"\n500 traces, {size:.1f} MB: tokens after {ready:.2f} s, every plot after {plotted:.2f} s; "
        f"{busy:.2f} s of the processor"
    )
    assert ready < MOST_SECONDS["ready"] and ready < plotted < MOST_SECONDS["plotted"]
    assert 0 < busy < MOST_SECONDS["busy"]
