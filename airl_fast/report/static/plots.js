// Draw the plots that Python described, one after the other so that the page stays responsive, in the theme's colours.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  // Only buttons that stay in the page: plotly also has some that lead to its own site.
  const buttons = ["toImage", "zoom2d", "pan2d", "resetScale2d"];
  const config = { responsive: true, displaylogo: false, modeBarButtons: [buttons] };

  // The colours that stand for the theme's are replaced in the text of a figure.
  function themed(figure) {
    const style = getComputedStyle(document.documentElement);
    let text = JSON.stringify(figure);
    for (const [name, stand] of Object.entries(data.colours)) {
      text = text.replaceAll(stand, style.getPropertyValue(`--${name}`).trim());
    }
    const { data: traces, layout } = JSON.parse(text);
    layout.uirevision = "kept"; // zoom and hidden lines stay when the theme changes
    return [traces, layout];
  }

  const turn = () => new Promise((resolve) => setTimeout(resolve));

  let drawing = 0;
  async function drawAll() {
    const mine = ++drawing;
    for (const [id, figure] of Object.entries(data.plots)) {
      if (mine !== drawing) return; // the theme changed again meanwhile
      await Plotly.react(id, ...themed(figure), config);
      await turn();
    }
    performance.mark("report-plotted");
    document.documentElement.dataset.plotted = document.documentElement.dataset.theme;
  }

  drawAll();
  document.addEventListener("themechange", drawAll);
})();
