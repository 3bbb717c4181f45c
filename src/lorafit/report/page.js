"use strict";
(() => {
  const { figures, dark } = JSON.parse(document.getElementById("figures").textContent);
  const frames = [...document.querySelectorAll("[data-figure]")];
  const night = window.matchMedia("(prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const config = {
    responsive: true,
    displaylogo: false,
    scrollZoom: false,
    // Plotly's own choice of buttons has one that sends the data to a server.
    modeBarButtons: [["toImage", "resetScale2d"]],
    showSendToCloud: false,
    plotlyServerURL: "",
    displayModeBar: window.matchMedia("(hover: hover)").matches ? "hover" : false,
  };

  // The figures come in the colours of the light palette; `dark` has the counterpart of each.
  const recolour = (value, colours) => {
    if (typeof value === "string") return colours[value] ?? value;
    if (Array.isArray(value)) return typeof value[0] === "object" ? value.map((part) => recolour(part, colours)) : value;
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, recolour(part, colours)]));
  };

  const draw = (colours, size) => {
    for (const frame of frames) {
      const figure = recolour(figures[frame.dataset.figure], colours);
      // On a touch screen a drag over a plot scrolls the page.
      const layout = { ...figure.layout, ...size?.(frame), dragmode: touch ? false : "zoom" };
      Plotly.react(frame, figure.data, layout, config);
    }
  };
  const onScreen = () => draw(night.matches ? dark : {});

  // Paper is white and as wide as the style sheet makes it; what is folded on the screen is printed too.
  const folded = [...document.querySelectorAll("details:not([open])")];
  window.addEventListener("beforeprint", () => {
    for (const part of folded) part.open = true;
    draw({}, (frame) => ({ autosize: false, width: frame.closest(".small") ? 325 : 680 }));
  });
  window.addEventListener("afterprint", () => {
    for (const part of folded) part.open = false;
    onScreen();
    for (const frame of frames) Plotly.Plots.resize(frame);
  });

  night.addEventListener("change", onScreen);
  onScreen();
})();
