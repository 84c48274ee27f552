// Without this file all pictures of a card stand side by side; with it, two of them under a slider.
"use strict";
const list = document.getElementById("pairs");
if (list) {
  const STEP = 12, $ = id => document.getElementById(id);
  const cards = [...list.children], names = JSON.parse(list.dataset.names);
  const read = card => ({card, reward: JSON.parse(card.dataset.reward), judge: JSON.parse(card.dataset.judge)});
  const rows = cards.map(read);
  let shown = STEP, left = 0, right = names.length - 1;
  const number = v => (v < 0 ? "−" : "") + Math.abs(v).toPrecision(3);
  const signed = v => (v < 0 ? "" : "+") + number(v);
  const gain = (row, of = "reward") => row[of][right] - row[of][left];
  const orders = {
    gain: (a, b) => gain(b) - gain(a), loss: (a, b) => gain(a) - gain(b),
    judge: (a, b) => gain(a, "judge") - gain(b, "judge"), prompt: (a, b) => a.place - b.place,
  };
  rows.forEach((row, place) => {
    row.place = +row.card.dataset.place;
    const frame = row.card.querySelector(".frame"), input = document.createElement("input");
    Object.assign(input, {type: "range", min: 0, max: 100, step: 1, value: 50});
    input.setAttribute("aria-label", row.card.dataset.label);
    const say = () => {
      frame.style.setProperty("--at", input.value + "%");
      input.setAttribute("aria-valuetext", `${input.value} % ${names[left]}, the rest ${names[right]}`);
    };
    input.addEventListener("input", say);
    for (const side of ["left", "right"]) {
      const tag = document.createElement("span");
      tag.className = "is-" + side;
      frame.append(tag);
    }
    frame.append(input);
    row.set = value => { input.value = value; say(); };
    row.say = say;
  });
  const draw = () => {
    rows.sort(orders[$("sort").value]);
    rows.forEach((row, k) => {
      row.card.hidden = k >= shown;
      list.append(row.card);
      if (k >= shown) return;
      row.card.querySelectorAll("img").forEach((image, column) => {
        image.classList.toggle("left", column === left);
        image.classList.toggle("right", column === right && column !== left);
      });
      row.card.querySelector(".is-left").textContent = names[left];
      row.card.querySelector(".is-right").textContent = names[right];
      row.card.querySelector(".scores").textContent = ["reward", "judge"].map(of =>
        `${of} ${number(row[of][left])} → ${number(row[of][right])} (${signed(gain(row, of))})`).join(" · ");
      row.say();
    });
    $("more").hidden = shown >= rows.length;
    $("more").textContent = `Show more (${rows.length - Math.min(shown, rows.length)} left)`;
  };
  document.documentElement.classList.add("js");
  $("controls").hidden = false;
  $("sort").addEventListener("change", () => { shown = STEP; draw(); });
  $("all").addEventListener("input", () => rows.forEach(row => row.set($("all").value)));
  for (const [id, set] of [["left", v => left = v], ["right", v => right = v]]) {
    const select = $(id);
    if (select) select.addEventListener("change", () => { set(+select.value); draw(); });
  }
  $("more").addEventListener("click", () => {
    const first = rows[shown];
    shown += 2 * STEP;
    draw();
    first.card.querySelector("input").focus();
  });
  draw();
}
const live = document.documentElement.dataset.stamp;
if (live !== undefined) {
  setInterval(async () => {
    try {
      const stamp = await (await fetch("stamp", {cache: "no-store"})).text();
      if (stamp !== live) location.reload();
    } catch { /* the server is gone: the page stays as it is */ }
  }, 3000);
}
