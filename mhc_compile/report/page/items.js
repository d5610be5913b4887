// The network as the tree shows it: the elements, with runs of equal layers gathered into one item each.

/**
 * An item of the tree: an element, a group of equal layers, or the model itself.
 * { kind, name, label, ids, element, children, parent, level, streams, skipped }
 */
function makeItem(kind, name, ids, parent, streams) {
  const element = kind === "group" || kind === "model" ? null : elements[ids[0]];
  const level = parent ? parent.level + 1 : 1;
  const skipped = parent?.skipped || (streams > 1 && isSkipped(kind, ids));
  return { kind, name, label: name, ids, element, children: [], parent, level, streams, skipped };
}

/** Whether no add in a layer or a site was chosen: the streams are one there, and its adds stay residual. */
function isSkipped(kind, ids) {
  const sites = [...within(ids)].filter((id) => elements[id].kind === "site");
  return ["group", "layer", "site"].includes(kind) && sites.length > 0 && sites.every((id) => !elements[id].spec);
}

const itemOf = new Map(); // element id -> item
const signatures = new Map(); // element id -> what it has in common with its likes
const root = makeItem("model", report.model, report.roots, null, 1);
fillRoot();
const stageStarts = new Map(); // item -> the pipeline stage that begins with it
findStages(root, null);
let mostStreams = 1;
for (const item of itemOf.values()) mostStreams = Math.max(mostStreams, item.streams);

function itemFor(id, parent, streams) {
  const element = elements[id];
  // What lies in a stream is drawn with as many lanes as the stream has.
  const own = element.kind === "stream" ? streamCount(element) : streams;
  const item = makeItem(element.kind, element.name, [id], parent, own);
  // A site is named after its module as its stream sees it, and numbered: what the layer says already is left out.
  const number = element.kind === "site" ? /#\d+$/.exec(element.name) : null;
  item.label = shorter(number ? element.module + number[0] : element.name, parent);
  itemOf.set(id, item);
  item.children = gathered(element.children, item, own);
  return item;
}

/**
 * The top of the tree. A stream's exit goes into the stream, whose end it is; what is computed between the two beside
 * the stream (masks, rotary tables) goes before it, so that the drawing is one line from the input to the output.
 */
function fillRoot() {
  const order = [];
  for (const id of report.roots) {
    const isOpen = (item) => item.kind === "stream" && !item.exit && item.element.module === elements[id].module;
    const stream = elements[id].kind === "exit" ? order.findLastIndex(isOpen) : -1;
    if (stream < 0) {
      order.push(itemFor(id, root, 1));
      continue;
    }
    const item = order[stream];
    item.exit = itemFor(id, item, item.streams);
    item.children.push(item.exit);
    item.ids.push(id);
    const between = order.splice(stream + 1);
    const isBeside = (other) => other.kind === "outside";
    order.splice(stream, 0, ...between.filter(isBeside));
    order.push(...between.filter((other) => !isBeside(other)));
  }
  root.children = order;
}

/** Note where another stage begins than that of what stands before; returns the stage in which `item` ends. */
function findStages(item, before) {
  const stage = (item.kind === "group" ? item.children[0] : item).element?.stage ?? null;
  if (stage !== null && stage !== before) stageStarts.set(item, stage);
  return item.children.reduce((last, child) => findStages(child, last), stage ?? before);
}

/** Children as items; layers that follow each other and are alike become one group. */
function gathered(ids, parent, streams) {
  const items = [];
  for (let i = 0; i < ids.length;) {
    let end = i + 1;
    if (elements[ids[i]].kind === "layer") {
      const likeness = signature(ids[i]);
      while (end < ids.length && signature(ids[end]) === likeness) end++;
    }
    if (end - i < 3) {
      items.push(itemFor(ids[i], parent, streams));
      i += 1;
      continue;
    }
    const run = ids.slice(i, end);
    const group = makeItem("group", span(run.map((id) => elements[id].name)), run, parent, streams);
    group.label = shorter(group.name, parent);
    group.children = run.map((id) => itemFor(id, group, streams));
    items.push(group);
    i = end;
  }
  return items;
}

/** What two layers have in common when one box may stand for both: all but their names, places and values. */
function signature(id) {
  if (!signatures.has(id)) {
    const e = elements[id];
    const own = [e.kind, Boolean(e.spec), e.topology, e.shape, e.dtype, e.parameters, e.stage];
    signatures.set(id, [...own, ...e.children.map(signature)].join("|"));
  }
  return signatures.get(id);
}

/** `layers.0`, ..., `layers.95` as `layers.0-95`: the first number in which the names differ becomes a range. */
function span(names) {
  const [first, last] = [names[0], names[names.length - 1]].map((name) => name.split(/(\d+)/));
  const at = first.findIndex((part, i) => part !== last[i]);
  if (at < 0 || first.length !== last.length) return `${names[0]} … ${names[names.length - 1]}`;
  return first.map((part, i) => (i === at ? `${part}–${last[i]}` : part)).join("");
}

/** A name without what its parents' names say already. */
function shorter(name, parent) {
  for (let above = parent; above; above = above.parent) {
    if (above.element && above.name && name !== above.name && name.startsWith(above.name)) {
      const rest = name.slice(above.name.length);
      if (/^[.#]/.test(rest)) return rest.replace(/^\./, "");
    }
  }
  return name;
}

/** The item's ancestors, the nearest first. */
function ancestors(item) {
  const found = [];
  for (let above = item.parent; above; above = above.parent) found.push(above);
  return found;
}

/** What kind of thing an item is, in words. */
const KINDS = {
  model: "model",
  group: "equal layers",
  outside: "outside the stream",
  stream: "residual stream",
  layer: "layer",
  site: "site",
  branch: "branch",
  memory: "memory",
  exit: "exit of the stream",
};
