// What is shown of the model as a whole: why it was refused, what the passes did, its options, its kernels.

/** The parts of the overview; `wanted` as in `showDetail`. */
function overview({ line = null, kernel = null, code = line !== null }) {
  const everyKernel = kernels.map((_, index) => index);
  const parts = [
    make("header", {}, make("h2", {}, make("span", { class: "kind" }, "model"), report.model)),
    modelFacts(report),
    report.diagnostics.length ? section("Diagnostics", report.diagnostics.map(diagnostic)) : null,
    report.reach ? section("How far the stream was followed", reachFacts(report.reach)) : null,
    leftAdds(report.coverage),
    passes.length ? section("Passes", ...passTable()) : null,
    probeTable(),
    stepTable(),
    siteTable(),
    kernelSection(everyKernel, kernel),
    blocksTable(),
    stagesTable(),
    memoryFacts(),
    section("Options", facts(Object.entries(report.options).map(([name, value]) => [name, make("code", {}, value)]))),
    codeSection(root, line, code) ?? (passes.length ? codeLeftOut() : null),
  ];
  return parts.filter(Boolean);
}

function modelFacts({ state, parameters, coverage }) {
  const added = elements.reduce((sum, element) => sum + element.added, 0);
  const every = coverage && coverage.sites + coverage.skipped + coverage.left.length;
  const skipped = coverage?.skipped ? `, ${coverage.skipped} not chosen` : "";
  const adds = coverage && `${coverage.sites} of ${every} adds${skipped}`;
  const [streams, sites] = ["stream", "site"].map((kind) => elements.filter((element) => element.kind === kind).length);
  const share = ((100 * added) / Math.max(1, parameters)).toFixed(2);
  const versions = Object.entries(report.versions).map(([what, version]) => `${what} ${version}`);
  return facts([
    ["state", state],
    ["parameters", count(parameters)],
    ["streams", streams ? `${several(streams, "stream")}, ${several(sites, "site")}` : null],
    ["residual adds", adds],
    ["the sites add", added ? `${several(added, "parameter")} (${share} %)` : null],
    ["made by", versions.join(", ")],
  ]);
}

/** Why something is refused or not as good as it could be, and what to do. */
function diagnostic(row, index) {
  const code = (text) => text && make("code", {}, text);
  // That a model has streams of its own is no fault of it.
  const kind = report.state === "native" ? "warning" : row.severity;
  return make(
    "div",
    { class: `diagnostic ${kind}`, "data-diagnostic": index },
    make("h4", {}, code(row.code), ` ${row.title}`),
    make("p", {}, row.detail),
    row.way_out ? make("p", {}, make("b", {}, "What to do: "), row.way_out) : null,
    facts(["module", "source", "node"].map((name) => [name, code(row[name])])),
  );
}

/** The adds that did not become sites, and why. */
function leftAdds(coverage) {
  if (!coverage?.left.length) return null;
  const rows = coverage.left.map((where, i) => [make("code", {}, where), coverage.why[i]]);
  return section("Adds that are no sites", table(["where", "why"], rows));
}

/** The walk back from a refused model's output. */
function reachFacts(reach) {
  const entry = (text) => make("li", {}, make("code", {}, [text].flat().join(": ")));
  const shown = (value) => (value.length ? make("ul", { class: "plain" }, value.map(entry)) : "none");
  return facts(
    Object.entries(reach).map(([name, value]) => {
      if (Array.isArray(value)) return [name, shown(value)];
      return [name, value === null ? null : make("code", {}, String(value))];
    }),
  );
}

function passTable() {
  const heads = ["pass", "what it does", "#nodes", "#time", "#verified in"];
  const idle = passes.filter(changesNothing).map((pass) => pass.name);
  const rows = passes.map(({ name, text, purpose, notes, ms, verify_ms, nodes_before, nodes_after }, i) => {
    if (idle.includes(name)) return null;
    const options = text && text !== name ? make("span", { class: "note" }, make("code", {}, text)) : null;
    const said = notes.map((note) => make("span", { class: "note" }, note));
    const nodes = nodes_before === nodes_after ? "" : `${count(nodes_before)} → `;
    const show = { type: "button", class: "link", title: "show what it changed", on: { click: () => showPass(i) } };
    const cells = [make("button", show, name), [purpose, said, options].flat(), nodes + count(nodes_after)];
    return [...cells, duration(ms), duration(verify_ms)];
  });
  const rest = idle.length ? make("p", { class: "empty" }, `Nothing to do: ${idle.join(", ")}`) : null;
  return [table(heads, rows.filter(Boolean)), rest];
}

/** Whether a pass left the graph as it was, and had nothing to say. */
function changesNothing({ code, notes }, i) {
  const before = snapshots[i].code;
  return !notes.length && code.length === before.length && code.every((line, at) => line === before[at]);
}

/** What the kernels of every part move, with bars; what a boundary moves counts at one of its sites. */
function siteTable() {
  const parts = elements.map((element, id) => ({ element, id })).filter(({ element }) => element.bytes_token);
  if (!parts.length) return null;
  const most = Math.max(...parts.map(({ element }) => bytesOf(element)));
  const rows = parts.map(({ element, id }) => {
    const moved = bytesOf(element);
    const least = element.limit_token ? `${(moved / element.limit_token).toFixed(2)} x` : "";
    const cells = [partButton(id), [gauge(moved / most), count(moved)], least, element.unfused.length ? "no" : "yes"];
    return report.step ? [...cells, timeBar(element)] : cells;
  });
  const heads = ["part", "bytes per token, forward and backward", "#of the minimum", "all fused"];
  if (report.step) heads.push("time of a step");
  return section("Traffic of the fused kernels", partTable(heads, rows));
}

/** What a step takes, in the whole and in every part. */
function stepTable() {
  if (!report.step) return null;
  const { device, inputs, warm_up, runs, time, parts, streams } = report.step;
  const { ms, forward, backward, low, high } = time;
  const rows = elements.map((element, id) => {
    if (!element.time) return null;
    const of = element.time;
    const share = `${((100 * of.ms) / parts).toFixed(1)} %`;
    const spread = `${duration(of.low)} – ${duration(of.high)}`;
    const text = { stream: `entry of ${element.name}`, branch: element.module }[element.kind];
    return [partButton(id, text), timeBar(element), share, duration(of.forward), duration(of.backward), spread];
  });
  const measured = `${device}, with ${inputs.join(", ")}; medians of ${runs} runs after ${warm_up} to warm up`;
  const about = facts([
    ["step", `${duration(ms)} (${duration(low)} – ${duration(high)})`],
    ["forward, backward", `${duration(forward)}, ${duration(backward)}`],
    ["streams' own work", [gauge(streams / parts), `${duration(streams)}, ${((100 * streams) / parts).toFixed(1)} %`]],
    ["measured on", measured],
    ["how", "every operation by itself (inner=eager), without the time between them"],
  ]);
  const heads = ["part", "time", "#share", "#forward", "#backward", "#fastest and slowest run"];
  return section("Time of a step", about, partTable(heads, rows.filter(Boolean)));
}

function timeBar({ time }) {
  const most = Math.max(...elements.map((element) => element.time?.ms ?? 0));
  return time ? [gauge(time.ms / most), duration(time.ms)] : "";
}

function bytesOf({ bytes_token, bytes_token_backward }) {
  return bytes_token + bytes_token_backward;
}

/** A page in a notebook may be without its code. */
function codeLeftOut() {
  return section(
    "Graph code",
    make("p", { class: "empty" }, "Left out of this view: the page that .html() writes has it."),
  );
}

/** The whole graph's code before and after a pass. */
function showPass(index) {
  Object.assign(comparison, { from: index, to: index + 1, picked: true });
  reveal(root);
  showDetail(root, { code: true });
  byId("detail").querySelector(".comparison")?.scrollIntoView({ block: "start" });
}

function partButton(id, text = elements[id].name) {
  const go = () => reveal(itemOf.get(id));
  return make("button", { type: "button", class: "link", on: { click: go } }, text);
}

function blocksTable() {
  if (!report.blocks.length) return null;
  const row = ({ first, last, kept, recomputed }, i) =>
    [i, partButton(first), partButton(last), bytes(kept), bytes(recomputed)];
  return section("Recompute blocks", table(["#block", "from", "to", "#keeps", "#recomputes"], report.blocks.map(row)));
}

function stagesTable() {
  if (!report.stages.length) return null;
  const row = ({ first, last, parameters }, i) => [i, partButton(first), partButton(last), count(parameters)];
  return section("Pipeline stages", table(["#stage", "from", "to", "#parameters"], report.stages.map(row)));
}

function memoryFacts() {
  if (!report.memories.length) return null;
  const text = (value) => (typeof value === "number" ? count(value) : String(value));
  const one = (memory) => facts(Object.entries(memory).map(([name, value]) => [name, text(value)]));
  return section("Memories", report.memories.map(one));
}
