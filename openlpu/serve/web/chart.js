// In: numbers, twice a second. Out: a small chart of the last minute; pointing at it tells the past.

const SVG = "http://www.w3.org/2000/svg";
const SAMPLES = 121;
const WIDTH = SAMPLES - 1;
const HEIGHT = 40;

function drawn(tag, attributes = {}) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

/** The next number of 1, 2, 5, 10, 20, and so on: a scale that seldom changes. */
function roundUp(number) {
  const power = 10 ** Math.floor(Math.log10(number));
  return [1, 2, 5, 10].find((step) => step * power >= number) * power;
}

export class Chart {
  /** figure: an element to fill. lines: [{name, colour, area}], colour a class of the style sheet.
   * write(number): in words. least: the scale never shows less. */
  constructor(figure, { title, lines, write, least = 1 }) {
    this.write = write;
    this.least = least;
    this.values = lines.map(() => []);
    this.at = null; // the sample that is pointed at, from the right
    const head = document.createElement("figcaption");
    const name = document.createElement("h3");
    name.textContent = title;
    head.append(name);
    this.readings = lines.map((line) => {
      const reading = document.createElement("p");
      reading.className = `reading ${line.colour}`;
      const number = document.createElement("b");
      const word = document.createElement("span");
      word.textContent = line.name;
      reading.append(number, word);
      return { reading, number };
    });
    const readings = document.createElement("div");
    readings.className = "readings";
    readings.append(...this.readings.map(({ reading }) => reading));
    this.note = document.createElement("p");
    this.note.className = "note";
    const view = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none" };
    this.picture = drawn("svg", { ...view, role: "img", "aria-label": title });
    for (const y of [0, HEIGHT / 2]) {
      this.picture.append(drawn("path", { class: "grid", d: `M0 ${y + 0.2}H${WIDTH}` }));
    }
    this.lines = lines.map(({ colour, area }) => {
      const fill = area ? drawn("path", { class: `area ${colour}` }) : null;
      const line = drawn("path", { class: `line ${colour}` });
      this.picture.append(...[fill, line].filter(Boolean));
      return { fill, line };
    });
    this.mark = drawn("path", { class: "mark-at" });
    this.picture.append(this.mark);
    const plot = document.createElement("div");
    plot.className = "plot";
    this.top = document.createElement("span");
    this.top.className = "top";
    plot.append(this.picture, this.top);
    figure.append(head, readings, plot, this.note);
    plot.addEventListener("pointermove", (event) => {
      const area = plot.getBoundingClientRect();
      this.at = Math.round((WIDTH * (area.right - event.clientX)) / area.width);
      this.tell();
    });
    for (const name of ["pointerleave", "pointercancel"]) {
      plot.addEventListener(name, () => {
        this.at = null;
        this.tell();
      });
    }
    this.tell();
  }

  /** One number for each line; null: nobody knows. */
  push(numbers) {
    numbers.forEach((number, i) => {
      this.values[i].push(number);
      if (this.values[i].length > SAMPLES) this.values[i].shift();
    });
    this.draw();
    this.tell();
  }

  draw() {
    const known = this.values.flat().filter((number) => number !== null);
    const most = roundUp(Math.max(this.least, ...known));
    this.top.textContent = this.write(most).replace(/\.0\b/, "");
    this.values.forEach((values, i) => {
      const first = SAMPLES - values.length;
      let line = "";
      let area = "";
      let start = null;
      values.forEach((value, k) => {
        const x = first + k;
        if (value !== null) {
          const y = (HEIGHT - (HEIGHT * value) / most).toFixed(2);
          line += `${start === null ? "M" : "L"}${x} ${y}`;
          area += start === null ? `M${x} ${HEIGHT}L${x} ${y}` : `L${x} ${y}`;
          start ??= x;
        }
        if (start !== null && (value === null || k === values.length - 1)) {
          area += `L${value === null ? x - 1 : x} ${HEIGHT}Z`;
          start = null;
        }
      });
      this.lines[i].line.setAttribute("d", line);
      this.lines[i].fill?.setAttribute("d", area);
    });
  }

  /** The numbers of now, or of the time that is pointed at. */
  tell() {
    const at = this.at;
    this.readings.forEach(({ number }, i) => {
      const value = this.values[i].at(-1 - (at ?? 0)) ?? null;
      number.textContent = value === null ? "–" : this.write(value);
    });
    this.note.textContent = at === null ? "" : `${(at / 2).toFixed(1)} s ago`;
    this.mark.setAttribute("d", at === null ? "" : `M${WIDTH - at} 0V${HEIGHT}`);
  }
}
