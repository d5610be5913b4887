// The report's data, and what follows from it: who holds whom, which lines belong to what.

const report = JSON.parse(byId("report").textContent);
const { elements, lines, passes, sources, kernels } = report;
// A line of the graph: [text, element, source, form].
const [TEXT, OWNER, SOURCE, FORM] = [0, 1, 2, 3];

// The graph as it was captured, then after each pass.
const snapshots = [{ name: "captured", code: report.captured }, ...passes];

/** Ids of `roots` and everything below them. */
function within(roots) {
  const found = new Set();
  const waiting = [...roots];
  while (waiting.length) {
    const id = waiting.pop();
    if (found.has(id)) continue;
    found.add(id);
    waiting.push(...elements[id].children);
  }
  return found;
}

/** The line ids of a snapshot that belong to `owners`, or all where `owners` is null. */
function codeOf(snapshot, owners) {
  return owners === null ? snapshot.code : snapshot.code.filter((id) => owners.has(lines[id][OWNER]));
}

/** `file:line, in function`. */
function place(source) {
  return `${source.file}:${source.line}` + (source.function ? `, in ${source.function}` : "");
}

/** How many streams an element's specification names. */
function streamCount(element) {
  const named = /\bstreams=(\d+)/.exec(element.spec ?? "");
  return named ? Number(named[1]) : 1;
}

/** From which snapshot to which a line is in the graph, as names; null for a line of no snapshot. */
function lifetime(line) {
  const held = snapshots.map((snapshot) => snapshot.code.includes(line));
  const first = held.indexOf(true);
  return first < 0 ? null : [snapshots[first].name, snapshots[held.lastIndexOf(true)].name];
}
