/* The explorer: a heatmap and a map, both Bokeh's, and what is written beside them, all of one state.
 * modelsimExplorer(id) fills the element of that id from the JSON inside it; the page says what that holds. */
window.modelsimExplorer = async function (id) {
  "use strict";
  const root = document.getElementById(id);
  const data = JSON.parse(root.querySelector("script").textContent);
  const { names, views } = data;
  const n = names.length;
  const components = Object.keys(data.components);
  const lengthOfLists = 6;
  const [first, second] = data.pair;
  const state = { view: 0, order: "tree", first, second, query: "" };

  /* ---------- numbers ---------- */

  // Symmetric matrices come as their upper triangle with the diagonal, row by row.
  const at = (values, i, j) => values[Math.min(i, j) * n - (Math.min(i, j) * (Math.min(i, j) + 1)) / 2 + Math.max(i, j)];
  const all = [...names.keys()];
  const view = () => views[state.view];
  const baseOf = (i) => data.bases[i] || "no base given";
  const colourOf = (i) => data.colours[data.bases[i]] ?? "#999999";
  const minus = (text) => text.replace("-", "−");
  const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;

  function written(shown, value) {
    if (value === null) return "–";
    const sign = shown.signed && value > 0 ? "+" : "";
    return minus(sign + value.toFixed(shown.digits)) + (shown.unit ? ` ${shown.unit}` : "");
  }

  function withInterval(shown, i, j) {
    const value = written(shown, at(shown.values, i, j));
    if (!shown.low || i === j) return value;
    const bound = (values) => minus(at(values, i, j).toFixed(shown.digits));
    return `${value} [${bound(shown.low)}, ${bound(shown.high)}]`;
  }

  function mostOf(i, score) {
    const others = all.filter((j) => j !== i && score(j) !== null);
    return others.sort((j, k) => score(k) - score(j)).slice(0, lengthOfLists);
  }

  function gain(i, j) {
    const points = 100 * (at(data.votes, i, j) - Math.max(data.accuracy[i], data.accuracy[j]));
    return minus((points > 0 ? "+" : "") + points.toFixed(2));
  }

  /* ---------- order and search ---------- */

  function groups() {
    const label = state.order === "base" ? data.bases : data.components[state.order];
    if (!label) return null;
    const members = new Map();
    for (const i of view().tree) members.set(label[i], [...(members.get(label[i]) ?? []), i]);
    const known = (entry) => entry[0] !== "";
    return [...members].sort((a, b) => known(b) - known(a) || b[1].length - a[1].length);
  }

  function ordering() {
    if (state.order === "accuracy") return [...view().tree].sort((i, j) => data.accuracy[j] - data.accuracy[i]);
    return groups()?.flatMap(([, members]) => members) ?? view().tree;
  }

  function found() {
    const query = state.query.trim().toLowerCase();
    if (!query) return [];
    const holds = (text) => text.toLowerCase().includes(query);
    return all.filter((i) => {
      const valued = components.filter((c) => data.components[c][i]);
      const values = valued.map((c) => (query.includes(":") ? `${c}: ` : "") + data.components[c][i]);
      return [names[i], data.bases[i], ...values].some(holds);
    });
  }

  /* ---------- elements ---------- */

  function el(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes ?? {})) {
      if (typeof value === "function") node.addEventListener(key, value);
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }

  /** A name that may break after an underscore. */
  const breaking = (i) => names[i].split(/(?<=_)/).flatMap((part) => [part, el("wbr")]);
  const dot = (i) => el("span", { class: "dot", style: `background:${colourOf(i)}`, title: baseOf(i) });
  const field = (label, control) => el("label", { class: "field" }, el("span", {}, label), control);
  const options = (entries) => entries.map(([value, text]) => el("option", { value }, text));

  function nameButton(i, choose, ...rest) {
    const name = el("span", { class: "name" }, dot(i), el("span", {}, ...breaking(i)));
    return el("button", { type: "button", "data-network": i, click: () => choose(i) }, name, ...rest);
  }

  function nameField(label, which) {
    const input = el("input", { type: "text", list: `${id}-names`, autocomplete: "off", spellcheck: "false" });
    const take = () => {
      const typed = input.value.trim().toLowerCase();
      const fits = all.filter((i) => typed && names[i].toLowerCase().includes(typed));
      const exact = fits.find((i) => names[i].toLowerCase() === typed);
      const network = exact ?? (fits.length === 1 ? fits[0] : undefined);
      if (network !== undefined) which === "first" ? chooseFirst(network) : chooseSecond(network);
      else input.value = state[which] === null ? "" : names[state[which]];
    };
    input.addEventListener("change", take);
    input.addEventListener("focus", () => input.select());
    return [input, field(label, input)];
  }

  const select = {
    view: el("select", { change: (event) => set({ view: Number(event.target.value) }) }),
    order: el("select", { change: (event) => set({ order: event.target.value }) }),
  };
  select.view.append(...options(views.map((shown, k) => [k, shown.title])));
  select.order.append(...options([["tree", "tree of similarity"], ["base", "base"]]));
  if (data.accuracy) select.order.append(...options([["accuracy", "accuracy, highest first"]]));
  select.order.append(el("optgroup", { label: "component" }, ...options(components.map((c) => [c, c]))));

  const search = el("input", { type: "search", list: `${id}-terms`, autocomplete: "off", spellcheck: "false" });
  search.placeholder = "resnet, GeLU, …";
  search.addEventListener("input", () => set({ query: search.value }));
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape") set({ query: (search.value = "") });
    if (event.key === "Enter" && found().length) chooseFirst(found()[0]);
  });
  const terms = new Set(components.flatMap((c) => data.components[c].filter(Boolean).map((value) => `${c}: ${value}`)));
  const lists = [
    el("datalist", { id: `${id}-names` }, ...options(names.map((name) => [name, ""]))),
    el("datalist", { id: `${id}-terms` }, ...options([...names, ...terms].map((term) => [term, ""]))),
  ];

  const [firstInput, firstField] = nameField("First network", "first");
  const [secondInput, secondField] = nameField("Second network", "second");
  const swap = el("button", { type: "button", class: "swap", "aria-label": "Swap the two", title: "Swap the two" }, "⇄");
  swap.addEventListener("click", () => state.second !== null && set({ first: state.second, second: state.first }));

  const note = el("p", { class: "note" });
  const hits = el("div", { class: "hits" });
  const count = el("p", { class: "note", "aria-live": "polite" });
  const pair = el("section", { class: "pair", tabindex: "-1", "aria-label": "The chosen pair" });
  const near = el("div", { class: "near" });
  const live = el("p", { class: "live", "aria-live": "polite" });
  const legend = el("p", { class: "legend" });
  for (const base of new Set(all.map(baseOf))) {
    legend.append(el("span", {}, dot(all.find((i) => baseOf(i) === base)), base));
  }

  const nearness = `Near each other: similar. Lines go from the first network to the ${lengthOfLists} with the highest value.`;

  function figure(kind, label) {
    const tip = el("div", { class: "tip", hidden: "" });
    const drawn = el("div", { class: "drawn", inert: "", "aria-hidden": "true" });
    const over = el("div", { class: "over", tabindex: "0", role: "application", "aria-label": label });
    return { tip, drawn, over, box: el("div", { class: `plot ${kind}` }, drawn, over, tip) };
  }
  const heat = figure("heat", "Heatmap. Arrows move the chosen cell, Enter goes to its components, Escape chooses nothing.");
  const map = figure("map", "Map. Arrows go to the next network in that direction, Enter to its components.");

  root.append(
    el("div", { class: "controls" }, field("Show", select.view), field("Order by", select.order)),
    el(
      "div",
      { class: "figures" },
      el("div", {}, heat.box, note),
      el("div", {}, map.box, legend, el("p", { class: "note" }, nearness), field("Find a name, a base or a component", search), count, hits),
    ),
    el("div", { class: "fields" }, firstField, swap, secondField),
    pair,
    near,
    live,
    ...lists,
  );

  /* ---------- what is written ---------- */

  function numbers() {
    const { first: i, second: j } = state;
    const rows = [];
    if (data.accuracy) rows.push([`Accuracy of ${names[i]}`, percent(data.accuracy[i], 2)]);
    if (data.accuracy && j !== null) rows.push([`Accuracy of ${names[j]}`, percent(data.accuracy[j], 2)]);
    if (j === null) return rows;
    if (data.votes) rows.push(["Accuracy of the two in a vote", percent(at(data.votes, i, j), 2)]);
    for (const shown of views) rows.push([shown.title, withInterval(shown, i, j)]);
    for (const [a, b] of data.directed ? [[i, j], [j, i]] : []) {
      rows.push([`Images made on ${names[a]} that fool ${names[b]}, here`, percent(data.directed[a * n + b], 1)]);
    }
    return rows;
  }

  function writePair() {
    const { first: i, second: j } = state;
    if (i === null) {
      pair.replaceChildren(el("p", { class: "empty" }, "Nothing is chosen: click a cell, a dot or a name."));
      return;
    }
    const facts = numbers().map(([what, value]) => el("div", {}, el("dt", {}, what), el("dd", {}, value)));
    const shown = [i, j].filter((k) => k !== null);
    const head = shown.map((k) => el("th", { scope: "col" }, dot(k), ...breaking(k)));
    let differing = 0;
    const rows = components.map((c) => {
      const values = shown.map((k) => data.components[c][k]);
      const differs = values.length === 2 && values[0] !== values[1];
      differing += differs;
      const mark = el("td", { class: "unlike" }, differs ? "≠" : "");
      const cells = values.map((value) => el("td", {}, value || "–"));
      return el("tr", differs ? { class: "differs" } : {}, mark, el("th", { scope: "row" }, c), ...cells);
    });
    const title = j === null ? "Its components" : `${differing} of ${components.length} components differ`;
    const top = el("thead", {}, el("tr", {}, el("td"), el("td", { class: "title" }, title), ...head));
    pair.replaceChildren(el("dl", {}, ...facts), el("table", {}, top, el("tbody", {}, ...rows)));
  }

  function nearest(title, chosen, value) {
    const items = chosen.map((j) => el("li", {}, nameButton(j, chooseSecond, el("span", {}, value(j)))));
    return el("section", {}, el("h4", {}, title), el("ol", {}, ...items));
  }

  function writeNear() {
    const i = state.first;
    if (i === null) return near.replaceChildren();
    const alike = views.filter((shown) => shown.kind === view().kind);
    const sections = alike.map((shown) => {
      const score = (j) => at(shown.values, i, j);
      return nearest(`${shown.title}: highest with ${names[i]}`, mostOf(i, score), (j) => written(shown, score(j)));
    });
    if (data.votes) {
      const score = (j) => at(data.votes, i, j);
      const value = (j) => `${percent(score(j), 2)} (${gain(i, j)})`;
      sections.push(nearest(`Best partners of ${names[i]} in a vote (points gained on the better one)`, mostOf(i, score), value));
    }
    return near.replaceChildren(...sections);
  }

  function writeFound() {
    const matches = found();
    const plural = matches.length === 1 ? "1 network" : `${matches.length} networks`;
    count.textContent = state.query.trim() ? `${plural} found` : "What is found is marked in both figures.";
    hits.replaceChildren(...matches.map((i) => nameButton(i, chooseFirst)));
  }

  function writeNote() {
    const parts = groups()?.map(([label, members]) => `${label || "not given"} (${members.length})`);
    note.textContent = view().about + (parts ? ` From the top: ${parts.join(", ")}.` : "");
  }

  function say() {
    const { first: i, second: j } = state;
    if (i === null) live.textContent = "Nothing is chosen.";
    else if (j === null) live.textContent = `${names[i]}, ${baseOf(i)}.`;
    else live.textContent = `${names[i]} and ${names[j]}: ${view().title} ${withInterval(view(), i, j)}.`;
  }

  /* ---------- what is drawn ---------- */

  async function embed({ drawn }, item) {
    const manager = await Bokeh.embed.embed_item(item, drawn);
    const plot = [...manager][0];
    return { plot, source: (name) => plot.model.document.get_model_by_name(name) };
  }
  Object.assign(heat, await embed(heat, data.heat));
  Object.assign(map, await embed(map, data.map));

  /** How strongly a network is drawn: what isn't found fades. */
  function shade() {
    const matches = new Set(found());
    return (i) => (!matches.size || matches.has(i) ? 1 : 0.15);
  }

  function drawHeat() {
    const order = ordering();
    const cells = heat.source("cells");
    order.forEach((i, row) =>
      order.forEach((j, column) => {
        cells.data.image[0][(n - 1 - row) * n + column] = i === j ? NaN : at(view().values, i, j);
      }),
    );
    const [low, high] = view().range;
    heat.source("colours").setv({ palette: data.palettes[view().palette], low, high });
    cells.change.emit();
    const middle = order.map((_, k) => k + 0.5);
    const below = middle.map((k) => n - k);
    const [beside, above] = [order.map(() => -1.4), order.map(() => n + 1.4)];
    const strip = (x, y, width, height) => ({ x, y, width: order.map(() => width), height: order.map(() => height) });
    const both = (one, other) => Object.fromEntries(Object.keys(one).map((key) => [key, [...one[key], ...other[key]]]));
    const sides = both(strip(beside, below, 1.8, 1), strip(middle, above, 1, 1.8));
    const shades = order.map(shade());
    const color = order.map(colourOf);
    heat.source("strips").data = { ...sides, color: [...color, ...color], alpha: [...shades, ...shades] };
    const ends = (groups() ?? []).map(([, members]) => members.length);
    const lines = ends.slice(0, -1).map((_, k) => ends.slice(0, k + 1).reduce((a, b) => a + b));
    heat.source("borders").data = {
      x0: [...lines.map(() => 0), ...lines],
      x1: [...lines.map(() => n), ...lines],
      y0: [...lines.map((k) => n - k), ...lines.map(() => 0)],
      y1: [...lines.map((k) => n - k), ...lines.map(() => n)],
    };
  }

  /** Ends of both axes: one scale for both, with room at the rim. */
  function extent(points) {
    const ends = [0, 1].map((k) => [Math.min(...points.map((p) => p[k])), Math.max(...points.map((p) => p[k]))]);
    const reach = 0.58 * Math.max(...ends.map(([low, high]) => high - low));
    return ends.map(([low, high]) => [(low + high) / 2 - reach, (low + high) / 2 + reach]);
  }

  /** Where a name stands, in pixels from its dot: inside the map, and away from the other name. */
  function beside(point, other, name) {
    const [[start, end]] = extent(view().map);
    const wide = map.over.clientWidth;
    const dotAt = ((point[0] - start) / (end - start)) * wide;
    const length = 6.7 * name.length;
    const from = dotAt + 9 + length < wide ? dotAt + 9 : Math.max(4, dotAt - 9 - length);
    const above = point[1] > other[1] || point === other;
    return [from - dotAt, above ? -9 : 24];
  }

  function drawChosen() {
    const [row, column] = place();
    const bands = row === null ? [] : [[n / 2, n - row - 0.5, n, 1], [column + 0.5, n / 2, 1, n]];
    const [x, y, width, height] = [0, 1, 2, 3].map((k) => bands.map((band) => band[k]));
    heat.source("chosen").data = { x, y, width, height };
    const points = view().map;
    const chosen = [state.first, state.second].filter((i) => i !== null);
    const written = chosen.map((i, k) => beside(points[i], points[chosen[1 - k]] ?? points[i], names[i]));
    map.source("chosen").data = {
      x: chosen.map((i) => points[i][0]),
      y: chosen.map((i) => points[i][1]),
      name: chosen.map((i) => names[i]),
      right: written.map((offset) => offset[0]),
      down: written.map((offset) => offset[1]),
    };
    const nearby = state.first === null ? [] : mostOf(state.first, (j) => at(view().values, state.first, j));
    const [from, to] = [nearby.map(() => points[state.first]), nearby.map((j) => points[j])];
    const of = (ends, k) => ends.map((point) => point[k]);
    map.source("nearby").data = { x0: of(from, 0), y0: of(from, 1), x1: of(to, 0), y1: of(to, 1) };
  }

  function drawMap() {
    const points = view().map;
    extent(points).forEach(([start, end], k) => map.plot.model[k ? "y_range" : "x_range"].setv({ start, end }));
    map.source("dots").data = {
      x: points.map((p) => p[0]),
      y: points.map((p) => p[1]),
      color: all.map(colourOf),
      alpha: all.map(shade()),
    };
  }

  function follow() {
    const text = getComputedStyle(root).color;
    const ground = getComputedStyle(root.querySelector(".plot")).getPropertyValue("--ground").trim() || "white";
    heat.source("bar").major_label_text_color = text;
    map.source("name").setv({ text_color: { value: text }, background_fill_color: { value: ground } });
    map.source("line").line_color = { value: text };
    map.source("ring").line_color = { value: text };
  }

  /* ---------- state ---------- */

  function set(changed) {
    Object.assign(state, changed);
    for (const [name, control] of Object.entries(select)) control.value = state[name];
    firstInput.value = state.first === null ? "" : names[state.first];
    secondInput.value = state.second === null ? "" : names[state.second];
    if (["view", "order", "query"].some((key) => key in changed)) {
      drawHeat();
      drawMap();
      writeNote();
      writeFound();
    }
    drawChosen();
    writePair();
    writeNear();
    say();
  }

  const choose = (i, j) => set({ first: i, second: i === j ? null : j });
  const chooseSecond = (j) => choose(state.first ?? j, j);
  function chooseFirst(i) {
    if (i === state.second) choose(i, state.first);
    else choose(i, state.second ?? mostOf(i, (j) => at(view().values, i, j))[0]);
  }

  /** Where the chosen cell stands now: row and column. */
  function place() {
    if (state.first === null) return [null, null];
    const order = ordering();
    return [order.indexOf(state.first), order.indexOf(state.second ?? state.first)];
  }

  /* ---------- pointer ---------- */

  /** The middle of a cell on the screen, or of a dot. */
  function onScreen({ plot, over }, x, y) {
    const corner = over.getBoundingClientRect();
    return [corner.left + plot.frame.x_scale.compute(x), corner.top + plot.frame.y_scale.compute(y)];
  }

  function cellUnder(event) {
    const corner = heat.over.getBoundingClientRect();
    const column = Math.floor(heat.plot.frame.x_scale.invert(event.clientX - corner.left));
    const row = n - 1 - Math.floor(heat.plot.frame.y_scale.invert(event.clientY - corner.top));
    const inside = (k) => k >= 0 && k < n;
    const order = ordering();
    if (inside(row) && inside(column)) return [order[row], order[column]];
    if (inside(row) && column < 0) return [order[row], order[row]]; // on the strips: one network
    return inside(column) && row < 0 ? [order[column], order[column]] : null;
  }

  function dotUnder(event) {
    const away = ([x, y]) => Math.hypot(x - event.clientX, y - event.clientY);
    const distances = view().map.map((point) => away(onScreen(map, ...point)));
    const nearestDot = distances.indexOf(Math.min(...distances));
    return distances[nearestDot] < 18 ? nearestDot : null;
  }

  function showTip({ tip, box }, event, lines) {
    tip.replaceChildren(...lines.map((line) => el("div", {}, ...[line].flat())));
    tip.hidden = false;
    const around = root.getBoundingClientRect();
    const corner = box.getBoundingClientRect();
    const right = Math.min(event.clientX + 14, around.right - tip.offsetWidth);
    const below = event.clientY - corner.top + 16;
    const fits = below + tip.offsetHeight < corner.height;
    tip.style.left = `${Math.max(around.left, right) - corner.left}px`;
    tip.style.top = `${fits ? below : event.clientY - corner.top - tip.offsetHeight - 12}px`;
  }

  function tellCell([i, j]) {
    if (i === j) return [[dot(i), names[i]], baseOf(i)];
    const lines = [[dot(i), names[i]], [dot(j), names[j]], `${view().title}: ${withInterval(view(), i, j)}`];
    for (const [a, b, arrow] of data.directed ? [[i, j, "→"], [j, i, "←"]] : []) {
      lines.push(`first ${arrow} second, here: ${percent(data.directed[a * n + b], 1)}`);
    }
    return lines;
  }

  function tellDot(i) {
    const lines = [[dot(i), names[i]], baseOf(i)];
    if (data.accuracy) lines.push(`Accuracy: ${percent(data.accuracy[i], 2)}`);
    if (state.first !== null && i !== state.first) {
      lines.push(`With ${names[state.first]}: ${withInterval(view(), i, state.first)}`);
    }
    return lines;
  }

  function listen(part, under, tell, click) {
    const leave = () => (part.tip.hidden = true);
    part.over.addEventListener("pointermove", (event) => {
      const what = event.pointerType === "touch" ? null : under(event);
      part.over.style.cursor = what === null ? "default" : "pointer";
      what === null ? leave() : showTip(part, event, tell(what));
    });
    part.over.addEventListener("pointerleave", leave);
    part.over.addEventListener("click", (event) => {
      const what = under(event);
      if (what !== null) click(what);
    });
  }
  listen(heat, cellUnder, tellCell, ([i, j]) => choose(i, j));
  listen(map, dotUnder, tellDot, chooseFirst);

  /* ---------- keyboard ---------- */

  const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const jumps = { Home: [0, -n], End: [0, n], PageUp: [-n, 0], PageDown: [n, 0] };

  function leaveByKey(event) {
    if (event.key === "Enter") pair.focus();
    if (event.key === "Escape") set({ first: null, second: null });
    return ["Enter", "Escape"].includes(event.key);
  }

  heat.over.addEventListener("keydown", (event) => {
    const step = { ...arrows, ...jumps }[event.key];
    if (!step) return leaveByKey(event) && event.preventDefault();
    event.preventDefault();
    const order = ordering();
    const to = place().map((from, k) => Math.max(0, Math.min(n - 1, (from ?? 0) + step[k])));
    return choose(...to.map((k) => order[k]));
  });

  map.over.addEventListener("keydown", (event) => {
    const step = arrows[event.key];
    if (!step) return leaveByKey(event) && event.preventDefault();
    event.preventDefault();
    const [x, y] = view().map[state.first ?? 0];
    const reach = all.map((i) => {
      const [dx, dy] = [view().map[i][0] - x, view().map[i][1] - y];
      const ahead = dx * step[1] - dy * step[0];
      const aside = Math.abs(dx * step[0]) + Math.abs(dy * step[1]);
      return ahead > 0 ? ahead + 2 * aside : Infinity; // what lies ahead before what lies aside
    });
    const next = reach.indexOf(Math.min(...reach));
    return reach[next] < Infinity && chooseFirst(next);
  });

  new ResizeObserver(drawChosen).observe(map.over);
  new MutationObserver(follow).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  set(state);
  follow();
  const cell = (row, column) => onScreen(heat, column + 0.5, n - row - 0.5);
  root.explorer = { state, ordering, found, cell, dot: (i) => onScreen(map, ...view().map[i]) };
  root.dataset.ready = "yes";
};
