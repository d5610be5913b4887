// The right-hand side: what is known of the chosen part.

/** Show an item; `wanted` may name a line of code or of a kernel's source to bring into view, or ask for all code. */
function showDetail(item, wanted = {}) {
  const detail = byId("detail");
  stepPass = () => {};
  detail.replaceChildren(...(item.kind === "model" ? overview(wanted) : partDetail(item, wanted)));
  detail.scrollTop = 0;
  detail.querySelector(".wanted")?.scrollIntoView({ block: "center" });
}

function partDetail(item, { line = null, kernel = null }) {
  const called = [...new Set([...within(item.ids)].flatMap((id) => elements[id].kernels))];
  const parts = [
    heading(item),
    partFacts(item),
    sourceSection(item),
    kernelSection(called, kernel),
    codeSection(item, line),
  ];
  return parts.filter(Boolean);
}

/** The way from the model to the item, and its name. */
function heading(item) {
  const way = ancestors(item)
    .reverse()
    .map((above) =>
      make(
        "li",
        {},
        make("button", { type: "button", class: "link", on: { click: () => reveal(above) } }, above.label),
      ),
    );
  return make(
    "header",
    {},
    make("ol", { class: "way", "aria-label": "Where this is" }, way),
    make("h2", {}, make("span", { class: "kind" }, KINDS[item.kind] ?? item.kind), item.name || "the model itself"),
  );
}

function partFacts(item) {
  const e = item.element;
  if (!e)
    return facts([
      ["layers", count(item.ids.length)],
      ["each", equalFacts(elements[item.ids[0]])],
      ["parameters", count(item.ids.reduce((sum, id) => sum + elements[id].parameters, 0))],
      ["time of a step", stepTime(within(item.ids))],
    ]);
  return facts([
    ["module", e.module && make("code", {}, e.module)],
    ["value", e.dtype || e.shape ? make("code", {}, `${e.dtype ?? ""}${e.shape ?? ""}`) : null],
    ["topology", e.topology],
    ["streams", streamsOf(item)],
    ["parameters", e.parameters ? count(e.parameters) : null],
    ["not fused", e.unfused.length ? e.unfused.map((why) => make("p", {}, why)) : null],
    ["traffic", traffic(e)],
    ["time of a step", e.time ? stepTime([item.ids[0]]) : null],
    [e.time ? "with what is in it" : "time of a step", e.children.length ? stepTime(within(item.ids)) : null],
    ["probes", probeFacts(e)],
    ["calls", e.calls > 1 ? several(e.calls, "time") : null],
    ["recompute block", blockText(e.block)],
    ["pipeline stage", stageText(e.stage)],
  ]);
}

function equalFacts(e) {
  return [e.topology, `${e.dtype ?? ""}${e.shape ?? ""}`].filter(Boolean).join(", ");
}

function streamsOf({ kind, element, streams }) {
  if (element.spec) return specification(element.spec);
  return kind === "site" && streams > 1 ? "none: this add was not chosen as a site, the streams are one here" : null;
}

/** `streams=4 convention=paper` as single words that may wrap. */
function specification(text) {
  return make(
    "span",
    { class: "words" },
    text.split(" ").map((word) => make("code", {}, word)),
  );
}

function blockText(index) {
  if (index === null || index === undefined) return null;
  const block = report.blocks[index];
  const sizes = block ? `: keeps ${bytes(block.kept)}, recomputes ${bytes(block.recomputed)} in the backward pass` : "";
  return `${index} of ${report.blocks.length}${sizes}`;
}

function stageText(index) {
  if (index === null || index === undefined) return null;
  const stage = report.stages[index];
  return `${index} of ${report.stages.length}${stage ? `, ${count(stage.parameters)} parameters` : ""}`;
}

/** What a part's kernels move per token, and which share of all kernels' bytes that is. */
function traffic(e) {
  const [moved, all] = [e, { bytes_token: 0, bytes_token_backward: 0 }];
  for (const other of elements) {
    all.bytes_token += other.bytes_token;
    all.bytes_token_backward += other.bytes_token_backward;
  }
  const [own, whole] = [moved, all].map((of) => of.bytes_token + of.bytes_token_backward);
  if (!own) return null;
  const share = `${((100 * own) / whole).toFixed(1)} % of all kernels' bytes`;
  return [gauge(own / whole), `${count(own)} bytes per token, forward and backward, ${share}`];
}

/** What parts take of a step that was run, and which share that is. */
function stepTime(ids) {
  const times = [...ids].map((id) => elements[id].time).filter(Boolean);
  if (!times.length) return null;
  const sum = (what) => times.reduce((all, time) => all + time[what], 0);
  const share = sum("ms") / report.step.parts;
  const [ms, forward, backward] = ["ms", "forward", "backward"].map((what) => duration(sum(what)));
  const spread = times.length === 1 ? `; ${duration(times[0].low)} to ${duration(times[0].high)}` : "";
  const text = `${ms}, ${(100 * share).toFixed(1)} % of all parts (forward ${forward}, backward ${backward}${spread})`;
  return [gauge(share), text];
}

/** The lines of the user's code that the part came from, innermost first, each with the lines around it. */
function sourceSection(item) {
  const frames = [];
  for (let at = item.element?.source ?? null; at !== null; at = sources[at].caller) frames.push(sources[at]);
  return frames.length ? section("Source", frames.map((source, depth) => frame(source, depth === 0))) : null;
}

function frame(source, open) {
  if (!source.context.length) return sourceLine(source);
  const rows = source.context.map((row, i) =>
    make("span", { class: source.start + i === source.line ? "here" : null }, `${source.start + i}  ${row}\n`),
  );
  const path = source.path.split("/").map(encodeURIComponent).join("/");
  return make(
    "details",
    { class: "frame", open: open || null },
    make("summary", {}, sourceLine(source)),
    make("pre", { tabindex: "0", role: "region", "aria-label": place(source) }, make("code", {}, rows)),
    make("a", { href: `vscode://file${path}:${source.line}` }, "Open in the editor"),
  );
}
