// Lines of graph code with their differences: one list, or two side by side. Long stretches that stayed are folded,
// and rows beyond the first few hundred wait for a button, so that any element's code shows at once.

const CONTEXT = 3; // unchanged lines kept around a change
const AT_ONCE = 400; // rows put into the document at a time
const SIGNS = { "=": ["", "same", ""], "-": ["−", "went", "removed: "], "+": ["+", "came", "added: "] };

/** The rows of a difference as a list; `wanted` is a line that is shown open and scrolled to. */
function codeList(rows, sideBySide, wanted = null) {
  const parts = changedParts(rows);
  const entries = folded(sideBySide ? paired(rows) : rows.map((row) => [row]), rows, wanted);
  const list = make("div", {
    class: sideBySide ? "code two" : "code",
    role: "group",
    "aria-label": "Graph code",
    on: { keydown: codeKey },
  });
  fillCode(list, entries, parts, wanted);
  const first = list.querySelector("[tabindex]");
  if (first) first.tabIndex = 0;
  return list;
}

/** Rows side by side: a line that went stands beside the one that came under its name, or beside nothing. */
function paired(rows) {
  const entries = [];
  for (let i = 0; i < rows.length;) {
    if (rows[i][0] === "=") {
      entries.push([rows[i], rows[i++]]);
      continue;
    }
    const start = i;
    while (i < rows.length && rows[i][0] !== "=") i++;
    let went = rows.slice(start, i).filter(([sign]) => sign === "-");
    for (const row of rows.slice(start, i).filter(([sign]) => sign === "+")) {
      const at = went.findIndex(([, id]) => nameOf(id) === nameOf(row[1]));
      entries.push(...went.slice(0, Math.max(0, at)).map((other) => [other, null]), [went[at] ?? null, row]);
      went = went.slice(at + 1);
    }
    entries.push(...went.map((row) => [row, null]));
  }
  return entries;
}

/** Entries with long unchanged stretches as { hidden: entries }; all stay where nothing changed at all. */
function folded(entries, rows, wanted) {
  if (rows.every(([sign]) => sign === "=")) return entries;
  const kept = new Uint8Array(entries.length);
  entries.forEach((entry, at) => {
    const matters = entry.some((row) => row && (row[0] !== "=" || row[1] === wanted)) || entry.includes(null);
    if (matters) kept.fill(1, Math.max(0, at - CONTEXT), at + CONTEXT + 1);
  });
  const out = [];
  for (let i = 0; i < entries.length;) {
    let end = i;
    while (end < entries.length && kept[end] === kept[i]) end++;
    const stretch = entries.slice(i, end);
    // A fold that hides a line or two is longer than what it hides.
    if (kept[i] || stretch.length < 3) out.push(...stretch);
    else out.push({ hidden: stretch });
    i = end;
  }
  return out;
}

/** Append entries to `list`, up to as many as fit at once (or to the wanted line), and a button for the rest. */
function fillCode(list, entries, parts, wanted) {
  const at = entries.findIndex((entry) => !entry.hidden && entry.some((row) => row && row[1] === wanted));
  const end = Math.max(AT_ONCE, at + 20);
  list.append(...entries.slice(0, end).flatMap((entry) => codeEntry(entry, parts, wanted)));
  if (entries.length <= end) return;
  const rest = entries.slice(end);
  const more = make(
    "button",
    { type: "button", class: "gap", tabindex: "-1" },
    `${several(rest.length, "more line")}: show the next`,
  );
  more.addEventListener("click", () => {
    const next = document.createDocumentFragment();
    fillCode(next, rest, parts, null);
    const first = next.firstElementChild;
    more.replaceWith(next);
    enterCode(list, first);
  });
  list.append(more);
}

function codeEntry(entry, parts, wanted) {
  if (entry.hidden) return [gap(entry.hidden, parts)];
  if (entry.length === 1) return codeLine(entry[0], parts, wanted);
  return [
    make(
      "div",
      { class: "pair" },
      entry.map((row) => make("div", { class: "half" }, row ? codeLine(row, parts, wanted) : null)),
    ),
  ];
}

function gap(hidden, parts) {
  const button = make(
    "button",
    { type: "button", class: "gap", tabindex: "-1" },
    `${several(hidden.length, "unchanged line")}`,
  );
  button.addEventListener("click", () => {
    const list = button.parentElement;
    const rows = hidden.flatMap((entry) => codeEntry(entry, parts, null));
    button.replaceWith(...rows);
    enterCode(list, rows[0]);
  });
  return button;
}

/** A line of code, which opens to its facts. */
function codeLine([sign, id], parts, wanted) {
  const [symbol, kind, said] = SIGNS[sign];
  const text = lines[id][TEXT];
  const row = make(
    "div",
    {
      class: `line ${kind}`,
      role: "button",
      tabindex: "-1",
      "aria-expanded": "false",
      "aria-label": said + text,
      "data-line": id,
    },
    make("span", { class: "sign" }, symbol),
    make("code", {}, marked(text, parts[sign]?.get(id))),
    make("span", { class: "form" }, lines[id][FORM] ?? ""),
  );
  row.addEventListener("click", () => toggleFacts(row, id));
  if (id === wanted) {
    row.classList.add("wanted");
    toggleFacts(row, id);
  }
  return row.factsBelow ? [row, row.factsBelow] : [row];
}

/** The text with its changed part marked and the value's name and operator set apart. */
function marked(text, part) {
  const [start, end] = part ?? [0, 0];
  const named = /^(\S+)( = )([\w.]+)/.exec(text);
  const cuts = named
    ? [
        [named[1].length, "value"],
        [named[1].length + 3, ""],
        [named[0].length, named[3].startsWith("mhc") ? "op ours" : "op"],
      ]
    : [];
  const out = [];
  let at = 0;
  for (const [until, kind] of [...cuts, [text.length, ""]]) {
    for (const [from, to, changed] of [
      [at, Math.min(until, start), false],
      [Math.max(at, start), Math.min(until, end), true],
      [Math.max(at, end), until, false],
    ]) {
      if (from >= to) continue;
      const span = make(changed ? "mark" : "span", { class: kind || null }, text.slice(from, to));
      out.push(kind || changed ? span : text.slice(from, to));
    }
    at = until;
  }
  return out;
}

function toggleFacts(row, id) {
  if (row.factsBelow) {
    row.factsBelow.remove();
    row.factsBelow = null;
  } else {
    row.factsBelow = lineFacts(id);
    row.after(row.factsBelow);
  }
  row.setAttribute("aria-expanded", String(Boolean(row.factsBelow)));
}

/** What is known of a line: its source, its value, whose it is, how long it lives. */
function lineFacts(id) {
  const [, owner, source, form] = lines[id];
  const life = lifetime(id);
  const holder = owner === null ? null : itemOf.get(owner);
  const jump =
    holder && make("button", { type: "button", class: "link", on: { click: () => reveal(holder) } }, holder.name);
  const rows = [
    ["source", source === null ? "none: a pass made it" : sourceLine(sources[source])],
    ["value", form],
    ["belongs to", jump],
  ];
  if (life)
    rows.push(["in the graph", life[0] === life[1] ? `after ${life[0]} only` : `from ${life[0]} to ${life[1]}`]);
  return make("div", { class: "line-facts" }, facts(rows));
}

/** A line of the user's code with its place. */
function sourceLine(source) {
  return make(
    "span",
    { class: "source" },
    make("code", {}, source.text),
    make("span", { class: "place" }, place(source)),
  );
}

/** The focusable rows of a code list are one stop of the Tab key; arrows go between them. */
function codeKey(event) {
  const list = event.currentTarget;
  const stops = [...list.querySelectorAll(".line, .gap")];
  const at = stops.indexOf(event.target);
  if (at < 0) return;
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: stops.length - 1 }[event.key];
  if (to !== undefined) {
    if (stops[to]) enterCode(list, stops[to]);
  } else if (event.target.matches(".line") && (event.key === "Enter" || event.key === " ")) event.target.click();
  else return;
  event.preventDefault();
}

function enterCode(list, row) {
  const stop = row.matches(".line, .gap") ? row : row.querySelector(".line, .gap");
  if (!stop) return;
  for (const other of list.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  stop.tabIndex = 0;
  stop.focus();
}
