// The token view: which traces are listed, and the tokens of one or two of them in the colour of their reward.
// Text of a trace only ever becomes textContent. What the short keys of a trace mean: airl_fast/report/tokens.py.
"use strict";
(() => {
  const views = JSON.parse(document.getElementById("data").textContent).views;
  if (!views.length) return;

  const { values, fullColour, pieces, stepOf } = traceValues;
  const SIGNS = { correct: "✓", wrong: "✗", perturbed: "~" };
  const element = (id) => document.getElementById(id);
  const state = { view: 0, panes: [null, null], colour: "standardised", beside: true };

  function make(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  const number = (value, digits = 3) => (value === null ? "–" : value.toFixed(digits).replace("-", "−"));

  const located = (trace) => trace.truth !== null && trace.truth >= 0 && trace.guess !== null;

  // ------------------------------------------------------------------------------------------------ the list

  function chosen() {
    const kinds = new Set([...document.querySelectorAll("input[name=kind]:checked")].map((box) => box.value));
    const words = element("search").value.trim().toLowerCase();
    const outcome = element("outcome").value;
    const view = views[state.view];
    const prompts = view.prompts.map(
      (each) => !words || each.prompt.toLowerCase().includes(words) || each.id.toLowerCase().includes(words),
    );
    return view.traces.flatMap((trace, index) => {
      if (!kinds.has(trace.k) || !prompts[trace.p]) return [];
      if (outcome !== "any" && (!located(trace) || (trace.guess === trace.truth) !== (outcome === "found"))) return [];
      return [index];
    });
  }

  // Samples before perturbed demonstrations, the best reward first.
  function ordered(view, indices) {
    const rank = (trace) => [trace.k === "perturbed" ? 1 : 0, -(trace.scores.reward ?? -Infinity)];
    return indices.sort((a, b) => {
      const [x, y] = [rank(view.traces[a]), rank(view.traces[b])];
      return x[0] - y[0] || x[1] - y[1] || a - b;
    });
  }

  function traceName(trace) {
    const what = trace.k === "perturbed" ? "perturbed demonstration" : "sample";
    return `${what} ${trace.n + 1}`;
  }

  function label(trace) {
    const kind = trace.k === "perturbed" ? "" : `, ${trace.k}`;
    return `${traceName(trace)}${kind}, reward ${number(trace.scores.reward)}`;
  }

  function list() {
    const view = views[state.view];
    const indices = chosen();
    const byPrompt = new Map();
    for (const index of indices) {
      const prompt = view.traces[index].p;
      if (!byPrompt.has(prompt)) byPrompt.set(prompt, []);
      byPrompt.get(prompt).push(index);
    }
    const rows = document.createDocumentFragment();
    for (const [prompt, members] of [...byPrompt].sort((a, b) => a[0] - b[0])) {
      const row = make("div", "row");
      const heading = make("div", "heading", view.prompts[prompt].prompt);
      heading.title = view.prompts[prompt].id;
      const chips = make("div", "chips");
      for (const index of ordered(view, members)) {
        const trace = view.traces[index];
        const chip = make("button", `chip ${trace.k}`, SIGNS[trace.k]);
        chip.type = "button";
        chip.tabIndex = -1;
        chip.dataset.trace = index;
        chip.setAttribute("aria-label", label(trace));
        chip.title = label(trace);
        chips.append(chip);
      }
      row.append(heading, chips);
      rows.append(row);
    }
    element("prompts").replaceChildren(rows);
    const total = view.traces.length;
    const some = view.prompts.length < view.promptsTotal ? ` (the first ${view.prompts.length} of ${view.promptsTotal} prompts)` : "";
    element("listed").textContent = indices.length
      ? `${indices.length} of ${total} traces, ${byPrompt.size} of ${view.prompts.length} prompts${some}`
      : "No trace is like that. Widen the search or the filter.";
    mark();
  }

  // Which chips are open, and which one the Tab key reaches.
  function mark() {
    const chips = [...element("prompts").querySelectorAll(".chip")];
    for (const chip of chips) {
      const place = state.panes.indexOf(Number(chip.dataset.trace));
      const open = place === 0 || (place === 1 && state.beside);
      chip.classList.toggle("open", open);
      chip.setAttribute("aria-pressed", String(open));
      chip.tabIndex = -1;
    }
    const first = chips.find((chip) => chip.classList.contains("open")) || chips[0];
    if (first) first.tabIndex = 0;
  }

  // ------------------------------------------------------------------------------------------------ reading

  const siblings = (view, prompt) =>
    ordered(view, view.traces.flatMap((trace, index) => (trace.p === prompt ? [index] : [])));

  // What stands beside a trace unless the reader says: its prompt's best sample of the other kind, else another one.
  function counterpart(view, index) {
    const trace = view.traces[index];
    const others = siblings(view, trace.p).filter((other) => other !== index);
    const wanted = trace.k === "correct" ? "wrong" : "correct";
    return others.find((other) => view.traces[other].k === wanted) ?? others[0] ?? null;
  }

  function open(index, place) {
    const view = views[state.view];
    if (place === 1 && !state.beside) {
      state.beside = true;
      element("beside").checked = true;
    }
    const other = state.panes[1 - place];
    state.panes[place] = index;
    if (other === null || other === index || view.traces[other].p !== view.traces[index].p) {
      state.panes[1 - place] = counterpart(view, index);
    }
    read();
    mark();
  }

  function read() {
    hideTip();
    const view = views[state.view];
    const panes = element("panes");
    const prompt = view.prompts[view.traces[state.panes[0]].p];
    const heading = make("div", "prompt");
    heading.append(make("h3", "", prompt.id), make("p", "", prompt.prompt));
    const answer = make("p", "answer", "answer: ");
    answer.append(make("b", "", prompt.answer));
    heading.append(answer);
    element("prompt").replaceChildren(heading);
    const full = fullColour(view, state.colour);
    element("scale-name").textContent = `${state.colour} reward`;
    element("scale-low").textContent = `≤ ${number(-full, 1)}`;
    element("scale-high").textContent = `≥ ${number(full, 1)}`;
    const shown = state.beside && state.panes[1] !== null ? [0, 1] : [0];
    panes.classList.toggle("two", shown.length === 2);
    panes.replaceChildren(...shown.map((place) => pane(view, place)));
  }

  function pane(view, place) {
    const index = state.panes[place];
    const trace = view.traces[index];
    const box = make("article", "pane");
    box.dataset.trace = index;
    box.setAttribute("aria-label", label(trace));
    const head = make("header", "");
    const select = make("select", "");
    select.setAttribute("aria-label", place ? "trace on the right" : "trace on the left");
    for (const other of siblings(view, trace.p)) {
      const sibling = view.traces[other];
      const option = make("option", "", `${SIGNS[sibling.k]} ${traceName(sibling)}  (${number(sibling.scores.reward, 2)})`);
      option.value = other;
      option.selected = other === index;
      select.append(option);
    }
    select.addEventListener("change", () => open(Number(select.value), place));
    head.append(make("span", `chip ${trace.k}`, SIGNS[trace.k]), select, make("span", `verdict ${trace.k}`, trace.k));
    if (!trace.finished) head.append(make("span", "flag", "cut off"));
    box.append(head, verdict(trace), steps(view, trace), scores(view, trace));
    return box;
  }

  function verdict(trace) {
    const line = make("p", "located");
    const name = (step) => (step === null ? "not known" : step < 0 ? "none" : `step ${step + 1}`);
    line.append("first wrong step: predicted ", make("b", "", trace.guess === null ? "–" : name(trace.guess)));
    line.append(", true ", make("b", "", name(trace.truth)));
    if (located(trace)) {
      const found = trace.guess === trace.truth;
      line.append(" ", make("span", found ? "flag found" : "flag missed", found ? "found" : "missed"));
    }
    return line;
  }

  function steps(view, trace) {
    const shown = values(view, trace)[state.colour];
    const full = fullColour(view, state.colour);
    const text = pieces(trace);
    const body = make("div", "steps");
    let token = 0;
    trace.e.forEach((end, step) => {
      const row = make("div", "step");
      if (step === trace.truth) row.classList.add("true");
      if (step === trace.guess) row.classList.add("predicted");
      const gutter = make("span", "gutter");
      gutter.append(make("b", "", step + 1), make("small", "", number(trace.c[step], 2)));
      gutter.title = `step ${step + 1}: reward ${number(trace.c[step])} (${view.stepScore} of its tokens)`;
      const line = make("span", "line");
      for (; token <= end; token++) line.append(tokenSpan(trace, token, text[token], shown[token] / full, token === end, view));
      const badges = make("span", "badges");
      if (step === trace.guess) badges.append(make("span", "badge predicted", "predicted"));
      if (step === trace.truth) badges.append(make("span", "badge true", "first wrong"));
      row.append(gutter, line, badges);
      body.append(row);
    });
    body.querySelector(".token").tabIndex = 0;
    return body;
  }

  function tokenSpan(trace, index, { piece, whole }, strength, last, view) {
    const span = make("span", "token");
    const isEnd = whole === "" && trace.finished && index === trace.r.length - 1;
    let text = isEnd ? trace.endToken ?? view.endToken : piece || "▯";
    if (isEnd) span.classList.add("end");
    text = text.replaceAll("\n", last ? "↵" : "↵\n");
    span.textContent = text;
    span.classList.add(strength >= 0 ? "pos" : "neg");
    span.style.setProperty("--strength", Math.min(Math.abs(strength), 1).toFixed(3));
    span.dataset.token = index;
    span.tabIndex = -1;
    return span;
  }

  function scores(view, trace) {
    const details = make("details", "scores");
    details.append(make("summary", "", "scores of this trace"));
    const table = make("table", "");
    for (const [name, value] of Object.entries(trace.scores)) {
      const row = table.insertRow();
      row.append(make("th", "", view.labels[name]), make("td", "", number(value)));
    }
    details.append(table);
    return details;
  }

  // ------------------------------------------------------------------------------------------------ values of a token

  function showTip(span) {
    const view = views[state.view];
    const trace = view.traces[Number(span.closest(".pane").dataset.trace)];
    const index = Number(span.dataset.token);
    const { standardised, discounted } = values(view, trace);
    const { whole } = pieces(trace)[index];
    const spelt = span.classList.contains("end") ? trace.endToken ?? view.endToken : JSON.stringify(whole);
    const step = stepOf(trace, index);
    const table = make("table", "");
    for (const [name, value] of [
      ["token", spelt],
      ["step", `${step + 1} of ${trace.e.length}`],
      ["reward", number(trace.r[index])],
      ["standardised", number(standardised[index])],
      ["discounted", number(discounted[index])],
      ["log-probability", number(trace.l[index], 4)],
    ]) {
      const row = table.insertRow();
      row.append(make("th", "", name), make("td", "", value));
    }
    const tip = element("tip");
    tip.replaceChildren(table);
    tip.hidden = false;
    const at = span.getClientRects()[0] || span.getBoundingClientRect();
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left, innerWidth - width - 8));
    const above = at.top - height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above < 8 ? at.bottom + 8 : above}px`;
    for (const old of document.querySelectorAll("[aria-describedby=tip]")) old.removeAttribute("aria-describedby");
    span.setAttribute("aria-describedby", "tip");
  }

  function hideTip() {
    element("tip").hidden = true;
  }

  // ------------------------------------------------------------------------------------------------ keys

  function focusOn(node, group) {
    if (!node) return;
    for (const other of group) other.tabIndex = -1;
    node.tabIndex = 0;
    node.focus();
  }

  // Left and right through all; up and down by rows, to the same place of the next row where it has one.
  function move(event, items, rowOf) {
    const at = items.indexOf(event.target);
    if (at < 0) return;
    const rows = [...new Set(items.map(rowOf))];
    const within = (row) => items.filter((item) => rowOf(item) === row);
    const row = rows.indexOf(rowOf(event.target));
    const place = within(rows[row]).indexOf(event.target);
    const beside = (step) => {
      const target = rows[row + step];
      if (!target) return null;
      const members = within(target);
      return members[Math.min(place, members.length - 1)];
    };
    const goal = {
      ArrowRight: () => items[at + 1], ArrowLeft: () => items[at - 1], ArrowDown: () => beside(1),
      ArrowUp: () => beside(-1), Home: () => within(rows[row])[0], End: () => within(rows[row]).at(-1),
    }[event.key];
    if (!goal) return;
    event.preventDefault();
    focusOn(goal(), items);
  }

  function listen() {
    const prompts = element("prompts");
    prompts.addEventListener("click", (event) => {
      const chip = event.target.closest(".chip");
      if (chip) open(Number(chip.dataset.trace), event.shiftKey ? 1 : 0);
    });
    prompts.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.shiftKey && event.target.matches(".chip")) {
        event.preventDefault();
        open(Number(event.target.dataset.trace), 1);
        return;
      }
      move(event, [...prompts.querySelectorAll(".chip")], (chip) => chip.parentElement);
    });
    const panes = element("panes");
    for (const kind of ["mouseover", "focusin"]) {
      panes.addEventListener(kind, (event) => {
        if (event.target.matches(".token")) showTip(event.target);
      });
    }
    for (const kind of ["mouseout", "focusout"]) panes.addEventListener(kind, hideTip);
    panes.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hideTip();
      const body = event.target.closest(".steps");
      if (body) move(event, [...body.querySelectorAll(".token")], (span) => span.parentElement);
    });
    addEventListener("scroll", hideTip, { passive: true });
    const controls = element("controls");
    controls.addEventListener("submit", (event) => event.preventDefault());
    controls.addEventListener("input", (event) => {
      const { id, name, value, checked } = event.target;
      if (id === "view") choose(Number(value));
      else if (name === "colour") {
        state.colour = value;
        read();
      } else if (id === "beside") {
        state.beside = checked;
        read();
        mark();
      } else list();
    });
  }

  // Begin with a wrong sample of a prompt that also has a correct one: that is where there is something to see.
  function choose(index) {
    state.view = index;
    const view = views[index];
    const prompts = view.prompts.map((_, prompt) => new Set());
    for (const trace of view.traces) prompts[trace.p].add(trace.k);
    const mixed = prompts.findIndex((kinds) => kinds.has("correct") && kinds.has("wrong"));
    const first = view.traces.findIndex((trace) => trace.p === mixed && trace.k === "wrong");
    const counts = { correct: 0, wrong: 0, perturbed: 0 };
    for (const trace of view.traces) counts[trace.k] += 1;
    for (const [kind, count] of Object.entries(counts)) element(`count-${kind}`).textContent = count;
    state.panes = [null, null];
    list();
    open(Math.max(first, 0), 0);
  }

  listen();
  choose(0);
  performance.mark("report-ready");
})();
