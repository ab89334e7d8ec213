"use strict";
(() => {
  const grid = document.getElementById("cards");
  const cards = Array.from(grid.children);
  const sort = document.getElementById("sort");
  const filter = document.getElementById("filter");
  const toggle = document.getElementById("play");
  const shown = document.getElementById("shown");
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  let playing = !calm;

  const start = (video) => { video.play().catch(() => {}); };

  const compare = (key, descending) => (a, b) => {
    const x = a.dataset[key], y = b.dataset[key];
    // Clips without a score come last, whichever way the others are sorted.
    if (x === "" || y === "") return (x === "") - (y === "");
    const numbers = key !== "video" && key !== "bucket";
    const order = numbers ? Number(x) - Number(y) : x.localeCompare(y);
    return descending ? -order : order;
  };

  const arrange = () => {
    const [key, direction] = sort.value.split(":");
    cards.slice().sort(compare(key, direction === "down")).forEach((card) => grid.append(card));
    const wanted = filter.value.trim().toLowerCase();
    let count = 0;
    for (const card of cards) {
      const hide = wanted !== "" && !card.dataset.text.includes(wanted);
      card.classList.toggle("hidden", hide);
      count += hide ? 0 : 1;
    }
    shown.textContent = `${count} of ${cards.length}`;
    resume();
  };

  const visible = new Set();
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) { visible.add(target); if (playing) start(target); }
      else { visible.delete(target); target.pause(); }
    }
  }, { rootMargin: "100px" });

  // Moving a video in the page pauses it.
  const resume = () => { if (playing) visible.forEach(start); };

  for (const video of grid.querySelectorAll("video")) {
    watch.observe(video);
    video.addEventListener("click", () => { if (video.paused) start(video); else video.pause(); });
  }
  toggle.addEventListener("click", () => {
    playing = !playing;
    toggle.textContent = playing ? "Pause all" : "Play all";
    visible.forEach((video) => { if (playing) start(video); else video.pause(); });
  });
  toggle.textContent = playing ? "Pause all" : "Play all";
  sort.addEventListener("change", arrange);
  filter.addEventListener("input", arrange);
  arrange();
})();
