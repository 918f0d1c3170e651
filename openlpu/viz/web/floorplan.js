// In: the chip, what its memory holds, how busy its queues are. Out: the floorplan, with answers to
// the pointer. Units stand as they do on the chip, west to east; lanes run down the page.

class Floorplan {
  constructor(data, canvas) {
    Object.assign(this, { data, canvas, chip: data.chip, hits: [], hover: null });
    this.bySlice = Array.from({ length: this.chip.slices }, () => []);
    const { slice, word, words, kind } = data.words;
    for (let i = 0; i < slice.length; i += 1) {
      this.bySlice[slice[i]].push({ word: word[i], words: words[i], kind: kind[i] });
    }
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => {
      this.hover = null;
      tip.hide();
      this.draw();
    });
  }

  // Busy share of each queue in one section.
  busy(section) {
    const { first, bursts, cycles } = this.data.sections[section];
    const { queue, count } = this.data.bursts;
    const busy = new Float64Array(this.chip.queues.length);
    for (let i = first; i < first + bursts; i += 1) busy[queue[i]] += count[i] / cycles;
    this.shares = busy;
    this.section = section;
    this.draw();
  }

  draw() {
    const chip = this.chip,
      height = 430;
    const [pen, width] = prepare(this.canvas, height);
    const top = 34,
      bottom = height - 58,
      h = bottom - top,
      left = 22,
      right = width - 22;
    const gap = 6,
      span = right - left;
    const mxm = Math.max(58, Math.min(132, span * 0.105)),
      sxm = Math.max(22, span * 0.033);
    const vxm = Math.max(48, Math.min(96, span * 0.075));
    const mem = (span - 2 * mxm - 2 * sxm - vxm - 6 * gap) / 2;
    this.hits = [];
    this.colors = kindColors(this.data.memory.kinds);
    let x = left;
    this.planes(pen, 0, x, top, mxm, h);
    x += mxm + gap;
    this.switches(pen, 0, x, top, sxm, h);
    x += sxm + gap;
    this.slices(pen, 0, x, top, mem, h);
    x += mem + gap;
    this.alus(pen, x, top, vxm, h);
    x += vxm + gap;
    this.slices(pen, 1, x, top, mem, h);
    x += mem + gap;
    this.switches(pen, 1, x, top, sxm, h);
    x += sxm + gap;
    this.planes(pen, 1, x, top, mxm, h);
    // Superlanes: ticks on both edges.
    pen.fillStyle = css("--faint");
    for (let i = 0; i <= chip.superlanes; i += 1) {
      const y = Math.round(top + (h * i) / chip.superlanes);
      pen.fillRect(left - 9, y, 4, 1);
      pen.fillRect(right + 5, y, 4, 1);
    }
    const lanes = `${plural(chip.superlanes, "superlane")} of ${chip.superlane_lanes} lanes`;
    write(pen, lanes, left - 15, top + h / 2, {
      size: 10.5,
      align: "center",
      turn: -Math.PI / 2,
      color: css("--faint"),
    });
    this.streams(pen, left, bottom + 11, span);
    if (this.hover) {
      const { x: hx, y: hy, w, h: hh } = this.hover;
      pen.strokeStyle = css("--ink");
      pen.lineWidth = 1.5;
      pen.strokeRect(hx - 0.5, hy - 0.5, w + 1, hh + 1);
    }
  }

  label(pen, text, x, w, note = "") {
    write(pen, text, x + w / 2, 10, {
      size: 12,
      weight: 600,
      color: css("--ink"),
      align: "center",
    });
    if (note) write(pen, note, x + w / 2, 24, { size: 10.5, align: "center" });
  }

  heat(share) {
    return `rgba(${css("--heat")}, ${share ? (0.03 + 0.8 * Math.min(1, share)).toFixed(3) : 0})`;
  }

  planes(pen, side, x, top, w, h) {
    const n = this.chip.planes / 2,
      gap = 6,
      each = (h - gap * (n - 1)) / n;
    this.label(
      pen,
      `MXM ${"west east".split(" ")[side]}`,
      x,
      w,
      `${this.chip.lanes} × ${this.chip.lanes} int8`,
    );
    for (let p = 0; p < n; p += 1) {
      const plane = side * n + p,
        y = top + p * (each + gap);
      const queues = ["load", "act", "out"].map((part) =>
        this.chip.queues.indexOf(`mxm${plane}.${part}`),
      );
      const shares = queues.map((queue) => this.shares?.[queue] ?? 0);
      box(pen, x, y, w, each, 5, css("--unit"), css("--cell-edge"));
      // The array of multipliers, a cell for a square of lanes; blue as far as it is busy.
      const pad = 8,
        foot = 50,
        cells = 16;
      const size = Math.floor(Math.min((w - 2 * pad) / cells, (each - pad - foot) / cells) * 2) / 2;
      const gx = Math.round(x + (w - size * cells) / 2),
        gy = Math.round(y + pad + (each - pad - foot - size * cells) / 2);
      for (let i = 0; i < cells * cells; i += 1) {
        pen.fillStyle = css("--cell-edge");
        const cx = gx + (i % cells) * size,
          cy = gy + Math.floor(i / cells) * size;
        pen.fillRect(cx, cy, size - 1, size - 1);
        // Of each column the lower part, as much as `act` keeps it busy.
        const full = shares[1] * cells - (cells - 1 - Math.floor(i / cells));
        if (full <= 0) continue;
        const high = (size - 1) * Math.min(1, full);
        pen.fillStyle = css("--accent");
        pen.fillRect(cx, cy + size - 1 - high, size - 1, high);
      }
      const low = y + each - 30;
      write(pen, `plane ${plane}`, x + w / 2, low - 11, {
        size: 11,
        weight: 600,
        align: "center",
        color: css("--ink"),
      });
      ["load", "act", "out"].forEach((part, i) => {
        const by = low + 3 + i * 9;
        write(pen, part, x + pad, by, { size: 9 });
        box(pen, x + pad + 22, by - 2, w - 2 * pad - 22, 4, 2, css("--cell"));
        if (shares[i])
          box(
            pen,
            x + pad + 22,
            by - 2,
            Math.max(2, (w - 2 * pad - 22) * Math.min(1, shares[i])),
            4,
            2,
            css("--accent"),
          );
      });
      this.hits.push({
        x,
        y,
        w,
        h: each,
        tell: () => [
          tip.title(`MXM plane ${plane}`),
          tip.list([
            ["weights", `${this.chip.lanes} × ${this.chip.lanes} int8`],
            ["accumulators", `${whole(this.chip.accumulators)} × ${this.chip.lanes} int32`],
            ...["load", "act", "out"].map((part, i) => [`${part}, busy`, percent(shares[i])]),
          ]),
        ],
      });
    }
  }

  switches(pen, side, x, top, w, h) {
    const n = this.chip.sxm_queues;
    this.label(pen, "SXM", x, w);
    box(pen, x, top, w, h, 5, css("--unit"), css("--cell-edge"));
    // Strands that cross: what a permutation does to lanes.
    pen.save();
    pen.beginPath();
    pen.roundRect(x, top, w, h, 5);
    pen.clip();
    pen.strokeStyle = css("--cell-edge");
    pen.lineWidth = 1;
    for (let i = 0; i < this.chip.superlanes; i += 1) {
      const from = top + (h * (i + 0.5)) / this.chip.superlanes;
      const to = top + (h * (((i * 7 + 3) % this.chip.superlanes) + 0.5)) / this.chip.superlanes;
      pen.beginPath();
      pen.moveTo(x, from);
      pen.bezierCurveTo(x + w * 0.5, from, x + w * 0.5, to, x + w, to);
      pen.stroke();
    }
    pen.restore();
    const queues = Array.from({ length: n }, (_, i) =>
      this.chip.queues.indexOf(`sxm.${"we"[side]}${i}`),
    );
    const shares = queues.map((queue) => this.shares?.[queue] ?? 0);
    const mean = shares.reduce((a, b) => a + b, 0) / n;
    box(pen, x, top, w, h, 5, this.heat(mean));
    this.hits.push({
      x,
      y: top,
      w,
      h,
      tell: () => [
        tip.title(`SXM ${"west east".split(" ")[side]}`),
        tip.list([
          ["queues", `${n}`],
          ["busy, mean", percent(mean)],
          ["busiest queue", percent(Math.max(...shares))],
        ]),
      ],
    });
  }

  alus(pen, x, top, w, h) {
    const n = this.chip.alus,
      columns = n % 4 === 0 && w > 60 ? 4 : 2,
      rows = Math.ceil(n / columns);
    this.label(pen, "VXM", x, w, `${n} ALUs a lane`);
    box(pen, x, top, w, h, 5, css("--unit"), css("--cell-edge"));
    const pad = 6,
      gap = 4,
      cw = (w - 2 * pad - gap * (columns - 1)) / columns;
    const ch = (h - 2 * pad - gap * (rows - 1)) / rows;
    for (let i = 0; i < n; i += 1) {
      const cx = x + pad + (i % columns) * (cw + gap),
        cy = top + pad + Math.floor(i / columns) * (ch + gap);
      const share = this.shares?.[this.chip.queues.indexOf(`alu${i}`)] ?? 0;
      box(pen, cx, cy, cw, ch, 3, css("--cell"));
      const full = ch * Math.min(1, share);
      if (share) box(pen, cx, cy + ch - full, cw, full, 3, css("--accent"));
      write(pen, `${i}`, cx + cw / 2, cy + 9, {
        size: 9.5,
        align: "center",
        color: css("--quiet"),
      });
      this.hits.push({
        x: cx,
        y: cy,
        w: cw,
        h: ch,
        tell: () => [tip.title(`ALU ${i}`), tip.list([["busy", percent(share)]])],
      });
    }
  }

  slices(pen, side, x, top, w, h) {
    const n = this.chip.slices / 2,
      each = w / n,
      inner = Math.max(1, each - (each > 4 ? 1.5 : 0.5));
    const east = side === 1;
    this.label(
      pen,
      `MEM ${east ? "east" : "west"}`,
      x,
      w,
      `${n} slices of ${whole(this.chip.words)} words, word 0 on top`,
    );
    for (let k = 0; k < n; k += 1) {
      // Slice 0 is the one next to the VXM.
      const slice = side * n + (east ? k : n - 1 - k),
        sx = x + k * each;
      pen.fillStyle = css("--cell");
      pen.fillRect(sx, top, inner, h);
      for (const run of this.bySlice[slice]) {
        pen.fillStyle = this.colors[run.kind];
        const y = top + (h * run.word) / this.chip.words;
        pen.fillRect(sx, y, inner, Math.max(0.6, (h * run.words) / this.chip.words));
      }
      this.hits.push({
        x: sx,
        y: top,
        w: inner,
        h,
        tell: (y) => this.tellSlice(slice, Math.floor(((y - top) / h) * this.chip.words)),
      });
      const number = east ? k : n - 1 - k;
      if (number % Math.max(4, 4 * Math.ceil(22 / (each * 4))) === 0) {
        write(pen, `${number}`, sx + inner / 2, top + h + 9, {
          size: 9.5,
          align: "center",
          color: css("--faint"),
        });
      }
    }
    pen.fillStyle = css("--panel");
    for (let bank = 1; bank < this.chip.banks; bank += 1)
      pen.fillRect(x, top + (h * bank) / this.chip.banks - 1, w, 2);
    if (this.chip.regions.length > 1) {
      let free = top + 3;
      for (const region of [...this.chip.regions].sort((a, b) => a.first_word - b.first_word)) {
        const y = top + (h * region.first_word) / this.chip.words,
          at = Math.max(free, y + 3);
        free = at + 16;
        pen.fillStyle = css("--ink");
        pen.fillRect(x, y, w, 0.75);
        pen.font = `600 10px ${FONT}`;
        box(pen, x + 3, at, pen.measureText(region.name).width + 9, 14, 4, css("--panel"));
        write(pen, region.name, x + 7, at + 7.5, { size: 10, weight: 600, color: css("--ink") });
      }
    }
  }

  tellSlice(slice, word) {
    const n = this.chip.slices / 2,
      name = `MEM slice ${"we"[Math.floor(slice / n)]}${slice % n}`;
    const kinds = this.data.memory.kinds,
      words = new Map();
    for (const run of this.bySlice[slice])
      words.set(run.kind, (words.get(run.kind) ?? 0) + run.words);
    const used = [...words.values()].reduce((a, b) => a + b, 0);
    const here = this.bySlice[slice].find((run) => run.word <= word && word < run.word + run.words);
    const line = (count) => `${plural(count, "word")}, ${bytesText(count * this.chip.lanes)}`;
    const at = here
      ? `word ${whole(word)}: ${kinds[here.kind]}, ` +
        `${whole(here.word)} to ${whole(here.word + here.words - 1)}`
      : `word ${whole(word)}: free`;
    return [
      tip.title(name),
      make("code", {}, at),
      tip.list([
        ...[...words]
          .sort((a, b) => b[1] - a[1])
          .map(([kind, count]) => [kinds[kind], line(count), this.colors[kind]]),
        ["free", line(this.chip.words - used), css("--cell-edge")],
      ]),
    ];
  }

  streams(pen, x, y, w) {
    const chip = this.chip,
      mid = y + 22;
    const text = `${chip.streams} streams of ${chip.lanes} B`;
    [
      [-1, "westward", mid - 7],
      [1, "eastward", mid + 9],
    ].forEach(([direction, name, at]) => {
      pen.strokeStyle = css("--cell-edge");
      pen.lineWidth = 1.5;
      pen.beginPath();
      pen.moveTo(x, at);
      pen.lineTo(x + w, at);
      pen.stroke();
      pen.strokeStyle = css("--faint");
      for (let ax = x + 24; ax < x + w - 12; ax += 48) {
        pen.beginPath();
        pen.moveTo(ax - 3 * direction, at - 3);
        pen.lineTo(ax, at);
        pen.lineTo(ax - 3 * direction, at + 3);
        pen.stroke();
      }
      const label = `${text} ${name}, ${plural(chip.positions, "register")} long`;
      pen.font = `400 10.5px ${FONT}`;
      const wide = pen.measureText(label).width;
      box(pen, x + w / 2 - wide / 2 - 8, at - 7, wide + 16, 14, 7, css("--panel"));
      write(pen, label, x + w / 2, at, { size: 10.5, align: "center" });
    });
  }

  point(event) {
    const area = this.canvas.getBoundingClientRect();
    const x = event.clientX - area.left,
      y = event.clientY - area.top;
    const found = this.hits.find(
      (hit) => hit.x <= x && x < hit.x + hit.w + 1 && hit.y <= y && y < hit.y + hit.h,
    );
    if (found?.x !== this.hover?.x || found?.y !== this.hover?.y) {
      this.hover = found ?? null;
      this.draw();
    }
    if (found) tip.show(event, ...found.tell(y));
    else tip.hide();
  }
}
