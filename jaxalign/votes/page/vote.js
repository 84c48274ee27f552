"use strict";
// Everything that comes from outside is set as text or as a property, never as HTML.
const $ = (id) => document.getElementById(id);
const image = { left: $("left").firstElementChild, right: $("right").firstElementChild };
const names = { left: "First picture", right: "Second picture" };
let state = null, busy = false, zoomed = null;

async function talk(body) {
  const answer = await fetch(body ? "vote" : "ask", body && {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  if (!answer.ok) throw Object.assign(new Error(await answer.text()), { status: answer.status });
  return answer.json();
}

// A vote that gets no answer is sent again until it does: the server counts it once.
async function send(body) {
  if (busy) return;
  busy = true;
  document.body.classList.add("busy");
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    try {
      await show(await talk(body));
      $("error").hidden = true;
      break;
    } catch (error) {
      if (error.status === 409) { body = null; continue; }   // answered elsewhere: look again
      complain(error.status === 404 ? "This link is no longer valid."
        : error.status ? error.message : "Not saved yet: the server does not answer. Trying again…");
      if (error.status === 404) break;
      await new Promise((done) => setTimeout(done, wait));
    }
  }
  document.body.classList.remove("busy");
  busy = false;
}

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = false;
}

async function show(next) {
  if (next.ask) {
    // Both pictures are complete before either shows: the faster one would catch the eye.
    const loaded = await Promise.all(["left", "right"].map(async (side) => {
      const copy = new Image();
      copy.src = "picture/" + next[side];
      await copy.decode();
      return copy;
    }));
    ["left", "right"].forEach((side, i) => {
      image[side].src = loaded[i].src;
      image[side].classList.toggle("small", loaded[i].naturalWidth <= 128);
      $(side).classList.remove("chosen");
    });
  }
  const first = !state;
  state = next;
  $("pair").hidden = !next.ask;
  $("end").hidden = Boolean(next.ask);
  $("prompt").textContent = next.ask ? next.prompt : "Thank you!";
  $("count").textContent = `${next.done} of ${next.total}`;
  $("fill").style.width = `${100 * next.done / next.total}%`;
  $("bar").setAttribute("aria-valuemax", next.total);
  $("bar").setAttribute("aria-valuenow", next.done);
  $("undo").disabled = !next.undo || next.decided;
  $("equal").disabled = $("both_bad").disabled = !next.ask;
  if (next.ask) {
    $("said").textContent = `${next.done + 1} of ${next.total}. ${next.prompt}`;
  } else {
    $("thanks").textContent = next.decided
      ? "The question is decided: no more votes are needed." : "All your votes are saved.";
    if (!first) $("thanks").focus();
    $("said").textContent = $("thanks").textContent;
  }
}

function vote(choice) {
  if (busy || !state || !state.ask) return;
  if (choice in image) $(choice).classList.add("chosen");
  send({ ask: state.ask, choice });
}

function undo() {
  if (!busy && state && state.undo && !state.decided) send({ ask: state.undo });
}

function zoom(side) {
  if (!state || !state.ask) return;
  zoomed = side;
  $("large-image").src = image[side].src;
  $("large-image").alt = $("large-name").textContent = names[side];
  $("large-image").classList.toggle("small", image[side].classList.contains("small"));
  if (!$("large").open) $("large").showModal();
}

for (const side of ["left", "right"]) $(side).addEventListener("click", () => vote(side));
for (const choice of ["equal", "both_bad"]) $(choice).addEventListener("click", () => vote(choice));
$("undo").addEventListener("click", undo);
for (const button of document.querySelectorAll(".zoom")) {
  button.addEventListener("click", () => zoom(button.dataset.side));
}
$("close").addEventListener("click", () => $("large").close());
$("flip").addEventListener("click", () => zoom(zoomed === "left" ? "right" : "left"));
$("large-image").addEventListener("click", () => $("large").close());

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if ($("large").open) {
    const side = { ArrowLeft: "left", ArrowRight: "right", 1: "left", 2: "right" }[event.key];
    if (side) { event.preventDefault(); zoom(side); }
    return;
  }
  const act = {
    ArrowLeft: () => vote("left"), ArrowRight: () => vote("right"), ArrowUp: () => vote("equal"),
    ArrowDown: () => vote("both_bad"), Backspace: undo, 1: () => zoom("left"), 2: () => zoom("right"),
  }[event.key];
  if (act) { event.preventDefault(); act(); }
});

send(null);
