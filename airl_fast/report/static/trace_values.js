// What the token view computes of a trace: values, the text of each token, its step. No page in sight.
"use strict";
const traceValues = (() => {
  const QUANTILE = 0.97; // of |value|: full colour from there on
  const SAMPLE = 20000; // values that the quantile is taken of, at most

  // Standardised and discounted reward of every token of a trace; computed once.
  function values(view, trace) {
    if (trace.values) return trace.values;
    const { mean, scale } = view.prompts[trace.p];
    const standardised = trace.r.map((reward) => (scale === null ? 0 : (reward - mean) / scale));
    const discounted = standardised.slice();
    for (let t = discounted.length - 2; t >= 0; t--) discounted[t] += view.gamma * discounted[t + 1];
    trace.values = { standardised, discounted };
    return trace.values;
  }

  // The |value| that gets the full colour, over the samples of a run.
  function fullColour(view, colour) {
    view.full ??= {};
    if (view.full[colour] === undefined) {
      const all = [];
      const total = view.traces.reduce((sum, trace) => sum + trace.r.length, 0);
      const every = Math.ceil(total / SAMPLE);
      let seen = 0;
      for (const trace of view.traces) {
        for (const value of values(view, trace)[colour]) if (seen++ % every === 0) all.push(Math.abs(value));
      }
      all.sort((a, b) => a - b);
      view.full[colour] = all[Math.floor(QUANTILE * (all.length - 1))] || 1;
    }
    return view.full[colour];
  }

  // The text that each token adds. Offsets count characters as Python does, not UTF-16 units; tokens that share a
  // character (parts of an emoji) show it once.
  function pieces(trace) {
    const characters = Array.from(trace.text);
    let shown = 0;
    return trace.r.map((_, i) => {
      const [start, end] = [trace.s[2 * i], trace.s[2 * i + 1]];
      const piece = characters.slice(Math.max(start, shown), end).join("");
      shown = Math.max(shown, end);
      return { piece, whole: characters.slice(start, end).join("") };
    });
  }

  function stepOf(trace, token) {
    const step = trace.e.findIndex((end) => token <= end);
    return step < 0 ? trace.e.length - 1 : step;
  }

  return { values, fullColour, pieces, stepOf };
})();
