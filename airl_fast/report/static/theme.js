// Light or dark: the reader's choice, else the system's. Runs in the head, so that nothing is painted twice.
"use strict";
(() => {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const KEY = "airl-fast-theme";
  let choice = "auto";
  try {
    choice = localStorage.getItem(KEY) || "auto";
  } catch {
    // Storage may be off for local files: then a choice lasts as long as the page.
  }

  function apply() {
    const dark = choice === "dark" || (choice === "auto" && system.matches);
    root.dataset.theme = dark ? "dark" : "light";
    document.dispatchEvent(new Event("themechange"));
  }

  apply();
  system.addEventListener("change", apply);
  addEventListener("DOMContentLoaded", () => {
    const group = document.getElementById("theme");
    const radio = group.querySelector(`input[value="${CSS.escape(choice)}"]`);
    (radio || group.querySelector("input")).checked = true;
    group.addEventListener("change", (event) => {
      choice = event.target.value;
      try {
        localStorage.setItem(KEY, choice);
      } catch {
        // As above.
      }
      apply();
    });
  });
})();
