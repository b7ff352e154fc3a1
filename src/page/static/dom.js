// Builds elements. Texts enter the page as text nodes only, never as markup.

const SVG = "http://www.w3.org/2000/svg";

// Returns an element. attributes: name -> value; a function is an event listener, and null, undefined and false are
// left out. children: elements, texts and lists of them.
export function h(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

// The same for a part of an SVG picture.
export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export function byId(id) {
  return document.getElementById(id);
}

// Says a sentence to screen readers when they have finished the current one.
export function say(text) {
  byId("status").textContent = text;
}

// Shows a problem above the page; an empty text removes it.
export function warn(text) {
  byId("alert").textContent = text;
  byId("alert").hidden = !text;
}

// Takes a warning back, unless another one is shown by now.
export function unwarn(text) {
  if (text && byId("alert").textContent === text) warn("");
}

// Returns [value, unit] of a number in the largest of [[size, unit], ...] that it reaches; the unit is "" below them.
function scaled(number, units) {
  const [size, unit] = units.find(([size]) => number >= size) ?? [1, ""];
  return [number / size, unit];
}

const POWERS = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
const BINARY = [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]];

// 2391234 -> "2.39M"; three digits.
export function short(number) {
  const [value, unit] = scaled(number, POWERS);
  return `${value >= 100 || !unit ? Math.round(value) : value.toPrecision(3)}${unit}`;
}

// Bytes as KiB, MiB or GiB.
export function size(bytes) {
  const [value, unit] = scaled(bytes, BINARY);
  return `${value >= 100 || !unit ? Math.round(value) : value.toPrecision(2)} ${unit || "bytes"}`;
}

// A probability in percent; the spaces in it do not break.
export function percent(p) {
  const value = p >= 0.0995 || p === 0 ? Math.round(100 * p) : p < 0.001 ? "<\u00a00.1" : (100 * p).toFixed(1);
  return `${value}\u00a0%`;
}

export function count(n, what) {
  return `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
}

// Copies a link with a fragment, and says so on the button that was pressed.
export async function copyLink(button, fragment) {
  try {
    await navigator.clipboard.writeText(new URL(`#${fragment}`, location.href).href);
  } catch {
    return warn("The browser does not allow copying: the link is in the address bar.");
  }
  button.textContent = "Copied";
  say("The link is copied.");
  setTimeout(() => (button.textContent = "Copy link"), 1500);
}

let [set, timer] = [0, null];

// Puts a fragment into the address, at most five times a second, because browsers refuse more.
export function setAddress(fragment) {
  clearTimeout(timer);
  const wait = Math.max(0, set + 200 - performance.now());
  const before = location.hash;
  timer = setTimeout(() => {
    if (location.hash !== before) return; // the reader has opened another address
    set = performance.now();
    history.replaceState(null, "", `#${fragment}`);
  }, wait);
}
