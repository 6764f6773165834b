"use strict";
(() => {
  const gallery = document.getElementById("gallery");
  if (!gallery) return;
  const data = JSON.parse(document.getElementById("data").textContent);
  const samples = [...gallery.querySelectorAll("article")].map((article, i) => {
    const picture = (kind, which) => article.querySelector(`img[data-kind=${kind}][data-model="${which}"]`)?.src ?? "";
    const all = data.models.map((_, m) => m + 1);
    const pictures = [picture("input", 0), ...all.map((m) => picture("reconstruction", m))];
    return { ...data.samples[i], pictures, latents: ["", ...all.map((m) => picture("latents", m))] };
  });
  gallery.hidden = true;

  // state: which image, which two pictures are compared (0 is the input, 1... the models), the slider and the view;
  // places are those of the order, which is by name or by a metric of the model on the right
  const state = { order: samples.map((_, i) => i), place: 0, left: 0, right: 1, split: 0.5, zoom: 1, x: 0, y: 0 };
  const names = ["input", ...data.models];

  const element = (tag, properties = {}, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };
  const choice = (label, name, first) => {
    const select = element("select", { className: `${name}-choice`, onchange: () => { state[name] = Number(select.value); sort(); } });
    names.slice(first).forEach((text, i) => select.append(element("option", { value: i + first, textContent: text })));
    return [select, element("label", { textContent: `${label} ` }, select)];
  };

  const title = element("div", { className: "title" });
  const [leftSelect, leftLabel] = choice("left", "left", 0);
  const [rightSelect, rightLabel] = choice("right", "right", 1);
  const order = element("select", { className: "order", onchange: () => { sort(); show(0); } });
  for (const { name, label } of data.metrics) order.append(element("option", { value: name, textContent: `worst ${label} first` }));
  order.append(element("option", { value: "", textContent: "by name" }));
  const bar = element("div", { className: "bar" }, title, leftLabel, rightLabel, element("label", { textContent: "order " }, order),
    element("div", { className: "arrows" }, element("button", { textContent: "←", ariaLabel: "previous image", onclick: () => step(-1) }),
      element("button", { textContent: "→", ariaLabel: "next image", onclick: () => step(1) })));

  const below = element("img", { alt: "", draggable: false }), above = element("img", { alt: "", draggable: false });
  const cover = element("div", { className: "layer" }, above);
  const handle = element("button", { className: "handle", ariaLabel: "slider between the two pictures" });
  handle.setAttribute("role", "slider");
  handle.setAttribute("aria-valuemin", 0);
  handle.setAttribute("aria-valuemax", 100);
  const leftTag = element("span", { className: "tag left" }), rightTag = element("span", { className: "tag right" });
  const compare = element("div", { className: "stage" }, element("div", { className: "layer" }, below), cover, handle, leftTag, rightTag);
  const one = element("img", { alt: "", draggable: false }), two = element("img", { alt: "", draggable: false });
  const difference = element("div", { className: "stage" }, element("div", { className: "layer difference" }, one, two));
  const tiles = element("img", { alt: "latent channels" });
  const captions = [0, 1, 2].map(() => element("figcaption"));
  const pane = (stage, caption) => element("figure", { className: "pane" }, stage, caption);
  const strip = element("div", { className: "strip" });
  const grid = element("div", { className: "models", hidden: data.models.length < 2 });
  const small = names.map((name, which) => {
    const image = element("img", { alt: "", draggable: false });
    const button = element("button", { textContent: name, title: `${name}: show it on the right`, disabled: which === 0 });
    button.onclick = () => { state.right = which; sort(); };
    const figures = element("small");
    const stage = element("div", { className: "stage" }, element("div", { className: "layer" }, image));
    grid.append(element("figure", {}, stage, element("figcaption", {}, button, figures)));
    return { image, button, figures, stage };
  });
  const keys = element("p", { className: "keys" });
  keys.innerHTML = "<kbd>←</kbd> <kbd>→</kbd> image · <kbd>Home</kbd> first · <kbd>↑</kbd> <kbd>↓</kbd> model · <kbd>space</kbd> flip · <kbd>a</kbd> <kbd>d</kbd> slider · " +
    "<kbd>+</kbd> <kbd>−</kbd> <kbd>0</kbd> zoom, or wheel and drag";
  const viewer = document.getElementById("viewer");
  viewer.append(bar, element("div", { className: "panes" }, pane(compare, captions[0]), pane(difference, captions[1]),
    pane(element("div", { className: "tiles" }, tiles), captions[2])), strip, grid, keys);
  viewer.hidden = false;
  const zoomed = [below, above, one, two, ...small.map(({ image }) => image)];
  const stages = [compare, difference, ...small.map(({ stage }) => stage)];

  const set = (image, source) => {
    image.hidden = !source;
    if (source && image.src !== source) image.src = source;
  };

  function draw() {
    const sample = samples[state.order[state.place]];
    title.textContent = sample.key;
    title.append(element("small", { textContent: `${state.place + 1} of ${samples.length}` }));
    set(above, sample.pictures[state.left]);
    set(below, sample.pictures[state.right]);
    set(one, sample.pictures[0]);
    set(two, sample.pictures[state.right]);
    set(tiles, sample.latents[state.right]);
    small.forEach(({ image, button, figures }, which) => {
      set(image, sample.pictures[which]);
      button.setAttribute("aria-current", which === state.right);
      figures.textContent = which && data.metrics.length ? figure(sample, which, order.value || data.metrics[0].name) : "";
    });
    leftSelect.value = state.left;
    rightSelect.value = state.right;
    leftTag.textContent = names[state.left];
    rightTag.textContent = names[state.right];
    captions[0].textContent = sample.figures[state.right - 1];
    captions[1].textContent = `error × 8, ${names[state.right]}`;
    captions[2].textContent = sample.latents[state.right] ? "first latent channels, each over its own range" : "no latents";
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
    for (const stage of stages) {
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

  const show = (place) => { state.place = place; draw(); };
  const step = (by) => show((state.place + by + samples.length) % samples.length);
  const model = (by) => { state.right = 1 + (state.right - 1 + by + data.models.length) % data.models.length; sort(); };
  const slide = (to) => { state.split = Math.min(1, Math.max(0, to)); view(); };

  function figure(sample, which, name) {
    const value = sample.values[which - 1]?.[name];
    const { label, digits } = data.metrics.find((metric) => metric.name === name);
    return value == null ? "" : `${label} ${value.toFixed(digits)}`;
  }

  // how bad: what was not measured at all is worst, and a metric without a value, such as PSNR of an equal image, best
  function badness(sample) {
    const row = sample.values[state.right - 1];
    const value = row?.[order.value];
    if (!row) return Infinity;
    if (value == null) return -Infinity;
    return data.metrics.find((metric) => metric.name === order.value).higher_is_better ? -value : value;
  }

  function sort() {  // the image that is shown stays
    const current = state.order[state.place];
    state.order = samples.map((_, i) => i);
    if (order.value) {
      const bad = samples.map(badness);
      state.order.sort((a, b) => (bad[a] === bad[b] ? a - b : bad[b] - bad[a]));
    }
    state.place = state.order.indexOf(current);
    strip.replaceChildren(...state.order.map((index, place) => element("button",
      { ariaLabel: samples[index].key, title: samples[index].key, onclick: () => show(place) },
      element("img", { src: samples[index].pictures[0], alt: "" }))));
    draw();
  }

  const position = (event, stage) => {
    const box = stage.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  };
  // one finger or the mouse moves, two fingers also zoom: ``move`` gets their middle before and now, and how much wider
  const drag = (node, move) => {
    const pointers = new Map();
    const middle = () => {
      const at = [...pointers.values()];
      const mean = (of) => at.reduce((sum, event) => sum + of(event), 0) / at.length;
      const spread = at.length < 2 ? 1 : Math.hypot(at[0].clientX - at[1].clientX, at[0].clientY - at[1].clientY);
      return { clientX: mean((event) => event.clientX), clientY: mean((event) => event.clientY), spread: spread || 1 };
    };
    node.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      event.stopPropagation();
      node.setPointerCapture(event.pointerId);
      node.classList.add("moving");
      pointers.set(event.pointerId, event);
    });
    node.addEventListener("pointermove", (event) => {
      if (!pointers.has(event.pointerId)) return;
      const last = middle();
      pointers.set(event.pointerId, event);
      const now = middle();
      move(now, last, now.spread / last.spread);
    });
    for (const end of ["pointerup", "pointercancel"]) {
      node.addEventListener(end, (event) => {
        pointers.delete(event.pointerId);
        if (!pointers.size) node.classList.remove("moving");
      });
    }
  };
  drag(handle, (event) => slide(position(event, compare)[0]));
  for (const stage of stages) {
    drag(stage, (event, last, wider) => {
      const size = stage.getBoundingClientRect().width;
      if (stage === compare && state.zoom === 1 && wider === 1) return slide(state.split + (event.clientX - last.clientX) / size);
      state.x += (event.clientX - last.clientX) / size;
      state.y += (event.clientY - last.clientY) / size;
      zoom(wider, ...position(event, stage));
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
    Home: () => show(0), End: () => show(samples.length - 1),
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
  sort();
  show(0);
})();
