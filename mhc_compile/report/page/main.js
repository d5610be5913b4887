// What belongs to the page as a whole: its head, its colours, and the keys that work everywhere.

const THEMES = [
  ["", "Auto"],
  ["dark", "Dark"],
  ["light", "Light"],
];

function setTheme(index) {
  const [theme, label] = THEMES[index % THEMES.length];
  // Nothing is stored: opened again, the page follows the system.
  document.documentElement.dataset.theme = theme;
  byId("theme").textContent = label;
  byId("theme").setAttribute("aria-label", `Colours: ${label}`);
}

function nextTheme() {
  setTheme(THEMES.findIndex(([theme]) => theme === (document.documentElement.dataset.theme ?? "")) + 1);
}

function everywhere(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") return goBack(event);
  // Letters belong to whoever is being typed into.
  if (event.target.closest?.("input, select, textarea, dialog")) return undefined;
  const act = {
    "/": () => (searchBox.focus(), searchBox.select()),
    "?": () => byId("help").showModal(),
    "[": () => stepPass(-1),
    "]": () => stepPass(1),
    t: nextTheme,
  }[event.key];
  if (act) event.preventDefault();
  return act?.();
}

/** Close what is open, else go back to the network. */
function goBack(event) {
  if (byId("help").open) return; // the dialog closes itself
  if (!resultList.hidden) setResults(false);
  else if (event.target === searchBox && searchBox.value) {
    searchBox.value = "";
    search();
  } else shown.get(chosen).focus();
  event.preventDefault();
}

byId("model-name").textContent = report.model;
byId("model-state").textContent = report.state;
byId("model-state").dataset.state = report.state;
byId("save").addEventListener("click", saveDrawing);
byId("theme").addEventListener("click", nextTheme);
byId("help-button").addEventListener("click", () => byId("help").showModal());
document.addEventListener("keydown", everywhere);
wide.addEventListener("change", () => comparison.sideBySide && showDetail(chosen));
setTheme(0);
const asked = location.hash; // what is chosen first overwrites it
startTree((item) => (showDetail(item), writeAddress(item)));
readAddress(asked);
addEventListener("hashchange", () => readAddress(location.hash));
