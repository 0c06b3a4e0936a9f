(() => {
"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Theme: automatic, light, dark.
const themes = ["automatic", "light", "dark"];
const themeButton = document.getElementById("theme");
const store = (value) => {
  try {
    return value === undefined ? localStorage.getItem("kvloom-theme") : localStorage.setItem("kvloom-theme", value);
  } catch { return null; }
};
const setTheme = (theme) => {
  if (theme === "automatic") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  themeButton.textContent = `Theme: ${theme}`;
  themeButton.value = theme;
};
setTheme(themes.includes(store()) ? store() : "automatic");
themeButton.hidden = false;
themeButton.addEventListener("click", () => {
  const next = themes[(themes.indexOf(themeButton.value) + 1) % themes.length];
  setTheme(next);
  store(next);
});

// Tooltips of chart points and cells take the place of native titles, which stay where scripts do not run.
const tip = document.getElementById("tip");
const hideTip = () => { tip.hidden = true; };
const said = (element) => {
  const title = element.querySelector("title");
  if (title) {
    element.dataset.tip = title.textContent;
    title.remove();
  } else if (element.title) {
    element.dataset.tip = element.title;
    element.removeAttribute("title");
  }
  return element.dataset.tip;
};
const showTip = (element) => {
  tip.textContent = said(element);
  tip.hidden = false;
  const box = (element.querySelector(".hit") || element).getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const left = box.left + box.width / 2 - own.width / 2;
  const above = box.top - own.height - 6;
  tip.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - own.width - 8))}px`;
  tip.style.top = `${above < 8 ? box.bottom + 6 : above}px`;
};
const tipped = ".point, .heat td[title], .needle td[title], .plain [title], [data-tip]";
for (const [enter, leave] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
  document.addEventListener(enter, (event) => {
    const target = event.target.closest(tipped);
    if (target) showTip(target);
  });
  document.addEventListener(leave, hideTip);
}
document.addEventListener("scroll", hideTip, { capture: true, passive: true });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

// Charts: one tab stop each, arrow keys move from point to point.
const shown = (chart) => all(".series:not(.off) .point", chart);
const setStop = (chart, stop) => all(".point", chart).forEach((point) => point.setAttribute("tabindex", point === stop ? "0" : "-1"));
for (const chart of all("[data-roving]")) {
  setStop(chart, shown(chart)[0]);
  chart.addEventListener("keydown", (event) => {
    const points = shown(chart);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const at = points.indexOf(event.target.closest(".point"));
    const to = event.key === "Home" ? 0 : event.key === "End" ? points.length - 1 : step && (at + step + points.length) % points.length;
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    setStop(chart, points[to]);
    points[to].focus();
  });
}

// Legends: a series can be switched off.
for (const plot of all(".plot")) {
  for (const key of all(".key", plot)) {
    key.addEventListener("click", () => {
      const on = key.getAttribute("aria-pressed") !== "true";
      key.setAttribute("aria-pressed", String(on));
      all(`.series[data-series="${key.dataset.series}"]`, plot).forEach((series) => series.classList.toggle("off", !on));
      all(".chart", plot).forEach((chart) => setStop(chart, shown(chart)[0]));
    });
  }
}

// Results: sort by a column; rows without a figure stay last.
for (const button of all(".sort")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const rising = heading.getAttribute("aria-sort") !== "ascending";
    const table = heading.closest("table");
    all("th[aria-sort]", table).forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
    const body = table.tBodies[0];
    const key = (row) => row.cells[heading.cellIndex].dataset.sort;
    const order = (a, b) => {
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      const gap = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
      return rising ? gap : -gap;
    };
    body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
    for (const row of body.rows) row.classList.remove("first");
  });
}

// Explorers: a budget picks one of the plans in the page; the pointer may drag it in the chart, too.
for (const explorer of all(".explorer")) {
  const { formats, layers, places, plans } = JSON.parse(explorer.querySelector("script").textContent);
  const slider = explorer.querySelector("input");
  const [facts, fits, cells, charts] = ["[data-fact]", "[data-fit]", ".heat td", ".chart"].map((part) => all(part, explorer));
  const dots = charts.map((chart) => {
    const dot = document.createElementNS(chart.namespaceURI, "circle");
    dot.setAttribute("class", "dot");
    dot.setAttribute("r", "7");
    return chart.appendChild(dot);
  });
  const write = (elements, texts) => elements.forEach((element, n) => { element.textContent = texts[n]; });
  const show = () => {
    const at = slider.valueAsNumber;
    const plan = plans[at];
    slider.setAttribute("aria-valuetext", plan.said);
    write(facts, plan.facts);
    write(fits, plan.fits);
    cells.forEach((cell, n) => {
      const [text, css, title] = formats[plan.cells[n]];
      cell.textContent = text;
      cell.className = css;
      cell.title = `Layer ${layers[n % layers.length]}: ${title}`;
    });
    dots.forEach((dot, n) => {
      dot.setAttribute("cx", places[n][2 * at]);
      dot.setAttribute("cy", places[n][2 * at + 1]);
    });
  };
  charts.forEach((chart, n) => {
    const pick = (event) => {
      const box = chart.getBoundingClientRect();
      const x = (event.clientX - box.left) * chart.viewBox.baseVal.width / box.width;
      const gaps = plans.map((_, at) => Math.abs(places[n][2 * at] - x));
      slider.valueAsNumber = gaps.indexOf(Math.min(...gaps));
      show();
    };
    chart.addEventListener("pointerdown", (event) => { chart.setPointerCapture(event.pointerId); pick(event); });
    chart.addEventListener("pointermove", (event) => { if (event.buttons) pick(event); });
  });
  slider.addEventListener("input", show);
  slider.disabled = false;
  show();
}
})();
