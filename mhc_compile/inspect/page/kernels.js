// The fused kernels: what they move, how near that is to what they must move, and their generated source.

/** A section of those kernels, or null; `wanted` is { kernel, direction, line } to open and scroll to. */
function kernelSection(indices, wanted = null) {
  if (!indices.length) return null;
  return section(
    indices.length === 1 ? "Fused kernel" : "Fused kernels",
    indices.map((index) => kernelCard(index, wanted)),
  );
}

function kernelCard(index, wanted) {
  const kernel = kernels[index];
  const wantedHere = wanted?.kernel === index ? wanted : null;
  return make(
    "div",
    { class: "kernel", "data-kernel": index },
    make("h4", {}, make("code", {}, kernel.name)),
    make("p", { class: "summary" }, kernelSummary(kernel)),
    limit("forward", kernel.bytes_token, kernel.limit_token),
    limit("backward", kernel.bytes_token_backward, kernel.limit_token_backward),
    ["forward", "backward"].map((direction) => kernelSource(kernel, direction, wantedHere)),
  );
}

function kernelSummary({ kind, device, calls }) {
  return [kind, device, `${several(calls, "call")} a forward pass`].join(" · ");
}

/** The bytes that must move as a share of those that do: 100 % is a kernel that moves nothing twice. */
function limit(direction, moved, least) {
  if (!moved || !least) return null;
  const share = Math.min(1, least / moved);
  const bar = make("span", { class: "gauge", "aria-hidden": "true" }, make("span", { style: { "--share": share } }));
  const figures = `${count(moved)} bytes a token, ${Math.round(100 * share)} % of the limit (${count(least)} must)`;
  return make("p", { class: "limit" }, make("span", { class: "direction" }, direction), bar, figures);
}

/** Generated code, put into the document when it is opened. */
function kernelSource(kernel, direction, wanted) {
  const text = kernel[direction];
  if (!text) return null;
  const here = wanted?.direction === direction;
  const details = make(
    "details",
    { open: here },
    make(
      "summary",
      {},
      `${direction} source`,
      make("span", { class: "more" }, several(text.split("\n").length, "line")),
    ),
  );
  const fill = () => {
    if (details.open && !details.querySelector("pre"))
      details.append(numbered(text, here ? wanted.line : null, `${kernel.name}, ${direction}`));
  };
  details.addEventListener("toggle", fill);
  if (here) fill();
  return details;
}

function numbered(text, wanted, label) {
  const rows = text.split("\n").map((row, i) => make("span", { class: i === wanted ? "wanted" : null }, `${row}\n`));
  return make("pre", { tabindex: "0", role: "region", "aria-label": label }, make("code", {}, rows));
}
