// The page's requests: search by an image or by an answer, turn pages, add and remove images.
"use strict";

const part = id => document.getElementById(id);
const address = (path, query) => `${path}?${new URLSearchParams(query)}`;
const canChange = part("found").dataset.canChange === "yes";
const PAGE = 24;
let asked = null; // {body} of an image file, or {like} of an id
let shown = 0;
let doubtfulBelow = -Infinity; // scores that were right too seldom when the index was built
let turn = 0; // of the newest search: late answers to earlier ones are dropped

function say(text, wrong = false) {
  part("status").textContent = text;
  part("status").classList.toggle("wrong", wrong);
}

async function request(method, path, query, body) {
  let response;
  try {
    response = await fetch(address(path, query), {method, body});
  } catch {
    throw new Error("the server does not answer; is it still running?");
  }
  if (response.ok) return response.status === 204 ? null : response.json();
  let detail = `${response.status} ${response.statusText}`;
  try {
    const said = (await response.json()).detail;
    detail = typeof said === "string" ? said : said.map(each => `${each.loc.at(-1)}: ${each.msg}`).join("; ");
  } catch { /* no JSON: the status says it */ }
  throw new Error(detail);
}

async function about() {
  const {num_images, kind, model, doubt} = await request("GET", "api/index", {});
  const by = model.run ? `, embedded by ${model.run}, step ${model.step}` : "";
  part("about").textContent = `${num_images.toLocaleString("en")} images in a ${kind} index${by}.`;
  if (doubt !== null) {
    doubtfulBelow = doubt.below;
    part("about").append(` ${doubt.sentence}`);
  }
}

function figure({score, id, class_name}) {
  const tile = document.createElement("figure");
  const like = document.createElement("button");
  like.className = "like";
  like.title = "Search for images like this one";
  like.addEventListener("click", () => start({like: id}, address("api/image", {id})));
  const image = document.createElement("img");
  image.loading = "lazy";
  image.alt = class_name === null ? id : `${class_name}: ${id}`;
  image.src = address("api/image", {id});
  like.append(image);
  const caption = document.createElement("figcaption");
  const number = document.createElement("b");
  number.textContent = score.toFixed(5) + (score < doubtfulBelow ? " doubtful" : "");
  tile.classList.toggle("doubtful", score < doubtfulBelow);
  caption.append(number);
  if (class_name !== null) {
    const name = document.createElement("strong");
    name.textContent = class_name;
    caption.append(name);
  }
  caption.append(id);
  tile.append(like, caption);
  if (canChange) {
    const remove = document.createElement("button");
    remove.className = "remove";
    remove.textContent = "Remove";
    remove.setAttribute("aria-label", `Remove ${id} from the index`);
    remove.addEventListener("click", async () => {
      if (!confirm(`Remove ${id} from the index?`)) return;
      try {
        await request("DELETE", "api/images", {id});
        tile.remove();
        shown -= 1;
        say(`${id} is removed.`);
        await about();
      } catch (problem) { say(problem.message, true); }
    });
    tile.append(remove);
  }
  return tile;
}

async function search() {
  const mine = ++turn;
  say("Searching …");
  part("more").hidden = true;
  try {
    const query = {k: PAGE, skip: shown};
    if (asked.like !== undefined) query.like = asked.like;
    const {matches, more} = await request("POST", "api/search", query, asked.body);
    if (mine !== turn) return;
    const least = part("least").value === "" ? -Infinity : Number(part("least").value);
    const good = matches.filter(match => match.score >= least);
    part("found").append(...good.map(figure));
    shown += good.length;
    part("more").hidden = !more || good.length < matches.length;
    const nearest = matches.length ? `; the nearest has ${matches[0].score.toFixed(5)}` : "";
    say(shown ? "" : `Nothing with a score of ${least} or more${nearest}.`);
  } catch (problem) {
    if (mine === turn) say(problem.message, true);
  }
}

function start(what, picture) {
  asked = what;
  shown = 0;
  part("found").replaceChildren();
  part("query").src = picture;
  part("query").hidden = false;
  part("hint").hidden = true;
  part("drop").classList.add("filled");
  if (canChange) part("add").hidden = asked.body === undefined;
  window.scrollTo({top: 0});
  return search();
}

function choose(file) {
  if (!file) return;
  if (canChange) part("new-id").value = file.name;
  start({body: file}, URL.createObjectURL(file));
}

part("file").addEventListener("change", event => choose(event.target.files[0]));
part("drop").addEventListener("keydown", event => {
  if (event.key === "Enter" || event.key === " ") part("file").click();
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, event => {
    event.preventDefault();
    part("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") choose(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", event => choose(event.clipboardData.files[0]));
part("more").addEventListener("click", search);
part("least").addEventListener("change", () => asked && start(asked, part("query").src));
if (canChange) {
  part("add").addEventListener("submit", async event => {
    event.preventDefault();
    const id = part("new-id").value;
    try {
      await request("POST", "api/images", {id, class_name: part("new-class").value}, asked.body);
      say(`${id} is in the index.`);
      await about();
    } catch (problem) { say(problem.message, true); }
  });
}
about().catch(problem => say(problem.message, true));
