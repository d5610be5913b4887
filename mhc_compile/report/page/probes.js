// What probes sampled: bars on the drawing, longer and brighter the larger the figure is, and the figures as a table.

const HEAT = document.body
  .dataset.heat.split(" ")
  .map((colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)));
/** The figures that are drawn: a bar begins at `low`, and is full at `full` or at the highest figure beyond it. */
const BARS = {
  gain: { low: 1, full: 2, says: "gain: the largest row or column sum of |H|, on a logarithmic scale" },
  apart: { low: 0, full: 1, says: "apart: how far the streams are from their mean, relative to it" },
  gate: { low: 0, full: 1, says: "gate: the mean gate of a memory" },
};
const BAR = 34;
const PROBES = report.probes ? BAR + 12 : 0; // room at the right of the drawing
for (const [name, bar] of Object.entries(BARS))
  bar.full = Math.max(bar.full, ...elements.map((element) => element.probe[name] ?? 0));

/** How much of its bar a figure fills. */
function filled(name, value) {
  const { low, full } = BARS[name];
  const share = low ? Math.log(value / low) / Math.log(full / low) : value / full;
  return Math.min(1, Math.max(0, share));
}

function heat(share) {
  const at = share * (HEAT.length - 1);
  const below = Math.min(Math.floor(at), HEAT.length - 2);
  const mixed = HEAT[below].map((low, i) => Math.round(low + (at - below) * (HEAT[below + 1][i] - low)));
  return `rgb(${mixed.join(" ")})`;
}

/** The bars beside an item's piece of the drawing: its own figures, or, where it is folded, the largest inside. */
function probeBars(item, height, open, x) {
  if (!PROBES) return [];
  const own = item.element && Object.keys(item.element.probe).length ? item.ids : open ? [] : [...within(item.ids)];
  const drawn = Object.keys(BARS).flatMap((name) => {
    const values = own.map((id) => elements[id].probe[name]).filter((value) => value !== undefined);
    return values.length ? [[name, Math.max(...values)]] : [];
  });
  return drawn.flatMap(([name, value], i) => {
    const [y, share] = [height / 2 + (i - drawn.length / 2) * 10 + 1, filled(name, value)];
    const title = draw("title", {}, `${name} ${figure(value)}`);
    const back = draw("rect", { class: "bar-back", x, y, width: BAR, height: 7, rx: 2 }, title);
    const style = { "--heat": heat(share) };
    return [back, draw("rect", { class: "heat", x, y, width: Math.max(1.5, share * BAR), height: 7, rx: 2, style })];
  });
}

function figure(value) {
  return Math.abs(value) >= 0.1 || value === 0 ? String(Number(value.toPrecision(4))) : value.toExponential(1);
}

/** A part's own figures, those that are drawn with their bars. */
function probeFacts(e) {
  const rows = Object.entries(e.probe).map(([name, value]) => {
    const share = name in BARS ? filled(name, value) : null;
    return make("p", {}, share === null ? null : gauge(share, heat(share)), `${name} ${figure(value)}`);
  });
  return rows.length ? [...rows, make("span", { class: "note" }, report.probes)] : null;
}

/** All figures of all parts. */
function probeTable() {
  const parts = elements.map(({ probe }, id) => ({ probe, id })).filter(({ probe }) => Object.keys(probe).length);
  if (!parts.length) return null;
  const names = [...new Set(parts.flatMap(({ probe }) => Object.keys(probe)))];
  const cells = (probe) => names.map((name) => (name in probe ? figure(probe[name]) : ""));
  const rows = parts.map(({ probe, id }) => [partButton(id), ...cells(probe)]);
  const said = names.filter((name) => name in BARS).map((name) => BARS[name].says);
  return section(
    "Probes",
    make("p", {}, report.probes),
    said.map((text) => make("p", { class: "note" }, text)),
    partTable(["part", ...names.map((name) => `#${name}`)], rows),
  );
}
