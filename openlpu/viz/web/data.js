// In: the page's data blocks. Out: `data`, with typed columns instead of packed bytes.

// Every name in the data was written by strangers: text goes into the page as text nodes only.
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "style") Object.assign(node.style, value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "class") node.className = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const find = (selector) => document.querySelector(selector);
const whole = (n) => Math.round(n).toLocaleString("en-US");
const percent = (x) =>
  x > 0 && x < 0.001 ? "<0.1 %" : `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)} %`;
const plural = (n, one) => `${whole(n)} ${one}${n === 1 ? "" : "s"}`;

function bytesText(n) {
  const units = ["B", "KB", "MB", "GB"];
  let i = 0;
  while (n >= 1000 && i < units.length - 1) {
    n /= 1000;
    i += 1;
  }
  return `${i && n < 100 ? n.toFixed(n < 10 ? 2 : 1) : Math.round(n)} ${units[i]}`;
}

function timeText(seconds) {
  const units = [
    ["s", 1],
    ["ms", 1e-3],
    ["µs", 1e-6],
    ["ns", 1e-9],
  ];
  const [name, size] = units.find(([, unit]) => seconds >= unit) ?? units[3];
  const n = seconds / size;
  return `${n.toFixed(n < 10 ? 2 : n < 100 ? 1 : 0)} ${name}`;
}

async function unpack() {
  const data = JSON.parse(find("#data").textContent);
  const packed = Uint8Array.from(atob(find("#blob").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = await new Response(stream).arrayBuffer();
  const view = new DataView(bytes);
  let at = 0;
  const table = (spec) => {
    const columns = {};
    for (const name of spec.columns) {
      const column = new Int32Array(spec.rows);
      for (let i = 0; i < spec.rows; i += 1) column[i] = view.getInt32(at + 4 * i, true);
      at += 4 * spec.rows;
      columns[name] = column;
    }
    return columns;
  };
  data.bursts = table(data.tables.bursts);
  data.flows = table(data.tables.flows);
  data.words = table(data.tables.words);
  data.texts = new TextDecoder().decode(new Uint8Array(bytes, at)).split("\n");
  return data;
}

// -- colours

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// A colour of even lightness, as #rrggbb: canvases parse that fastest, and every browser knows it.
function oklch(light, chroma, hue) {
  const a = chroma * Math.cos((hue * Math.PI) / 180),
    b = chroma * Math.sin((hue * Math.PI) / 180);
  const l = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (light - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return `#${[
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ]
    .map((linear) => {
      const x = Math.min(1, Math.max(0, linear));
      const shown = x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055;
      return Math.round(255 * shown)
        .toString(16)
        .padStart(2, "0");
    })
    .join("")}`;
}

// Operations whose names begin alike (up to the first blank) have hues close to each other.
function operationColors(tags) {
  const light = Number(css("--op-light")),
    chroma = Number(css("--op-chroma"));
  const families = new Map();
  return tags.map((tag) => {
    const family = tag.split(" ")[0];
    if (!families.has(family)) families.set(family, { hue: 255 + 137.508 * families.size, n: 0 });
    const entry = families.get(family),
      k = entry.n % 5;
    entry.n += 1;
    const shade = [0, -0.1, 0.09, -0.05, 0.05][k],
      turn = [0, 14, -14, 26, -26][k];
    return oklch(light + shade, chroma, entry.hue + turn);
  });
}

const KNOWN_KINDS = ["weights", "context", "state", "constants", "table", "text"];

function kindColors(kinds) {
  return kinds.map((kind, i) => {
    if (KNOWN_KINDS.includes(kind)) return css(`--k-${kind}`);
    if (kind.startsWith("port ")) return css("--k-port");
    return oklch(0.7, 0.13, 40 + 137.508 * i);
  });
}

// -- what floats and what is painted

const tip = {
  show(event, ...children) {
    const node = find("#tip");
    node.replaceChildren(...children);
    node.hidden = false;
    const { width, height } = node.getBoundingClientRect();
    const right = event.clientX + 16 + width > innerWidth - 8;
    const x = right ? event.clientX - 16 - width : event.clientX + 16;
    const y = Math.min(event.clientY + 14, innerHeight - height - 8);
    node.style.transform = `translate(${Math.max(8, x)}px, ${Math.max(8, y)}px)`;
  },
  hide() {
    find("#tip").hidden = true;
  },
  title: (text, color) =>
    make(
      "h3",
      {},
      color ? make("span", { class: "swatch", style: { background: color } }) : null,
      text,
    ),
  list: (pairs) =>
    make(
      "dl",
      {},
      ...pairs.flatMap(([key, value, color]) => [
        make(
          "dt",
          {},
          color ? make("span", { class: "swatch", style: { background: color } }) : null,
          key,
        ),
        make("dd", {}, value),
      ]),
    ),
};

// A canvas at the screen's own resolution; draws in CSS pixels.
function prepare(canvas, height) {
  const width = canvas.clientWidth,
    ratio = devicePixelRatio || 1;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return [pen, width];
}

const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';

function write(
  pen,
  text,
  x,
  y,
  { size = 11, weight = 400, color = css("--quiet"), align = "left", turn = 0 } = {},
) {
  pen.save();
  pen.font = `${weight} ${size}px ${FONT}`;
  pen.fillStyle = color;
  pen.textAlign = align;
  pen.textBaseline = "middle";
  pen.translate(x, y);
  pen.rotate(turn);
  pen.fillText(text, 0, 0);
  pen.restore();
}

function box(pen, x, y, w, h, radius, fill, edge) {
  pen.beginPath();
  pen.roundRect(x, y, w, h, radius);
  if (fill) {
    pen.fillStyle = fill;
    pen.fill();
  }
  if (edge) {
    pen.strokeStyle = edge;
    pen.lineWidth = 1;
    pen.stroke();
  }
}
