// The difference of two lists of line ids. Equal lines have equal ids, and nearly every line of a graph is unique, so
// that unique common lines anchor the comparison and only short stretches between them need a table.

const LARGEST_TABLE = 250000;

/** Rows of what stayed ("="), went ("-") and came ("+"), each with its line id, in order. */
function difference(before, after) {
  const rows = [];
  compare(before, 0, before.length, after, 0, after.length, rows);
  return rows;
}

function compare(a, aStart, aEnd, b, bStart, bEnd, rows) {
  while (aStart < aEnd && bStart < bEnd && a[aStart] === b[bStart]) {
    rows.push(["=", a[aStart]]);
    aStart++;
    bStart++;
  }
  let same = 0;
  while (aStart < aEnd - same && bStart < bEnd - same && a[aEnd - same - 1] === b[bEnd - same - 1]) same++;
  between(a, aStart, aEnd - same, b, bStart, bEnd - same, rows);
  for (let i = aEnd - same; i < aEnd; i++) rows.push(["=", a[i]]);
}

function between(a, aStart, aEnd, b, bStart, bEnd, rows) {
  if (aStart < aEnd && bStart < bEnd) {
    const anchors = uniqueCommon(a, aStart, aEnd, b, bStart, bEnd);
    if (anchors.length) {
      for (const [i, j] of anchors) {
        compare(a, aStart, i, b, bStart, j, rows);
        rows.push(["=", a[i]]);
        [aStart, bStart] = [i + 1, j + 1];
      }
      compare(a, aStart, aEnd, b, bStart, bEnd, rows);
      return;
    }
    if ((aEnd - aStart) * (bEnd - bStart) <= LARGEST_TABLE) {
      byTable(a.slice(aStart, aEnd), b.slice(bStart, bEnd), rows);
      return;
    }
  }
  for (let i = aStart; i < aEnd; i++) rows.push(["-", a[i]]);
  for (let j = bStart; j < bEnd; j++) rows.push(["+", b[j]]);
}

/** Positions of lines that are in both stretches once each, the most of them that keep their order. */
function uniqueCommon(a, aStart, aEnd, b, bStart, bEnd) {
  const counts = new Map(); // id -> [times in a, times in b, position in b]
  for (let i = aStart; i < aEnd; i++) counts.set(a[i], [(counts.get(a[i])?.[0] ?? 0) + 1, 0, 0]);
  for (let j = bStart; j < bEnd; j++) {
    const entry = counts.get(b[j]);
    if (entry) [entry[1], entry[2]] = [entry[1] + 1, j];
  }
  const pairs = [];
  for (let i = aStart; i < aEnd; i++) {
    const [inA, inB, j] = counts.get(a[i]);
    if (inA === 1 && inB === 1) pairs.push([i, j]);
  }
  return longestRising(pairs);
}

/** The longest run of pairs whose second positions rise (patience sorting). */
function longestRising(pairs) {
  const piles = []; // the last pair of the best run of each length
  const previous = new Map();
  for (const pair of pairs) {
    let [low, high] = [0, piles.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (piles[middle][1] < pair[1]) low = middle + 1;
      else high = middle;
    }
    previous.set(pair, piles[low - 1]);
    piles[low] = pair;
  }
  const run = [];
  for (let pair = piles[piles.length - 1]; pair; pair = previous.get(pair)) run.push(pair);
  return run.reverse();
}

/** The textbook table of longest common subsequences. */
function byTable(a, b, rows) {
  const width = b.length + 1;
  const longest = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      const at = i * width + j;
      longest[at] = a[i] === b[j] ? longest[at + width + 1] + 1 : Math.max(longest[at + width], longest[at + 1]);
    }
  }
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) (rows.push(["=", a[i++]]), j++);
    else if (j >= b.length || (i < a.length && longest[(i + 1) * width + j] >= longest[i * width + j + 1]))
      rows.push(["-", a[i++]]);
    else rows.push(["+", b[j++]]);
  }
}

/** How many lines went and came, whatever their order: cheap enough to ask for every pass. */
function changes(before, after) {
  const held = new Map();
  for (const id of before) held.set(id, (held.get(id) ?? 0) + 1);
  let came = 0;
  for (const id of after) {
    const left = held.get(id) ?? 0;
    if (left) held.set(id, left - 1);
    else came++;
  }
  let went = 0;
  for (const left of held.values()) went += left;
  return { went, came };
}

/**
 * Of each line that went and came back under the same name, where the two texts differ: id -> [start, end], a Map for
 * either side. The value's name stands before " = ".
 */
function changedParts(rows) {
  const parts = { "-": new Map(), "+": new Map() };
  const gone = new Map();
  for (const [sign, id] of rows) if (sign === "-") gone.set(nameOf(id), id);
  for (const [sign, id] of rows) {
    const other = sign === "+" ? gone.get(nameOf(id)) : undefined;
    if (other === undefined) continue;
    const [start, oldEnd, newEnd] = middle(lines[other][TEXT], lines[id][TEXT]);
    parts["-"].set(other, [start, oldEnd]);
    parts["+"].set(id, [start, newEnd]);
  }
  return parts;
}

function nameOf(id) {
  return lines[id][TEXT].split(" = ", 1)[0];
}

/** Where two texts begin to differ, and where in either of them they no longer do; whole words. */
function middle(a, b) {
  let start = 0;
  while (start < Math.min(a.length, b.length) && a[start] === b[start]) start++;
  while (start > 0 && /\w/.test(a[start - 1])) start--;
  let same = 0;
  while (same < Math.min(a.length, b.length) - start && a[a.length - 1 - same] === b[b.length - 1 - same]) same++;
  while (same > 0 && /\w/.test(a[a.length - same])) same--;
  return [start, a.length - same, b.length - same];
}
