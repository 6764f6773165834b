"use strict";
(() => {
  const gallery = document.getElementById("gallery");
  if (!gallery) return;
  const data = JSON.parse(document.getElementById("data").textContent);
  const samples = [...gallery.querySelectorAll("article")].map((article, i) => {
    const of = (kind) => [...article.querySelectorAll(`img[data-kind=${kind}]`)].map((image) => image.src);
    return { ...data.samples[i], input: of("input")[0], reconstructions: of("reconstruction"), latents: of("latents") };
  });
  gallery.hidden = true;

  // state: which image, which two pictures are compared (0 is the input, 1... the models), the slider and the view
  const state = { order: samples.map((_, i) => i), place: 0, left: 0, right: 1, split: 0.5, zoom: 1, x: 0, y: 0 };
  const names = ["input", ...data.models];

  const element = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };
  const choice = (label, name, first) => {
    const select = element("select", { onchange: () => { state[name] = Number(select.value); draw(); } });
    names.slice(first).forEach((text, i) => select.append(element("option", { value: i + first, textContent: text })));
    return [select, element("label", { textContent: `${label} ` }, select)];
  };

  const title = element("div", { className: "title" });
  const [leftSelect, leftLabel] = choice("left", "left", 0);
  const [rightSelect, rightLabel] = choice("right", "right", 1);
  const order = element("select", { onchange: () => sort(order.value) });
  order.append(element("option", { value: "name", textContent: "by name" }), element("option", { value: "worst", textContent: "worst first" }));
  const bar = element("div", { className: "bar" }, title, leftLabel, rightLabel, element("label", { textContent: "order " }, order),
    element("button", { textContent: "←", ariaLabel: "previous image", onclick: () => step(-1) }),
    element("button", { textContent: "→", ariaLabel: "next image", onclick: () => step(1) }));

  const below = element("img", { alt: "", draggable: false }), above = element("img", { alt: "", draggable: false });
  const cover = element("div", { className: "layer" }, above);
  const handle = element("button", { className: "handle", ariaLabel: "slider between the two pictures" });
  handle.setAttribute("role", "slider");
  const leftTag = element("span", { className: "tag left" }), rightTag = element("span", { className: "tag right" });
  const compare = element("div", { className: "stage" }, element("div", { className: "layer" }, below), cover, handle, leftTag, rightTag);
  const one = element("img", { alt: "", draggable: false }), two = element("img", { alt: "", draggable: false });
  const difference = element("div", { className: "stage" }, element("div", { className: "layer difference" }, one, two));
  const tiles = element("img", { alt: "latent channels" });
  const captions = [0, 1, 2].map(() => element("figcaption"));
  const pane = (stage, caption) => element("figure", { className: "pane" }, stage, caption);
  const strip = element("div", { className: "strip" });
  const keys = element("p", { className: "keys" });
  keys.innerHTML = "<kbd>←</kbd> <kbd>→</kbd> image · <kbd>↑</kbd> <kbd>↓</kbd> model · <kbd>space</kbd> flip · <kbd>a</kbd> <kbd>d</kbd> slider · " +
    "<kbd>+</kbd> <kbd>−</kbd> <kbd>0</kbd> zoom, or wheel and drag";
  const viewer = document.getElementById("viewer");
  viewer.append(bar, element("div", { className: "panes" }, pane(compare, captions[0]), pane(difference, captions[1]),
    pane(element("div", { className: "tiles" }, tiles), captions[2])), strip, keys);
  viewer.hidden = false;
  const zoomed = [below, above, one, two];

  const picture = (sample, which) => (which === 0 ? sample.input : sample.reconstructions[which - 1]);
  const set = (image, source) => { if (image.src !== source) image.src = source; };

  function draw() {
    const sample = samples[state.order[state.place]];
    title.textContent = sample.key;
    title.append(element("small", { textContent: `${state.place + 1} of ${samples.length}` }));
    set(above, picture(sample, state.left));
    set(below, picture(sample, state.right));
    set(one, sample.input);
    set(two, sample.reconstructions[state.right - 1]);
    set(tiles, sample.latents[state.right - 1]);
    leftSelect.value = state.left;
    rightSelect.value = state.right;
    leftTag.textContent = names[state.left];
    rightTag.textContent = names[state.right];
    captions[0].textContent = sample.figures[state.right - 1];
    captions[1].textContent = `error × 8, ${names[state.right]}`;
    captions[2].textContent = "first latent channels, each over its own range";
    [...strip.children].forEach((button, i) => {
      button.setAttribute("aria-current", i === state.place);
      if (i === state.place) strip.scrollLeft = button.offsetLeft - strip.offsetLeft - strip.clientWidth / 2 + 30;
    });
    view();
  }

  function view() {
    const free = 1 - state.zoom;  // a view never leaves the picture
    state.x = Math.min(0, Math.max(free, state.x));
    state.y = Math.min(0, Math.max(free, state.y));
    for (const image of zoomed) image.style.transform = `translate(${state.x * 100}%, ${state.y * 100}%) scale(${state.zoom})`;
    for (const stage of [compare, difference]) {
      stage.classList.toggle("zoomed", state.zoom > 1);
      stage.classList.toggle("sharp", state.zoom > 2);
    }
    cover.style.clipPath = `inset(0 ${(1 - state.split) * 100}% 0 0)`;
    handle.style.left = `${state.split * 100}%`;
    handle.setAttribute("aria-valuenow", Math.round(state.split * 100));
  }

  function zoom(factor, x = 0.5, y = 0.5) {
    const next = Math.min(16, Math.max(1, state.zoom * factor));
    state.x = x - (x - state.x) * (next / state.zoom);
    state.y = y - (y - state.y) * (next / state.zoom);
    state.zoom = next;
    view();
  }

  const step = (by) => { state.place = (state.place + by + samples.length) % samples.length; draw(); };
  const model = (by) => { state.right = 1 + (state.right - 1 + by + data.models.length) % data.models.length; draw(); };
  const slide = (to) => { state.split = Math.min(1, Math.max(0, to)); view(); };

  function sort(how) {
    const current = state.order[state.place];
    state.order = samples.map((_, i) => i);
    if (how === "worst") state.order.sort((a, b) => (samples[a].worst ?? Infinity) - (samples[b].worst ?? Infinity));
    state.place = how === "worst" ? 0 : state.order.indexOf(current);
    strip.replaceChildren(...state.order.map((index, place) => element("button",
      { ariaLabel: samples[index].key, title: samples[index].key, onclick: () => { state.place = place; draw(); } },
      element("img", { src: samples[index].input, alt: "" }))));
    draw();
  }

  const position = (event, stage) => {
    const box = stage.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  const drag = (node, move) => node.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    event.stopPropagation();
    node.setPointerCapture(event.pointerId);
    node.classList.add("moving");
    let last = event;
    const onMove = (next) => { move(next, last); last = next; };
    const onUp = () => { node.classList.remove("moving"); node.removeEventListener("pointermove", onMove); };
    node.addEventListener("pointermove", onMove);
    node.addEventListener("pointerup", onUp, { once: true });
    node.addEventListener("pointercancel", onUp, { once: true });
  });
  drag(handle, (event) => slide(position(event, compare)[0]));
  for (const stage of [compare, difference]) {
    drag(stage, (event, last) => {
      const size = stage.getBoundingClientRect().width;
      state.x += (event.clientX - last.clientX) / size;
      state.y += (event.clientY - last.clientY) / size;
      view();
    });
    stage.addEventListener("wheel", (event) => {
      if (state.zoom === 1 && event.deltaY > 0) return;  // nothing to zoom out of: the page scrolls on
      event.preventDefault();
      zoom(Math.exp(-event.deltaY / 300), ...position(event, stage));
    }, { passive: false });
    stage.addEventListener("dblclick", (event) => (state.zoom > 1 ? zoom(1e-9) : zoom(4, ...position(event, stage))));
  }

  const actions = {
    ArrowLeft: () => step(-1), ArrowRight: () => step(1), ArrowUp: () => model(-1), ArrowDown: () => model(1),
    a: () => slide(state.split - 0.05), d: () => slide(state.split + 0.05), " ": () => slide(state.split < 0.5 ? 1 : 0),
    "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: () => zoom(1e-9),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input")) return;
    const box = viewer.getBoundingClientRect();
    if (box.bottom < 0 || box.top > innerHeight) return;  // arrows scroll the page while the viewer is out of sight
    if (event.target === handle && event.key.startsWith("Arrow")) {
      slide(state.split + ({ ArrowLeft: -0.02, ArrowRight: 0.02 }[event.key] ?? 0));
    } else if (actions[event.key] && !(event.key === " " && event.target.matches("button:not(.handle)"))) {
      actions[event.key]();
    } else return;
    event.preventDefault();
  });
  sort("name");
})();
