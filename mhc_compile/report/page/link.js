// Links: the page's address names the chosen part, so that a reload or another reader finds it again.

const itemAt = new Map(); // address -> item
const addressOf = new Map(); // item -> address
noteAddresses(root);

/** Give every item an address of its kind and name; of several with the same, the later ones have a number. */
function noteAddresses(item) {
  const name = `${item.kind}/${item.name}`;
  let address = name;
  for (let i = 2; itemAt.has(address); i++) address = `${name}/${i}`;
  itemAt.set(address, item);
  addressOf.set(item, address);
  item.children.forEach(noteAddresses);
}

/** Write the address of an item into the page's, which adds nothing to the browser's history. */
function writeAddress(item) {
  const hash = item === root ? "" : `#${encodeURIComponent(addressOf.get(item))}`;
  // A page within another one, as in a notebook, has no address of its own.
  if (location.hash === hash || location.protocol === "about:") return;
  history.replaceState(null, "", hash || location.pathname);
}

/** Choose what the end of an address names, if the report has it. */
function readAddress(hash) {
  let address = "";
  try {
    address = decodeURIComponent(hash.slice(1));
  } catch {
    return; // no address of ours
  }
  const item = itemAt.get(address);
  if (item && item !== chosen) reveal(item, false);
}
