// Building the page's elements. A report's texts come from other people's code: they are only ever set as text and
// as attribute values, and nothing in this page parses markup.

const SVG = "http://www.w3.org/2000/svg";

const MANY_ROWS = 60;

/** An HTML element; `on` holds event listeners, `style` CSS variables, absent attributes are left out. */
function make(tag, attributes = {}, ...children) {
  return furnish(document.createElement(tag), attributes, children);
}

/** The same of an SVG element. */
function draw(tag, attributes = {}, ...children) {
  return furnish(document.createElementNS(SVG, tag), attributes, children);
}

function furnish(node, { on = {}, style = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  for (const [name, listener] of Object.entries(on)) node.addEventListener(name, listener);
  for (const [name, value] of Object.entries(style)) node.style.setProperty(name, value);
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

/** The element with that id. */
function byId(id) {
  return document.getElementById(id);
}

/** 12,345 */
function count(number) {
  return number.toLocaleString("en");
}

/** "1 layer", "3 layers" */
function several(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

/** 1.5 MiB */
function bytes(number) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; number >= 1024 && unit < units.length - 1; unit++) number /= 1024;
  return `${unit ? number.toFixed(1) : count(number)} ${units[unit]}`;
}

/** 0.21 ms, 12.4 ms, 1.52 s */
function duration(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(2)} s`;
  return `${ms.toFixed(ms < 10 ? 2 : 1)} ms`;
}

/** Rows of a name and a value; those without a value are left out. */
function facts(rows) {
  const shown = rows.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return make(
    "dl",
    { class: "facts" },
    shown.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))),
  );
}

/** A part of the right-hand side under a heading. */
function section(title, ...content) {
  return make("section", {}, make("h3", {}, title), ...content);
}

/** Rows of cells under their heads, each with its name first; a head that begins with "#" is of a column of figures. */
function table(heads, rows) {
  const kinds = heads.map((head) => (head.startsWith("#") ? "number" : null));
  const cell = (tag, extra) => (content, i) => make(tag, { class: kinds[i], ...extra }, [content].flat());
  const head = make("tr", {}, heads.map((text) => text.replace("#", "")).map(cell("th", { scope: "col" })));
  const body = rows.map(([name, ...rest]) => {
    const others = [null, ...rest].map(cell("td")).slice(1);
    return make("tr", {}, cell("th", { scope: "row" })(name, 0), others);
  });
  return make("div", { class: "wide" }, make("table", {}, make("thead", {}, head), make("tbody", {}, body)));
}

/** A table with a row for every part; one of many rows waits to be opened. */
function partTable(heads, rows) {
  if (rows.length <= MANY_ROWS) return table(heads, rows);
  const details = make("details", {}, make("summary", {}, several(rows.length, "part")));
  details.addEventListener("toggle", () => {
    if (!details.querySelector("table")) details.append(table(heads, rows));
  });
  return details;
}

/** Said by screen readers, seen by nobody. */
function announce(text) {
  byId("status").textContent = text;
}
