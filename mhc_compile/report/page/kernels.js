// The fused kernels: what they move, how near that is to what they must move, and their generated source.

/** A section of those kernels, or null; `wanted` is { kernel, direction, line } to open and scroll to. */
function kernelSection(indices, wanted = null) {
  if (!indices.length) return null;
  const cards = indices.map((index) => kernelCard(index, wanted?.kernel === index ? wanted : null));
  return section(indices.length === 1 ? "Fused kernel" : "Fused kernels", cards);
}

function kernelCard(index, wanted) {
  const kernel = kernels[index];
  const summary = [kernel.kind, kernel.device, `${several(kernel.calls, "call")} a forward pass`].join(" · ");
  return make(
    "div",
    { class: "kernel", "data-kernel": index },
    make("h4", {}, make("code", {}, kernel.name), make("span", { class: "more" }, summary)),
    kernelSource(kernel, "forward", kernel.bytes_token, kernel.limit_token, wanted),
    kernelSource(kernel, "backward", kernel.bytes_token_backward, kernel.limit_token_backward, wanted),
  );
}

/** One direction: its bytes, and its generated code, which is put into the document when it is opened. */
function kernelSource(kernel, direction, moved, least, wanted) {
  const text = kernel[direction];
  const name = make("span", { class: "direction" }, direction);
  if (!text) return make("p", { class: "limit" }, name, limit(moved, least));
  const here = wanted?.direction === direction;
  const size = make("span", { class: "more" }, several(text.split("\n").length, "line"));
  const details = make("details", { open: here }, make("summary", {}, name, limit(moved, least), size));
  const fill = () => {
    if (!details.open || details.querySelector("pre")) return;
    details.append(numbered(text, here ? wanted.line : null, `${kernel.name}, ${direction}`));
  };
  details.addEventListener("toggle", fill);
  if (here) fill();
  return details;
}

/** The bytes that move as a multiple of those that must: 1.00 x is a kernel that moves nothing twice. */
function limit(moved, least) {
  if (!moved || !least) return [];
  const times = `${(moved / least).toFixed(2)} x minimum traffic (${count(least)})`;
  return [gauge(least / moved), make("span", { class: "figures" }, `${count(moved)} bytes per token, ${times}`)];
}

/** A bar that is full at 1, in a colour of its own or in the page's. */
function gauge(share, colour = "var(--accent)") {
  const full = make("span", { style: { "--share": Math.min(1, share), "--heat": colour } });
  return make("span", { class: "gauge", "aria-hidden": "true" }, full);
}

function numbered(text, wanted, label) {
  const rows = text.split("\n").map((row, i) => make("span", { class: i === wanted ? "wanted" : null }, `${row}\n`));
  return make("pre", { tabindex: "0", role: "region", "aria-label": label }, make("code", {}, rows));
}
