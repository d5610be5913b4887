// The tree: what is folded is not in the document. Follows the keyboard pattern of ARIA's tree view.

const tree = byId("tree");
const opened = new Set(); // items
const shown = new Map(); // item -> its <li>, for what is in the document
let chosen = null;
let whenChosen = () => {};

/** Fill the tree; `choose` is called with every item that is chosen. */
function startTree(choose) {
  whenChosen = choose;
  opened.add(root);
  for (const item of root.children) if (item.kind === "stream") opened.add(item);
  tree.append(treeItem(root));
  tree.addEventListener("keydown", treeKey);
  select(root);
}

function treeItem(item) {
  const open = opened.has(item);
  const li = make("li", {
    role: "treeitem",
    class: `item ${item.kind}${item.skipped ? " skipped" : ""}`,
    tabindex: "-1",
    "aria-level": item.level,
    "aria-selected": "false",
    "aria-label": spoken(item),
    ...(item.children.length ? { "aria-expanded": String(open) } : {}),
  });
  shown.set(item, li);
  fillItem(item, li);
  return li;
}

/** Write an item's row and, where it is open, what is in it. */
function fillItem(item, li) {
  const open = opened.has(item);
  const row = make("div", { class: "row", on: { click: () => clicked(item) } }, piece(item, open), rowText(item, open));
  li.replaceChildren(row);
  if (!open) return;
  const list = make("ul", { role: "group" });
  for (const child of item.children) {
    if (stageStarts.has(child)) list.append(stageLine(child, stageStarts.get(child)));
    list.append(treeItem(child));
  }
  const end = closing(item);
  if (end) list.append(make("li", { role: "none", class: "closing" }, end));
  li.append(list);
}

function rowText(item, open) {
  const fold = item.children.length
    ? make("span", { class: open ? "chevron open" : "chevron", "aria-hidden": "true" })
    : null;
  const { main, more, mark } = said(item);
  return make(
    "div",
    { class: "text", style: { "--level": Math.max(0, item.level - 2) }, title: item.name },
    fold ?? make("span", { class: "chevron none" }),
    make("span", { class: "lines" }, make("span", { class: "name" }, main), make("span", { class: "more" }, more)),
    mark ? make("span", { class: "mark" }, mark) : null,
  );
}

/** The caption of an item, and whether it was skipped. */
function said(item) {
  const words = caption(item);
  const tells = item.skipped && item.kind !== "branch";
  return tells ? { ...words, mark: ["skipped", words.mark].filter(Boolean).join(" · ") } : words;
}

/** What stands beside an item: its name, a few words, and a short mark. */
function caption(item) {
  const e = item.element;
  const value = e ? [e.dtype, e.shape].filter(Boolean).join("") : "";
  switch (item.kind) {
    case "model":
      return { main: item.label, more: "passes, kernels, diagnostics" };
    case "group":
      return {
        main: item.label,
        more: [sitesIn(item), stageWithin(item)].filter(Boolean).join(" · "),
        mark: `× ${item.ids.length}`,
      };
    case "stream":
      return {
        main: item.label || "the model itself",
        more: item.streams > 1 ? several(item.streams, "stream") : "one residual stream",
        mark: sitesIn(item),
      };
    case "layer":
      return { main: item.label, more: stageWithin(item), mark: sitesIn(item) };
    case "site":
      return {
        main: item.label,
        more: [...item.children.map((branch) => branch.name), e.topology].filter(Boolean).join(" · "),
      };
    case "exit":
      return { main: "exit", more: item.streams > 1 ? `${item.streams} streams to one` : value };
    default:
      return { main: item.label || item.name, more: e.topology ?? value };
  }
}

function sitesIn(item) {
  let sites = 0;
  for (const id of within(item.ids)) if (elements[id].kind === "site") sites++;
  return sites ? several(sites, "site") : "";
}

/** Which pipeline stage begins somewhere inside: while an item is folded its line is not drawn. */
function stageWithin(item) {
  const starts = item.children
    .flatMap((child) => [stageStarts.get(child), stageWithin(child)])
    .filter((stage) => stage !== undefined && stage !== "");
  return typeof starts[0] === "number" ? `stage ${starts[0]} begins here` : (starts[0] ?? "");
}

function spoken(item) {
  const { main, more, mark } = said(item);
  return [KINDS[item.kind] ?? item.kind, main, more, mark].filter(Boolean).join(", ");
}

/** Where the next pipeline stage begins. */
function stageLine(item, stage) {
  const svg = canvas(24, [...straight(item.streams, 0, 24), line("cut", `M6 12H${WIDTH}`)]);
  return make("li", { role: "none", class: "stage" }, svg, make("span", { class: "stage-name" }, `stage ${stage}`));
}

function setOpen(item, open) {
  if (!item.children.length || opened.has(item) === open) return;
  if (open) opened.add(item);
  else opened.delete(item);
  const li = shown.get(item);
  if (!li) return;
  for (const other of [...shown.keys()]) if (other !== item && ancestors(other).includes(item)) shown.delete(other);
  li.setAttribute("aria-expanded", String(open));
  fillItem(item, li);
  // Folding may have taken away what was chosen.
  if (!shown.has(chosen)) select(item);
}

/** Choose an item that is in the document. */
function select(item, focus = false) {
  const li = shown.get(item);
  const before = shown.get(chosen);
  if (before) {
    before.setAttribute("aria-selected", "false");
    before.tabIndex = -1;
  }
  li.setAttribute("aria-selected", "true");
  li.tabIndex = 0;
  if (focus) {
    li.focus({ preventScroll: true });
    li.firstElementChild.scrollIntoView({ block: "nearest" });
  }
  if (chosen !== item) {
    chosen = item;
    whenChosen(item);
  }
}

/** Unfold down to an item, then choose it. */
function reveal(item, focus = true) {
  for (const above of ancestors(item).reverse()) setOpen(above, true);
  select(item, focus);
}

/** A first click on a folded part unfolds it; a click on the chosen part folds or unfolds. */
function clicked(item) {
  if (chosen === item) setOpen(item, !opened.has(item));
  else setOpen(item, true);
  select(item, true);
}

/** The items in the document, from top to bottom. */
function visible(item = root) {
  return [item, ...(opened.has(item) ? item.children.flatMap((child) => visible(child)) : [])];
}

function treeKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const order = visible();
  const at = order.indexOf(chosen);
  const open = opened.has(chosen);
  const go = {
    ArrowDown: () => order[at + 1],
    ArrowUp: () => order[at - 1],
    Home: () => order[0],
    End: () => order[order.length - 1],
    ArrowRight: () => (open ? chosen.children[0] : setOpen(chosen, true)),
    ArrowLeft: () => (open && chosen !== root ? setOpen(chosen, false) : chosen.parent),
    Enter: () => setOpen(chosen, !open),
    " ": () => setOpen(chosen, !open),
  }[event.key];
  if (!go) return;
  event.preventDefault();
  select(go() ?? chosen, true);
}
