// The graph code of the chosen part before and after a pass: which passes are compared is kept from part to part.

const MANY = 3000; // lines above which the difference waits to be asked for
const comparison = { from: 0, to: snapshots.length - 1, sideBySide: false, picked: false };
const wide = window.matchMedia("(min-width: 1000px)");
let stepPass = () => {}; // what the keys [ and ] do

/** The section for an item; `wanted` is a line to show. */
function codeSection(item, wanted = null, asked = wanted !== null) {
  const owners = item.kind === "model" ? null : within(item.ids);
  const codes = snapshots.map((snapshot) => codeOf(snapshot, owners));
  if (codes.every((code) => !code.length)) return null;
  if (!comparison.picked) startingPass(codes);
  if (wanted !== null) showing(codes, wanted);
  const holder = make("div", { class: "comparison" });
  const refresh = () => holder.replaceChildren(passBar(codes, change), pairBar(change), body());
  const change = (from, to) => {
    const focused = holder.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    Object.assign(comparison, { from, to, picked: true });
    wanted = null;
    asked = true;
    refresh();
    // The bars were written anew: the focus goes to the same control again.
    if (focused) holder.querySelector(`[data-key="${focused}"]`)?.focus();
  };
  const body = () => {
    const [before, after] = [codes[comparison.from], codes[comparison.to]];
    // The whole graph is seldom what is looked for: it is not laid out each time the model is chosen.
    if (!asked && (item === root || Math.max(before.length, after.length) > MANY)) {
      const show = () => ((asked = true), refresh());
      return make(
        "button",
        { type: "button", class: "ask", on: { click: show } },
        `Show the ${several(after.length, "line")}`,
      );
    }
    const rows = difference(before, after);
    if (!rows.length) return make("p", { class: "empty" }, "No code of this part in either graph.");
    return codeList(rows, comparison.sideBySide && wide.matches, wanted);
  };
  stepPass = (by) => {
    const to = Math.min(snapshots.length - 1, Math.max(1, comparison.to + by));
    change(to - 1, to);
    announce(`What ${snapshots[to].name} did`);
  };
  refresh();
  return section("Graph code", holder);
}

/** Begin with the pass that tells most: `widen` where it changes the part, else the first that does. */
function startingPass(codes) {
  const changing = snapshots.flatMap((_, i) => {
    const { went, came } = i ? changes(codes[i - 1], codes[i]) : { went: 0, came: 0 };
    return went || came ? [i] : [];
  });
  const to = changing.find((i) => snapshots[i].name === "widen") ?? changing[0] ?? snapshots.length - 1;
  Object.assign(comparison, { from: Math.max(0, to - 1), to });
}

/** Compare such passes that the wanted line is in one of the two graphs. */
function showing(codes, wanted) {
  if (codes[comparison.from].includes(wanted) || codes[comparison.to].includes(wanted)) return;
  const to = codes.findIndex((code) => code.includes(wanted));
  if (to >= 0) Object.assign(comparison, { from: Math.max(0, to - 1), to, picked: true });
}

/** A button for each pass, with what it changed here. */
function passBar(codes, change) {
  const last = snapshots.length - 1;
  const buttons = snapshots.map((snapshot, i) => {
    const [from, to] = i ? [i - 1, i] : [0, last];
    const { went, came } = changes(codes[from], codes[to]);
    const counts =
      went || came
        ? make(
            "span",
            { class: "counts" },
            came ? make("b", { class: "came" }, `+${came}`) : null,
            went ? make("b", { class: "went" }, `−${went}`) : null,
          )
        : null;
    const pressed = comparison.from === from && comparison.to === to;
    return make(
      "button",
      {
        type: "button",
        class: counts ? "pass" : "pass idle",
        "aria-pressed": String(pressed),
        "data-key": `pass-${i}`,
        on: { click: () => change(from, to) },
      },
      i ? snapshot.name : "all passes",
      counts,
    );
  });
  return make("div", { class: "passes", role: "group", "aria-label": "What a pass did" }, buttons);
}

/** Any two graphs, and the form of the comparison. */
function pairBar(change) {
  const choice = (name, value, set) =>
    make(
      "label",
      {},
      make("span", {}, name),
      make(
        "select",
        { "aria-label": name, "data-key": name, on: { change: (event) => set(Number(event.target.value)) } },
        snapshots.map((snapshot, i) =>
          make("option", { value: i, selected: i === value }, i ? `after ${snapshot.name}` : "as captured"),
        ),
      ),
    );
  const turn = () => {
    comparison.sideBySide = !comparison.sideBySide;
    change(comparison.from, comparison.to);
  };
  return make(
    "div",
    { class: "pair-bar" },
    choice("from", comparison.from, (i) => change(i, comparison.to)),
    choice("to", comparison.to, (i) => change(comparison.from, i)),
    make(
      "button",
      {
        type: "button",
        class: "side",
        "aria-pressed": String(comparison.sideBySide),
        "data-key": "side",
        on: { click: turn },
      },
      "Side by side",
    ),
  );
}
