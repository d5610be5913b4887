// Search over everything that has a name or a text. Every word must occur; the list is a combobox's list box.

const MOST_RESULTS = 40;
const searchBox = byId("search");
const resultList = byId("results");
let found = [];
let current = -1;

// What can be found: [kind, text, what to do], written when the box is first used.
let haystack = null;

function fillHaystack() {
  haystack = [];
  const add = (kind, text, go, more = "") =>
    haystack.push({ kind, text, more, go, low: `${text} ${more}`.toLowerCase() });
  for (const [id, item] of itemOf) {
    const e = elements[id];
    add(
      KINDS[e.kind] ?? e.kind,
      e.name || "the model itself",
      () => reveal(item),
      [e.module !== e.name ? e.module : "", e.topology].filter(Boolean).join(" · "),
    );
  }
  passes.forEach((pass, i) => add("pass", pass.name, () => showPass(i), pass.notes.join("; ") || pass.text));
  report.diagnostics.forEach((row, i) =>
    add("diagnostic", `${row.code} ${row.title}`, () => showDiagnostic(i), row.detail),
  );
  lines.forEach((line, id) => {
    const holder = line[OWNER] === null ? root : itemOf.get(line[OWNER]);
    add("code", line[TEXT], () => showAt(holder, { line: id }), holder === root ? "" : holder.name);
  });
  const users = new Map(); // source -> the first line that came from it
  lines.forEach((line, id) => users.has(line[SOURCE]) || users.set(line[SOURCE], id));
  const holders = new Map(elements.map((e, id) => [e.source, id]).reverse());
  sources.forEach((source, id) => {
    const go = () =>
      users.has(id)
        ? showAt(itemOf.get(lines[users.get(id)][OWNER]) ?? root, { line: users.get(id) })
        : reveal(itemOf.get(holders.get(id)) ?? root);
    add("source", source.text, go, place(source));
  });
  kernels.forEach((kernel, index) => {
    add("kernel", kernel.name, () => showAt(root, { kernel: { kernel: index, direction: "forward", line: 0 } }));
    for (const direction of ["forward", "backward"]) {
      (kernel[direction] ?? "").split("\n").forEach((text, line) => {
        if (text.trim())
          add(
            "kernel source",
            text.trim(),
            () => showAt(root, { kernel: { kernel: index, direction, line } }),
            `${kernel.name}, ${direction}, line ${line + 1}`,
          );
      });
    }
  });
}

/** Choose an item with something in it brought into view. */
function showAt(item, wanted) {
  reveal(item);
  showDetail(item, wanted);
}

function showDiagnostic(index) {
  reveal(root);
  byId("detail").querySelector(`[data-diagnostic="${index}"]`).scrollIntoView({ block: "center" });
}

function search() {
  const words = searchBox.value.toLowerCase().split(/\s+/).filter(Boolean);
  if (!haystack && words.length) fillHaystack();
  found = words.length ? haystack.filter(({ low }) => words.every((word) => low.includes(word))) : [];
  current = found.length ? 0 : -1;
  resultList.replaceChildren(...found.slice(0, MOST_RESULTS).map(result));
  if (words.length && found.length !== resultList.children.length)
    resultList.append(
      make(
        "div",
        { class: "rest", role: "presentation" },
        `and ${several(found.length - MOST_RESULTS, "more result")}`,
      ),
    );
  if (words.length && !found.length)
    resultList.append(make("div", { class: "rest", role: "presentation" }, "nothing found"));
  setResults(words.length > 0);
  if (words.length) announce(found.length ? several(found.length, "result") : "nothing found");
}

function result({ kind, text, more }, index) {
  return make(
    "div",
    {
      role: "option",
      id: `result-${index}`,
      class: "result",
      "aria-selected": "false",
      on: { click: () => take(index), mousedown: (event) => event.preventDefault() },
    },
    make("span", { class: "kind" }, kind),
    make(
      "span",
      { class: "lines" },
      make("span", { class: "name" }, text),
      more ? make("span", { class: "more" }, more) : null,
    ),
  );
}

function setResults(open) {
  resultList.hidden = !open;
  searchBox.setAttribute("aria-expanded", String(open));
  markCurrent();
}

function markCurrent() {
  resultList.querySelectorAll("[aria-selected=true]").forEach((row) => row.setAttribute("aria-selected", "false"));
  const row = resultList.children[current];
  if (resultList.hidden || !row || current < 0) {
    searchBox.removeAttribute("aria-activedescendant");
    return;
  }
  row.setAttribute("aria-selected", "true");
  row.scrollIntoView({ block: "nearest" });
  searchBox.setAttribute("aria-activedescendant", row.id);
}

function take(index) {
  const chosenResult = found[index];
  setResults(false);
  if (!chosenResult) return;
  chosenResult.go();
  announce(`${chosenResult.kind} ${chosenResult.text}`);
}

function searchKey(event) {
  const most = Math.min(found.length, MOST_RESULTS);
  if (event.key === "ArrowDown" && most) {
    if (resultList.hidden) setResults(true);
    else current = (current + 1) % most;
  } else if (event.key === "ArrowUp" && most) current = (current - 1 + most) % most;
  else if (event.key === "Enter") return take(current);
  else return undefined;
  event.preventDefault();
  return markCurrent();
}

searchBox.addEventListener("input", search);
searchBox.addEventListener("keydown", searchKey);
searchBox.addEventListener("focus", () => searchBox.value && setResults(true));
searchBox.addEventListener("blur", () => setResults(false));
