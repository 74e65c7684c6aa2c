// An ECG on ECG paper: drawn in millimetres on a canvas, with zoom, calipers, the tokens below it and the reconstruction over it.
const LEADS = ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"];
const LAYOUTS = {
  "3 × 4": { rows: [["I", "aVR", "V1", "V4"], ["II", "aVL", "V2", "V5"], ["III", "aVF", "V3", "V6"], ["II"]], spacing: 35 },
  "12 × 1": { rows: LEADS.map((lead) => [lead]), spacing: 20 },
};
const SPEED = 25; // mm/s
const GAIN = { mV: 10, SD: 2.5 }; // mm a unit: a lead's SD is about 0.2 mV, so beats then look as tall as in mV
const WIDTH = 280, GRID = { left: 5, right: 275, top: 5 }, LEFT = 20; // mm; where t = 0 is drawn
const CLIP = 30; // mm: a trace that is cut here stops short of the next row's baseline in 3 x 4
const TOKEN_SECONDS = 16 / 500;
const COLOURS = {
  paper: "#fffaf9", thin: "#fbdcdc", thick: "#f0aaae", ink: "#1c1c22", reconstruction: "#1673ff", note: "#55555f", time: "#7a3fb5", volt: "#0a7d5a",
};

const element = (tag, properties = {}, ...children) => {
  const { dataset, ...rest } = properties;
  const made = Object.assign(document.createElement(tag), rest);
  Object.assign(made.dataset, dataset);
  made.append(...children);
  return made;
};

// Each array [12, n] as int16 in steps of 5 uV, the difference to the sample before in zigzag (0, -1, 1, -2 ... become 0, 1, 2, 3 ...), all low
// bytes before all high bytes, deflated: a third of the plain int16.
async function unpack(packed) {
  const zipped = Uint8Array.from(atob(packed.data), (character) => character.charCodeAt(0));
  const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const n = packed.samples, size = LEADS.length * n, arrays = {};
  packed.arrays.forEach((name, at) => {
    const start = at * 2 * size;
    arrays[name] = LEADS.map((_, lead) => {
      const trace = new Float32Array(n), from = start + lead * n;
      for (let i = 0, value = 0; i < n; i++) {
        const zigzag = bytes[from + i] | (bytes[from + size + i] << 8);
        value = ((value + ((zigzag >>> 1) ^ -(zigzag & 1))) << 16) >> 16; // wraps as int16 does
        trace[i] = value * packed.step;
      }
      return trace;
    });
  });
  return { ...packed, ...arrays };
}

const digits = (id, levels) => levels.map((n) => { const digit = id % n; id = Math.floor(id / n); return digit; });
// Golden-ratio hues: whatever ids a page holds lie far apart. Three shades tell hues that come close after all.
const tokenColour = (id) => `hsl(${(id * 222.49) % 360} ${55 + 25 * (id % 2)}% ${70 - 12 * (id % 3)}%)`;

// The figure of one ECG. It draws itself whenever its size, zoom, layout or calipers change.
function ecgFigure(ecg) {
  const gain = GAIN[ecg.unit], traces = [];
  if (ecg.signal) traces.push({ signal: ecg.signal, colour: COLOURS.ink });
  if (ecg.reconstruction) traces.push({ signal: ecg.reconstruction, colour: COLOURS.reconstruction, overlay: Boolean(ecg.signal) });
  const canvas = element("canvas", { tabIndex: 0, role: "img", ariaLabel: `12-lead ECG on ECG paper: ${ecg.title}. Plus and minus zoom, arrow keys move.` });
  const context = canvas.getContext("2d");
  const readout = element("output", { className: "readout" });
  const caption = element("figcaption", { className: "soft" });
  let layout, paths, height, view = { scale: 0, x: 0, y: 0 }, fit = 1;
  let overlay = Boolean(ecg.signal && ecg.reconstruction), lines = null, active = "t1", hovered = null;

  function choose(name) {
    layout = { ...LAYOUTS[name], name };
    layout.baselines = layout.rows.map((_, row) => GRID.top + 20 + layout.spacing * row);
    layout.bottom = layout.baselines.at(-1) + 15;
    height = layout.bottom + (ecg.tokens.length ? 12 : 5);
    const cut = new Set();
    paths = traces.map(({ signal }) => {
      const path = new Path2D();
      layout.rows.forEach((leads, row) => leads.forEach((lead, column) => {
        const trace = signal[LEADS.indexOf(lead)], last = Math.min(Math.round(((column + 1) * ecg.samples) / leads.length), ecg.samples - 1);
        for (let i = Math.round((column * ecg.samples) / leads.length), first = i; i <= last; i++) {
          const y = trace[i] * gain;
          if (Math.abs(y) > CLIP) cut.add(lead);
          path[i === first ? "moveTo" : "lineTo"](LEFT + (i / ecg.fs) * SPEED, layout.baselines[row] - Math.max(-CLIP, Math.min(CLIP, y)));
        }
      }));
      return path;
    });
    caption.textContent = `${SPEED} mm/s, ${gain} mm/${ecg.unit}: a large square is 200 ms and ${5 / gain} ${ecg.unit}. Drawn at ${ecg.fs} Hz.`
      + (ecg.unit === "SD" ? " The recording was z-scored upstream: it is in standard deviations of each lead, voltages are lost." : "")
      + (cut.size ? ` Cut at ±${CLIP / gain} ${ecg.unit}: ${[...cut].join(", ")}.` : "");
  }

  const box = () => ({ width: canvas.clientWidth, height: canvas.clientHeight });
  function clamp() {
    const { width, height: high } = box();
    view.scale = Math.max(fit, Math.min(view.scale, 40));
    view.x = Math.min(0, Math.max(view.x, width - WIDTH * view.scale));
    view.y = Math.min(0, Math.max(view.y, high - height * view.scale));
    canvas.style.touchAction = view.scale > fit * 1.01 || lines ? "none" : "pan-y"; // the page scrolls until there is something to drag
  }
  function reset() {
    fit = canvas.parentElement.clientWidth / WIDTH;
    view = { scale: Math.max(fit, 2.4), x: 0, y: 0 }; // 2.4 pixels a millimetre: on a phone a part is seen, not a whole that nobody can read
    canvas.style.height = `${Math.round(view.scale * height)}px`;
    fit = Math.min(fit, view.scale);
    draw();
  }
  function zoom(factor, x = box().width / 2, y = box().height / 2) {
    const before = view.scale;
    view.scale = Math.max(fit, Math.min(before * factor, 40));
    view.x = x - ((x - view.x) * view.scale) / before;
    view.y = y - ((y - view.y) * view.scale) / before;
    draw();
  }

  function draw() {
    const { width, height: high } = box(), ratio = window.devicePixelRatio || 1;
    if (!width) return;
    clamp();
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(high * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(high * ratio);
    }
    const s = view.scale, pixel = 1 / s;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = "#fff";
    context.fillRect(0, 0, width, high);
    context.setTransform(s * ratio, 0, 0, s * ratio, view.x * ratio, view.y * ratio); // from here on in mm
    context.fillStyle = COLOURS.paper;
    context.fillRect(GRID.left, GRID.top, GRID.right - GRID.left, layout.bottom - GRID.top);
    for (const [step, colour, thick] of [[1, COLOURS.thin, 0.12], [5, COLOURS.thick, 0.2]]) {
      context.beginPath();
      for (let x = GRID.left; x <= GRID.right; x += step) { context.moveTo(x, GRID.top); context.lineTo(x, layout.bottom); }
      for (let y = GRID.top; y <= layout.bottom; y += step) { context.moveTo(GRID.left, y); context.lineTo(GRID.right, y); }
      stroke(colour, Math.max(thick, 0.6 * pixel));
    }
    if (hovered !== null) {
      context.fillStyle = "rgba(22, 115, 255, .18)";
      context.fillRect(tokenX(hovered), GRID.top, TOKEN_SECONDS * SPEED, layout.bottom - GRID.top);
    }
    layout.rows.forEach((leads, row) => {
      const y = layout.baselines[row];
      context.beginPath(); // the calibration pulse: one unit, 200 ms
      [[8, 0], [10, 0], [10, gain], [15, gain], [15, 0], [17, 0]].forEach(([x, up], i) => context[i ? "lineTo" : "moveTo"](x, y - up));
      leads.slice(1).forEach((_, column) => {
        const x = LEFT + ((column + 1) * ecg.samples * SPEED) / leads.length / ecg.fs;
        context.moveTo(x, y - 3);
        context.lineTo(x, y + 3);
      });
      stroke(COLOURS.ink, Math.max(0.25, pixel));
    });
    paths.forEach((path, i) => { if (!traces[i].overlay || overlay) stroke(traces[i].colour, Math.max(i ? 0.16 : 0.28, (i ? 0.8 : 1.1) * pixel), path); });
    context.font = `bold ${Math.max(3.2, 11 * pixel)}px system-ui, sans-serif`;
    layout.rows.forEach((leads, row) => leads.forEach((lead, column) => {
      write(lead, LEFT + (column * ecg.samples * SPEED) / leads.length / ecg.fs + 1.2, layout.baselines[row] - (layout.spacing > 20 ? 12 : 6));
    }));
    drawTokens();
    drawLines(pixel);
    canvas.dataset.scale = (s / fit).toFixed(2);
  }
  function stroke(colour, thick, path) {
    Object.assign(context, { strokeStyle: colour, lineWidth: thick, lineJoin: "round" });
    path ? context.stroke(path) : context.stroke();
  }
  function write(text, x, y) {
    Object.assign(context, { strokeStyle: COLOURS.paper, lineWidth: 1, fillStyle: COLOURS.ink, lineJoin: "round" });
    context.strokeText(text, x, y);
    context.fillText(text, x, y);
  }
  const tokenX = (i) => LEFT + i * TOKEN_SECONDS * SPEED;
  function drawTokens() {
    ecg.tokens.forEach((id, i) => {
      context.fillStyle = tokenColour(id);
      context.fillRect(tokenX(i), layout.bottom + 3, TOKEN_SECONDS * SPEED, 6);
    });
    context.font = "3px system-ui, sans-serif";
    context.fillStyle = COLOURS.note;
    context.fillText(ecg.tokens.length ? "tokens" : "", GRID.left, layout.bottom + 7);
  }
  function drawLines(pixel) {
    for (const [name, at] of Object.entries(lines ?? {})) {
      const time = name[0] === "t";
      context.beginPath();
      if (time) { context.moveTo(at, GRID.top); context.lineTo(at, layout.bottom); } else { context.moveTo(GRID.left, at); context.lineTo(GRID.right, at); }
      stroke(time ? COLOURS.time : COLOURS.volt, (name === active ? 2.2 : 1.4) * pixel);
      context.fillStyle = time ? COLOURS.time : COLOURS.volt;
      const grip = 9 * pixel;
      context.fillRect(time ? at - grip / 2 : GRID.right - grip, time ? GRID.top : at - grip / 2, grip, grip);
    }
  }

  function say(position) {
    const said = [];
    if (lines) {
      const ms = (Math.abs(lines.t2 - lines.t1) / SPEED) * 1000, high = Math.abs(lines.v2 - lines.v1) / gain;
      said.push(`${Math.round(ms)} ms`, ms >= 100 ? `${Math.round(60000 / ms)} bpm` : "– bpm", `${high.toFixed(2)} ${ecg.unit}`);
    }
    const i = position && position.y > layout.bottom + 1 ? Math.floor((position.x - LEFT) / SPEED / TOKEN_SECONDS) : -1, before = hovered;
    hovered = i >= 0 && i < ecg.tokens.length ? i : null;
    if (hovered !== null) {
      const id = ecg.tokens[i];
      said.push(`token ${i + 1} of ${ecg.tokens.length}: id ${id}, digits ${digits(id, ecg.levels).join(" ")}, ${(i * TOKEN_SECONDS).toFixed(2)} s`);
    }
    readout.textContent = said.join("  ·  ");
    if (before !== hovered) draw();
  }
  function calipers(on) {
    // a second in the middle of what is seen, and one unit up from the baseline nearest to that
    const middle = (size, from) => (size / 2 - from) / view.scale, x = Math.max(GRID.left + 13, Math.min(middle(box().width, view.x), GRID.right - 13));
    const far = (y) => Math.abs(y - middle(box().height, view.y)), y = layout.baselines.reduce((best, one) => (far(one) < far(best) ? one : best));
    lines = on ? { t1: x - SPEED / 2, t2: x + SPEED / 2, v1: y, v2: y - gain } : null;
    say();
    draw();
  }
  function move(name, to) {
    lines[name] = name[0] === "t" ? Math.max(GRID.left, Math.min(to, GRID.right)) : Math.max(GRID.top, Math.min(to, layout.bottom));
    active = name;
    say();
    draw();
  }

  listen();
  function listen() {
    const pointers = new Map(), at = (event) => {
      const area = canvas.getBoundingClientRect(), px = event.clientX - area.left, py = event.clientY - area.top;
      return { px, py, x: (px - view.x) / view.scale, y: (py - view.y) / view.scale };
    };
    const far = (p, name) => Math.abs((name[0] === "t" ? p.x : p.y) - lines[name]) * view.scale; // in pixels
    const line = (p) => Object.keys(lines ?? {}).filter((name) => far(p, name) < 9).sort((a, b) => far(p, a) - far(p, b))[0];
    let held = null;
    canvas.addEventListener("pointerdown", (event) => {
      const p = at(event);
      pointers.set(event.pointerId, p);
      canvas.setPointerCapture(event.pointerId);
      held = line(p) ?? null;
      if (held) event.preventDefault();
    });
    canvas.addEventListener("pointermove", (event) => {
      const p = at(event), old = pointers.get(event.pointerId);
      if (!old) {
        canvas.style.cursor = { t: "ew-resize", v: "ns-resize" }[line(p)?.[0]] ?? (view.scale > fit * 1.01 ? "grab" : "default");
        return say(p);
      }
      const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
      pointers.set(event.pointerId, p);
      if (other) return zoom(Math.hypot(p.px - other.px, p.py - other.py) / Math.max(1, Math.hypot(old.px - other.px, old.py - other.py)), other.px, other.py);
      if (held) return move(held, held[0] === "t" ? p.x : p.y);
      view.x += p.px - old.px;
      view.y += p.py - old.py;
      draw();
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => pointers.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => say());
    canvas.addEventListener("wheel", (event) => {
      if (event.deltaY > 0 && view.scale <= fit * 1.001) return; // whole already: the page scrolls on
      event.preventDefault();
      const p = at(event);
      zoom(Math.exp(-event.deltaY / 400), p.px, p.py);
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (event.key === "+" || event.key === "=") zoom(1.5);
      else if (event.key === "-") zoom(1 / 1.5);
      else if (lines && event.key === "c") { active = { t1: "t2", t2: "v1", v1: "v2", v2: "t1" }[active]; draw(); }
      else if (arrow && lines) move(active, lines[active] + (active[0] === "t" ? (arrow[0] * SPEED) / ecg.fs : 0.1 * arrow[1]));
      else if (arrow) { view.x -= 40 * arrow[0]; view.y -= 40 * arrow[1]; draw(); }
      else return;
      event.preventDefault();
    });
  }

  const button = (text, label, act) => element("button", { type: "button", textContent: text, title: label, ariaLabel: label, onclick: act });
  const toggle = (text, on, act) => {
    const made = button(text, text, () => { on = !on; made.ariaPressed = String(on); act(on); });
    made.ariaPressed = String(on);
    return made;
  };
  const tools = element("div", { className: "tools" },
    button("+", "zoom in", () => zoom(1.5)), button("−", "zoom out", () => zoom(1 / 1.5)), button("Fit", "the whole ECG", reset),
    button("12 × 1", "other layout", (event) => { event.target.textContent = layout.name; choose(layout.name === "3 × 4" ? "12 × 1" : "3 × 4"); reset(); }),
    toggle("Calipers", false, calipers));
  if (ecg.signal && ecg.reconstruction) tools.append(toggle("Reconstruction", true, (on) => { overlay = on; draw(); }));
  tools.append(readout);
  choose("3 × 4");
  const note = ecg.note ? [element("p", { className: "soft", textContent: ecg.note })] : [];
  const sheet = element("div", { className: "sheet" }, canvas);
  const figure = element("figure", { className: "ecg" }, element("h3", { textContent: ecg.title }), ...note, tools, sheet, caption);
  let wide = 0;
  new ResizeObserver(() => { if (canvas.parentElement.clientWidth !== wide) { wide = canvas.parentElement.clientWidth; reset(); } }).observe(figure);
  return figure;
}
