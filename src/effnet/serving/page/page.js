"use strict";

const AT_ONCE = 2; // photos that are sent side by side
const PATIENCE = 20; // times that a busy server is asked again
const SHOWN = 5; // classes

const find = (selector, within = document) => within.querySelector(selector);
const wait = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));
const percent = (share) => `${(100 * share).toFixed(1)}%`;

let token = "";
let cards = 0;
let sending = 0;
const queue = [];

// asking the server

class Refused extends Error {} // asking again would not help

const predict = (options, file) => {
  const model = find("#model").value;
  return ask(`/predict?${new URLSearchParams({ ...options, ...(model && { model }) })}`, file);
};

async function ask(path, body) {
  for (let turn = 0; ; turn += 1) {
    let answer;
    try {
      const headers = token ? { Authorization: `Bearer ${token}` } : {};
      answer = await fetch(path, body ? { method: "POST", body, headers } : { headers });
    } catch {
      throw new Error("The server does not answer.");
    }
    if (answer.ok) return answer.json();
    if (answer.status === 401) {
      find("#access").hidden = false;
      find("#token").focus();
      throw new Error("The server asks for a token.");
    }
    const busy = answer.status === 429 || answer.status === 503;
    if (!busy || turn === PATIENCE) {
      const said = await answer.json().catch(() => ({}));
      const reason = said.error || `The server answered ${answer.status}.`;
      throw new (busy ? Error : Refused)(answer.status === 422 ? `This file ${reason}.` : reason);
    }
    await wait(Number(answer.headers.get("Retry-After")) || 1);
  }
}

// photos

function add(files) {
  for (const file of files) {
    const card = find("#card").content.firstElementChild.cloneNode(true);
    const name = file.name || "a pasted picture";
    const image = find("img", card);
    find("h2", card).textContent = name;
    find("h2", card).id = `photo${cards += 1}`;
    // a list of buttons has the same ones for every photo: their description says which
    for (const each of card.querySelectorAll("button, input")) each.setAttribute("aria-describedby", find("h2", card).id);
    image.src = URL.createObjectURL(file);
    image.alt = name;
    image.addEventListener("error", () => { find(".picture", card).hidden = true; });
    find(".again", card).addEventListener("click", () => {
      if (document.activeElement === find(".again", card)) find("h2", card).focus(); // the button goes
      enqueue(card, file);
    });
    find(".explain", card).addEventListener("click", () => explain(card, file, ""));
    find(".versus", card).addEventListener("click", () => explain(card, file, card.dataset.second));
    find("input", card).addEventListener("input", (event) => { find("canvas", card).style.opacity = event.target.value / 100; });
    find("#photos").prepend(card);
    enqueue(card, file);
  }
}

function enqueue(card, file) {
  find(".again", card).hidden = find(".error", card).hidden = true;
  find(".waiting", card).hidden = false;
  queue.push([card, file]);
  next();
}

async function next() {
  if (sending === AT_ONCE || !queue.length) return;
  const [card, file] = queue.shift();
  sending += 1;
  try {
    show(card, await predict({ topk: SHOWN }, file));
    say(`${find("h2", card).textContent}: ${find("ol li", card).dataset.words}. ${find(".doubt", card).textContent}`);
  } catch (error) {
    fail(card, error);
  }
  find(".waiting", card).hidden = true;
  sending -= 1;
  next();
}

function show(card, answer) {
  const list = find("ol", card);
  list.replaceChildren();
  for (const { label, probability } of answer.predictions) {
    const item = document.createElement("li");
    const name = document.createElement("span");
    const share = document.createElement("span");
    const meter = document.createElement("meter");
    name.textContent = label;
    share.textContent = percent(probability);
    meter.value = probability;
    meter.setAttribute("aria-hidden", "true");
    item.dataset.words = `${label}, ${percent(probability)}`;
    item.append(name, share, meter);
    list.append(item);
  }
  list.hidden = false;
  const doubts = [];
  if (answer.unsure) doubts.push("Unsure: too close to call; the model had better not be relied on here.");
  if (answer.unfamiliar) doubts.push("Unfamiliar: this is unlike the images that the model was trained on.");
  if (answer.labels) doubts.push(`It may be: ${answer.labels.join(", ")}.`);
  find(".doubt", card).textContent = doubts.join(" ");
  find(".doubt", card).hidden = !doubts.length;
  const second = answer.predictions[1];
  find(".why", card).hidden = false;
  find(".versus", card).hidden = !second;
  if (second) {
    card.dataset.second = second.label;
    find(".versus", card).textContent = `Why not ${second.label}?`;
  }
}

function fail(card, error) {
  const line = find(".error", card);
  const which = document.createElement("span"); // is heard where the heading is not seen
  which.className = "unseen";
  which.textContent = `${find("h2", card).textContent}: `;
  line.replaceChildren(which, error.message);
  line.hidden = false;
  find(".again", card).hidden = error instanceof Refused;
}

function say(words) {
  find("#status").textContent = words;
}

// where it looked

async function explain(card, file, versus) {
  const reason = find(".reason", card);
  reason.textContent = "…";
  try {
    const { explanation } = await predict({ explain: true, ...(versus && { versus }) }, file);
    const most = draw(card, explanation);
    const against = versus ? ` rather than ${versus}` : "";
    reason.textContent = `Orange speaks for ${explanation.class}${against}, blue against it; full colour is `
      + `${most.toFixed(2)} of a logit of ${explanation.logit.toFixed(2)}.`;
  } catch (error) {
    reason.textContent = error.message;
  }
}

// The map covers a part of the photo, given by its box: left, top, right, bottom as shares of the sides.
function draw(card, { map, box }) {
  const canvas = find("canvas", card);
  const slider = find("input", card);
  const most = Math.max(...map.flat().map(Math.abs)) || 1;
  canvas.width = map[0].length;
  canvas.height = map.length;
  const pixels = new ImageData(canvas.width, canvas.height);
  map.flat().forEach((value, place) => {
    const colour = value > 0 ? [230, 159, 0] : [0, 114, 178];
    pixels.data.set([...colour, (255 * Math.abs(value)) / most], 4 * place);
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  const [left, top, right, bottom] = box;
  Object.assign(canvas.style, {
    left: percent(left), top: percent(top), width: percent(right - left), height: percent(bottom - top),
    opacity: slider.value / 100,
  });
  canvas.hidden = slider.parentElement.hidden = false;
  find("img", card).classList.add("grey");
  return most;
}

// what the visitor does

for (const each of document.querySelectorAll(".camera")) each.hidden = !navigator.maxTouchPoints;

async function list() {
  try {
    const models = await ask("/v2/repository/index", "{}");
    find("#model").replaceChildren(...models.map(({ name }) => new Option(name)));
  } catch (error) {
    say(error.message);
  }
}

for (const id of ["choose", "camera"]) {
  find(`#${id}`).addEventListener("change", (event) => {
    add(event.target.files);
    event.target.value = "";
  });
}
for (const button of document.querySelectorAll(".example")) {
  button.addEventListener("click", async () => {
    const name = button.dataset.file;
    try {
      add([new File([await (await fetch(`/${name}`)).blob()], name)]);
    } catch {
      say("The server does not answer.");
    }
  });
}
document.addEventListener("paste", (event) => add(event.clipboardData.files));
for (const type of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    find("#drop").classList.toggle("over", type === "dragenter" || type === "dragover");
    if (type === "drop") add(event.dataTransfer.files);
  });
}
find("#access").addEventListener("submit", (event) => {
  event.preventDefault();
  token = find("#token").value;
  find("#access").hidden = true;
  find("#choose").focus();
  say("");
  list();
  for (const again of document.querySelectorAll(".again:not([hidden])")) again.click();
});
list();
