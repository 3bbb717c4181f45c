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
    modeBarButtons: [["zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
    showSendToCloud: false,
    plotlyServerURL: "",
    doubleClick: "reset",
    displayModeBar: "hover",
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
    draw({}, (frame) => ({ autosize: false, width: frame.closest(".smalls") ? 325 : 680 }));
  });
  window.addEventListener("afterprint", () => {
    for (const part of folded) part.open = false;
    onScreen();
    for (const frame of frames) Plotly.Plots.resize(frame);
  });

  night.addEventListener("change", onScreen);
  onScreen();

  // Tables sort by a click on a column's name, or by the keyboard: a button in each head.
  // A cell is worth its data-key, or else what it shows; what says nothing stays at the end.
  const keyOf = (row, place) => {
    const cell = row.cells[place];
    return (cell.dataset.key ?? cell.textContent).trim().replace(/^\u2013$/, "").replace(/^\u2212/, "-");
  };
  const written = /^[+-]?([\d.][\d,.]*(e[+-]?\d+)?\s?%?|Infinity)$/i;
  const numberOf = (key) => (written.test(key) ? Number(key.replace(/,|\s?%$/g, "")) : NaN);
  const compare = (one, other) => {
    const [a, b] = [numberOf(one), numberOf(other)];
    if (!Number.isNaN(a) && !Number.isNaN(b)) return a < b ? -1 : Number(a > b);
    if (Number.isNaN(a) !== Number.isNaN(b)) return Number.isNaN(a) ? 1 : -1;
    return one.localeCompare(other, undefined, { numeric: true });
  };
  const sort = (table, head, place) => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].map((row) => [keyOf(row, place), row]);
    rows.sort(([a], [b]) => (a === "" || b === "" ? (a === "") - (b === "") : compare(a, b) * (down ? -1 : 1)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  };
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    [...table.tHead.rows[0].cells].forEach((head, place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(table, head, place));
    });
  }
})();
