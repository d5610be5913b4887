// The drawing as an SVG file: the rows that are unfolded, with their names and the colours that the page has now.

const PAINT = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linecap", "opacity"];

/** The drawing as the text of an SVG file. */
function drawingAsSvg() {
  const frame = tree.getBoundingClientRect();
  const moved = (node) => {
    const { left, top } = node.getBoundingClientRect();
    return [left - frame.left, top - frame.top];
  };
  const pieces = [...tree.querySelectorAll("svg.piece")].map((piece) => {
    const [x, y] = moved(piece);
    return draw("g", { transform: `translate(${x} ${y})` }, [...piece.childNodes].map(painted));
  });
  const names = [...tree.querySelectorAll(".name, .more, .mark, .stage-name")].filter((node) => node.textContent);
  const texts = names.map((node) => {
    const [x, y] = moved(node);
    const { color, fontSize, fontWeight } = getComputedStyle(node);
    const look = { fill: color, "font-size": fontSize, "font-weight": fontWeight, "font-family": "sans-serif" };
    return draw("text", { x, y: y + 0.75 * node.getBoundingClientRect().height, ...look }, node.textContent);
  });
  const { width, height } = frame;
  const back = draw("rect", { width, height, fill: getComputedStyle(document.body).backgroundColor });
  const whole = draw("svg", { xmlns: SVG, width, height, viewBox: `0 0 ${width} ${height}` }, back, pieces, texts);
  return new XMLSerializer().serializeToString(whole);
}

/** A copy of a shape with what the page's style sheet gives it as attributes. */
function painted(shape) {
  const copy = shape.cloneNode(false);
  copy.removeAttribute("class");
  const style = getComputedStyle(shape);
  for (const name of PAINT) copy.setAttribute(name, style.getPropertyValue(name));
  for (const child of shape.childNodes) copy.append(child instanceof Element ? painted(child) : child.cloneNode());
  return copy;
}

/** Save the drawing as a file. */
function saveDrawing() {
  const url = URL.createObjectURL(new Blob([drawingAsSvg()], { type: "image/svg+xml" }));
  make("a", { href: url, download: `${report.model}.svg` }).click();
  URL.revokeObjectURL(url);
}
