// Starts the page: loads the model card, and connects the views of text and boards to the address.

import { get } from "./api.js";
import { byId, warn } from "./dom.js";
import { askForKey, showPuzzleCard } from "./head.js";
import { buildHelp } from "./help.js";
import { PuzzlePage } from "./puzzle.js";
import { WritingPage } from "./writing.js";

async function start() {
  let card;
  try {
    card = await get("v1/model_card");
  } catch (error) {
    if (error.status === 401) askForKey(start);
    else warn(error.message);
    return;
  }
  warn("");
  byId("key").hidden = true;
  const views = {};
  if (card.context) views.writer = new WritingPage(card);
  if (card.puzzle) views.puzzle = new PuzzlePage(byId("puzzle"), card);
  const names = Object.keys(views);
  byId("views").hidden = names.length < 2;
  for (const button of byId("views").children) {
    button.addEventListener("click", () => show(button.value));
  }
  // One address is opened after the other, so that the newest one stays.
  let opening = Promise.resolve();
  const openNext = (fragment) => (opening = opening.catch(() => {}).then(() => open(fragment)));
  window.addEventListener("hashchange", (event) => openNext(new URL(event.newURL).hash));
  openNext(location.hash);

  // Opens the view that an address belongs to.
  async function open(fragment) {
    const isBoard = new URLSearchParams(fragment.slice(1)).has("board");
    const name = names.length < 2 ? names[0] : isBoard ? "puzzle" : "writer";
    if (fragment.slice(1) !== views[name].fragment) await views[name].open(fragment);
    show(name);
  }

  function show(name) {
    for (const each of names) byId(each).hidden = each !== name;
    for (const button of byId("views").children) button.setAttribute("aria-pressed", String(button.value === name));
    buildHelp(byId("help"), name);
    if (name === "puzzle") showPuzzleCard(card.puzzle);
    else views.writer.refresh();
    views[name].remember();
  }
}

start();
