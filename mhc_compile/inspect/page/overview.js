// What is shown of the model as a whole: why it was refused, what the passes did, its options, its kernels.

/** The parts of the overview. */
function overview({ kernel = null, line = null }) {
  const { name, parameters, added, state } = report.model;
  const parts = [
    make("header", {}, make("h2", {}, make("span", { class: "kind" }, "model"), name)),
    facts([
      ["state", state],
      ["parameters", count(parameters)],
      ["streams add", added ? `${count(added)} (${((100 * added) / Math.max(1, parameters)).toFixed(2)} %)` : null],
      [
        "made by",
        Object.entries(report.versions)
          .map(([what, version]) => `${what} ${version}`)
          .join(", "),
      ],
    ]),
    report.diagnostics.length ? section("Diagnostics", report.diagnostics.map(diagnostic)) : null,
    report.reach ? section("How far the stream was followed", reachFacts(report.reach)) : null,
    passes.length ? section("Passes", passTable()) : null,
    kernelSection(
      kernels.map((_, index) => index),
      kernel,
    ),
    blocksTable(),
    stagesTable(),
    Object.keys(report.options).length
      ? section("Options", facts(Object.entries(report.options).map(([key, value]) => [key, make("code", {}, value)])))
      : null,
    codeSection(root, line),
  ];
  return parts.filter(Boolean);
}

/** Why something is refused or not as good as it could be, and what to do. */
function diagnostic(row, index) {
  const source = row.source && make("code", {}, row.source);
  return make(
    "div",
    { class: `diagnostic ${row.severity}`, "data-diagnostic": index },
    make("h4", {}, make("code", {}, row.code), ` ${row.title}`),
    make("p", {}, row.detail),
    facts([
      ["node", row.node && make("code", {}, row.node)],
      ["module", row.module && make("code", {}, row.module)],
      ["source", source],
    ]),
    row.way_out ? make("p", { class: "way-out" }, make("b", {}, "What to do: "), row.way_out) : null,
  );
}

/** The walk back from a refused model's output. */
function reachFacts(reach) {
  const list = (value) =>
    Array.isArray(value) ? value.map((part) => (Array.isArray(part) ? part.join(": ") : String(part))) : null;
  return facts(
    Object.entries(reach).map(([key, value]) => {
      const many = list(value);
      if (many)
        return [
          key.replaceAll("_", " "),
          many.length
            ? make(
                "ul",
                { class: "plain" },
                many.map((text) => make("li", {}, make("code", {}, text))),
              )
            : "none",
        ];
      return [key.replaceAll("_", " "), value === null ? null : make("code", {}, String(value))];
    }),
  );
}

function table(heads, rows) {
  const head = make(
    "tr",
    {},
    heads.map(([text, kind]) => make("th", { scope: "col", class: kind }, text)),
  );
  return make("div", { class: "wide" }, make("table", {}, make("thead", {}, head), make("tbody", {}, rows)));
}

function passTable() {
  const heads = [["pass"], ["what it does"], ["nodes", "number"], ["time", "number"], ["verified in", "number"]];
  return table(
    heads,
    passes.map((pass, i) => {
      const show = () => {
        Object.assign(comparison, { from: i, to: i + 1, picked: true });
        showDetail(root);
        byId("detail").querySelector(".comparison")?.scrollIntoView({ block: "start" });
      };
      const changed = pass.nodes_before !== pass.nodes_after;
      return make(
        "tr",
        { "data-pass": pass.name },
        make(
          "th",
          { scope: "row" },
          make(
            "button",
            { type: "button", class: "link", title: "show what it changed", on: { click: show } },
            pass.name,
          ),
        ),
        make(
          "td",
          { class: "what" },
          pass.text,
          pass.notes.map((note) => make("span", { class: "note" }, note)),
        ),
        make(
          "td",
          { class: "number" },
          changed ? `${count(pass.nodes_before)} → ${count(pass.nodes_after)}` : count(pass.nodes_after),
        ),
        make("td", { class: "number" }, duration(pass.ms)),
        make("td", { class: "number" }, duration(pass.verify_ms)),
      );
    }),
  );
}

function partButton(id) {
  return make(
    "button",
    { type: "button", class: "link", on: { click: () => reveal(itemOf.get(id)) } },
    elements[id].name,
  );
}

function blocksTable() {
  if (!report.blocks.length) return null;
  const heads = [["block", "number"], ["from"], ["to"], ["keeps", "number"], ["makes again", "number"]];
  const rows = report.blocks.map((block, i) =>
    make(
      "tr",
      {},
      make("th", { scope: "row", class: "number" }, String(i + 1)),
      make("td", {}, partButton(block.first)),
      make("td", {}, partButton(block.last)),
      make("td", { class: "number" }, bytes(block.kept)),
      make("td", { class: "number" }, bytes(block.again)),
    ),
  );
  return section("Recompute blocks", table(heads, rows));
}

function stagesTable() {
  if (!report.stages.length) return null;
  const heads = [["stage", "number"], ["from"], ["to"], ["parameters", "number"]];
  const rows = report.stages.map((stage, i) =>
    make(
      "tr",
      {},
      make("th", { scope: "row", class: "number" }, String(i)),
      make("td", {}, partButton(stage.first)),
      make("td", {}, partButton(stage.last)),
      make("td", { class: "number" }, count(stage.parameters)),
    ),
  );
  return section("Pipeline stages", table(heads, rows));
}
