// The drawing: each row of the tree has one piece of it at its left, and the pieces join to one picture from the input
// to the output. Lanes run down the middle, one for each stream; what a site does happens at their right.

const LANE = 6; // from one lane to the next
const EDGE = 13; // left of the first lane, where recompute blocks are marked
const CENTRE = EDGE + ((mostStreams - 1) * LANE) / 2;
const SIDE = EDGE + (mostStreams - 1) * LANE + 30; // where branches and memories stand
const WIDTH = SIDE + 18 + PROBES;
const HEIGHTS = {
  model: 40,
  outside: 44,
  stream: 52,
  group: 52,
  layer: 44,
  site: 60,
  branch: 44,
  memory: 48,
  exit: 48,
};
const TAIL = 22; // the piece that closes an open site

/** Where the lanes of n streams run. */
function lanes(n) {
  return Array.from({ length: n }, (_, i) => CENTRE + (i - (n - 1) / 2) * LANE);
}

/** The piece beside an item's row. */
function piece(item, open) {
  const height = HEIGHTS[item.kind] ?? 44;
  const parts = (PIECES[item.kind] ?? PIECES.outside)(item, height, open);
  return canvas(height, [blockMark(item, height), ...parts, ...probeBars(item, height, open, SIDE + 22)]);
}

/** The piece below an open item's children, or null: a site's branch returns, a stream without an exit ends. */
function closing(item) {
  if (item.kind === "site" && item.children.length)
    return canvas(TAIL, [blockMark(item, TAIL), ...straight(item.streams, 0, TAIL), ...returned(item, 0, TAIL)]);
  if (item.kind === "stream" && !hasExit(item)) return canvas(TAIL, fan(item.streams, 0, TAIL, true));
  return null;
}

function canvas(height, parts) {
  const size = { width: WIDTH, height, viewBox: `0 0 ${WIDTH} ${height}` };
  return draw("svg", { class: "piece", "aria-hidden": "true", focusable: "false", ...size }, parts);
}

function line(kind, path) {
  return draw("path", { class: kind, d: path });
}

function straight(n, top, bottom) {
  return lanes(n).map((x) => line("lane", `M${x} ${top}V${bottom}`));
}

/** One line that spreads into n, or n that join. */
function fan(n, top, bottom, joins = false) {
  const half = (top + bottom) / 2;
  const [one, many] = joins ? [bottom, top] : [top, bottom];
  return lanes(n).map((x) => line("lane", `M${CENTRE} ${one}C${CENTRE} ${half} ${x} ${half} ${x} ${many}`));
}

function dot(x, y, kind = "node") {
  return draw("circle", { class: kind, cx: x, cy: y, r: 4 });
}

function box(kind, x, y, width, height) {
  return draw("rect", { class: kind, x: x - width / 2, y: y - height / 2, width, height, rx: 4 });
}

/** What mixes the streams: a bar across their lanes. */
function mixer(n, y) {
  return box("mixer", CENTRE, y, (n - 1) * LANE + 12, 9);
}

function rightmost(n) {
  return CENTRE + ((n - 1) * LANE) / 2;
}

/** The way out of the streams into a branch, downwards. */
function left(item, top, bottom) {
  const x = rightmost(item.streams);
  return [line("wire", `M${x} ${top}C${SIDE} ${top} ${SIDE} ${top} ${SIDE} ${bottom}`)];
}

/** The way back into them, at the mixer. */
function returned(item, top, bottom) {
  const [x, y] = [rightmost(item.streams) + 6, bottom - 8];
  const end = item.skipped ? dot(CENTRE, y, "plain") : mixer(item.streams, y);
  return [line("wire", `M${SIDE} ${top}C${SIDE} ${y} ${SIDE} ${y} ${x} ${y}`), end];
}

function hasExit(item) {
  return item.children.some((child) => child.kind === "exit");
}

/** Whether a part stands before everything, or after. */
function endOf(item) {
  const [siblings, outermost] = [item.parent.children, item.parent === root];
  return { first: outermost && siblings[0] === item, last: outermost && siblings[siblings.length - 1] === item };
}

const PIECES = {
  model: () => [],
  outside(item, height) {
    const { first, last } = endOf(item);
    const [top, bottom] = [first ? height / 2 : 0, last ? height / 2 : height];
    return [...straight(item.streams, top, bottom), dot(CENTRE, height / 2, "plain")];
  },
  stream(item, height, open) {
    const n = item.streams;
    if (open) return [...fan(n, 4, height), line("lane", `M${CENTRE} 0V4`)];
    const parts = [...fan(n, 0, 16), ...straight(n, 16, height - 16), ...fan(n, height - 16, height, true)];
    return [...parts, box("fold", CENTRE, height / 2, (n - 1) * LANE + 18, 18)];
  },
  group(item, height, open) {
    const n = item.streams;
    if (open) return straight(n, 0, height);
    // Three sheets, one behind the other: this box stands for many.
    const sheets = [6, 3, 0].map((by) => box("fold", CENTRE + by / 2, height / 2 - by, (n - 1) * LANE + 18, 22));
    return [...straight(n, 0, height), ...sheets];
  },
  layer(item, height, open) {
    const parts = straight(item.streams, 0, height);
    return open ? parts : [...parts, box("fold", CENTRE, height / 2, (item.streams - 1) * LANE + 18, 22)];
  },
  site(item, height, open) {
    const lines = straight(item.streams, 0, height);
    if (open && item.children.length) return [...lines, ...left(item, height - 22, height)];
    const half = height / 2;
    return [...lines, ...left(item, 10, half), ...returned(item, half, height - 2), box("branch", SIDE, half, 20, 18)];
  },
  branch(item, height) {
    const wire = line("wire", `M${SIDE} 0V${height}`);
    return [...straight(item.streams, 0, height), wire, box("branch", SIDE, height / 2, 20, 22)];
  },
  memory(item, height) {
    const [x, half] = [rightmost(item.streams), height / 2];
    const shelf = [-4, 0, 4].map((by) => line("rows", `M${SIDE - 8} ${half + by}h16`));
    const way = line("wire memory-way", `M${SIDE - 11} ${half}H${x}`);
    return [
      ...straight(item.streams, 0, height),
      way,
      box("memory", SIDE, half, 22, 20),
      ...shelf,
      dot(x, half, "memory"),
    ];
  },
  exit(item, height) {
    const half = height / 2;
    return [...fan(item.streams, 0, half, true), line("lane", `M${CENTRE} ${half}V${height}`), dot(CENTRE, half)];
  },
};

/** A stripe at the left edge beside everything that lies in one recompute block. */
function blockMark(item, height) {
  const block = item.element?.block;
  if (block === null || block === undefined || item.kind === "stream") return null;
  return draw("rect", { class: `block ${block % 2 ? "odd" : "even"}`, x: 0, y: 0, width: 3, height });
}
